"""Finds the best plan: the fastest combination of values whose expected memory fits. Imports no torch.

Each combination has a least time, that of the GPU's arithmetic, which costs little to compute. They are tried in the order of this
bound until it exceeds the best time found, so the result is that of trying all.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ldft.config import Config, Device, Goal
from ldft.errors import ConfigError
from ldft.memory.policy import PlacementError
from ldft.memory.topology import Topology
from ldft.planning import candidates, iteration_time
from ldft.planning.candidates import Choice
from ldft.planning.iteration_time import Times
from ldft.planning.rates import Rates
from ldft.preflight import device_estimate, fit, gpu_share, mlp_tiles, resolved, room, selection
from ldft.preflight.resolved import Resolved
from ldft.preflight.selection import Selection

# Of device memory this stays free beyond the estimate and its allowance for fragmentation.
_DEVICE_SPARE = 0.02
LEANEST_WITHIN = 1.05
HOST, VRAM = "host memory", "VRAM"
MEMORIES = (HOST, VRAM)
"""Refusals for lack of memory."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice, and what is expected of it."""

    choice: Choice
    run: Selection
    times: Times
    host_bytes: int
    device_bytes: int

    @property
    def seconds_per_token(self) -> float:
        return self.times.iteration_s / _tokens(self.run.config)


def _tokens(config: Config) -> int:
    """Tokens between two updates, of all ranks."""
    return config.sequences_per_update * config.seq_len.tokens


