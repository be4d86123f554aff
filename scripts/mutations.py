"""Change one operator, comparison or constant of a module at a time, and see whether its nearest tests notice.

    python scripts/mutations.py                                  # 60 mutations, drawn over all modules below
    python scripts/mutations.py --count 10 --seed 3 ldft/memory/limits.py
    python scripts/mutations.py --list                           # where there is something to change, per module

Each mutation is written to a copy of the working tree in a temporary folder, so the checkout never holds one. Prints each survivor
with its line; the exit code is 1 if there are any. A survivor is a missing assertion, or a change without effect: decide by
reading. A small sampler instead of mutmut or cosmic-ray, which run the whole suite for each mutation or copy single folders: the
tests here need the native module and the config tree beside the package.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Module -> its nearest tests.
TESTS = {
    "ldft/memory/cost_model.py": ["tests/memory/test_cost_model.py"],
    "ldft/memory/layout.py": ["tests/memory/test_layout.py"],
    "ldft/memory/limits.py": ["tests/memory/test_limits.py"],
    "ldft/memory/policy.py": ["tests/memory/test_policy.py"],
    "ldft/memory/probe.py": ["tests/memory/test_probe.py"],
    "ldft/planning/candidates.py": ["tests/planning/test_candidates.py"],
    "ldft/planning/iteration_time.py": [
        "tests/planning/test_time_formulas.py",
        "tests/planning/test_whole_formulas.py",
        "tests/planning/test_iteration_time.py",
    ],
    "ldft/planning/machine.py": ["tests/planning/test_machine_rates.py"],
    "ldft/planning/rates.py": ["tests/planning/test_machine_rates.py"],
    "ldft/planning/remedies.py": ["tests/planning/test_remedies.py"],
    "ldft/planning/search.py": ["tests/planning/test_search_steps.py", "tests/planning/test_search.py"],
    "ldft/planning/settled.py": ["tests/planning/test_settled.py"],
    "ldft/preflight/assumed_machine.py": ["tests/preflight/test_assumed_machine.py"],
    "ldft/preflight/deepspeed_keys.py": [
        "tests/preflight/test_deepspeed_bounds.py",
        "tests/preflight/test_deepspeed_files.py",
        "tests/preflight/test_deepspeed_config.py",
    ],
    "ldft/preflight/deepspeed_refused.py": [
        "tests/preflight/test_deepspeed_bounds.py",
        "tests/preflight/test_deepspeed_files.py",
    ],
    "ldft/preflight/device_estimate.py": [
        "tests/preflight/test_device_parts.py",
        "tests/preflight/test_device_estimate.py",
        "tests/preflight/test_memory_of_experts.py",
    ],
    "ldft/preflight/device_inputs.py": ["tests/preflight/test_host_parts.py", "tests/preflight/test_gpu_share.py"],
    "ldft/preflight/fit.py": ["tests/preflight/test_host_parts.py", "tests/preflight/test_fit.py"],
    "ldft/preflight/gpu_share.py": ["tests/preflight/test_gpu_share.py"],
    "ldft/preflight/host_estimate.py": ["tests/preflight/test_host_parts.py", "tests/preflight/test_host_estimate.py"],
    "ldft/preflight/mlp_tiles.py": ["tests/preflight/test_mlp_tiles.py"],
    "ldft/preflight/parameter_counts.py": [
        "tests/preflight/test_parameter_counts.py",
        "tests/preflight/test_host_estimate.py",
    ],
    "ldft/preflight/role_placement.py": [
        "tests/preflight/test_budgets.py",
        "tests/preflight/test_role_placement.py",
        "tests/preflight/test_strategy_options.py",
    ],
    "ldft/preflight/room.py": ["tests/preflight/test_host_parts.py", "tests/preflight/test_gpu_share.py"],
    "ldft/preflight/strategies.py": [
        "tests/preflight/test_greedy.py",
        "tests/preflight/test_budgets.py",
        "tests/preflight/test_strategy_options.py",
    ],
    "ldft/results/intact.py": ["tests/results/test_intact.py"],
    "ldft/results/places.py": ["tests/results/test_places.py", "tests/results/test_rewritten.py"],
    "ldft/results/rewritten.py": ["tests/results/test_places.py", "tests/results/test_rewritten.py"],
    "ldft/sweep/plan.py": ["tests/sweep/test_plan.py"],
    "multirun_analysis/comparison.py": ["tests/analysis/test_verdicts.py", "tests/analysis/test_comparison.py"],
    "multirun_analysis/figures/plans.py": ["tests/analysis/test_plan_maps.py"],
    "multirun_analysis/figures/predictions.py": ["tests/analysis/test_predictions.py"],
    "multirun_analysis/rows.py": [
        "tests/analysis/test_verdicts.py",
        "tests/analysis/test_tidy.py",
        "tests/analysis/test_labels.py",
    ],
    "multirun_analysis/tidy.py": ["tests/analysis/test_verdicts.py", "tests/analysis/test_tidy.py"],
}
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
# A mutation that takes this many times as long as the tests without one never ends; quick tests have this long at least.
_TIMES_AS_LONG, _LONG_S = 5, 60
# An editable install would import the checkout's packages, not the copy's. Every Python that the tests start runs this first.
_WITHOUT_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]"


@dataclass(frozen=True, slots=True)
class Mutation:
    """The number of the change among all of its module, and its place."""

    module: str
    number: int
    line: int
    description: str


def _changes(tree: ast.AST) -> Iterator[tuple[int, str, ast.AST, str, object]]:
    """(line, description, node, field, new value) of each possible change, always in the same order."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
            new = _SWAPS[type(node.op)]()
            yield node.lineno, f"{type(node.op).__name__} -> {type(new).__name__}", node, "op", new
        elif isinstance(node, ast.Compare):
            for position, op in enumerate(node.ops):
                if type(op) in _SWAPS:
                    new = _SWAPS[type(op)]()
                    ops = [*node.ops[:position], new, *node.ops[position + 1 :]]
                    yield node.lineno, f"{type(op).__name__} -> {type(new).__name__}", node, "ops", ops
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.lineno, "not x -> not not x", node, "operand", ast.UnaryOp(ast.Not(), node.operand)
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node.lineno, f"{node.value} -> {not node.value}", node, "value", not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node.lineno, f"{node.value} -> {node.value + 1}", node, "value", node.value + 1


