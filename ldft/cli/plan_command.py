"""`python -m ldft.plan`: the best plan for a model and a machine, what else was close, what binds it, and what would change it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ldft import closed_pipe, files
from ldft.cli import composition, overrides
from ldft.config import THIS, Config, Device, Goal, from_dict
from ldft.config.checkpointing import CheckpointingMode
from ldft.environment import CONF_DIR
from ldft.errors import ConfigError, ResultsError
from ldft.planning import candidates, remedies, search, settled
from ldft.planning.search import Plan, Search
from ldft.preflight import assumed_machine, fit
from ldft.preflight.resolved import device_gib
from ldft.runner import checks
from ldft.terminal import Parser, length, seconds

GIB = 2**30
_HEAD = (
    "",
    "tokens/s",
    "iteration",
    "VRAM",
    "host",
    "offload",
    "on the GPU",
    "recomputed",
    "attention kept",
    "tiles",
    "batch",
    "bound by",
)
_RUNNERS_UP, _WITHIN = 3, 1.25


def resolved_config(given: list[str]) -> Config:
    """The config of a command line, its plan not made. Raises ConfigError and Hydra's errors."""
    overrides.check(given)
    composition.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        config = from_dict(compose("config", overrides=given))
    config.plan.keep += overrides.keys(given)
    goal, config.plan.goal = config.plan.goal, Goal.none
    checks.resolve(config)
    config.plan.goal = Goal.fastest if goal in (Goal.none, Goal.auto) else goal
    config.validate()
    with assumed_machine.assumed(config):
        checks.check_config(config, assumed_machine.topology(config))
    return config


def answer(config: Config) -> tuple[Search, Plan | None, list[Plan]]:
    """The search, at the sequence length that it is about; its best plan, and the fastest plans of other kinds."""
    searched = settled.started(config)
    if config.plan.goal is Goal.longest:
        found = settled.longest(searched)
        if found is None:
            return searched, None, []
        searched = settled.started(dataclasses.replace(config, seq_len=found.run.config.seq_len))
    plans = searched.within(_WITHIN)
    if not plans:
        return searched, None, []
    found = search.best_of(plans, config.plan.goal)
    return searched, found, _runners_up(plans, found)


def describe(config: Config, given: list[str]) -> tuple[str, bool]:
    """The text for one question, and whether there is a plan."""
    searched, found, others = answer(config)
    machine = config.machine
    rates = "measured" if searched.rates.measured else "by datasheet"
    title = f"plan={config.plan.goal.name}: {config.model.name}, {config.launch.num_ranks} x "
    title += f"{'this machine' if machine.name == THIS else machine.gpu} ({rates})"
    if found is None:
        settings = dataclasses.replace(config, plan=dataclasses.replace(config.plan, goal=Goal.fastest))
        fixes = remedies.remedies(settled.started(settings), None)
        lines = [
            f"{title}: {settled.nothing_fits(searched, ask='')}",
            *_changes("what would make it fit:", fixes),
        ]
        return "\n".join(lines), False
    rows = [
        _cells("chosen", found),
        *(_cells("next" if number == 0 else "", plan) for number, plan in enumerate(others)),
    ]
    lines = [f"{title}, {length(found.run.config.seq_len.tokens)} tokens", "", *_table([_HEAD, *rows]), ""]
    lines += [f"memory: {_memory(found)}", f"time: {_time(found)}"]
    lines += _changes("what would change it:", remedies.remedies(searched, found))
    lines += ["", "run it:", f"  {shlex.join(_command(config, found, given))}"]
    return "\n".join(lines), True


def _runners_up(plans: list[Plan], found: Plan) -> list[Plan]:
    kinds = {found.choice.kind}
    others = []
    for plan in plans:
        if plan.choice.kind not in kinds:
            kinds.add(plan.choice.kind)
            others.append(plan)
    return others[:_RUNNERS_UP]


def _cells(name: str, plan: Plan) -> tuple[str, ...]:
    config, choice, run = plan.run.config, plan.choice, plan.run
    count = config.model.num_layers
    recomputed = config.checkpointing.recomputed(count)
    where = {CheckpointingMode.cpu: ", inputs on host", CheckpointingMode.gpu: "", CheckpointingMode.none: ""}[
        choice.mode
    ]
    named = (name for name, value in candidates.OFFLOADS.items() if value == choice.offload)
    share = f"{run.gpu_share / 1e9:.2f}e9 parameters" if run.gpu_share else "-"
    return (
        name,
        f"{1 / plan.seconds_per_token:.0f}",
        _duration(plan.times.iteration_s),
        f"{plan.device_bytes / GIB:.1f}",
        f"{plan.host_bytes / GIB:.1f}",
        next(named, config.offload.optimizer.name),
        share,
        f"{recomputed} of {count}{where if recomputed else ''}",
        choice.keep_attention.name,
        str(run.mlp_tiles) if run.mlp_tiles > 1 else "-",
        f"{config.train.micro_batch_size} x {config.train.gradient_accumulation_steps}"
        + (f", each on {choice.sequence_parallel} GPUs" if choice.sequence_parallel > 1 else ""),
        plan.times.bound,
    )


