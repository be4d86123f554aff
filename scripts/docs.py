"""Fill in the generated parts of docs/: `python scripts/docs.py`; with --check, only list what is out of date.

Between `<!-- columns: begin -->` and `<!-- columns: end -->` goes the table of row columns, from the schema; between `trace` marks,
the columns of trace.parquet; between `messages` marks, every message about a config value, from the source; between `sweep` marks,
the speeds in multirun_analysis/data. In tables between `availability` marks, the last cell of each line says whether its first
override exists in this version's config tree.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from ldft.config import columns as config_columns
from ldft.monitor import trace
from ldft.results import schema
from multirun_analysis import evidence, load, publish

REPOSITORY = Path(__file__).resolve().parent.parent
# Errors whose first argument is the dotted key, and errors that are only a sentence.
KEYED = {"ConfigError", "CombinationError", "PlacementError", "NumaCallError"}
PLAIN = {"HostMemoryError", "ResultsError"}


def column_table(columns: list[schema.Column]) -> str:
    """Columns of the row, or of the trace, as a markdown table."""
    lines = ["| column | type | unit | meaning |", "| --- | --- | --- | --- |"]
    for column in columns:
        kind = str(column.type).replace("element: ", "").replace("item: ", "")
        lines.append(f"| `{column.name}` | {kind} | {column.unit} | {column.description} |")
    return "\n".join(lines)


def _text(node: ast.expr, names: dict[str, str]) -> str:
    """A message as a reader sees it: literal text, with `<name>` for inserted values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names) + _text(node.right, names)
    if isinstance(node, ast.IfExp):
        body, other = _text(node.body, names), _text(node.orelse, names)
        return f"{body} (or: {other})" if body and other else f"[{body or other}]"
    if isinstance(node, ast.Name):
        return names.get(node.id, f"<{node.id}>")
    if isinstance(node, ast.Attribute):
        return f"<{node.attr}>"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len" and node.args:
        return f"<number of {_text(node.args[0], names).strip('<>')}>"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "plural":
        return f"{_text(node.args[0], names)} {_text(node.args[1], names)}s"
    return "<...>" if isinstance(node, ast.Call | ast.Subscript | ast.BinOp) else f"<{ast.unparse(node)}>"


def _walk(node: ast.AST, loops: tuple[ast.For, ...]) -> Iterator[tuple[ast.Call, tuple[ast.For, ...]]]:
    """Every call below a node, with the loops around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child, loops
        yield from _walk(child, (*loops, child) if isinstance(child, ast.For) else loops)


def _loop_values(loops: tuple[ast.For, ...]) -> Iterator[dict[str, str]]:
    """Variables bound by the innermost loop over literal strings, one dict per iteration; one empty dict if there is no such
    loop."""
    for loop in reversed(loops):
        if isinstance(loop.target, ast.Name) and isinstance(loop.iter, ast.Tuple | ast.List):
            values = [item.value for item in loop.iter.elts if isinstance(item, ast.Constant)]
            if values and len(values) == len(loop.iter.elts):
                yield from ({loop.target.id: str(value)} for value in values)
                return
    yield {}


def _constants(module: ast.Module) -> dict[str, str]:
    """Strings and numbers assigned to names at a module's top level."""
    found: dict[str, str] = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            found |= {
                target.id: str(statement.value.value) for target in statement.targets if isinstance(target, ast.Name)
            }
    return found


def messages() -> list[tuple[str, str]]:
    """(key, message) of every error that a user can meet, from the source of ldft; the key is empty for plain sentences.

    Messages that are built elsewhere and only passed on are not listed.
    """
    found = set()
    for path in sorted((REPOSITORY / "ldft").rglob("*.py")):
        module = ast.parse(path.read_text())
        constants = _constants(module)
        for call, loops in _walk(module, ()):
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            if name in KEYED and len(call.args) == 2:
                for turn in _loop_values(loops):
                    names = constants | turn
                    if name == "PlacementError":
                        names["key"] = "numa"  # the caller passes the key; roles have keys below numa
                    found.add((_text(call.args[0], names), _text(call.args[1], names)))
            elif name in PLAIN and call.args:
                found.add(("", _text(call.args[0], constants)))
    return sorted((key, text) for key, text in found if re.search(r"[a-z]", re.sub(r"<[^>]*>", "", text)))


def message_table() -> str:
    """Every message as a markdown table: key, what is wrong, what to do."""
    lines = ["| key | message | what to do |", "| --- | --- | --- |"]
    for key, message in messages():
        problem, _, fix = " ".join(message.split()).replace("|", "\\|").partition("; ")
        shown = [text.replace("<", "&lt;").replace(">", "&gt;") for text in (problem, fix)]
        lines.append(f"| {f'`{key}`' if key else ''} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


@cache
def _keys() -> frozenset[str]:
    return frozenset(key for key, _ in config_columns())


def available(override: str) -> bool:
    """Whether `group=option`, `dotted.key=value` or `python -m module` exists in this version."""
    if override.startswith("python -m "):
        module = REPOSITORY / Path(*override.split()[2].split("."))
        return module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    key, _, value = override.partition("=")
    if (REPOSITORY / "conf" / key).is_dir():
        return (REPOSITORY / "conf" / key / f"{value}.yaml").exists()
    if key == "memory.pinning":
        from ldft.config.memory import Pinning

        return value in Pinning.__members__
    return key in _keys()


def _availability(block: str) -> str:
    lines = []
    for line in block.splitlines():
        cells = line.split("|")
        overrides = re.findall(r"`((?:[a-z_.]+=[^`]*)|(?:python -m ldft\.[a-z_]+))`", line)
        if len(cells) > 3 and overrides:
            cells[-2] = " yes " if available(overrides[0]) else " not yet "
            line = "|".join(cells)
        lines.append(line)
    return "\n".join(lines)


def _replace(text: str, mark: str, fill: Callable[[str], str]) -> str:
    pattern = re.compile(rf"(<!-- {mark}: begin -->\n)(.*?)(\n?<!-- {mark}: end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{fill(found[2])}\n{found[3].lstrip()}", text)


def filled(text: str) -> str:
    """A document with up-to-date generated parts."""
    text = _replace(text, "columns", lambda _: column_table(schema.all_columns()))
    text = _replace(text, "trace", lambda _: column_table(trace.COLUMNS))
    text = _replace(text, "messages", lambda _: message_table())
    text = _replace(text, "sweep", lambda _: evidence.speeds(load(publish.DATA)))
    return _replace(text, "availability", _availability)


def main() -> int:
    """Write changed documents; with --check, write nothing and return 1 if any would change."""
    stale = []
    for path in sorted((REPOSITORY / "docs").glob("*.md")):
        text = path.read_text()
        if filled(text) != text:
            stale.append(path.relative_to(REPOSITORY))
            if "--check" not in sys.argv:
                path.write_text(filled(text))
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(map(str, stale))}; run python scripts/docs.py", file=sys.stderr)
        return 1
    print(f"docs: {', '.join(map(str, stale)) or 'nothing'} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