@dataclass(slots=True)
class Search:
    """The plans for one config on one machine. Device, precision and model are resolved."""

    config: Config
    topology: Topology
    rates: Rates
    refusals: dict[str, int] = field(default_factory=dict)
    """Memory that combinations lack, or what the check of every run said -> how many."""
    invalid: dict[str, int] = field(default_factory=dict)
    """Why other combinations are not possible at all -> how many."""
    host_limit: int = 0
    """Bytes that all ranks may use, of what the machine has and of what is free now."""
    _bases: dict[tuple[Any, ...], Selection | ConfigError] = field(default_factory=dict)
    _limit: float = math.inf
    """Seconds per token that a plan may take to be of interest."""

    def __post_init__(self) -> None:
        free = fit.available(self.config).bytes
        self.host_limit = self.host_limit or min(free, room.host_memory(self.config) or free)

    def plans(self) -> Iterator[tuple[float, Callable[[], Plan | None]]]:
        """Every valid combination with its least seconds per token, in that order, and a function that makes its plan: None if it
        does not fit."""
        config = candidates.placed(self.config, self.topology)
        queue: list[tuple[float, int, Choice, Selection]] = []
        for number, choice in enumerate(candidates.choices(config)):
            try:
                run = self._select(candidates.applied(config, choice))
            except ConfigError as error:
                self._forbid(error)
                continue
            heapq.heappush(queue, (self._least(run), number, choice, run))
        while queue:
            least, _, choice, run = heapq.heappop(queue)
            yield least, lambda choice=choice, run=run: self._plan(choice, run)  # type: ignore[misc]

    def _select(self, config: Config) -> Selection:
        """selection.select, which builds DeepSpeed's settings only once for combinations that agree in what these depend on."""
        checkpointing, count = config.checkpointing, config.model.num_layers
        key = (
            *(config.offload.stage, config.offload.parameters, config.offload.optimizer),
            *(config.train.micro_batch_size, config.train.gradient_accumulation_steps),
            config.launch.sequence_parallel,
            *(checkpointing.recomputed(count) == count, checkpointing.every, checkpointing.keep_attention),
        )
        if key not in self._bases:
            try:
                self._bases[key] = selection.select(config, topology=self.topology)
            except ConfigError as error:
                self._bases[key] = error
        base = self._bases[key]
        if isinstance(base, ConfigError):
            raise base
        return dataclasses.replace(base, config=config, mlp_tiles=mlp_tiles.choose(config))

    def _least(self, run: Selection) -> float:
        times = iteration_time.predict(dataclasses.replace(run, overlap_step=False), self.rates)
        return (times.arithmetic_s + times.step_s - times.update_s) / _tokens(run.config)

    def _plan(self, choice: Choice, run: Selection) -> Plan | None:
        """The plan of one combination; None if it does not fit."""
        config = run.config
        size = resolved.device_gib(config) if config.launch.device is Device.cuda else None
        # What settles next only adds to device memory.
        if size is not None and room.device_room(run, size, _DEVICE_SPARE) < 0:
            self._refuse(VRAM)
            return None
        unsettled = run
        try:
            run = resolved.settle(run)
        except ConfigError as error:
            self._refuse(str(error))
            return None
        if size is not None and run.overlap_step and candidates.default(self.config, gpu_share.KEY):
            run = self._with_better_share(run, unsettled, size)
        peak = device_estimate.peak_of(device_estimate.moments(run))
        host = room.host_bytes(run, peak)
        if self._is_too_much(host):
            self._refuse(HOST)
            return None
        if size is not None and room.device_room(run, size, _DEVICE_SPARE) < 0:
            self._refuse(VRAM)
            return None
        return Plan(choice, run, self._times(run), host, sum(peak.values()))

    def _is_too_much(self, host_bytes: int) -> bool:
        return host_bytes * (1 + room.HOST_SPARE) > self.host_limit

    def _times(self, run: Selection) -> Times:
        return iteration_time.predict(run, self.rates)

    def _with_better_share(self, run: Selection, unsettled: Selection, size: float) -> Selection:
        """The run with the share on the GPU that takes least time, if one larger than the default fits and is faster, or if the
        default leaves too much in host memory.

        The default hides the update's own time; but beside it Python is slower, and that is hidden only where the GPU is slower
        still.
        """
        times, counts = self._times(run), gpu_share.larger(run)
        short = self._is_too_much(room.host_bytes(run))
        if not counts or not (times.exposed_s or short):
            return run
        # No share makes the passes shorter than that of all, nor the step shorter than it is.
        whole = self._times(dataclasses.replace(run, gpu_share=counts[-1]))
        if (whole.forward_s + whole.backward_s + times.step_s) / _tokens(run.config) > self._limit:
            return run

        def lacks_memory(count: int) -> bool:
            return room.device_room(dataclasses.replace(unsettled, gpu_share=count), size, _DEVICE_SPARE) < 0

        fitting = counts[: bisect.bisect_left(counts, True, key=lacks_memory)]
        # With this run's inputs on the device, of which a larger share leaves room for fewer: the least that each can take.
        larger = [dataclasses.replace(run, gpu_share=count) for count in fitting]
        if short:
            larger = [one for one in larger if not self._is_too_much(room.host_bytes(one))]
        least = sorted(((self._times(one).iteration_s, one) for one in larger), key=lambda pair: pair[0])
        best, best_s = run, math.inf if short else times.iteration_s
        for least_s, one in least:
            if least_s >= best_s:
                break
            offload = dataclasses.replace(run.config.offload, gpu_share=gpu_share.part(one))
            config = dataclasses.replace(run.config, offload=offload)
            found = resolved.settle(dataclasses.replace(unsettled, config=config))
            found_s = self._times(found).iteration_s
            if found_s < best_s and self._fits_both(found, size):
                best, best_s = found, found_s
        return best

    def _fits_both(self, run: Selection, size: float) -> bool:
        return room.device_room(run, size, _DEVICE_SPARE) >= 0 and not self._is_too_much(room.host_bytes(run))

    def _forbid(self, why: ConfigError) -> None:
        self.invalid[str(why)] = self.invalid.get(str(why), 0) + 1

    def _refuse(self, why: str) -> None:
        self.refusals[why] = self.refusals.get(why, 0) + 1

    def fits(self, plan: Plan) -> Resolved | None:
        """The plan with its placements, if the check of every run lets it pass."""
        try:
            run = resolved.complete(plan.run, settled=True)
            fit.examine(run)
        except (ConfigError, PlacementError) as error:
            self._refuse(str(error))
            return None
        return run

    def any_fits(self) -> bool:
        """Whether any plan fits. Of plans that differ in nothing else, only the one that recomputes and offloads most is tried."""
        config = candidates.placed(self.config, self.topology)
        for choice in candidates.leanest(config):
            try:
                plan = self._plan(choice, self._select(candidates.applied(config, choice)))
            except ConfigError as error:
                self._forbid(error)
                continue
            if plan is not None and self.fits(plan) is not None:
                return True
        return False

    def within(self, part: float = 1.0) -> list[Plan]:
        """The fastest plan, and all plans that take at most `part` of its time, fastest first; empty if none fits."""
        found: list[Plan] = []
        best = self._limit = math.inf
        for least, make in self.plans():
            if least > best * part:
                break
            plan = make()
            if plan is None or plan.seconds_per_token > best * part or self.fits(plan) is None:
                continue
            best = min(best, plan.seconds_per_token)
            self._limit = best * part
            found.append(plan)
        # Of equal times, that with less work to hide is the safer one.
        found.sort(
            key=lambda plan: (plan.seconds_per_token, plan.times.arithmetic_s, plan.host_bytes, plan.device_bytes)
        )
        return [plan for plan in found if plan.seconds_per_token <= best * part]

    def best(self) -> Plan | None:
        """The best plan by config.plan.goal, whose sequence length is set; None if none fits."""
        goal = self.config.plan.goal
        plans = self.within(LEANEST_WITHIN if goal is Goal.leanest else 1.0)
        return best_of(plans, goal) if plans else None


def best_of(plans: list[Plan], goal: Goal) -> Plan:
    """Of plans in the order of within(), which hold all those that a goal may choose from."""
    if goal is not Goal.leanest:
        return plans[0]
    limit = plans[0].seconds_per_token * LEANEST_WITHIN
    return min(
        (plan for plan in plans if plan.seconds_per_token <= limit),
        key=lambda plan: (plan.host_bytes, plan.seconds_per_token),
    )