def _duration(value: float) -> str:
    return f"{value:.3g}s" if value < 10 else seconds(value)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = range(1, 5)
    return [
        "  ".join(
            cell.rjust(w) if column in right else cell.ljust(w)
            for column, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _memory(plan: Plan) -> str:
    config = plan.run.config
    size = device_gib(config) if config.launch.device is Device.cuda else None
    device = f"VRAM {plan.device_bytes / GIB:.1f} of {size:.1f} GiB each, " if size else ""
    each = f" each on {config.launch.num_hosts} hosts" if config.launch.num_hosts > 1 else ""
    return f"{device}host {plan.host_bytes / GIB:.1f} of {fit.available(config).bytes / GIB:.1f} GiB{each}"


def _time(plan: Plan) -> str:
    times = plan.times
    parts = f"forward {times.forward_s:.3f}, backward {times.backward_s:.3f}, step {times.step_s:.3f} s"
    update = (
        f"; host update {times.update_s:.3f} s, of which the GPU waits {times.exposed_s:.3f} s"
        if times.update_s
        else ""
    )
    return f"{parts}; arithmetic {times.arithmetic_s:.3f} s, link {times.link_s:.3f} s{update}"


def _changes(title: str, found: list[remedies.Remedy]) -> list[str]:
    if not found:
        return []
    return [title, *_table_of([(f"  {one.what}", one.effect) for one in found])]


def _table_of(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(first) for first, _ in rows)
    return [f"{first.ljust(width)}  {second}" for first, second in rows]


def _command(config: Config, plan: Plan, given: list[str]) -> list[str]:
    """The command that runs the plan here, or on the machine that it is for. There plan=auto could choose others for what this plan
    left at its default: it aims at fastest, and by that machine's rates."""
    own = [text for text in given if text.partition("=")[0].partition(".")[0] not in ("plan", "machine")]
    return [Path(sys.executable).name, "-m", "ldft", *own, *settled.changes(config, plan.run.config), "plan=none"]


def _grid(given: list[str]) -> list[list[str]]:
    """The command lines of a sweep."""
    found: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(given):
        key = override.get_key_element()
        swept = override.is_sweep_override() and override.is_discrete_sweep()
        found.append(
            [f"{key}={value}" for value in override.sweep_string_iterator()] if swept else [str(override.input_line)]
        )
    return [list(texts) for texts in itertools.product(*found)]


def _map(cells: list[list[str]], out: Path | None, say: Callable[[str], None]) -> int:
    """One line a cell, and the cells as a parquet file; returns the exit code."""
    rows = []
    for given in cells:
        config = resolved_config(given)
        with assumed_machine.assumed(config):
            searched, plan, _ = answer(config)
        row: dict[str, Any] = {
            "model": config.model.name,
            "machine": config.machine.name,
            "rates": "measured" if searched.rates.measured else "datasheet",
            "goal": config.plan.goal.name,
            "num_ranks": config.launch.num_ranks,
            "tokens": (plan.run.config if plan else config).seq_len.tokens,
            "overrides": given,
            "fits": plan is not None,
        }
        if plan:
            chosen = plan.run.config
            row |= {
                "tokens_per_s": 1 / plan.seconds_per_token,
                "iteration_s": plan.times.iteration_s,
                "vram_gib": plan.device_bytes / GIB,
                "host_gib": plan.host_bytes / GIB,
                "bound": plan.times.bound,
                "chosen": settled.changes(config, chosen),
            }
        rows.append(row)
        text = (
            f"{1 / plan.seconds_per_token:.0f} tokens/s, VRAM {row['vram_gib']:.1f}, host {row['host_gib']:.1f} GiB"
            if plan
            else "nothing fits"
        )
        say(f"{row['model']} {length(row['tokens'])} {row['machine']} x{row['num_ranks']} {row['goal']}: {text}")
    if out:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(out) as file:
                pq.write_table(pa.Table.from_pylist(rows), file)
        except OSError as error:
            raise ResultsError(f"cannot write {out}: {error.strerror}; name another file") from error
        say(f"ldft: rows: {out}")
    return 0


@closed_pipe.work_on
def main() -> int:
    """Returns the exit code: 0, or 1 if nothing fits or a file cannot be written, or 2 for invalid input."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    parser = Parser(prog="python -m ldft.plan", description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", help="as for python -m ldft, e.g. model=llama3_8b seq_len=128k machine=h200"
    )
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="several models, lengths or machines: one line for each"
    )
    parser.add_argument("--rows", type=Path, metavar="OUT.parquet", help="with -m: also write one row for each")
    arguments = parser.parse_intermixed_args()
    given: list[str] = arguments.overrides
    try:
        if arguments.multirun:
            overrides.check(given)
            return _map(_grid(given), arguments.rows, lambda text: print(text, flush=True))
        config = resolved_config(given)
        with assumed_machine.assumed(config):
            text, fits = describe(config, given)
        print(text)
        return 0 if fits else 1
    except KeyboardInterrupt:
        return 130
    except (HydraException, OmegaConfBaseException) as error:
        print(f"ldft: {composition.one_line(error, given)}", file=sys.stderr)
    except yaml.YAMLError as error:
        print(f"ldft: {composition.bad_yaml(error)}", file=sys.stderr)
    except ConfigError as error:
        print(f"ldft: {error}", file=sys.stderr)
    except ResultsError as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 1
    return 2
