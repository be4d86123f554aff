"""The native code under the address, undefined-behaviour and thread sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import long

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
TESTS = [Path(__file__).with_name(name) for name in ("test_memory.cpp", "test_update.cpp")]
SOURCES = [CSRC / f"{name}.cpp" for name in ("region", "stripes", "system", "threads", "touch", "update", "update_job")]


def build_and_run(folder: Path, sanitizers: str) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    program = folder / "test_memory"
    command = [compiler, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", f"-fsanitize={sanitizers}"]
    command += ["-fno-sanitize-recover=all", f"-I{CSRC}", "-o", str(program)]
    built = subprocess.run([*command, *map(str, TESTS), *map(str, SOURCES)], capture_output=True, text=True)
    if built.returncode and "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"this compiler has no runtime for -fsanitize={sanitizers}")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=300)


@long
def test_native_code_is_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    result = build_and_run(tmp_path, "address,undefined")
    assert result.returncode == 0, result.stderr
    assert "all native tests passed" in result.stdout


@long
def test_native_code_is_clean_under_the_thread_sanitizer(tmp_path):
    result = build_and_run(tmp_path, "thread")
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this compiler's thread sanitizer cannot run under this kernel's address layout")
    assert result.returncode == 0, result.stderr
    assert "all native tests passed" in result.stdout


def test_native_module_links_neither_libnuma_nor_torch_nor_cuda():
    from ldft import _native

    linked = subprocess.run(["ldd", _native.__file__], capture_output=True, text=True, check=True).stdout
    for name in ("numa", "torch", "cuda", "openblas"):
        assert name not in linked, linked
