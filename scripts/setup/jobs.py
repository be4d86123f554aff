"""The programs that set-up starts, mainly pip: their output goes to the log and is parsed for progress."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from typing import TextIO

from scripts.setup.environment import Environment


def _running_in(session: int) -> set[int]:
    """Processes of a session. One that has ended and is not waited for yet still counts."""
    found = set()
    for path in Path("/proc").iterdir():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if path.name.isdigit() and os.getsid(int(path.name)) == session:
                found.add(int(path.name))
    return found


class Job:
    """A concurrent program in its own session, by which all that it has started is found: ninja gives each compiler a process group
    of its own. temporary: its folder for temporary files, made here and removed by `tidy`."""

    title = ""

    def __init__(
        self, command: list[str], log: TextIO, variables: dict[str, str] | None = None, temporary: Path | None = None
    ) -> None:
        self.tail: deque[str] = deque(maxlen=200)
        self._log = log
        self._temporary = temporary
        variables = dict(variables or {})
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            variables["TMPDIR"] = str(temporary)
        self._process = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.tail.append(line.rstrip())
            with contextlib.suppress(OSError):  # on a full disk the program itself reports it too
                self._log.write(f"{self.title}: {line}")
                self._log.flush()
            self.read(line)

    def read(self, line: str) -> None:
        """Update the progress from a line of output."""

    def progress(self) -> str:
        """The current progress."""
        return ""

    def summary(self) -> str:
        """What it did, after it has ended."""
        return self.title

    def ended(self) -> int | None:
        """Its exit code, with all output read; None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._reader.join()
        return code

    def end(self) -> None:
        """End it now, with all that it started."""
        ended = set[int]()
        while (
            found := _running_in(self._process.pid) - ended
        ):  # what is about to end may have started another meanwhile
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ended |= found
        self._process.wait()

    def tidy(self) -> None:
        """Remove its temporary files, after it has ended."""
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)


class Creation(Job):
    """`python -m venv`."""

    title = "virtual environment"


def pip(environment: Environment) -> list[str]:
    """The start of a pip command; pip's own progress display is off, since set-up shows progress itself."""
    return [str(environment.python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]


def bytes_of_wheels(folder: Path) -> int:
    """Size of all wheels below a folder, from which pip removes files and folders at any moment."""
    size = 0
    for below, _, names in os.walk(folder):  # passes over folders that are gone, which Path.rglob does not
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    size += Path(below, name).stat().st_size
    return size


def _is_newer(path: Path, since: float) -> bool:
    """Whether a file that pip may remove meanwhile was written after a moment."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime >= since
    return False


class Packages(Job):
    """pip installs the dependencies under the constraints."""

    title = "packages"

    def __init__(self, environment: Environment, needed: list[str], constraints: Path, log: TextIO) -> None:
        self._site = environment.site
        self.collected, self.total, self._since = 0, 0, 0.0
        # Beside the packages, where there must be room for them anyway; /tmp is often too small for torch.
        self._downloads = environment.folder / "tmp"
        # Bytecode of all modules would take pip twice as long as everything else; Bytecode compiles only those needed.
        # Use PEP 517 for DeepSpeed too, or an old pip needs the package `wheel` first.
        options = ["--no-compile", "--use-pep517", "--progress-bar", "off", "--constraint", str(constraints)]
        super().__init__([*pip(environment), *options, *needed], log, temporary=self._downloads)

    def read(self, line: str) -> None:
        if line.startswith("Collecting "):
            self.collected += 1
        elif line.startswith("Installing collected packages: "):
            self._since = time.time()
            self.total = line.count(",") + 1

    def progress(self) -> str:
        if self.total:
            return f"installing packages {min(self._installed(), self.total)}/{self.total}"
        if not self.collected:
            return "looking at packages"
        size = bytes_of_wheels(self._downloads) / 2**20
        return f"downloading packages: {self.collected} so far" + (f", {size:.0f} MiB" if size >= 1 else "")

    def summary(self) -> str:
        return f"packages: {self.total} installed" if self.total else "packages: all there"

    def _installed(self) -> int:
        records = [
            record for record in self._site.glob("*.dist-info/RECORD") if not record.parent.name.startswith("ldft-")
        ]
        return sum(_is_newer(record, self._since) for record in records)


class Native(Job):
    """pip builds ldft's native module and installs the checkout in editable mode."""

    title = "native module"

    def __init__(self, environment: Environment, root: Path, log: TextIO, variables: dict[str, str]) -> None:
        self._done, self._total = 0, 0
        command = [*pip(environment), "--verbose", "--no-deps", "--no-compile", "--editable", str(root)]
        super().__init__(command, log, variables, temporary=root / ".build" / "tmp")

    def read(self, line: str) -> None:
        found = re.match(r"\s*\[(\d+)/(\d+)\] ", line)
        if found:
            self._done, self._total = int(found[1]), int(found[2])

    def progress(self) -> str:
        if not self._total:
            return "native module: getting build tools"
        return f"native module: building {self._done}/{self._total}"

    def summary(self) -> str:
        return "native module: built"


class Bytecode(Job):
    """Imports everything that a run imports, once, so that Python writes its bytecode.

    Leaving this to the first run is not enough: many container images forbid Python to write bytecode, and every run would take ten
    seconds longer.
    """

    title = "bytecode"
    _modules = (
        "deepspeed", "transformers.modeling_layers", "transformers.models.llama.modeling_llama", "hydra", "psutil",
        "pyarrow.parquet", "rich.console",
    )  # fmt: skip
    _for_tests = ("pytest", "pandas", "duckdb", "peft", "matplotlib.pyplot")
    _import = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
"""

    def __init__(self, environment: Environment, test: bool, log: TextIO) -> None:
        modules = [*self._modules, *(self._for_tests if test else ())]
        command = [str(environment.python), "-c", self._import, *modules]
        super().__init__(command, log, {"PYTHONDONTWRITEBYTECODE": "", "DS_ACCELERATOR": "cpu"})

    def progress(self) -> str:
        return "compiling Python modules"

    def summary(self) -> str:
        return "Python modules that a run imports: compiled"
