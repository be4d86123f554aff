"""`make`'s set-up: the real scripts, Makefile, venv and pip, on a project whose packages are a few bytes, without a network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.setup import failure
from scripts.setup.environment import Environment
from scripts.setup.jobs import bytes_of_wheels

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "ldft"
version = "0.1.0"
dependencies = ["small"]
[project.optional-dependencies]
test = ["smaller"]
"""
# Builds an empty wheel, as loudly, slowly or badly as csrc/module.cpp says.
BACKEND = """
import os, pathlib, subprocess, sys, tempfile, time, zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    source = pathlib.Path("csrc/module.cpp").read_text()
    print("[1/2] Building CXX object", flush=True)
    if "slow" in source:
        # A compiler, in a process group of its own, as ninja starts it, and a file of its.
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", os.getcwd()], process_group=0)
        tempfile.mkdtemp()
    pathlib.Path("building").touch()
    if "slow" in source:
        time.sleep(60)
    if "wrong" in source:
        print("module.cpp:7:3: error: expected ';' before 'return'", flush=True)
        raise SystemExit(1)
    with open("builds", "a") as builds:
        builds.write("built ")
    sys.path.insert(0, ".")
    from wheels import wheel
    return wheel(pathlib.Path(folder), "ldft")
"""
WHEELS = '''
import zipfile
def wheel(folder, name, version="0.1.0"):
    """A wheel with nothing but one module in it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}_module.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        file.writestr(f"{info}/RECORD", "")
    return path.name
'''


