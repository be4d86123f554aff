"""Output of set-up: finished steps as lines, and the progress of the others between them."""

from __future__ import annotations

import shutil
import time

from ldft.terminal import rewrites


class Terminal:
    """Rewrites one line on a terminal; elsewhere prints plain lines at growing intervals, so that a slow network does not fill
    logs."""

    def __init__(self) -> None:
        self._live = rewrites()
        self._start = time.monotonic()
        self._due = 15.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since set-up began."""
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self.clear()
        print(f"ldft: {text}", flush=True)

    def show(self, text: str) -> None:
        """Show progress; call it often."""
        if self._live:
            line = f"ldft: {text} [{self.elapsed_s:.0f}s]"
            print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", flush=True)
        elif self.elapsed_s > self._due:
            self._due = self.elapsed_s + max(15.0, self.elapsed_s / 4)
            print(f"ldft: {text} [{self.elapsed_s:.0f}s]", flush=True)

    def clear(self) -> None:
        """Clear the progress line."""
        if self._live:
            print("\r\x1b[K", end="", flush=True)
