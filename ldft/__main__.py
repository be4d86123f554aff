"""`python -m ldft`."""

from __future__ import annotations

import sys

from ldft.hidden_packages import hidden


def _without_pandas() -> None:
    """Let pyarrow see that there is no pandas. It would import it with the first array that it makes, in case it was given one of
    pandas', and that takes half a second; this command gives it none."""
    with hidden("pandas"):
        import pyarrow

        pyarrow.array([0])


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
    _without_pandas()
    return run()


if __name__ == "__main__":
    sys.exit(main())