@dataclass(slots=True)
class Checkout:
    """A small project with the set-up of this one."""

    folder: Path
    variables: dict[str, str]

    def command(self, mode: str = "run", *variables: str) -> list[str]:
        # The rest of the target is not run here: the small project has no training.
        return ["make", "--no-print-directory", f"only-{mode}", *variables]

    def make(self, mode: str = "run", *variables: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        done = subprocess.run(
            self.command(mode, *variables),
            cwd=self.folder, env=self.variables | (env or {}), capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
        return done.returncode, done.stdout, "\n".join(errors)

    @property
    def packages(self) -> set[str]:
        return {path.name.split("-")[0] for path in self.folder.glob(".venv/lib/*/site-packages/*.dist-info")}

    @property
    def builds(self) -> int:
        return (self.folder / "builds").read_text().count("built")

    def source(self, text: str) -> None:
        (self.folder / "csrc" / "module.cpp").write_text(text)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """Shared by the tests, since making a virtual environment takes seconds; each leaves it as a set-up may find it."""
    tmp_path = tmp_path_factory.mktemp("setup")
    folder = tmp_path / "a checkout"
    (folder / "csrc").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ldft").mkdir()
    for name in ("__init__.py", "terminal.py"):
        shutil.copy(ROOT / "ldft" / name, folder / "ldft")
    makefile = (ROOT / "Makefile").read_text()
    (folder / "Makefile").write_text(makefile + "\nonly-run:\n\t$(SETUP) run\nonly-test:\n\t$(SETUP) test\n")
    for name, text in {
        "pyproject.toml": PYPROJECT, "backend.py": BACKEND, "wheels.py": WHEELS, "CMakeLists.txt": "",
        "constraints.txt": "small==0.1.0\nsmaller==0.1.0\n", "csrc/module.cpp": "right",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    wheels: dict[str, object] = {}
    exec(WHEELS, wheels)
    links = tmp_path / "wheels"
    links.mkdir()
    for name in ("small", "smaller"):
        wheels["wheel"](links, name)  # type: ignore[operator]
    wheels["wheel"](links, "small", "0.2.0")  # type: ignore[operator]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE", "MFLAGS"))}
    variables |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": links.as_uri(),
        "HOME": str(tmp_path),
    }
    return Checkout(folder, variables)


def test_the_first_is_a_few_lines_the_second_says_nothing_and_changes_are_seen(checkout: Checkout) -> None:
    assert not checkout.packages
    code, said, errors = checkout.make()
    assert (code, errors) == (0, ""), said + errors
    lines = said.splitlines()
    assert len(lines) <= 15 and all(line.startswith("ldft: ") for line in lines), said
    assert "\r" not in said and "\x1b" not in said, "no control characters where there is no terminal"
    assert lines[0].endswith("the log is .build/setup.log")
    assert any("packages: 1 installed" in line for line in lines)
    assert "Successfully installed small-0.1.0" in (checkout.folder / ".build" / "setup.log").read_text()
    assert {"small", "ldft"} <= checkout.packages and "smaller" not in checkout.packages
    assert not (checkout.folder / ".venv" / "tmp").exists()
    # Nothing to do: nothing said, also where only times have changed.
    (checkout.folder / "pyproject.toml").touch()
    began = time.monotonic()
    assert checkout.make() == (0, "", "")
    assert time.monotonic() - began < 3
    # The tests' packages come on top, and nothing is built for them.
    code, said, _ = checkout.make("test")
    assert code == 0 and "packages: 1 installed" in said and "native" not in said, said
    assert "smaller" in checkout.packages and checkout.builds == 1
    assert checkout.make("run") == checkout.make("test") == (0, "", "")
    # A new pin and a new source are both taken.
    (checkout.folder / "constraints.txt").write_text("small==0.2.0\n")
    checkout.source("right, too")
    assert checkout.make()[0] == 0 and checkout.builds == 2
    assert list(checkout.folder.glob(".venv/lib/*/site-packages/small-0.2.0.dist-info"))
    assert checkout.make("test") == (0, "", ""), "what a run sets up again keeps the tests' packages"


def test_a_compilers_error_is_shown_with_the_log_and_the_next_attempt_goes_on(checkout: Checkout) -> None:
    checkout.source("wrong")
    code, _, errors = checkout.make()
    assert code != 0
    first, *rest = errors.splitlines()
    assert first.startswith("ldft: set-up failed at: native module; all of its output is in ") and "setup.log" in first
    assert any("error: expected ';' before 'return'" in line for line in rest) and len(rest) <= 12, errors
    checkout.source("right")
    assert checkout.make()[0] == 0 and checkout.make() == (0, "", "")


def test_wheels_are_counted_while_pip_removes_its_folders(tmp_path: Path) -> None:
    (tmp_path / "stays.whl").write_bytes(b"four")
    (tmp_path / "gone.whl").symlink_to(tmp_path / "removed-after-it-was-listed")
    ended = threading.Event()

    def churn() -> None:
        for number in range(1_000_000):
            if ended.is_set():
                return
            folder = tmp_path / f"pip-unpack-{number}" / "inner"
            folder.mkdir(parents=True)
            (folder / "goes.whl").write_bytes(b"two")
            shutil.rmtree(folder.parent)

    pip = threading.Thread(target=churn)
    pip.start()
    try:
        sizes = {bytes_of_wheels(tmp_path) for _ in range(3000)}
    finally:
        ended.set()
        pip.join()
    assert min(sizes) == 4


def test_without_a_network_it_is_one_line(checkout: Checkout) -> None:
    # A port of this machine that nobody listens on.
    nowhere = {
        "PIP_NO_INDEX": "0",
        "PIP_FIND_LINKS": "",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "1",
    }
    (checkout.folder / "constraints.txt").write_text("small==0.1.0\n")
    code, _, errors = checkout.make(env=nowhere)
    assert code != 0 and errors.count("\n") == 0, errors
    assert errors.startswith("ldft: no connection to the package index; check the network")


def test_places_that_cannot_hold_an_environment_are_one_line(checkout: Checkout, tmp_path: Path) -> None:
    code, _, errors = checkout.make("run", "VENV=/proc/none")
    assert code != 0 and errors.startswith(
        "ldft: cannot write in /proc/none (No such file or directory); choose a folder"
    )
    file = tmp_path / "file"
    file.write_text("precious")
    for named in (file, file / "inside"):
        code, _, errors = checkout.make("run", f"VENV={named}")
        assert code != 0 and errors.startswith("ldft: ") and errors.count("\n") == 0 and str(named) in errors, errors
    assert file.read_text() == "precious"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    code, _, errors = checkout.make("run", f"VENV={mine}")
    assert code != 0 and "is not a virtual environment; choose a new folder" in errors and errors.count("\n") == 0
    assert (mine / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_running_and_goes_on_later(
    checkout: Checkout, signal_number: int, tmp_path: Path
) -> None:
    checkout.source("slow")
    # Not through make, which has a line of its own to say about the signal.
    command = [sys.executable, "-m", "scripts.setup", "run"]
    variables = checkout.variables | {"VENV": ".venv", "PYTHON": "python3", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, cwd=checkout.folder, env=variables, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 60
    (checkout.folder / "building").unlink(missing_ok=True)
    while not (checkout.folder / "building").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "ldft: set-up was interrupted; rerun the same command to resume\n"
    assert not running_in(checkout.folder)
    assert not list(tmp_path.iterdir()) and not (checkout.folder / ".build" / "tmp").exists()
    # A package of which pip had written only a part: it would take it for installed.
    part = next(checkout.folder.glob(".venv/lib/*/site-packages")) / "small-0.1.0.dist-info"
    part.mkdir(exist_ok=True)
    (part / "METADATA").write_text("Metadata-Version: 2.1\nName: small\nVersion: 0.1.0\n")
    (part / "RECORD").unlink(missing_ok=True)
    (part.parent / "small_module.py").unlink(missing_ok=True)
    checkout.source("right")
    assert checkout.make()[0] == 0 and (part.parent / "small_module.py").exists()


def test_what_fails_ends_the_build_beside_it_too(checkout: Checkout, tmp_path: Path) -> None:
    checkout.source("slow")
    pip = checkout.folder / "slow_pip"  # the packages fail once the build is at work
    pip.mkdir()
    (pip / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "if 'install' in sys.argv and '--constraint' in sys.argv:\n"
        "    while not pathlib.Path('building').exists(): time.sleep(0.05)\n"
        "    raise SystemExit('ERROR: no packages today')\n"
    )
    (checkout.folder / "building").unlink(missing_ok=True)
    try:
        code, _, errors = checkout.make(env={"TMPDIR": str(tmp_path), "PYTHONPATH": str(pip)})
    finally:
        shutil.rmtree(pip)
    assert code != 0 and errors.startswith("ldft: set-up failed at: packages"), errors
    assert not running_in(checkout.folder)
    assert not list(tmp_path.iterdir()) and not (checkout.folder / ".build" / "tmp").exists()


def test_a_full_disk_is_said_with_what_is_needed(tmp_path: Path) -> None:
    full = ["ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"]
    line = failure.explain("packages", full, tmp_path / ".venv", tmp_path / "setup.log")
    free = shutil.disk_usage(tmp_path).free / 2**30
    assert line == (
        f"the disk of {tmp_path}/.venv became full; now that pip has removed what it had unpacked, {free:.1f} GiB are free; set-up "
        "needs about 4 GiB, or 14 where torch comes with CUDA's libraries; make room, or use VENV= with a folder elsewhere, then "
        "rerun the same command to resume"
    )


def running_in(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if str(folder) in line:
            found.append(line)
    return found


def test_an_environment_of_another_python_or_another_place_is_made_anew(checkout: Checkout, tmp_path: Path) -> None:
    assert checkout.make()[0] == 0
    venv = checkout.folder / ".venv"
    # Scripts of a virtual environment hold its path, and it holds that of its Python.
    moved = tmp_path / "moved"
    shutil.copytree(venv, moved, symlinks=True)
    assert (Environment(moved).obstacle(None) or "").startswith("it was moved from ")
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python").symlink_to("/nowhere/python3")
    (other / "pyvenv.cfg").write_text("version = 3.11.2\n")
    assert Environment(other).obstacle(None) == "its Python 3.11 is gone"
    assert Environment(venv).obstacle(None) is None
    assert "but 3.99 is requested" in (Environment(venv).obstacle("3.99") or "")
    # What an upgrade of the system leaves: the Python that the environment rests on is another one now.
    settings = venv / "pyvenv.cfg"
    settings.write_text(settings.read_text().replace(f"version = 3.{sys.version_info.minor}", "version = 3.10"))
    (venv / "ldft-setup.json").unlink()
    code, said, errors = checkout.make()
    assert code == 0 and "is being recreated: it was made with Python 3.10, which is now 3." in said, said + errors
    assert checkout.make() == (0, "", "") and not (venv / "lib" / "python3.10").exists()


def test_on_a_terminal_one_line_is_rewritten(checkout: Checkout) -> None:
    checkout.source("wrong")
    main, other = os.openpty()
    variables = checkout.variables | {"TERM": "xterm"}
    process = subprocess.Popen(checkout.command(), cwd=checkout.folder, env=variables, stdout=other, stderr=other)
    os.close(other)
    shown = b""
    while True:
        try:
            shown += os.read(main, 4096)
        except OSError:  # the last writer has closed the terminal
            break
    process.wait()
    os.close(main)
    text = shown.decode()
    assert "\rldft: " in text and "\x1b[K" in text
    assert "error: expected ';'" in text.split("\x1b[K")[-1], "the error stands on lines of its own"
