"""`python -m ldft`."""

from __future__ import annotations

import sys


def main() -> int:
    """Entry point of `ldft` and `python -m ldft`; returns the exit code."""
    try:
        from ldft.cli.command import main as run
    except ImportError as error:
        if "_native" not in str(error):
            raise
        print(
            "ldft: the native module is not built for this folder; run make run, or python -m pip install -e . in the checkout",
            file=sys.stderr,
        )
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
