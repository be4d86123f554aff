"""The rooms of the package and what may know of what, held against the sources: docs/architecture.md says why."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import LONGEST, TESTS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ldft"
MOST_LINES = 350

# A room may import itself and the rooms in its line; what stands alone at the top may be imported by all.
ROOMS: dict[str, set[str]] = {
    "memory": set(),
    "config": {"memory"},
    "results": {"config"},
    "monitor": {"config", "memory", "results"},
    "preflight": {"config", "memory"},
    "training": {"config", "memory", "preflight"},
    "planning": {"config", "memory", "preflight"},
    "runner": {"config", "memory", "monitor", "planning", "preflight", "results", "training"},
    "sweep": {"config", "preflight", "results", "runner"},
    "bench": {"config", "memory", "runner", "training"},
    "cli": {"config", "planning", "preflight", "results", "runner", "sweep"},
}
SHARED = {"batch", "closed_pipe", "errors", "environment", "files", "hidden_packages", "proc", "terminal", "_native"}
TORCH = ("torch", "deepspeed", "transformers", "peft", "liger_kernel", "accelerate")

# Modules of DeepSpeed that no document of it names, and attributes that it keeps for itself.
INSIDE = re.compile(
    r"\bdeepspeed\.(?:runtime|ops|utils|accelerator)\b|\._?ds_\w+|[\"']ds_\w+[\"']|_DeepSpeedZero|_partitioned_groups_flat|"
    r"\bgrad_partitions_flat_buffer\b|\bparam_groups_fp16_flat\w*|\bsingle_partition_of_fp32_groups\b|\b_hp_mapping\b|"
    r"\baccumulated_grads_in_cpu\b|\bpartition_numel\b|\bfp16_groups\b|\bbit16_groups\b"
)


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, known: set[str]) -> Iterator[str]:
    """Everything that a source imports, also inside functions; a module by its own name where `from` takes it from its folder.

    What only a type checker reads is left out.
    """
    tree = ast.parse(source)
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known or node.module == "ldft" else node.module


def graph_of(root: Path) -> dict[str, set[str]]:
    """Module -> what it imports, of all modules of the package below `root`."""
    files = {module_of(path, root): path for path in sorted((root / "ldft").rglob("*.py"))}
    return {name: set(imports(path.read_text(), set(files))) for name, path in files.items()}


@cache
def graph() -> dict[str, set[str]]:
    return graph_of(ROOT)


def room(module: str) -> str:
    """memory of ldft.memory.policy; the name of a module at the top."""
    return module.split(".")[1] if "." in module else ""


def cycle(found: dict[str, set[str]]) -> list[str]:
    """One circle of imports; empty where there is none."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> list[str]:
        state[name] = 1
        path.append(name)
        for other in sorted(found[name] & found.keys()):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state and (closed := visit(other)):
                return closed
        state[name] = 2
        path.pop()
        return []

    for name in found:
        if name not in state and (closed := visit(name)):
            return closed
    return []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert cycle(graph()) == []
    assert len(graph()) > 80, "the package was not read"


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_room_knows_only_of_the_rooms_below_it(name: str) -> None:
    allowed = ROOMS[name] | SHARED | {name}
    wrong = [
        f"{module} imports {other}"
        for module, found in graph().items()
        if room(module) == name
        for other in sorted(found)
        if other.startswith("ldft.") and room(other) not in allowed
    ]
    assert not wrong and any(room(module) == name for module in graph())


def test_every_folder_is_a_room_with_a_rule() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == ROOMS.keys()


def test_the_document_has_the_rooms_in_this_order() -> None:
    found = re.search(r"From the top: (.*?)\.\n", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert found
    levels = [re.findall(r"`(\w+)`", part) for part in found[1].split(",")]
    level = {name: number for number, names in enumerate(levels) for name in names}
    assert level.keys() == ROOMS.keys()
    assert all(level[name] < level[lower] for name, below in ROOMS.items() for lower in below)


def test_memory_imports_errors_and_the_native_module_alone() -> None:
    wrong = {
        f"{module} imports {other}"
        for module, found in graph().items()
        if room(module) == "memory"
        for other in found
        if other.startswith("ldft") and room(other) not in ("memory", "errors", "_native")
    }
    assert not wrong


@pytest.mark.parametrize("module", sorted(name for name in graph() if room(name) in ("preflight", "config")))
def test_what_is_decided_before_a_rank_starts_needs_no_torch(module: str) -> None:
    """Import each module alone, in an interpreter where torch and packages that import it are blocked."""
    code = f"import sys\nfor name in {TORCH}: sys.modules[name] = None\nimport {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {name for name in graph()[module] if name.split(".")[0] in TORCH}, "not inside a function either"


def test_only_the_rooms_for_it_know_deepspeed_from_inside() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(("training/deepspeed/", "preflight/deepspeed_")):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if found := INSIDE.search(line):
                wrong.append(f"{name}:{number}: {found[0]}")
    assert not wrong


def sources() -> list[Path]:
    """The Python files and C++ files that git would keep."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.cpp", "*.h"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split() if (ROOT / name).is_file()]


def test_no_file_is_longer_than_one_idea() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources()}
    assert len(lengths) > 200, "the sources were not listed"
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from ldft import b", "import ldft.a"),
        ("from ldft.b import x", "def f():\n    from ldft import a"),
        ("import ldft.b", "if True:\n    from ldft.a import y"),
    ],
)
def test_a_planted_circle_is_found(tmp_path: Path, first: str, second: str) -> None:
    (tmp_path / "ldft").mkdir()
    (tmp_path / "ldft" / "a.py").write_text(first)
    (tmp_path / "ldft" / "b.py").write_text(second)
    assert cycle(graph_of(tmp_path)) == ["ldft.a", "ldft.b", "ldft.a"]


def test_an_import_for_a_type_checker_alone_closes_no_circle(tmp_path: Path) -> None:
    (tmp_path / "ldft").mkdir()
    (tmp_path / "ldft" / "a.py").write_text("import ldft.b")
    (tmp_path / "ldft" / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ldft.a")
    assert cycle(graph_of(tmp_path)) == []


def test_files_that_begin_first_exist() -> None:
    """Else a file that was renamed would begin anywhere, and nobody would see why `make test` takes longer."""
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []
