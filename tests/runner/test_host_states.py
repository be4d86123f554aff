"""How the ranks of several hosts have ended, from what their agents wrote."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldft.config import Config, to_dict
from ldft.results import attempt
from ldft.runner import agent, final_status, hosts, launch


def test_all_agents_may_have_ended_before_the_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank that is killed the other host's rank dies, too, and both agents end within a tenth of a second."""
    ended = {"ended_by_us": False, "peak_rss_gib": 0.1}
    exits: list[dict[str, Any]] = [
        {"rank": 0, "exit_code": 1, "signal": None},
        {"rank": 1, "exit_code": None, "signal": "SIGKILL"},
    ]
    for host, one in enumerate(exits):
        (tmp_path / f"host-{host}.json").write_text(json.dumps({"host": f"n{host}", "exits": [one | ended]}))
    step = SimpleNamespace(pids=[], refused=None, end=lambda: None, ended_with="srun ended with code 0")
    monkeypatch.setattr(hosts, "_Step", lambda folder, count, log: step)
    config = Config()
    config.launch.num_ranks = config.launch.num_hosts = 2
    with hosts.Hosts(tmp_path, config) as ranks:
        assert launch.wait(ranks, 0.0, lambda: None)
    verdict = ranks.judged(judged(ranks.exits))
    assert (verdict.status, verdict.rank, verdict.signal) == ("error", 1, "SIGKILL")


def test_a_host_whose_agent_was_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rank dies with it, and the other host's loses its connection."""
    ended = {"rank": 0, "exit_code": 1, "signal": None, "ended_by_us": False, "peak_rss_gib": 0.1}
    other: dict[str, Any] = {"host": "n1", "ready": True, "exits": []}
    (tmp_path / "host-0.json").write_text(json.dumps({"host": "n0", "ready": True, "ended": True, "exits": [ended]}))
    (tmp_path / "host-1.json").write_text(json.dumps(other))
    step = SimpleNamespace(pids=[], refused=None, end=lambda: None, ended_with="srun ended with code 137")
    monkeypatch.setattr(hosts, "_Step", lambda folder, count, log: step)
    config = Config()
    config.launch.num_ranks = config.launch.num_hosts = 2
    with hosts.Hosts(tmp_path, config) as ranks:
        launch.wait(ranks, 0.0, lambda: None)
    verdict = ranks.judged(judged(ranks.exits))
    assert (verdict.status, verdict.error_type) == ("error", "LostHost") and "host n1: its agent ended" in str(
        verdict.error_message
    )
    assert str(verdict.error_message).endswith("; rank 0: rank 0 ended with exit code 1 during start")
    # One that ended as it should says why itself.
    (tmp_path / "host-1.json").write_text(json.dumps(other | {"ended": True}))
    assert ranks.judged(judged(ranks.exits)).error_type is None


def judged(exits: list[launch.RankExit]) -> final_status.Verdict:
    return final_status.judge(exits, [{}, {}], timed_out_s=0.0, interrupted=None, new_oom_kills=0)


def test_ranks_that_were_ended_without_a_reason_are_no_success() -> None:
    done = launch.RankExit(rank=0, exit_code=0, signal=None, ended_by_us=False, peak_rss_gib=0.1)
    killed = launch.RankExit(rank=1, exit_code=None, signal="SIGTERM", ended_by_us=True, peak_rss_gib=0.1)
    verdict = judged([done, killed])
    assert (verdict.status, verdict.rank) == ("error", 1) and "was ended before it was done" in str(
        verdict.error_message
    )
    assert judged([done]).status == "ok"


def test_a_host_that_cannot_write_says_so_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    """Its state cannot tell: what started it hears by the exit code."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config())))

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(attempt, "write_json", full)
    monkeypatch.setattr(sys, "argv", ["agent", str(tmp_path)])
    assert agent.main() == agent.CANNOT_SAY
    said = f"ldft: results.dir: cannot write in {tmp_path} (No space left on device); all hosts must see it, have room there"
    assert capsys.readouterr().err == f"{said}, and may write\n"
