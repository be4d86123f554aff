"""The rates of the machine that a run is planned for: as `python -m ldft.bench machine` measured them, or from datasheets."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from ldft import environment
from ldft.config import THIS, Config, Device, Precision
from ldft.errors import ConfigError
from ldft.memory import bandwidths
from ldft.memory.cost_model import Bandwidths
from ldft.planning.rates import HostTime, Rates, from_datasheet
from ldft.preflight import device_rates

_NONE = (0.0, 0.0, 0.0)
_MEASURE = "measure this machine once with python -m ldft.bench machine"


class UnknownRatesError(ConfigError):
    """The machine's rates are not known, so no time can be predicted."""


def rates(config: Config) -> Rates:
    """Rates for a config whose device and precision are resolved. Raises UnknownRatesError, and ConfigError for a damaged
    profile."""
    found = _of_host(config)
    if config.launch.num_hosts == 1:
        return found
    network = config.machine.network_gb_per_s
    if not network:
        raise unknown_network()
    # What rings carry from GPU to GPU passes once through each host's network, over all of its adapters.
    return dataclasses.replace(found, peers=min(found.peers, 1e9 * network))


def unknown_network() -> UnknownRatesError:
    return UnknownRatesError(
        "machine.network_gb_per_s",
        "0: what moves between several hosts takes a time that is not known; use the GB/s of all network adapters of a host",
    )


def _of_host(config: Config) -> Rates:
    host = bandwidths.bandwidths(config.numa.bandwidth)
    if config.machine.name != THIS:
        return _of_datasheet(config, host)
    if environment.gpus_are_assumed():
        raise UnknownRatesError(
            "plan.goal",
            f"{config.plan.goal.name}: there is no GPU here; name a machine, as in machine=h200, or launch.device=cpu",
        )
    device = _measured(config)
    if host is None:
        raise UnknownRatesError("plan.goal", f"{config.plan.goal.name}: the host's bandwidth is unknown; {_MEASURE}")
    return _parse(device, host, config)


def _of_datasheet(config: Config, host: Bandwidths | None) -> Rates:
    machine = config.machine
    peak = device_rates.peak_tflops_per_s(machine.gpu, Precision.bf16)
    if peak is None or host is None:
        raise UnknownRatesError(
            "machine.gpu", f"'{machine.gpu}': its peak is not known here; use the GPU of one of ldft's machines"
        )
    if config.train.precision is Precision.fp32:
        peak /= 8  # tensor cores do not compute fp32; vector units do, at about an eighth on these GPUs
    peers = 1e9 * machine.peer_gb_per_s if config.launch.ranks_per_host > 1 else math.inf
    return from_datasheet(peak=1e12 * peak, device_memory=1e9 * machine.memory_gb_per_s, host=host, peers=peers)


def _key(config: Config) -> str:
    """The entry of the profile: rates differ by device and precision."""
    return f"{config.launch.device.name} {config.train.precision.name}"


def _measured(config: Config) -> dict[str, Any]:
    """The profile's section of the GPU, checked against the GPU and the driver that are there."""
    path, goal = bandwidths.profile_path(), config.plan.goal.name
    try:
        found: Any = json.loads(path.read_text()).get("devices", {}).get(_key(config), {})
    except (FileNotFoundError, NotADirectoryError):
        found = {}
    except (OSError, ValueError, AttributeError):
        raise ConfigError("plan.goal", f"{goal}: the profile {path} cannot be read; {_MEASURE}") from None
    if not isinstance(found, dict):
        raise _damaged(config)
    if not found:
        raise UnknownRatesError("plan.goal", f"{goal}: the rates of {_key(config)} are unknown; {_MEASURE}")
    if config.launch.device is Device.cuda:
        here = {"gpu": environment.gpus()[0], "driver": environment.driver()}
        for name, value in here.items():
            if found.get(name) != value:
                raise UnknownRatesError(
                    "plan.goal",
                    f"{goal}: the profile was measured with {name} {found.get(name)}, here is {value}; {_MEASURE}",
                )
    return found


def _damaged(config: Config) -> ConfigError:
    path = bandwidths.profile_path()
    return ConfigError("plan.goal", f"{config.plan.goal.name}: the profile {path} is damaged; {_MEASURE}")


def _number(value: Any, least: float = 0.0) -> float:
    """Raises ValueError for what is no time of at least `least` seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ValueError(value)
    return float(value)


def _rate(value: Any, unit: float = 1.0) -> float:
    """A rate in `unit`. Raises ValueError for none: times are divided by it."""
    return unit * _number(value, least=math.ulp(0.0))


def _attention(widths: dict[str, dict[str, list[float]]]) -> dict[int, dict[int, tuple[float, float]]]:
    found = {
        int(width): {int(tokens): (_rate(pair[0], 1e12), _rate(pair[1], 1e12)) for tokens, pair in lengths.items()}
        for width, lengths in widths.items()
    }
    if not found or any(min(lengths, default=0) < 1 for lengths in found.values()):
        raise ValueError(widths)
    return found


def _parse(device: dict[str, Any], host: Bandwidths, config: Config) -> Rates:
    try:
        # A CPU that computes has no other that starts its work.
        host_s = (
            device["layer_host_s"] if config.launch.device is Device.cuda else {"fetched": _NONE, "resident": _NONE}
        )
        return Rates(
            products=_rate(device["products_tflops_per_s"], 1e12),
            attention=_attention(device["attention_tflops_per_s"]),
            device_memory=_rate(device["memory_gb_per_s"], 1e9),
            host=host,
            launches_beside=_rate(device["launches_beside"]),
            fetched=HostTime(*map(_number, host_s["fetched"])),
            resident=HostTime(*map(_number, host_s["resident"])),
            peers=_rate(device["peer_gb_per_s"], 1e9)
            if config.launch.ranks_per_host > 1 and device.get("peer_gb_per_s")
            else math.inf,
            measured=True,
        )
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise _damaged(config) from None
