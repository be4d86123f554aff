"""`python -m ldft.results`: compact a folder of rows, or export it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ldft import closed_pipe
from ldft.errors import ResultsError
from ldft.results import read, store
from ldft.terminal import Parser


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


@closed_pipe.stop
def main() -> int:
    """`python -m ldft.results`; returns the exit code."""
    parser = Parser(prog="python -m ldft.results", description="Compact or export a folder of rows.")
    commands = parser.add_subparsers(dest="command", required=True)
    compact = commands.add_parser("compact", help="merge the rows of many runs into one file, without loss")
    export = commands.add_parser("export", help="write all rows as one table")
    for command in (compact, export):
        command.add_argument("results_dir", nargs="?", default="results", help="default: results")
    export.add_argument("--csv", action="store_true", required=True, help="comma-separated values, lists as JSON")
    export.add_argument("-o", "--output", help="file to write; default: standard output")
    arguments = parser.parse_args()
    try:
        if not Path(arguments.results_dir).exists():
            print(f"ldft: {arguments.results_dir} is not a folder; name the results.dir of a run", file=sys.stderr)
            return 2
        if arguments.command == "export":
            _export(arguments.results_dir, arguments.output)
        else:
            print(f"ldft: merged {store.compact(Path(arguments.results_dir))} rows")
    except ResultsError as error:
        print(f"ldft: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # from --output: functions that read or merge rows raise ResultsError
        if error.filename is None:
            raise
        print(f"ldft: cannot write {error.filename} ({error.strerror}); name another file", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
