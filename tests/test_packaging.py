"""What a user installs: the wheel stands alone, the make targets explain what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a virtual environment that has ldft from its wheel and everything else from ours."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        f"--config-settings=build-dir={folder}/build",
        "--config-settings=cmake.build-type=Debug",  # compiles in a third of the time, and in less without symbols
        "--config-settings=cmake.define.CMAKE_CXX_FLAGS_DEBUG=-O0",
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=300)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    wheel = next(folder.glob("ldft-*.whl"))
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    # A path line adds the folder alone: the editable install's own .pth file in there is not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.mark.parametrize("command", [["ldft"], ["python", "-m", "ldft"]])
def test_the_wheel_composes_its_own_conf_tree_in_an_unrelated_folder(from_wheel, tmp_path, command) -> None:
    program = [str(from_wheel / command[0]), *command[1:]]
    done = subprocess.run(
        [*program, "--cfg", "job", "model=nano"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "name: nano" in done.stdout and "tokens: 1024" in done.stdout
    assert not list(tmp_path.iterdir())
    where = subprocess.run(
        [
            str(from_wheel / "python"),
            "-c",
            "import ldft.environment as e, ldft._native as n; print(e.CONF_DIR, n.__file__)",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert str(ROOT) not in where.stdout.replace(str(from_wheel), "")


def test_the_wheel_carries_its_license(from_wheel) -> None:
    code = (
        "from importlib import metadata; about = metadata.metadata('ldft')\n"
        "print(about['License-Expression'], *[file.read_text() for file in metadata.files('ldft') if file.name == 'LICENSE'])"
    )
    done = subprocess.run([str(from_wheel / "python"), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Apache-2.0 ")
    assert done.stdout.split(" ", 1)[1].strip() == (ROOT / "LICENSE").read_text().strip()


def test_the_wheel_sweeps_in_an_unrelated_folder(from_wheel, tmp_path) -> None:
    # A value that the cell refuses: a row each, without ranks.
    line = [str(from_wheel / "ldft"), "-m", "model=nano", "train.iterations=0", "train.seed=1,2", "launch.device=cpu"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "2 cells: 2 invalid" in done.stdout, done.stdout + done.stderr
    status = [str(from_wheel / "python"), "-m", "ldft.status"]
    assert "2 invalid" in subprocess.run(status, capture_output=True, text=True, cwd=tmp_path, check=True).stdout


def test_the_wheel_makes_a_report(from_wheel, tmp_path) -> None:
    line = [str(from_wheel / "python"), "-m", "multirun_analysis", "report", str(ROOT / "multirun_analysis" / "data")]
    done = subprocess.run([*line, "--out", "r.html"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert all(
        part in (tmp_path / "r.html").read_text() for part in ("color-scheme", "function openDetails", "Plotly.react")
    )


@pytest.mark.parametrize(
    ("hidden", "package"),
    [("c++ g++", "g++"), ("python3", "python3"), ("venv", "python3-venv"), ("headers", "python3-dev")],
)
def test_a_missing_system_package_is_one_line_that_names_it(tmp_path, hidden, package) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "make", "touch", "cat", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    if hidden != "python3":
        # A python3 that has no venv module, or no headers, as Debian's has them in packages of their own.
        block = {
            "venv": "sys.modules['ensurepip'] = None",
            "headers": "import sysconfig; get = sysconfig.get_paths; "
            "sysconfig.get_paths = lambda *a, **k: get(*a, **k) | {'include': '/none'}",
        }
        (tmp_path / "sitecustomize.py").write_text("import sys\n" + block.get(hidden, ""))
        python = tools / "python3"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
    if "c++" not in hidden:
        (tools / "c++").symlink_to(shutil.which("c++"))
    done = subprocess.run(
        ["make", "run", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        env={"PATH": str(tools), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("ldft:")]
    assert len(lines) == 1 and f"apt-get install {package})" in lines[0], done.stdout + done.stderr
    assert not (tmp_path / "venv").exists()
