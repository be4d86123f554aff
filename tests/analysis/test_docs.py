"""The documents keep up with the code: generated parts are current, links lead somewhere, commands name what exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from ldft.config import columns
from ldft.monitor import trace
from ldft.results import schema

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DOCS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]

_spec = importlib.util.spec_from_file_location("docs_script", REPOSITORY / "scripts" / "docs.py")
assert _spec and _spec.loader
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_generated_parts_are_current(path: Path) -> None:
    text = path.read_text()
    assert script.filled(text) == text, "run: python scripts/docs.py"


def test_every_column_is_documented_with_its_meaning() -> None:
    text = (REPOSITORY / "docs" / "columns.md").read_text()
    for column in [*schema.all_columns(), *trace.COLUMNS]:
        assert f"| `{column.name}` |" in text and column.description in text


def test_every_key_that_an_error_names_is_in_troubleshooting() -> None:
    """Found another way than the script does: by text, not by syntax."""
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    keys = set()
    for path in (REPOSITORY / "ldft").rglob("*.py"):
        keys |= set(re.findall(r"(?:ConfigError|CombinationError)\(\s*\"([a-z_.]+)\"", path.read_text()))
    assert len(keys) > 10
    assert not {key for key in keys if f"`{key}`" not in text}


def test_messages_of_loops_are_listed_for_each_key() -> None:
    found = {key for key, _ in script.messages()}
    assert {"train.micro_batch_size", "train.iterations", "model.num_layers", "optimizer.eps"} <= found


def test_every_variable_and_flag_of_the_seed_has_its_line() -> None:
    text = (REPOSITORY / "docs" / "coming_from_the_seed.md").read_text()
    names = ["MODEL_NAME", "NUM_LAYERS", "HIDDEN_SIZE", "NUM_GPUS", "SYSTEM_TYPE", "PER_DEVICE_TRAIN_BATCH_SIZE"]
    names += [
        "GRADIENT_ACCUMULATION_STEPS",
        "MAX_SEQ_LENGTH",
        "LORA_DIM",
        "LEARNING_RATE",
        "WEIGHT_DECAY",
        "BETA_0",
        "BETA_1",
    ]
    names += ["NUM_TRAIN_ITERATION", "--liger_kernel", "--gradient_checkpointing", "--offload_gradient_checkpointing"]
    names += ["--flash_attn_2", "--zero_overhead_pin_memory", "--numa_aware_allocation"]
    for name in names:
        line = next(line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert re.search(r"\| (yes|not yet) \|$", line), line


def test_overrides_called_available_are_keys_or_options() -> None:
    assert script.available("model=tiny") and not script.available("model=of_nobody")
    assert script.available("train.iterations=5") and not script.available("train.steps=5")
    assert {key for key, _ in columns()} >= {"system", "launch.num_ranks"}


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as forges make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", path.read_text()):
        if not target.startswith(("http:", "https:")):
            there = (path.parent / target).resolve() if target else path
            assert there.exists() and there.is_relative_to(REPOSITORY), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{path.name}: {target}#{anchor}"


def test_the_index_names_every_document() -> None:
    index = (REPOSITORY / "docs" / "README.md").read_text()
    for path in (REPOSITORY / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index, path.name


def test_what_messages_call_a_section_of_the_readme_is_one() -> None:
    sources = "".join(path.read_text() for path in (REPOSITORY / "ldft").rglob("*.py"))
    named = set(re.findall(r'see README, "([\w ]+)"', sources))
    assert named and {section.lower().replace(" ", "-") for section in named} <= anchors(REPOSITORY / "README.md")
