"""The update of offloaded weights beside the next forward pass.

A step starts the update and returns. Its threads update parameter by parameter, in the order in which the forward pass fetched
them before; a fetch waits until the parameter's new weights are there. Whatever else reads or writes weights, gradients or state
ends the update first (FusedStage3), so every value is the one that an update within the step would have given.

The clock: between timed iterations the update stands still, so that it makes no progress for which no iteration pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ldft.training.optimizers.host_optimizer import Task, prepared, run

# Nice value of the update's threads: what the thread that launches the device's work needs, it gets at once.
NICE = 10


@dataclass(frozen=True, slots=True)
class UpdateTimes:
    """What updates took up to now, in all."""

    update_s: float = 0.0
    """Seconds in which an update was in progress."""
    wait_s: float = 0.0
    """Seconds for which training waited for it."""
    bytes: int = 0
    """Bytes that it read and wrote."""
    overlapped: int = 0
    """Those of them that were moved while training did not wait."""

    def __add__(self, other: UpdateTimes) -> UpdateTimes:
        return UpdateTimes(
            self.update_s + other.update_s,
            self.wait_s + other.wait_s,
            self.bytes + other.bytes,
            self.overlapped + other.overlapped,
        )

    def __sub__(self, other: UpdateTimes) -> UpdateTimes:
        return UpdateTimes(
            self.update_s - other.update_s,
            self.wait_s - other.wait_s,
            self.bytes - other.bytes,
            self.overlapped - other.overlapped,
        )


class Updates:
    """The updates of one rank: within the step, or (overlap) beside what follows."""

    def __init__(self, *, overlap: bool, threads: int) -> None:
        """threads: of an update beside other work. Within the step, the update uses all that torch has."""
        self.overlap = overlap
        self._threads = threads
        self._job: Any = None
        self._numbers: dict[int, int] = {}
        # Parameters by DeepSpeed's number, in the order in which they were first fetched.
        self._order: dict[int, int] = {}
        self._ended = UpdateTimes()
        self._on_device: Any = None

    def run(self, tasks: list[Task]) -> None:
        """Do the tasks now."""
        seconds, _, size, _ = run(tasks).progress
        self._ended += UpdateTimes(update_s=seconds, wait_s=seconds, bytes=size)

    def start(self, tasks: dict[int, Task], first: Callable[[int], bool]) -> None:
        """Start the tasks, given by DeepSpeed's number of the parameter. first: which parameters come before all others."""
        assert self._job is None
        order = sorted(tasks, key=lambda number: (not first(number), self._order.get(number, len(self._order))))
        self._job = prepared([tasks[number] for number in order])
        self._numbers = {number: i for i, number in enumerate(order)}
        self._job.start(self._threads, NICE)

    def launched_on(self, device: torch.device) -> None:
        """The update of a part was launched on a device: the streams that fetch weights wait for it."""
        self._on_device = torch.cuda.Event()
        self._on_device.record(torch.cuda.current_stream(device))

    def wait(self, parameters: Iterable[Any]) -> None:
        """Return when the new weights of these parameters are in host memory."""
        if self._on_device is not None:
            torch.cuda.current_stream().wait_event(self._on_device)
        for parameter in parameters:
            number = parameter.ds_id
            self._order.setdefault(number, len(self._order))
            if self._job is not None and number in self._numbers:
                self._job.wait(self._numbers[number])

    def finish(self) -> None:
        """Return when the update that is in progress has ended, if there is one."""
        if self._job is not None:
            self._job.finish()
            self._ended += UpdateTimes(*self._job.progress)
            self._job = None

    def pause(self) -> None:
        """Stop the update until `resume`, or until something waits for it."""
        if self._job is not None:
            self._job.pause()

    def resume(self) -> None:
        if self._job is not None:
            self._job.resume()

    @property
    def times(self) -> UpdateTimes:
        """What all updates took so far, the one in progress included."""
        return self._ended if self._job is None else self._ended + UpdateTimes(*self._job.progress)


def threads_beside() -> int:
    """Threads of an update beside the next forward pass: one core is left to the thread that launches the device's work."""
    return max(1, torch.get_num_threads() - 1)
