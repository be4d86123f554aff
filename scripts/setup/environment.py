"""The virtual environment as a folder: whether it can be used as it is, and what it was set up from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from scripts.setup.needs import SetupError

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ("3.11", "3.12", "3.13")


class Environment:
    """One virtual environment. Its stamp says from what a set-up that came to its end was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self._stamp = folder / "ldft-setup.json"

    @property
    def site(self) -> Path:
        """Where packages lie."""
        return self.folder / "lib" / f"python{self.made_with()}" / "site-packages"

    def made_with(self) -> str | None:
        """The Python it was made with, as 3.11; None where there is no virtual environment."""
        try:
            found = re.search(r"^version\w*\s*=\s*(\d+\.\d+)", (self.folder / "pyvenv.cfg").read_text(), re.MULTILINE)
        except OSError:
            return None
        return found[1] if found else None

    def stamped(self) -> dict[str, object]:
        """The stamp; empty where no set-up has come to its end."""
        try:
            return dict(json.loads(self._stamp.read_text()))
        except (OSError, ValueError):
            return {}

    def made_from(self, test: bool) -> dict[str, object]:
        """What the stamp must hold for nothing to be done. Contents, not times: a `git checkout` may change only those."""
        digest = hashlib.sha256()
        for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", *native_sources()):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
        return {
            "files": digest.hexdigest(),
            "checkout": str(ROOT),
            "folder": str(self.folder),
            "python": os.path.realpath(self.python),
            "test": test,
        }

    def up_to_date(self, test: bool) -> bool:
        """Whether everything that is asked for is there."""
        stamped = self.stamped()
        return self.python.exists() and stamped == self.made_from(test or bool(stamped.get("test")))

    def stamp(self, test: bool) -> None:
        """Set-up has come to its end."""
        self._stamp.write_text(json.dumps(self.made_from(test)))

    def unstamp(self) -> None:
        """Set-up begins: should it be cut short, the next one takes nothing for granted."""
        self._stamp.unlink(missing_ok=True)

    def obstacle(self, wanted: str | None) -> str | None:
        """Why the folder must be made anew; None where it can be used, or is not there yet.

        wanted: a Python version that was asked for by name. Raises SetupError where the folder is something else.
        """
        made_with = self.made_with()
        if made_with is None:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise SetupError(f"VENV={self.folder} is not a virtual environment; choose a new folder, or remove it")
            return None
        moved_from = self.stamped().get("folder", str(self.folder))
        if moved_from != str(self.folder):
            return f"it was moved from {moved_from}"
        runs = self._runs()
        if runs is None:
            return f"its Python {made_with} is gone"
        if runs != made_with:
            return f"it was made with Python {made_with}, which is now {runs}"
        if made_with not in SUPPORTED:
            return f"its Python {made_with} is not supported"
        if wanted not in (None, made_with):
            return f"it has Python {made_with}, and {wanted} is asked for"
        return None

    def _runs(self) -> str | None:
        ask = [str(self.python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(ask, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def has_pip(self) -> bool:
        """Also False where making the environment was cut short."""
        return any(self.site.glob("pip-*.dist-info/RECORD"))

    def creation(self, anew: bool) -> list[str]:
        """The command that makes it. By the Python that it rests on, since the one in it may be about to be removed."""
        base = getattr(sys, "_base_executable", None) or sys.executable
        return [base, "-m", "venv", *(["--clear"] if anew else []), str(self.folder)]

    def forget_unfinished(self) -> None:
        """Have packages installed again whose installation was cut short: pip would take them for installed."""
        for package in self.site.glob("*.dist-info"):
            if not (package / "RECORD").exists():
                shutil.rmtree(package)


def native_sources() -> list[Path]:
    """What the native module is built from."""
    return [ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").iterdir())]


def requirements(test: bool) -> list[str]:
    """What pyproject.toml asks for, with the tests' where `test`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(project["optional-dependencies"]["test"] if test else [])]
