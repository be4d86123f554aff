"""Make the committed rows from those of a sweep, execute the notebooks on them, and draw the README's picture:

    python -m multirun_analysis.publish results/

Run the sweep from a clean checkout, under a host name that may be published: unshare --uts sh -c 'hostname example && exec ...'.
Of the machine's folders, rows have the name of their own, which becomes `results`. Look at what this writes, then commit it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ldft import results
from ldft.errors import LdftError, ResultsError
from ldft.terminal import Parser, plural
from multirun_analysis import figures, load, notebooks, style

DATA = notebooks.FOLDER / "data"
_PICTURE = notebooks.FOLDER.parent / "docs" / "figures" / "throughput.png"
# No host but this one, and no path like these, may be in published rows.
HOST, PATH = "example", re.compile(r"/(?:home|root|tmp|work|usr|opt|var|Users)/[\w.-]+")


def rows(folder: Path) -> pa.Table:
    """The rows, without the name of their folder. Raises ResultsError if they cannot be published."""
    table = results.read_table(folder)
    if not len(table):
        raise ResultsError(f"{folder}: no rows; name the results.dir of a sweep")
    if any(table["git_dirty"].to_pylist()):
        raise ResultsError(f"{folder}: rows with git_dirty; run the sweep from a clean checkout")
    if hosts := {name for names in table["hosts"].to_pylist() for name in names or ()} - {HOST}:
        raise ResultsError(f"{folder}: rows of {', '.join(sorted(hosts))}; run the sweep on a host named {HOST}")
    for name, change in (("cfg.results.dir", lambda _: "results"), ("config_json", _renamed)):
        changed = pa.array([change(value) for value in table[name].to_pylist()], table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), changed)
    if left := PATH.search(str(table.to_pylist())):
        raise ResultsError(
            f"{folder}: a row names {left[0]}, a folder of its machine; use paths relative to the sweep's"
        )
    return table


def _renamed(config: str) -> str:
    values = json.loads(config)
    values["results"]["dir"] = "results"
    return json.dumps(values)


def publish(folder: Path, data: Path) -> int:
    """Write the rows, and the traces that are still there, in place of what is in `data`. Returns the number of rows."""
    table = rows(folder)
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    pq.write_table(table, data / "rows-published.parquet")
    for name in filter(None, table["trace_path"].to_pylist()):
        if (folder / name).is_file():
            (data / name).parent.mkdir(parents=True)
            shutil.copyfile(folder / name, data / name)
    return len(table)


def main(argv: list[str] | None = None) -> int:
    """Returns exit code 0, or 2 after printing one line if rows cannot be published."""
    parser = Parser(
        prog="python -m multirun_analysis.publish", description="Make multirun_analysis/data/ from a sweep."
    )
    parser.add_argument("folder", type=Path, help="results.dir of the sweep")
    arguments = parser.parse_args(argv)
    try:
        count = publish(arguments.folder, DATA)
    except LdftError as error:
        print(f"multirun_analysis: {error}", file=sys.stderr)
        return 2
    print(f"{plural(count, 'row')} in {DATA}")
    notebooks.main()
    figure = figures.throughput(load(DATA))
    if isinstance(figure, str):
        print(f"no picture: {figure}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        picture, _ = style.save(figure, Path(folder), _PICTURE.stem)
        shutil.copyfile(picture, _PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
