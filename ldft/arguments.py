"""argparse whose errors are one line, as all of ours are."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Subcommands take the class of their parser, so that it holds for them too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ldft: {message.removeprefix('argument ')}; see {self.prog} --help\n")
