"""Hydra's own options, groups and `${...}`, and the forms of overrides: one line each that says what to do. In this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from ldft.cli import command

# What is typed -> what the line says, in this order.
LINES = {
    # groups of Hydra
    "hydra/launcher=ray": ["hydra/launcher: 'ray' does not exist; use one of basic, slurm", "hydra-ray-launcher"],
    "-m hydra/launcher=joblib": ["hydra/launcher: 'joblib' does not exist", "pip install hydra-joblib-launcher"],
    "-m hydra/sweeper=optuna": ["hydra/sweeper: 'optuna' does not exist; use one of basic, ldft", "hydra-optuna-sweeper", "-m"],
    "hydra/job_logging=colorlog": ["hydra/job_logging: 'colorlog' does not exist; use one of default, disabled", "hydra-colorlog"],
    "hydra/sweeper=0": ["hydra/sweeper: 0 is no option's name; see python -m ldft --hydra-help"],
    "hydra/job_logging=null": ["hydra/job_logging: null is no option's name"],
    "+hydra/env=3": ["hydra/env: 3 is no option's name"],
    "hydra/launcher@x=1.5": ["hydra/launcher: 1.5 is no option's name"],
    "~hydra/launcher=true": ["hydra/launcher: true is no option's name"],
    "hydra/sweeper=[a,b]": ["hydra/sweeper: [a,b] is a list, and a group takes one option"],
    "hydra/help=foo": ["hydra/help: 'foo' does not exist; use one of default, ldft_help"],
    # sweeps without cells
    "-m model=glob(zzz*)": ["model: glob(zzz*) matches no option; use one of from_hf", "tiny"],
    "-m +sweep=glob(zzz*)": ["sweep: glob(zzz*) matches no option", "smoke"],
    "-m optimizer.learning_rate=glob(*)": ["optimizer.learning_rate: glob(*)", "options of a group; list the values"],
    "-m seq_len.tokens=range(10,1)": ["seq_len.tokens: range(10,1) contains no value; name at least one"],
    "-m seq_len.tokens=range(1,10,0)": ["seq_len.tokens: range(1,10,0): range() arg 3 must not be zero"],
    "-m seq_len.tokens=shuffle()": ["seq_len.tokens: shuffle() contains no value"],
    "model=glob(nano)": ["model: glob(nano) is a sweep; add -m"],
    # interpolations
    "system=${oc.env:LDFT_MISSING}": ["system: the environment variable LDFT_MISSING is not set", "${oc.env:LDFT_MISSING,value}"],
    "seq_len.tokens=${oc.env:LDFT_MISSING}": ["seq_len.tokens: the environment variable LDFT_MISSING is not set"],
    "system=${hydra:job.num}": ["system: ${hydra:job.num} has no value here", "write the value"],
    "-m model=nano,tiny system=${hydra:job.num}": ["system: ${hydra:job.num} has no value here"],
    "system=${nope:1}": ["system: ${nope:1}: there is no resolver 'nope'; use one of oc.env"],
    "system=${nowhere}": ["system: Interpolation key 'nowhere' not found; name a key that exists"],
    "system=${system}": ["system: ${system} refers to itself; give one of the keys"],
    "system=${results.dir} results.dir=${system}": ["refers to itself"],
    "system=${model}": ["system: ${model} is a section or a list; name one key of it"],
    "seq_len.tokens=${model.name}": ["seq_len.tokens: ${model.name} is 'tiny', which does not fit; give a whole number"],
    'seq_len.tokens=${oc.decode:"[1"}': ["seq_len.tokens: cannot read the text that", "missing BRACKET_CLOSE"],
    "system=${oc.select:a.b}": ["system: ${oc.select:a.b} has no value; name a key that has one"],
    "system=${": ["system: cannot read ${; quote text"],
    # prefixes
    "+model=nano": ["model: exists already, so it needs no +; use model=nano"],
    "++model=nano": ["model: exists already, so it needs no ++; use model=nano"],
    "+seq_len.tokens=64": ["seq_len.tokens: exists already, so it needs no +; use seq_len.tokens=64"],
    "++sweep=smoke": ["sweep: ++ is not for groups; use +sweep=smoke"],
    "~model": ["model: ~ would remove it, and every run needs one; give it another value"],
    "~seq_len": ["seq_len: ~ would remove it"],
    "~train.iterations": ["train.iterations: ~ would remove it"],
    "~nothing": ["nothing: no such key"],
    "model@foo=nano": ["model@foo: ldft's groups have their own places; use model=nano"],
    "a@b=c": ["a: no such group; use attention"],
    # keys, quoting, text
    "ключ=1": ["command line: 'ключ' is not a key"],
    "model..name=x": ["command line: 'model..name' is not a key"],
    "model.=1": ["command line: 'model.' is not a key"],
    "[1]=2": ["command line: '[1]' is not a key"],
    "system=päth": ["system: cannot read päth; quote text with special characters, as in 'system=\"päth\"'"],
    'system="unclosed': ["system: cannot read \"unclosed; quote", "'system=\"unclosed\"'"],
    "system=a=b": ["system: cannot read a=b; quote"],
    os.fsdecode(b"system=caf\xe9"): ["command line: 'system=caf\\udce9' is not UTF-8"],
    # Hydra's options
    "--multirun --cfg job": ["command line: --multirun and --cfg cannot be combined; use one"],
    "--detach dry_run=true": ["command line: --detach is for sweeps as jobs of SLURM; add -m hydra/launcher=slurm"],
    "hydra/launcher=slurm model=nano": ["hydra/launcher: has no effect on a single run, which runs here; add -m"],
    "hydra/launcher=slurm hydra.launcher.partition=x": ["hydra/launcher: has no effect on a single run"],
    "-m --detach seq_len=1k,2k": ["command line: --detach is for sweeps as jobs of SLURM"],
    "--resolve": ["command line: --resolve needs --cfg"],
    "--experimental-rerun x": ["command line: --experimental-rerun reads files that ldft does not write"],
    "--config-path=/tmp": ["command line: --config-path would replace ldft's own config tree; use --config-dir"],
    "--config-dir=/nowhere": ["--config-dir: /nowhere is not a folder"],
    "--config-name=nothing": ["nothing: no such config file"],
    "hydra.run.dir=/proc/x": ["hydra.run.dir: cannot create /proc/x (No such file or directory); leave it out"],
    "hydra.mode=foo": ["hydra.mode: Invalid value 'foo', expected one of [RUN, MULTIRUN]"],
    "hydra.searchpath=x": ["hydra.searchpath: x is not a list"],
    "hydra.nothing=1": ["hydra.nothing: Hydra has no such key"],
}  # fmt: skip


@pytest.fixture
def typed(tmp_path: Path, monkeypatch, capsys) -> Callable[[str], tuple[int, str, str]]:
    """Run ldft's main() with these words as the command line. Returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LDFT_MISSING", raising=False)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldft", *line.split(" ")])
        code = command.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize("line", LINES)
def test_the_edges_of_hydra_are_one_line(line: str, typed, tmp_path: Path) -> None:
    code, _, err = typed(f"{line} dry_run=true")
    assert err.startswith("ldft: ") and err.count("\n") == 1 and len(err) < 600, err
    at = 0
    for part in LINES[line]:
        assert part in err[at:], f"{part!r} not in {err!r}"
        at = err.index(part, at)
    assert code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "system"),
    [
        ("system=${oc.env:LDFT_MISSING,fallback}", "fallback"),
        ('system="päth, with; signs"', "päth, with; signs"),
        ('system="日本"', "日本"),
        ("++system=x", "x"),
        ("system=${model.name}", "tiny"),
    ],
)
def test_what_hydra_can_read_still_arrives(line: str, system: str, monkeypatch) -> None:
    seen: list[str] = []

    def cell(tree: DictConfig) -> int:
        seen.append(tree.system)
        return 0

    monkeypatch.setattr(command, "_cell", cell)
    monkeypatch.setattr(sys, "argv", ["ldft", line])
    assert command.main() == 0 and seen == [system]
