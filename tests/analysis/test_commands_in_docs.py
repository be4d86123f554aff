"""Every command and override in the documents works: it composes, its options parse, its files and make targets exist."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig

from ldft.cli import composition, many
from ldft.config import Device, from_dict
from ldft.config import columns as config_columns
from ldft.environment import CONF_DIR
from ldft.runner import checks
from tests.training.test_published_configs import published

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
# Flags of Hydra's that take the next word.
WITH_VALUE = {"--config-dir", "--cfg"}
# Keys whose own keys are free, or that are Hydra's.
FREE = (
    "hydra.launcher.",
    "offload.deepspeed.",
    "model.extra.",
    "model.rope_scaling.",
    "numa.bandwidth",
    "hydra/launcher",
)
# What has the form of an override and is none: Python, flags of other programs, labels.
NO_OVERRIDES = {"group", "key", "initial_job_idx", "pin", "install", "seccomp", "num_layers"}
PLACEHOLDERS = {"<name>": "my_model", "<folder>": "my_conf"}
# Options that the documents tell a reader to make, and models that they take from elsewhere.
MADE = ("my_model", "mine")
ELSEWHERE = ("~/models/Qwen3-8B", "~/models/Olmo-3-7B")
ON_THE_HUB = "model.hf_id=Qwen/Qwen3-8B"
# For each list of words, in a process of its own: parses the options of a module as it would, and ends there. What most modules
# import is imported once, before.
PARSE_ONLY = """
import argparse, json, os, runpy, sys, traceback
import hydra, matplotlib.pyplot, pandas, pyarrow.parquet
def only(whole):
    def parse(self, *args, **options):
        whole(self, *args, **options)
        print("parsed")
        sys.exit(0)
    return parse
for name in ("parse_args", "parse_intermixed_args"):
    setattr(argparse.ArgumentParser, name, only(getattr(argparse.ArgumentParser, name)))
for number, words in enumerate(json.loads(sys.argv[1])):
    if os.fork():
        status = os.waitstatus_to_exitcode(os.wait()[1])
        os.write(1, json.dumps([status, *(open(f"{number}.{end}").read() for end in ("out", "err"))]).encode() + b"\\n")
        continue
    for stream, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{number}.{end}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv, code = words, 1
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = 2 if isinstance(ended.code, str) else ended.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


def code_lines(text: str) -> Iterator[str]:
    """Lines of code blocks, indented or fenced by shell or nothing, and code within sentences."""
    fence = None
    for line in text.splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line[3:]
        elif fence is None and line.startswith("    "):
            yield line.strip()
        elif fence is None and not line.endswith("| not yet |"):  # of a later version, as the table says
            yield from re.findall(r"`([^`]+)`", line)
        elif fence in ("", "bash", "sh"):
            yield line.strip()


def commands() -> list[tuple[str, list[str]]]:
    """(document, words) of every command, without comments and what stands before the program."""
    found = []
    for path in DOCUMENTS:
        for line in code_lines(path.read_text()):
            for part in re.split(r"\s&&\s", re.sub(r"\s#\s.*$", "", line)):
                program = re.search(r"(?:^|\s)((?:\S*/)?python3? (?:-m )?\S.*|make(?: .*)?$)", part)
                if program and not re.search(r"^(from|import|#)|\.\.\.$|<overrides>|ATTEMPT_DIR", part):
                    found.append((path.name, shlex.split(re.sub(r"\s{2,}.*$", "", program[1]))))
    return found


def ldft_overrides() -> list[tuple[str, list[str]]]:
    """The words of every `python -m ldft`, and of the emulated machine's run_ldft.py."""
    found = []
    for name, words in commands():
        if words[1:3] == ["-m", "ldft"]:
            found.append((name, words[3:]))
        elif words[0] != "make" and words[1].endswith("run_ldft.py"):
            found.append((name, words[2:]))
    return found


def cells(words: list[str]) -> list[list[str]]:
    """The override lists of a command line: one, or those of its sweep."""
    overrides = []
    rest = iter(words)
    for word in rest:
        if word in WITH_VALUE:
            next(rest)
        elif not word.startswith("-"):
            overrides.append(word)
    sweeps = "-m" in words
    choices = []
    for word in overrides:
        key, _, value = word.partition("=")
        choices.append([f"{key}={one}" for one in value.split(",")] if sweeps and "[" not in value else [word])
    return [list(cell) for cell in itertools.product(*choices)]


