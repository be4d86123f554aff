"""Checks the system's prerequisites before anything is installed: venv, a C++ compiler, Python's C headers."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"

_NO_HEADERS = (
    "Python's C headers are missing; ldft and DeepSpeed compile against them (Debian: apt-get install python3-dev)"
)


class SetupError(Exception):
    """Set-up cannot continue; the text says why, and what to do."""


def check(venv: Path) -> None:
    """Raise SetupError for the first thing that is missing, before anything is written."""
    if any(_missing(module) for module in ("ensurepip", "venv")):
        raise SetupError("Python's venv module is missing (Debian: apt-get install python3-venv)")
    if not (shutil.which("c++") or shutil.which("g++")):
        raise SetupError("no C++ compiler (Debian: apt-get install g++)")
    if not (_has_headers(venv) or _can_unpack()):
        raise SetupError(_NO_HEADERS)


def variables(venv: Path) -> dict[str, str]:
    """Environment variables with which compilers find Python's C headers. Raises SetupError if there are no headers.

    On Debian they are a separate package. Without root it is unpacked into the virtual environment, where ldft's ranks also find
    the headers.
    """
    if not _has_headers(venv):
        _unpack(venv)
    include = _unpacked(venv)
    if not include.is_dir():
        return {}
    return {"CPATH": f"{include / PYTHON}:{include}", "CMAKE_ARGS": f"-DPython_INCLUDE_DIR={include / PYTHON}"}


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ValueError:  # sys.modules has None in its place
        return True


def _unpacked(venv: Path) -> Path:
    return venv / "headers" / "usr" / "include"


def _has_headers(venv: Path) -> bool:
    return Path(sysconfig.get_paths()["include"], "Python.h").exists() or _unpacked(venv).is_dir()


def _can_unpack() -> bool:
    return bool(shutil.which("apt-get") and shutil.which("dpkg"))


def _unpack(venv: Path) -> None:
    folder = venv / "headers"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-qq", f"lib{PYTHON}-dev"], cwd=folder, capture_output=True, check=False)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=False)
        package.unlink()
    if not _unpacked(venv).is_dir():
        raise SetupError(_NO_HEADERS)
