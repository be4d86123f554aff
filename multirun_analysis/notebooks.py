"""Execute the notebooks in place: `python -m multirun_analysis.notebooks`. Outputs are committed so that code hosts display them.

Metadata that differs between machines or runs (times, the kernel's name and version) is removed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from ldft.terminal import plural

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = ("analysis.ipynb", "paper.ipynb")
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(name: str, results: Path | None = None, timeout_s: int = 300) -> nbformat.NotebookNode:
    """The executed notebook; `results` sets its variable RESULTS to that folder in place of the committed data.

    Raises nbclient's CellExecutionError if a cell fails.
    """
    notebook = nbformat.read(FOLDER / name, as_version=4)
    if results is not None:
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        line = next(line for line in first.source.splitlines() if line.startswith("RESULTS = "))
        first.source = first.source.replace(line, f"RESULTS = {str(results)!r}")
    # Executed in the notebook's folder by this interpreter, whatever kernels the user's Jupyter has.
    client = NotebookClient(
        notebook, timeout=timeout_s, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata = nbformat.from_dict(_METADATA)
    return notebook


def main() -> int:
    """Execute every notebook and write it back."""
    for name in NOTEBOOKS:
        notebook = execute(name)
        nbformat.write(notebook, FOLDER / name)
        print(f"executed {name}: {plural(len(notebook.cells), 'cell')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
