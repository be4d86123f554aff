"""`python -m ldft.bench`: through the command line, rows read back, a profile that a dry run picks up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import duckdb
import pandas as pd
import pytest
import torch

from ldft.bench import command, nodes, profile
from ldft.bench import streams as streaming
from ldft.bench.nodes import NodeSet
from ldft.memory import bandwidths
from ldft.memory.policy import Placement
from ldft.memory.topology import read_topology

NODE = read_topology().memory_nodes[0]


def say(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | env,
        timeout=240,
        check=False,
    )


def test_rows_profile_and_the_plan_that_uses_it(tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    file = tmp_path / "rows" / "streams.parquet"
    done = say("ldft.bench", "nodes", "--sizes", "64K", "64M", "--processes", "1", "2", "--repeats", "3", "--rows", str(file),
               cwd=tmp_path, env=env)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    frame = pd.read_parquet(file)
    one = frame[(frame["nodes"] == str(NODE)) & frame["kernel"].isin(nodes.CPU_KERNELS)]
    assert len(one) == 4 * 2 * (1 + 2)  # kernels, sizes, processes of both counts
    assert (one["gb_per_s"] > 0).all() and one["samples_s"].map(len).eq(3).all()
    assert one["elements"].mul(4).equals(one["array_bytes"])
    adam = duckdb.execute(f"select traffic_bytes / elements from '{file}' where kernel = 'adam'").fetchall()
    assert {each for (each,) in adam} == {28.0}
    text = (tmp_path / "config" / "ldft" / "hardware").glob("*.json")
    assert len(list(text)) == 1 and not list(tmp_path.rglob("*.tmp"))
    done = say("ldft", "dry_run=true", "numa=local_only", "launch.device=cpu", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "modelled traffic to host memory, s per step:" in done.stdout, done.stderr


def test_a_machine_is_measured_once_and_a_plan_uses_it(tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    ask = ("ldft.plan", "model=tiny", "launch.device=cpu", "train.precision=fp32")
    assert "measure this machine once with python -m ldft.bench machine" in say(*ask, cwd=tmp_path, env=env).stderr
    done = say("ldft.bench", "machine", "--precision", "fp32", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    path = next((tmp_path / "config" / "ldft" / "hardware").glob("*.json"))
    found = json.loads(path.read_text())
    rates = found["devices"]["cpu fp32"]
    assert rates["products_tflops_per_s"] > 1e-3 and rates["memory_gb_per_s"] > 0.1 and rates["launches_beside"] == 1.0
    assert set(rates["attention_tflops_per_s"]) == {"64", "128"}
    assert found["bandwidth"][f"node{NODE}"]["cpu"] > 0.1
    # Measuring only the nodes again keeps the device.
    profile.save({"host": "a", "bandwidth": {"node0": {"cpu": 5.0}}}, path)
    assert json.loads(path.read_text())["devices"] == found["devices"]
    done = say(*ask, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "this machine (measured)" in done.stdout, done.stderr


def test_a_profile_is_not_made_from_caches(tmp_path: Path) -> None:
    kept = tmp_path / "profile.json"
    kept.write_text("kept")
    line = ("nodes", "--sizes", "1M", "--processes", "1", "--repeats", "1", "--kernels", "adam", "--profile", str(kept))
    done = say("ldft.bench", *line, cwd=tmp_path, env={})
    assert done.returncode == 0 and kept.read_text() == "kept", done.stderr
    assert "profile.json is unchanged: arrays of 1.00 MiB may fit in caches" in done.stdout
    assert profile.least_size(256 << 20) >= 64 << 20 and profile.least_size(8 << 20) == 8 << 20


def test_a_profile_takes_the_update_on_every_node() -> None:
    one = replace(read_topology().nodes[0], id=0)
    machine = replace(read_topology(), nodes=(one, replace(one, id=3)), allowed=(0, 3))
    sets = [NodeSet((0,)), NodeSet((3,)), NodeSet((0, 3))]
    assert profile.lacks(["adam"], sets, machine, 64 << 20, 64 << 20) == ""
    assert "needs the kernel adam" in profile.lacks(["read", "h2d"], sets, machine, 64 << 20, 64 << 20)
    assert "or add 3" in profile.lacks(["adam"], [sets[0], sets[2]], machine, 64 << 20, 64 << 20)
    assert "with --sizes 64M or more" in profile.lacks(["adam"], sets, machine, 1 << 20, 64 << 20)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--nodes 99", "--nodes: node 99 does not exist"),
        ("--weights 1:0", "--weights: 1:0: fits no node set; with --nodes, name a set of as many nodes"),
        ("--sizes 900G --processes 2", "--sizes: 900.00 GiB: 4 arrays of this size in each of 2 processes exceed the"),
        ("--rows /proc/x/rows.parquet", "--rows: cannot write /proc/x/rows.parquet (No such file or directory); name"),
        ("--profile /proc/x/y", "--profile: cannot write /proc/x/y (No such file or directory); name a file"),
        ("--repeats 0", "--repeats: 0 is too small; use 1 or more"),
        ("--rows .", "--rows: cannot write . (Is a directory); name a file"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    arguments: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "read_topology", lambda: replace(read_topology(), nodes=read_topology().nodes[:1]))
    monkeypatch.setattr(nodes, "Workers", None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["bench", "nodes", *arguments.split()])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ldft: {line}") and said.count("\n") == 1, said
    assert "capacity_gib" not in said


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("nodes --sizes abc", "--sizes: abc: write bytes, or 64K, 256M, 2G; see python -m ldft.bench nodes --help"),
        ("nodes --kernels x", "--kernels: invalid choice: 'x' (choose from"),
        ("nodes --nope", "unrecognized arguments: --nope; see python -m ldft.bench --help"),
        ("", "the following arguments are required: command"),
    ],
)
def test_arguments_that_cannot_be_read_are_one_line(
    arguments: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        command.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"ldft: {line}") and said.count("\n") == 1, said


def test_copies_without_a_gpu_are_left_out_with_a_line(tmp_path: Path) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "", "XDG_CONFIG_HOME": str(tmp_path)}
    done = say("ldft.bench", "nodes", "--kernels", "h2d", "--processes", "1", "--sizes", "1M", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert done.stdout == "ldft: 1 process: left out: copies (h2d) need one GPU per process, none visible\n", (
        done.stderr
    )


def test_kernels_do_what_they_are_named_after() -> None:
    streams = streaming.Streams(0)
    streams.place(Placement(kind="bind", nodes=(NODE,)), 1 << 16)
    weight, gradient, mean, square = streams._arrays
    before = [array.clone() for array in streams._arrays]
    assert len(streams.time("adam", 1 << 15, 2)) == 2
    half = 1 << 13
    for array, old in ((weight, before[0]), (mean, before[2]), (square, before[3])):
        assert bool((array[:half] != old[:half]).all()) and torch.equal(array[half:], old[half:])
    assert torch.equal(gradient, before[1])
    streams.time("triad", 1 << 16, 1)
    assert torch.allclose(mean, weight + 3 * gradient)
    streams.time("write", 1 << 16, 1)
    assert bool((weight == 1).all())
    assert len(streams.time("read", 1 << 16, 4)) == 4


def test_the_update_is_measured_on_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    workers = nodes.Workers(1)
    try:
        place = {"placement": {"kind": "bind", "nodes": (NODE,)}, "bytes": 1 << 16}
        assert workers.ask(do="place", **place) == [{}]
        workers.ask(do="time", kernel="adam", bytes=1 << 16, repeats=1)
        # The update's threads inherit from the main one.
        assert len(os.sched_getaffinity(workers._processes[0].pid)) == workers.cores[0]
    finally:
        workers.end()


def test_node_sets_become_placements() -> None:
    assert NodeSet((2,)).placement == Placement(kind="bind", nodes=(2,)) and NodeSet((2,)).texts() == ("2", "")
    assert NodeSet((0, 3)).placement.kind == "interleave" and NodeSet((0, 3)).texts() == ("0,3", "1:1")
    weighted = NodeSet((0, 3), (4, 1))
    assert weighted.placement.shares() == {0: 0.8, 3: 0.2} and weighted.texts() == ("0,3", "4:1")


def test_the_profile_sums_processes_and_takes_the_link_from_one() -> None:
    def row(kernel: str, nodes: str, processes: int, process: int, rate: float, size: int = 100) -> dict[str, object]:
        return {"kernel": kernel, "nodes": nodes, "weights": "", "processes": processes, "process": process,
                "array_bytes": size, "gb_per_s": rate, "measured_at": "now"}  # fmt: skip

    rows = [
        row("adam", "0", 1, 0, 278.0), row("adam", "3", 1, 0, 69.0), row("adam", "0,3", 1, 0, 347.0),
        row("adam", "0", 1, 0, 999.0, 10),
        row("h2d", "0", 1, 0, 55.0), row("h2d", "3", 1, 0, 53.0),
        *(row("h2d", "0", 2, process, 54.0) for process in (0, 1)),
        *(row("h2d", "3", 2, process, 26.5) for process in (0, 1)),
    ]  # fmt: skip
    found = profile.make(rows)["bandwidth"]
    assert found == {"node0": {"cpu": 278.0, "h2d": 108.0}, "node3": {"cpu": 69.0, "h2d": 53.0}, "link": {"h2d": 55.0}}
    parsed = bandwidths.parse(found, bandwidths.KEY)
    assert parsed.h2d == {0: 108e9, 3: 53e9} and parsed.link_h2d == 55e9 and parsed.d2h == parsed.cpu


@pytest.mark.parametrize(
    ("text", "size"), [("64K", 65536), ("1G", 1 << 30), ("4096", 4096), ("2MiB", 2 << 20), ("6", 4)]
)
def test_sizes(text: str, size: int) -> None:
    assert command._size(text) == size