def possible(module: str) -> list[Mutation]:
    """Every mutation of a module."""
    tree = ast.parse((ROOT / module).read_text())
    return [Mutation(module, number, line, what) for number, (line, what, *_) in enumerate(_changes(tree))]


def mutated(mutation: Mutation) -> str:
    """The module's source with the mutation; comments are lost."""
    tree = copy.deepcopy(ast.parse((ROOT / mutation.module).read_text()))
    _, _, node, field, new = list(_changes(tree))[mutation.number]
    setattr(node, field, new)
    return ast.unparse(ast.fix_missing_locations(tree))


def _copied(folder: Path) -> Path:
    """A copy of the checkout's tracked and new files, with the native module that was built for it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    import ldft._native as native

    shutil.copy2(str(native.__file__), folder / "ldft" / Path(str(native.__file__)).name)
    (folder / "sitecustomize.py").write_text(_WITHOUT_EDITABLE)
    return folder


def _pass(tests: Sequence[str], folder: Path, within_s: float | None = None) -> bool:
    """Whether the tests pass in the copy. The first failure ends them; so does a mutation that never ends, after `within_s`."""
    line = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    try:
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, timeout=within_s, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutate modules and run their nearest tests.")
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="default: all that have tests listed here")
    parser.add_argument("--count", type=int, default=60, help="mutations to draw; default: 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the number of possible mutations and end")
    arguments = parser.parse_args()
    if unknown := [module for module in arguments.modules if module not in TESTS]:
        parser.error(f"no tests listed for {unknown[0]}; add them to TESTS in {Path(__file__).name}")
    every = [mutation for module in arguments.modules for mutation in possible(module)]
    if arguments.list:
        for module in arguments.modules:
            print(f"{sum(one.module == module for one in every):4d} {module}")
        return 0
    drawn = random.Random(arguments.seed).sample(every, min(arguments.count, len(every)))
    survivors = []
    with tempfile.TemporaryDirectory(prefix="ldft-mutations-") as name:
        folder = _copied(Path(name))

        @functools.cache
        def takes_s(tests: tuple[str, ...]) -> float | None:
            """Seconds of the tests without a mutation; None if they fail."""
            start = time.monotonic()
            return time.monotonic() - start if _pass(tests, folder) else None

        for module in sorted({mutation.module for mutation in drawn}):
            if takes_s(tuple(TESTS[module])) is None:
                print(f"the tests of {module} fail without a mutation; nothing can be said about it", flush=True)
                drawn = [mutation for mutation in drawn if mutation.module != module]
        for number, mutation in enumerate(sorted(drawn, key=lambda one: (one.module, one.number)), start=1):
            target = folder / mutation.module
            target.write_text(mutated(mutation))
            usual_s = takes_s(tuple(TESTS[mutation.module])) or 0
            survived = _pass(TESTS[mutation.module], folder, max(_TIMES_AS_LONG * usual_s, _LONG_S))
            shutil.copy2(ROOT / mutation.module, target)
            word = "SURVIVED" if survived else "caught"
            print(
                f"[{number}/{len(drawn)}] {word} {mutation.module}:{mutation.line}: {mutation.description}", flush=True
            )
            survivors += [mutation] * survived
    print(f"{len(drawn) - len(survivors)} of {len(drawn)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
