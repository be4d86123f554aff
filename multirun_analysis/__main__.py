"""`python -m multirun_analysis [FOLDER]`, and its commands `report FOLDER`, `diff A B` and `plans FILE`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from ldft import closed_pipe
from ldft.errors import LdftError, ResultsError
from ldft.terminal import Parser, plural

_EPILOG = (
    "python -m multirun_analysis report FOLDER writes one HTML file to filter and pass on; diff A B shows what changed between two "
    "folders; plans FILE draws what python -m ldft.plan -m --rows wrote."
)


def _summary_parser() -> Parser:
    parser = Parser(
        prog="python -m multirun_analysis", description="Tables and figures of a results folder.", epilog=_EPILOG
    )
    parser.add_argument("folder", nargs="?", default="results", type=Path, help="results.dir of the runs (results)")
    parser.add_argument("--out", type=Path, help="folder for the figures (FOLDER/figures)")
    parser.add_argument(
        "--by", help="config group or key to compare, e.g. offload (default: all that differ among the rows)"
    )
    parser.add_argument("--baseline", help="option to compare the others with (default: local_only, bind_0 or default)")
    parser.add_argument("--no-figures", action="store_true", help="print the tables only")
    parser.add_argument("--all", action="store_true", help="print every line of every table")
    _add_price(parser)
    return parser


def _add_price(parser: Parser) -> None:
    parser.add_argument(
        "--price", type=_price, help="price of one GPU for one hour, in any currency: adds the cost of 1e9 tokens"
    )


def _price(text: str) -> float:
    return _positive(text, sys.float_info.max, "a number above 0, e.g. 2.50")


def _positive(text: str, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(f"{text}: use {what}")
    return value


def _report_parser() -> Parser:
    parser = Parser(
        prog="python -m multirun_analysis report",
        description="Write one HTML file with figures, tables and failures, which needs no network.",
    )
    parser.add_argument("folder", nargs="?", default="results", type=Path, help="results.dir of the runs (results)")
    parser.add_argument("--out", type=Path, help="file to write (FOLDER/report.html)")
    _add_price(parser)
    return parser


def _ratio(text: str) -> float:
    return _positive(text, 1.0, "a ratio above 0 and up to 1, e.g. 0.97")


def _diff_parser() -> Parser:
    parser = Parser(
        prog="python -m multirun_analysis diff", description="Show what changed from one results folder to another."
    )
    parser.add_argument("a", type=Path, help="results folder before")
    parser.add_argument("b", type=Path, help="results folder after")
    parser.add_argument(
        "--fail-below",
        type=_ratio,
        metavar="RATIO",
        help="exit with 1 if a cell has less than this part of its speed with confidence, or no longer ends ok; e.g. 0.97",
    )
    parser.add_argument("--all", action="store_true", help="print every line of the table")
    return parser


def _plans_parser() -> Parser:
    parser = Parser(prog="python -m multirun_analysis plans", description="Draw a map of plans.")
    parser.add_argument("rows", type=Path, help="file that python -m ldft.plan -m --rows wrote")
    parser.add_argument("--out", type=Path, help="folder for the figure (that of the file)")
    return parser


def _console() -> Console:
    # Do not wrap lines in a file or pipe: a table wrapped at 80 columns cannot be searched. No markup, since messages may have
    # brackets.
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def _summarise(arguments: argparse.Namespace) -> int:
    from ldft.results import places
    from multirun_analysis import figures, terminal
    from multirun_analysis.rows import load

    df = load(arguments.folder)
    console = _console()
    if df.empty:
        if places.below(arguments.folder):  # load has said where the rows are
            return 2
        console.print(places.missing(arguments.folder), soft_wrap=True)
        return 0
    groups = [arguments.by] if arguments.by else figures.groups_to_compare(df)
    if arguments.baseline:
        groups = groups[:1]  # a baseline belongs to one group
    terminal.summarise(df, groups, arguments.baseline, arguments.all, console, arguments.price)
    if not arguments.no_figures:
        out = arguments.out or places.results_dir(arguments.folder) / "figures"
        written, missing = figures.write_all(df, out, groups=groups, baseline=arguments.baseline)
        console.print(f"{len(written)} figure files in {out}", soft_wrap=True)
        for name, reason in missing.items():
            console.print(f"no figure {name}: {reason}", soft_wrap=True)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ldft.results import places
    from multirun_analysis import report
    from multirun_analysis.rows import load

    df = load(arguments.folder)
    if df.empty:
        raise ResultsError(places.missing(arguments.folder))
    folder = places.results_dir(arguments.folder)
    out = arguments.out or folder / "report.html"
    report.write(df, out, folder.name, arguments.price)
    size = out.stat().st_size / 2**20
    _console().print(f"{out}: {plural(len(df), 'row')}, {size:.1f} MiB; open it in a browser", soft_wrap=True)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from multirun_analysis import terminal
    from multirun_analysis.comparison import diff, gate
    from multirun_analysis.rows import load, versions_of

    a, b = load(arguments.a), load(arguments.b)
    versions, console, below = (versions_of(a), versions_of(b)), _console(), arguments.fail_below
    if below is None:
        terminal.print_diff(diff(a, b), versions, arguments.all, console)
        return 0
    table, refused = gate(a, b, below)
    terminal.print_diff(table, versions, arguments.all, console)
    terminal.print_gate(table, refused, below, console)
    # A gate that compared nothing must not pass.
    return 1 if len(refused) or not table["speedup"].notna().any() else 0


def _plans(arguments: argparse.Namespace) -> int:
    from multirun_analysis import style
    from multirun_analysis.figures import plans

    figure = plans.plans(plans.load(arguments.rows))
    if isinstance(figure, str):
        _console().print(f"no figure: {figure}", soft_wrap=True)
        return 0
    for path in style.save(figure, arguments.out or arguments.rows.parent, "plans"):
        _console().print(str(path), soft_wrap=True)
    return 0


@closed_pipe.work_on
def main(argv: list[str] | None = None) -> int:
    """Returns exit code 0, or 2 after printing one line if the folder, the group or the baseline does not exist."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] == ["report"]:
            return _report(_report_parser().parse_args(words[1:]))
        if words[:1] == ["diff"]:
            return _diff(_diff_parser().parse_args(words[1:]))
        if words[:1] == ["plans"]:
            return _plans(_plans_parser().parse_args(words[1:]))
        return _summarise(_summary_parser().parse_args(words))
    except LdftError as error:
        print(f"multirun_analysis: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"multirun_analysis: cannot write {error.filename}: {error.strerror}; choose another --out", file=sys.stderr
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
