"""One cell on several hosts: what the monitor shows of it, and the trace, which the first host's agent takes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys

import psutil
import pyarrow.parquet as pq

from tests.conftest import long
from tests.runner.conftest import ENDLESS, Hosts


def test_the_monitor_shows_one_run_and_the_first_hosts_trace_is_in_the_row(hosts: Hosts) -> None:
    both = [hosts.start(number, ENDLESS, "monitor.interval_s=0.2") for number in (0, 1)]
    pids = [rank.pid for rank in hosts.ranks()]
    command = [sys.executable, "-m", "ldft.monitor", "--once", "--json", "--results", str(hosts.folder / "results")]
    shown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [[rank["pid"] for rank in run["ranks"]] for run in shown["runs"]] == [pids]
    assert shown["without_ranks"] == [], "agents stand between the commands and their ranks"
    both[0].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=120)[0] for process in both]
    row = hosts.row()
    assert row["status"] == "interrupted", said
    note = f"the trace has the ranks of the first host alone, {socket.gethostname()}"
    assert note in row["notes"] and note in said[0]
    samples = pq.read_table(hosts.folder / "results" / row["trace_path"]).to_pylist()
    assert {entry["rank"] for sample in samples for entry in sample["ranks"]} == {0}
    assert samples[-1]["phase"] == "train" and samples[-1]["iteration"] > 0 and samples[-1]["memory"]


@long
def test_without_the_first_hosts_agent_there_is_no_trace_and_the_row_says_so(hosts: Hosts) -> None:
    both = [hosts.start(number, ENDLESS, "monitor.interval_s=0.2") for number in (0, 1)]
    hosts.ranks()
    (agent_of_first,) = [one for one in psutil.Process(both[0].pid).children() if "ldft.runner.agent" in one.cmdline()]
    agent_of_first.kill()
    for process in both:
        process.communicate(timeout=120)
    row = hosts.row()
    assert row["trace_path"] is None
    assert "no trace: the first host's agent, which takes it, ran no rank or was killed" in row["notes"]
