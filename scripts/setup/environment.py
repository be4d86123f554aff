"""The virtual environment's folder: whether it is usable as it is, and what it was set up from."""

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

from scripts.setup.failure import cannot_write
from scripts.setup.needs import SetupError

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ("3.11", "3.12", "3.13")


class Environment:
    """One virtual environment. Its stamp records the inputs of the last completed set-up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self._stamp = folder / "ldft-setup.json"

    @property
    def site(self) -> Path:
        """Folder of the installed packages."""
        return self.folder / "lib" / f"python{self.made_with()}" / "site-packages"

    def made_with(self) -> str | None:
        """Version of the Python it was made with, e.g. 3.11; None if there is no virtual environment."""
        try:
            found = re.search(r"^version\w*\s*=\s*(\d+\.\d+)", (self.folder / "pyvenv.cfg").read_text(), re.MULTILINE)
        except OSError:
            return None
        return found[1] if found else None

    def stamped(self) -> dict[str, object]:
        """The stamp; empty if no set-up has completed."""
        try:
            return dict(json.loads(self._stamp.read_text()))
        except (OSError, ValueError):
            return {}

    def made_from(self, test: bool) -> dict[str, object]:
        """The stamp for which nothing needs to be done. Holds hashes of contents, since `git checkout` may change file times
        only."""
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
        """Whether everything requested is installed."""
        stamped = self.stamped()
        # The stamp first: without one, the folder may be a file, or closed to this user.
        return stamped == self.made_from(test or bool(stamped.get("test"))) and self.python.exists()

    def stamp(self, test: bool) -> None:
        """Record that set-up has completed."""
        self._stamp.write_text(json.dumps(self.made_from(test)))

    def unstamp(self) -> None:
        """Remove the stamp when set-up begins, so that after an interruption the next one checks everything."""
        self._stamp.unlink(missing_ok=True)

    def obstacle(self, wanted: str | None) -> str | None:
        """Why the folder must be recreated; None if it is usable or does not exist yet.

        wanted: a Python version requested by name. Raises SetupError if the folder is not a virtual environment.
        """
        made_with = self.made_with()
        if made_with is None:
            try:
                other = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
            except OSError as error:
                raise SetupError(cannot_write(self.folder, error.strerror)) from None
            if other:
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
            return f"it has Python {made_with}, but {wanted} is requested"
        return None

    def _runs(self) -> str | None:
        ask = [str(self.python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(ask, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def has_pip(self) -> bool:
        """Also False if creating the environment was interrupted."""
        return any(self.site.glob("pip-*.dist-info/RECORD"))

    def creation(self, anew: bool) -> list[str]:
        """The command that creates it, with its base Python, since the Python inside may be about to be removed."""
        base = getattr(sys, "_base_executable", None) or sys.executable
        return [base, "-m", "venv", *(["--clear"] if anew else []), str(self.folder)]

    def forget_unfinished(self) -> None:
        """Make pip reinstall packages whose installation was interrupted: it would consider them installed."""
        for package in self.site.glob("*.dist-info"):
            if not (package / "RECORD").exists():
                shutil.rmtree(package)


def native_sources() -> list[Path]:
    """Source files of the native module."""
    return [ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").iterdir())]


def requirements(test: bool) -> list[str]:
    """The requirements in pyproject.toml, including the tests' if `test`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(project["optional-dependencies"]["test"] if test else [])]
