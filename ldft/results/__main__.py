"""`python -m ldft.results`: compact a folder of rows, export it, or log it to experiment trackers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ldft import closed_pipe, files
from ldft.config.results import missing
from ldft.errors import ConfigError, ResultsError
from ldft.results import read, store
from ldft.terminal import Parser, plural


def _export(results_dir: str, output: str | None) -> None:
    """Write all rows as CSV; lists and structs become JSON."""
    frame = read(results_dir)
    for name in [name for name in frame.columns if frame[name].dtype.kind == "O"]:
        frame[name] = [
            value if value is None or isinstance(value, str | bool | int | float) else json.dumps(value, default=_plain)
            for value in frame[name]
        ]
    frame.to_csv(output or sys.stdout, index=False)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _log(path: Path, arguments: argparse.Namespace) -> int:
    """Write every row to the trackers that have a target. One that fails gets no further row, and the others get all. Returns the
    exit code. Raises ResultsError."""
    targets = {name: target for name in _TARGETS if (target := getattr(arguments, name))}
    if not targets:
        raise ResultsError(
            f"name at least one tracker: {', '.join(f'--{name} {what}' for name, (what, _) in _TARGETS.items())}"
        )
    for name in targets:
        if told := missing(name):
            raise ResultsError(f"--{name}: {told}")
    from multirun_analysis import trackers  # matplotlib, and then the trackers themselves

    failed: set[str] = set()
    for record in trackers.records(path, draw=arguments.figures):
        for name in [name for name in targets if name not in failed]:
            try:
                print(f"ldft: logged to {name}: {trackers.TRACKERS[name](record, targets[name])}", flush=True)
            except (ResultsError, OSError) as error:
                failed.add(name)
                said = f"cannot write {error.filename}: {error.strerror}" if isinstance(error, OSError) else error
                print(f"ldft: not logged to {name}: {said}", file=sys.stderr, flush=True)
        if len(failed) == len(targets):
            break
    return 1 if failed else 0


# Tracker -> what its option names, and the help.
_TARGETS = {
    "tensorboard": ("FOLDER", "as for tensorboard --logdir"),
    "mlflow": (
        "URI",
        "a tracking server, a database or a folder: http://HOST:5000, sqlite:///results/mlflow.db",
    ),
    "wandb": ("PROJECT", "a project of Weights & Biases; WANDB_MODE=offline writes files alone"),
}


@closed_pipe.stop
def main() -> int:
    """`python -m ldft.results`; returns the exit code."""
    parser = Parser(prog="python -m ldft.results", description="Compact, export or log a folder of rows.")
    commands = parser.add_subparsers(dest="command", required=True)
    compact = commands.add_parser("compact", help="merge the rows of many runs into one file, without loss")
    export = commands.add_parser("export", help="write all rows as one table")
    log = commands.add_parser("log", help="write all rows to experiment trackers, one run per row; again replaces")
    for command in (compact, export, log):
        command.add_argument("results_dir", nargs="?", default="results", help="default: results")
    for name, (target, said) in _TARGETS.items():
        log.add_argument(f"--{name}", metavar=target, help=said)
    log.add_argument("--no-figures", dest="figures", action="store_false", help="numbers only, which is faster")
    export.add_argument("--csv", action="store_true", required=True, help="comma-separated values, lists as JSON")
    export.add_argument("-o", "--output", help="file to write; default: standard output")
    arguments = parser.parse_args()
    try:
        if not files.named(arguments.results_dir, "results folder").exists():
            print(f"ldft: {arguments.results_dir} is not a folder; name the results.dir of a run", file=sys.stderr)
            return 2
        if arguments.command == "export":
            _export(arguments.results_dir, arguments.output)
        elif arguments.command == "log":
            return _log(Path(arguments.results_dir), arguments)
        else:
            print(f"ldft: merged {plural(store.compact(Path(arguments.results_dir)), 'row')}")
    except ResultsError as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 1
    except ConfigError as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # from --output: functions that read or merge rows raise ResultsError
        if error.filename is None:
            raise
        print(f"ldft: cannot write {error.filename} ({error.strerror}); name another file", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
