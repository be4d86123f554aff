"""Terminal output: one-line argument errors, and the progress of a run (one live line on a terminal, otherwise one line per
event)."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any, NoReturn


def seconds(value: float) -> str:
    """A duration in short form: 4.2s, 1m42s, 1h12m."""
    if value < 60:
        return f"{value:.1f}s"
    if value < 3600:
        return f"{int(value // 60)}m{int(value % 60):02d}s"
    return f"{int(value // 3600)}h{int(value % 3600 // 60):02d}m"


def length(tokens: int) -> str:
    """A sequence length as the name of its option: 4k, 1m; any other length as a plain number."""
    for unit, size in (("m", 2**20), ("k", 2**10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def plural(count: float, noun: str, several: str = "") -> str:
    """A number of things: 1 rank, 2 ranks, 1.5 cores. several: the noun's plural, if not with an s."""
    number = f"{count:g}" if isinstance(count, float) else str(count)
    return f"{number} {noun if count == 1 else several or noun + 's'}"


def rewrites() -> bool:
    """Whether standard output is a terminal that can go back over what it shows."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class Progress:
    """Shows a rank's partial results as they arrive. A context manager: leaving it ends the live line."""

    def __init__(self, iterations: int, warmup_iterations: int, tokens_per_iteration: int) -> None:
        self._iterations, self._warmup, self._tokens = iterations, warmup_iterations, tokens_per_iteration
        self._terminal = rewrites()
        self._phase_text, self._count, self._since = "", 0, time.monotonic()

    def _iteration(self, times: list[float], count: int) -> str:
        took = times[count - 1]
        warm = " (warm-up)" if count <= self._warmup else ""
        left = (self._iterations - count) * took
        text = f"iteration {count}/{self._iterations}{warm}: {seconds(took)}, {self._tokens / took:.0f} tokens/s"
        return text + (f", {seconds(left)} left" if left else "")

    def show(self, report: dict[str, Any]) -> None:
        """Show the newest partial results; if they have no phase, the rank is still starting."""
        report = {"phase": "start", "phase_text": "starting Python"} | report
        times = report.get("iteration_s", [])
        if not self._terminal:
            for count in range(self._count + 1, len(times) + 1):
                print(f"ldft: {self._iteration(times, count)}", flush=True)
        if (report["phase_text"], len(times)) != (self._phase_text, self._count):
            if not self._terminal and report["phase_text"] != self._phase_text:
                print(f"ldft: {report['phase_text']}", flush=True)
            self._phase_text, self._count, self._since = report["phase_text"], len(times), time.monotonic()
        if self._terminal:
            training = report["phase"] == "train" and times
            text = self._iteration(times, len(times)) if training else report["phase_text"]
            print(f"\r\x1b[Kldft: {text} [{seconds(time.monotonic() - self._since)}]", end="", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", flush=True)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, like all of ldft's. Subcommands use their parser's class, so theirs are one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ldft: {message.removeprefix('argument ')}; see {self.prog} --help\n")
