"""`python -m ldft.bench machine`: what a plan needs to know of this machine, measured once and saved in its profile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ldft import environment
from ldft.bench import layers, profile
from ldft.bench.nodes import COPIES, NodeSet, measure
from ldft.config import Device, Precision
from ldft.errors import LdftError
from ldft.memory.topology import read_topology
from ldft.runner import checks


def run(path: Path, precision: str | None) -> None:
    """Measure and save. precision: by default that of train.precision=auto. Raises LdftError if something cannot be measured."""
    topology = read_topology()
    gpus = environment.gpus()
    device = Device.cuda if gpus else Device.cpu
    sets = [NodeSet((node,)) for node in topology.memory_nodes]
    counts = sorted({1, max(1, len(gpus))})
    rows = measure(sets, [profile.default_size(topology)], counts, ["adam", *COPIES], 7)
    found = profile.make(rows)
    if missing := [node for node in topology.memory_nodes if "cpu" not in found["bandwidth"].get(f"node{node}", {})]:
        raise LdftError(f"node {missing[0]} could not be measured; see above")
    name = precision or checks.native_precision(device)[0].name
    found["devices"] = {f"{device.name} {name}": _device(device, name)}
    profile.save(found, path)
    print(f"ldft: profile: {path}: {json.dumps(found)}")


def _device(device: Device, precision: str) -> dict[str, Any]:
    """The rates of the device, and what they were measured with."""
    command = [sys.executable, "-m", "ldft.bench.device", device.name, precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LdftError(f"the measuring process ended with code {done.returncode}; its output is above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if device is Device.cuda:
        print("ldft: the host's time for a layer: four small runs", file=sys.stderr, flush=True)
        found["layer_host_s"] = layers.seconds(Precision[precision])
        found |= {"gpu": environment.gpus()[0], "driver": environment.driver()}
    return found
