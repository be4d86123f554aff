"""One cell on several hosts that a system other than SLURM numbers: the same command on each, here twice on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from ldft import batch
from ldft.config import Config, disagreements, from_dict, to_dict
from ldft.errors import ConfigError
from ldft.runner import agent, checks, meeting
from tests.conftest import compose, long
from tests.runner.conftest import ENDLESS, Hosts


def nothing_runs_in(folder: Path) -> bool:
    return not [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]


def test_the_same_command_on_each_host_is_one_run(hosts: Hosts) -> None:
    """The second host may come first; torchrun's names and SkyPilot's do as well."""
    second = hosts.start(1, "train.iterations=3", NODE_RANK="", PET_NODE_RANK="1", PET_NNODES="2", PET_MASTER_ADDR="localhost",
                         PET_MASTER_PORT=hosts.port)  # fmt: skip
    time.sleep(1.0)
    first = hosts.start(0, "train.iterations=3", NODE_RANK="", SKYPILOT_NODE_RANK="0", SKYPILOT_NUM_NODES="2",
                        SKYPILOT_NODE_IPS="localhost\n10.0.0.2")  # fmt: skip
    said, also = first.communicate(timeout=120)[0], second.communicate(timeout=120)[0]
    assert (first.returncode, second.returncode) == (0, 0), said + also
    row = hosts.row()
    assert row["status"] == "ok" and len(row["hosts"]) == 2 and len(row["loss"]) == 3
    assert {one["rank"] for one in row["roles"]} == {0, 1}
    assert "host 1 of 2: its ranks run in" in also and "ok in" in said and "ok in" not in also
    assert nothing_runs_in(hosts.folder)


@pytest.mark.parametrize(
    ("overrides", "other", "differ"),
    [
        (("launch.device=auto",), ("launch.device=cpu",), [("launch.device", "cpu", "auto")]),
        (("model=nano",), ("model=nano", "model.num_layers=1"), [("model.num_layers", "1", "2")]),
        (("results.dir=a", "launch.timeout_s=60"), ("results.dir=b", "launch.timeout_s=70"), []),
        (("checkpointing=cpu",), ("checkpointing=gpu",), [("checkpointing.mode", "gpu", "cpu")]),
        (
            ("model=llama3_1b", "machine=h200", "plan=fastest", "offload=full"),
            ("model=llama3_1b", "machine=h200", "offload=full"),
            [("plan.goal", "auto", "fastest")],
        ),
        (("numa=bind_0",), ("numa=bind_0", "numa.nodes=[1]"), [("numa.nodes", "[1]", "[0]")]),
    ],
)
def test_commands_that_measure_something_else_disagree(overrides, other, differ) -> None:
    """Equal commands do not, whatever ldft chose for the first host in the meantime."""
    run = compose(*overrides)
    checks.resolve(run)
    run.numa.bandwidth = {}  # of a machine that is not here, on which nothing runs
    assert disagreements(compose(*overrides), from_dict(to_dict(run))) == []
    assert disagreements(compose(*other), from_dict(to_dict(run))) == differ


@long
def test_another_command_on_the_other_host_is_refused(hosts: Hosts) -> None:
    first, second = hosts.start(0, "seq_len.tokens=64", ENDLESS), hosts.start(1, "seq_len.tokens=32", ENDLESS)
    said, also = first.communicate(timeout=120)[0], second.communicate(timeout=120)[0]
    reason = "seq_len.tokens: 32 here, but 64 on the first host; start the same command on every host"
    assert (first.returncode, second.returncode) == (2, 2), said + also
    assert f"ldft: {reason}\n" in also and hosts.row()["status"] == "invalid"
    assert hosts.row()["error_message"] == f"{socket.gethostname()}: {reason}"
    assert nothing_runs_in(hosts.folder)


@long
def test_an_agent_that_is_told_to_end_when_it_has_ended_still_ends_well(hosts: Hosts) -> None:
    """The first host ends when it reads that all agents have; another's may be just about to exit."""
    (hosts.folder / "late").mkdir()
    (hosts.folder / "late" / "sitecustomize.py").write_text(
        "import atexit, sys, time\nif 'ldft.runner.agent' in sys.orig_argv: atexit.register(time.sleep, 3)\n"
    )
    path = os.pathsep.join(filter(None, (str(hosts.folder / "late"), os.environ.get("PYTHONPATH"))))
    both = [hosts.start(0, "train.iterations=3"), hosts.start(1, "train.iterations=3", PYTHONPATH=path)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert hosts.row()["status"] == "ok"


def test_a_rank_that_is_killed_on_the_other_host_ends_both(hosts: Hosts) -> None:
    first, second = (hosts.start(number, ENDLESS) for number in (0, 1))
    hosts.ranks()[1].kill()
    began = time.monotonic()
    first.communicate(timeout=60), second.communicate(timeout=60)
    assert time.monotonic() - began < 20
    row = hosts.row()
    assert (row["status"], row["signal"]) == ("error", "SIGKILL") and "rank 1" in row["error_message"]
    assert (first.returncode, second.returncode) == (1, 0) and nothing_runs_in(hosts.folder)


@pytest.mark.parametrize("number", [1, pytest.param(0, marks=long)])
def test_a_host_that_is_told_to_stop_ends_the_run(hosts: Hosts, number: int) -> None:
    both = [hosts.start(number, ENDLESS) for number in (0, 1)]
    hosts.ranks()
    both[number].send_signal(signal.SIGTERM)
    for process in both:
        process.communicate(timeout=60)
    row = hosts.row()
    assert row["status"] == ("interrupted" if number == 0 else "error") and row["iteration_s"]
    assert both[0].returncode and nothing_runs_in(hosts.folder)


def test_a_host_that_does_not_see_the_results_ends_the_run(hosts: Hosts, monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "attempt"
    folder.mkdir()
    given = batch.Given(1, 2, "localhost", int(hosts.port), "NODE_RANK", "NNODES", "MASTER_PORT")
    monkeypatch.setattr(meeting, "_SEEN_S", 0.2)
    monkeypatch.setattr(meeting, "_agent", lambda folder, log: subprocess.Popen(["sleep", "60"]))
    with (tmp_path / "log").open("wb") as log:
        one = meeting.Meeting(folder, given, log)
    try:
        with pytest.raises(
            ConfigError, match=r"results.dir: .*/attempt is not there; the results folder must be on a file"
        ):
            meeting.join(given, Config())
        end = time.monotonic() + 10
        while not one.refused and time.monotonic() < end:
            time.sleep(0.01)
        assert (
            one.refused
            == f"{socket.gethostname()}: {folder} is not there; the results folder must be on a file system that all hosts see"
        )
    finally:
        one.end()
    assert not one.pids and one.ended_with == "the agent of this host ended with code -15"


def test_a_port_is_refused_where_another_program_has_it_or_answers(hosts: Hosts, tmp_path: Path, monkeypatch) -> None:
    given = batch.Given(1, 2, "localhost", int(hosts.port), "NODE_RANK", "NNODES", "MASTER_PORT")
    monkeypatch.setattr(agent, "MEET_S", 0.5)
    with pytest.raises(
        ConfigError, match=f"no answer from localhost:{hosts.port} within 0 s .*; see that the first host runs"
    ):
        meeting.join(given, Config())
    with closing(socket.create_server(("localhost", given.port))) as other, (tmp_path / "log").open("wb") as log:
        with pytest.raises(ConfigError, match=rf"port {hosts.port} \(MASTER_PORT\) cannot be used: .*; choose another"):
            meeting.Meeting(tmp_path, given, log)
        other.settimeout(10)
        process = hosts.start(1)
        guest = other.accept()[0]
        guest.sendall(b"SSH-2.0\n")
        assert (
            f"localhost:{hosts.port} (MASTER_PORT) is not ldft's; choose another port"
            in process.communicate(timeout=60)[0]
        )
        guest.close()
    assert process.returncode == 2


@pytest.fixture
def met(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[meeting.Meeting]:
    """A first host of two, whose agent runs until it is told to end."""
    monkeypatch.setattr(meeting, "_agent", lambda folder, log: subprocess.Popen(["sleep", "60"]))
    with (tmp_path / "log").open("wb") as log:
        one = meeting.Meeting(tmp_path, this(hosts), log)
    yield one
    one.end()


def this(hosts: Hosts, count: int = 2) -> batch.Given:
    return batch.Given(1, count, "localhost", int(hosts.port), "NODE_RANK", "NNODES", "MASTER_PORT")


def guest(hosts: Hosts, said: bytes) -> tuple[socket.socket, bytes]:
    """A connection to the first host, and what it answers."""
    one = socket.create_connection(("localhost", int(hosts.port)), timeout=10)
    one.sendall(said)
    return one, one.makefile("rb").readline() if said else b""


def until(done: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_connection_that_is_not_of_ldft_does_not_keep_the_run(hosts: Hosts, met: meeting.Meeting) -> None:
    with closing(guest(hosts, b"")[0]):
        met._own.kill()
        until(lambda: not met.pids)


def test_a_command_that_stands_still_does_not_keep_a_run_whose_agents_have_ended(
    hosts: Hosts, met: meeting.Meeting
) -> None:
    one, answer = guest(hosts, b'{"host": 1, "hosts": 2}\n')
    with closing(one):
        assert json.loads(answer) == {"hosts": 2, "folder": str(hosts.folder)}
        met._own.kill()
        met._own.wait()
        assert met.pids
        (hosts.folder / "host-1.json").write_text('{"ended": true}')
        assert not met.pids


def test_each_host_joins_once_and_only_a_run_of_as_many(
    hosts: Hosts, met: meeting.Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"3, but localhost:[0-9]+ has a run on 2 hosts; correct NNODES, or choose another"
    ):
        meeting.join(this(hosts, 3), Config())
    one, _ = guest(hosts, b'{"host": 1, "hosts": 2}\n')
    with pytest.raises(ConfigError, match=r"has host 1 \(NODE_RANK\) already; give each host a number"):
        meeting.join(this(hosts), Config())
    one.shutdown(socket.SHUT_RDWR)
    one.close()
    until(lambda: not met._guests)
    monkeypatch.setattr(agent, "MEET_S", 0.5)
    with pytest.raises(ConfigError, match="no answer"):  # it is for the next run, at the same port, and waits for that
        meeting.join(this(hosts), Config())


def test_the_agent_ends_with_a_first_host_that_is_killed_while_it_waits(hosts: Hosts) -> None:
    first = hosts.start(0)
    until(lambda: list(hosts.folder.glob("results/*/attempt-1/host-0.json")))
    first.kill()
    first.communicate(timeout=10)
    until(lambda: nothing_runs_in(hosts.folder))


def test_a_task_of_slurm_that_is_not_on_the_first_host_runs_no_cell(hosts: Hosts) -> None:
    """As with srun over all hosts in place of one command on the first: each would run the cell, on the same hosts."""
    one = hosts.start(0, SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", SLURM_PROCID="1")
    assert one.communicate(timeout=60)[0] == "" and one.returncode == 0
    assert not (hosts.folder / "results").exists()


@pytest.mark.parametrize(
    ("overrides", "environment", "said"),
    [
        (
            (),
            {"NNODES": "3"},
            "launch.num_hosts: 2, but this is host 1 of 3 (NODE_RANK, NNODES); use launch.num_hosts=3, or start",
        ),
        (
            ("launch.num_hosts=1",),
            {},
            "launch.num_hosts: 1, but this is host 1 of 2 (NODE_RANK, NNODES); use launch.num_hosts=2, or",
        ),
        (
            (),
            {"MASTER_ADDR": ""},
            "launch.num_hosts: MASTER_ADDR is not set; set it to the first host's address, or unset NODE_RANK",
        ),
        ((), {"MASTER_PORT": "99999"}, "launch.num_hosts: MASTER_PORT=99999 is no port; use 1 to 65535"),
        ((), {"MASTER_PORT": "²"}, "launch.num_hosts: MASTER_PORT=² is no number; correct it, or unset NODE_RANK"),
        ((), {"NODE_RANK": "2"}, "launch.num_hosts: NODE_RANK=2 is not below NNODES=2; correct it, or unset it"),
        ((), {"NNODES": "1:2"}, "launch.num_hosts: NNODES=1:2 is no number; correct it, or unset NODE_RANK"),
        (
            ("-m",),
            {},
            "launch.num_hosts: 2: a sweep over several hosts needs SLURM; start each cell by a command of its own",
        ),
    ],
)
def test_what_the_environment_says_is_checked(hosts: Hosts, overrides, environment: dict[str, Any], said: str) -> None:
    process = hosts.start(1, *overrides, **environment)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and out.strip().count("\n") == 0 and said in out, out


def test_a_slurm_job_numbers_its_hosts_itself_and_one_host_needs_no_number(monkeypatch) -> None:
    for name, value in {"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    assert batch.given() == batch.Given(1, 2, "a", 29400, "NODE_RANK", "NNODES", "MASTER_PORT")
    assert batch.address() == "a" and batch.host_number() == 1
    monkeypatch.setenv("NNODES", "1")
    assert batch.given() is None
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert batch.given() is None and batch.host_number() == 0