def once(entries: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Each command at its first place."""
    return list({tuple(words): (name, words) for name, words in reversed(entries)}.values())


def label(entry: tuple[str, list[str]]) -> str:
    return f"{entry[0]}: {' '.join(entry[1])}"


def test_commands_are_found() -> None:
    assert len(ldft_overrides()) > 40
    assert {"README.md", "CONTRIBUTING.md", "numa.md", "offload.md"} <= {name for name, _ in commands()}
    assert any("-m" in words for _, words in ldft_overrides())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The options and the model that the documents tell a reader to make."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "model").mkdir()
    nano = (CONF_DIR / "model" / "nano.yaml").read_text()
    for name in MADE:
        (folder / "model" / f"{name}.yaml").write_text(nano.replace("name: nano", f"name: {name}"))
    (folder / "config.json").write_text(json.dumps(published("Qwen/Qwen3-8B")))
    return folder


@pytest.fixture(scope="module")
def composed(made: Path) -> many.Composer:
    """Composes a line of overrides, with what is made beside."""

    def load(overrides: list[str]) -> DictConfig:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            return hydra_compose("config", [f"hydra.searchpath=[file://{made}]", *overrides])

    return many.Composer(load)


@pytest.mark.parametrize("entry", once(ldft_overrides()), ids=label)
def test_every_run_composes(entry: tuple[str, list[str]], made: Path, composed: many.Composer) -> None:
    flags = {word for word in entry[1] if word.startswith("-")}
    assert flags <= {"-m", "--help", "--cfg", "--config-dir", "--version"}
    composition.register()
    for cell in cells(entry[1]):
        for mark, meant in PLACEHOLDERS.items():
            cell = [word.replace(mark, meant) for word in cell]
        for there in (ON_THE_HUB, *(f"model.path={folder}" for folder in ELSEWHERE)):
            cell = [word.replace(there, f"model.path={made}") for word in cell]
        config = from_dict(composed(cell))
        config.launch.device = Device.cuda  # what most of them are for
        checks.resolve(config)
        config.sweep.started_at = 1.0  # some have keys of sweeps
        config.validate()


MODULES = once(
    [entry for entry in commands() if entry[1][1:2] == ["-m"] and re.match(r"ldft\.|multirun_analysis", entry[1][2])]
)


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code and output of each of MODULES, by its label."""
    lines = [[*itertools.takewhile(lambda word: word != ">", words[2:])] for _, words in MODULES]
    done = subprocess.run(
        [sys.executable, "-c", PARSE_ONLY, json.dumps(lines)],
        capture_output=True, text=True, cwd=tmp_path_factory.mktemp("parsed"), check=True,
    )  # fmt: skip
    said = map(json.loads, done.stdout.splitlines())
    return {label(entry): (code, out, err) for entry, (code, out, err) in zip(MODULES, said, strict=True)}


@pytest.mark.parametrize("entry", MODULES, ids=label)
def test_every_other_module_takes_its_options(
    entry: tuple[str, list[str]], parsed: dict[str, tuple[int, str, str]]
) -> None:
    code, out, err = parsed[label(entry)]
    assert (code, out.strip()) == (0, "parsed"), err


def test_every_file_and_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for name, words in commands():
        if words[0] == "make":
            assert set(words[1:2]) <= targets, f"{name}: {' '.join(words)}"
    for path in DOCUMENTS:
        for line in code_lines(path.read_text()):
            for word in re.findall(r"(?<![\w/.-])(?:tests|scripts|benchmarks)/[\w/.*-]*\w", line):
                assert list(REPOSITORY.glob(word)), f"{path.name}: {word}"


def test_every_override_named_in_a_sentence_exists() -> None:
    groups, keys = composition.groups(), {key for key, _ in config_columns()}
    seen, unknown = 0, []
    for path in DOCUMENTS:
        for code in code_lines(path.read_text()):
            for word in code.split():
                found = re.fullmatch(r"\+?([a-z_]+(?:[./][a-z_0-9]+)*)=(?!=)(\S*)", word)
                if not found or found[1] in NO_OVERRIDES:
                    continue
                key, value = found.groups()
                seen += 1
                if key in groups:
                    options = [one for one in value.split(",") if one and not re.search(r"[<.]", one)]
                    unknown += [f"{path.name}: {word}" for one in options if one not in (*groups[key], *MADE)]
                elif key not in keys and not key.startswith(FREE):
                    unknown.append(f"{path.name}: {word}")
    assert unknown == [] and seen > 100


@pytest.mark.parametrize("group", ["attention", "numa"])
def test_the_document_of_a_group_has_a_line_for_every_option(group: str) -> None:
    text = (REPOSITORY / "docs" / f"{group}.md").read_text()
    named = re.findall(rf"^\| `(?:{group}=)?(\w+)`", text, re.MULTILINE)
    assert set(composition.groups()[group]) <= set(named)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md", "docs/upgrading_deepspeed.md"])
def test_files_and_names_that_a_contributor_is_sent_to_exist(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    quoted = set(re.findall(r"`([^`\s]+)`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE)))
    rooms = ["ldft", "tests", "conf", "scripts", "benchmarks", "multirun_analysis", "hydra_plugins", "csrc"]
    paths = {one for one in quoted if one.split("/")[0] in rooms and "/" in one and not re.search(r"[<*]", one)}
    assert paths and not {one for one in paths if not (REPOSITORY / one).exists()}
    sources = "".join(path.read_text() for room in rooms for path in (REPOSITORY / room).rglob("*.py"))
    identifiers = {one for one in quoted if re.fullmatch(r"_?[A-Z]\w*|_\w+", one)}
    assert not {one for one in identifiers if one not in sources}


def test_the_table_of_options_is_complete() -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    lines = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    defaults = dict(re.findall(r"^  - (\w+): (\w+)$", (CONF_DIR / "config.yaml").read_text(), re.MULTILINE))
    for group, options in composition.groups().items():
        named = lines[group].split(", ")
        assert sorted(named) == options, group
        assert named[0] == defaults.get(group, named[0]), f"{group}: the default comes first"
