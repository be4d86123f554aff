"""A real SLURM cluster of two nodes on this machine, in a folder of its own: `with cluster(folder) as env: ...`.

Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge. Both nodes are daemons on this host, with two cores and
eight gigabytes each as far as SLURM knows. A job that takes more memory than it asked for is killed within two seconds. Jobs of the
partition `high` preempt those of `test`. Each node has half of this machine's cores, as two ranks of one host would have.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "munged")
_CONF = """\
ClusterName=ldft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/ctld.pid
SlurmdPidFile={dir}/d-%n.pid
SlurmctldLogFile={dir}/ctld.log
SlurmdLogFile={dir}/d-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
KillWait=10
SlurmdTimeout=20
FirstJobId={first}
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{nodes}] CPUs=2 RealMemory=8000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid():
        return "needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    return f"needs {', '.join(absent)}" if absent else ""


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start it; yields the environment in which SLURM's commands use it."""
    for name in ("state", "munge"):
        (folder / name).mkdir(parents=True)
    ports = _free_ports(3)
    first = 1000 + secrets.randbelow(100_000)  # no number is that of a job of an earlier cluster
    text = _CONF.format(
        host=socket.gethostname(), dir=folder, port=ports[0], nodes=f"{ports[1]},{ports[2]}", first=first
    )
    (folder / "slurm.conf").write_text(text)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    try:
        _munge(folder / "munge")
        _start(folder, env, "slurmctld")
        cores = sorted(os.sched_getaffinity(0))
        for node, mine in (("n0", cores[: len(cores) // 2] or cores), ("n1", cores[len(cores) // 2 :])):
            _start(folder, env, "taskset", "--cpu-list", ",".join(map(str, mine)), "slurmd", "-N", node)
        _until_idle(env)
        yield env
    finally:
        subprocess.run(["scancel", "--user=root"], env=env, capture_output=True, check=False)
        time.sleep(1.0)
        for path in [*folder.glob("*.pid"), *folder.glob("munge/pid")]:
            subprocess.run(["kill", path.read_text().strip()], capture_output=True, check=False)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _munge(folder: Path) -> None:
    """An authentication daemon with a key and a socket of its own, as the user that its package makes."""
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "key").chmod(0o400)
    for path in (folder, folder / "key"):
        shutil.chown(path, "munge", "munge")
    folder.chmod(0o711)
    options = {name: folder / name for name in ("key-file", "log-file", "pid-file", "seed-file", "socket")}
    options |= {"key-file": folder / "key", "pid-file": folder / "pid"}
    command = ["munged", "--force", *(f"--{name}={path}" for name, path in options.items())]
    as_munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", *command]
    subprocess.run(as_munge, env={"PATH": _path()}, check=True, timeout=20)


def _start(folder: Path, env: dict[str, str], *command: str) -> None:
    with (folder / "daemons.log").open("ab") as log:
        subprocess.run(command, env=env, stdout=log, stderr=log, check=True, timeout=60)


def _until_idle(env: dict[str, str]) -> None:
    for _ in range(60):
        done = subprocess.run(
            ["sinfo", "-h", "-t", "idle", "-o", "%D"], env=env, capture_output=True, text=True, check=False
        )
        if done.stdout.strip() == "2":
            return
        time.sleep(0.5)
    raise RuntimeError(f"the nodes did not come up: {done.stdout}{done.stderr}")
