"""Where rows are: in a results folder, or in the folder or file of a single run, which can be named instead of it."""

from __future__ import annotations

import os
from pathlib import Path

from ldft.results.schema import ROW_FILE

_ATTEMPT = "attempt-"
MERGED = "rows-*.parquet"
_NOT_READ = f"is not named {MERGED}, so it is read only if you name it"
# How far below a folder without rows to look for rows, and how many folders to name.
_DEPTH, _MOST_NAMED = 3, 3


def of_one_run(path: Path) -> list[Path] | None:
    """The row files of one run or file, oldest attempt first, if `path` names such; None for a results folder."""
    if path.is_file():
        return [path]
    if (path / ROW_FILE).is_file():
        return [path / ROW_FILE]
    attempts = [found for found in path.glob(f"{_ATTEMPT}*/{ROW_FILE}") if found.is_file()]
    return sorted(attempts, key=lambda found: (len(found.parent.name), found.parent.name)) or None


def results_dir(path: Path) -> Path:
    """The results folder that `path` belongs to: paths in rows are relative to it."""
    path = path.absolute()
    folder = path.parent if path.is_file() else path
    if folder.name.startswith(_ATTEMPT) and (folder / ROW_FILE).is_file():
        return folder.parents[1]
    if folder == path and of_one_run(path):
        return folder.parent
    return folder


def missing(path: Path) -> str:
    """The line for a path without rows: where rows are instead, if they are further down, or what else is there."""
    further = further_down(path)
    if further:
        return f"no rows in {path}; they {further}"
    links = sorted(one for one in path.iterdir() if one.is_symlink() and not one.exists()) if path.is_dir() else []
    if links:
        return f"no rows in {path}; {links[0].name} is a link to {links[0].readlink()}, which is not there: restore that folder"
    if others := unread(path):
        return f"no rows in {path}; {', '.join(others)} {_NOT_READ}"
    if path.is_file() or merged(path):
        return f"no rows in {path}: its file has none; name the results.dir of a run"
    if path.is_dir() and any(path.glob("*/" * _DEPTH + "*/*")):
        return f"no rows in {path} or {_DEPTH} folders below it; name a folder further down"
    return f"no rows in {path}; python -m ldft writes one per run"


def merged(folder: Path) -> list[Path]:
    """Files with compacted rows."""
    return sorted(folder.glob(MERGED))


def unread(folder: Path) -> list[str]:
    """Names of parquet files in a folder that are not read, since ldft does not name files so."""
    if not folder.is_dir() or (folder / ROW_FILE).is_file():
        return []
    return sorted(one.name for one in folder.glob("*.parquet") if not one.match(MERGED) and one.is_file())[:_MOST_NAMED]


def left_out(folder: Path) -> str:
    """The line about rows beside or below those of a results folder that are not read with them; empty if there are none."""
    if of_one_run(folder) is not None:
        return ""
    told = [f"{', '.join(others)} {_NOT_READ}"] if (others := unread(folder)) else []
    if further := further_down(folder):
        told.append(f"more rows {further}")
    return f"{folder}: not read: {'; '.join(told)}" if told else ""


def further_down(path: Path) -> str:
    """The end of a line about a path without rows: "are further down: name one of ...", or empty if there are none."""
    found = below(path)
    names = ", ".join(str(folder) for folder in found[:_MOST_NAMED])
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return f"are further down: name one of {names}{more}" if found else ""


def below(folder: Path, depth: int = _DEPTH) -> list[Path]:
    """The results folders below a folder that is none."""
    found = []
    with os.scandir(folder) as entries:
        subfolders = sorted(Path(one.path) for one in entries if one.is_dir() and not one.name.startswith("."))
    for subfolder in subfolders:
        if os.access(subfolder, os.R_OK | os.X_OK) and any(
            one.name.startswith(_ATTEMPT) for one in subfolder.iterdir()
        ):
            continue  # a run: a results folder may have thousands
        if any(subfolder.glob(MERGED)) or any(subfolder.glob(f"*/{_ATTEMPT}*/{ROW_FILE}")):
            found.append(subfolder)
        elif depth > 1 and os.access(subfolder, os.R_OK | os.X_OK):
            found += below(subfolder, depth - 1)
    return found
