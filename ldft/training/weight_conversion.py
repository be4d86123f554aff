"""How a model's tensors come from those of its files: transformers' renamings and conversions, planned from the headers alone and
applied to one group of tensors at a time.

transformers names some tensors differently in memory and in published files, and stacks the experts of a mixture into one tensor.
Its tables and operations are used as they are (transformers.conversion_mapping and core_model_loading), in its order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ldft.errors import ConfigError
from ldft.training.safetensors_index import Entry

# The text model's place in a multimodal checkpoint (Gemma 3, Mistral 3, Llama 4, ...), which transformers reads only as a whole.
_TEXT_PART = re.compile(r"^(model\.)?language_model\.")


@dataclass(slots=True)
class Group:
    """Tensors of the files that together make one or more tensors of the model."""

    first: str
    """The first tensor of the model that it makes."""

    converter: Any
    """transformers' WeightConverter, or None: the one source is copied."""

    dtype: torch.dtype
    """The sources are cast to it before they are converted, as transformers does."""

    sources: list[tuple[str, str]] = field(default_factory=list)
    """Names in the files, each with the converter's pattern that matched it."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What it makes: tensor of the model -> shape."""

    def convert(self, model: PreTrainedModel, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that it makes by name, from those that `read` returns for its sources."""
        if self.converter is None:
            return {self.first: read(self.sources[0][0]).to(self.dtype)}
        conversion = deepcopy(self.converter)
        for name, pattern in self.sources:
            conversion.add_tensor(self.first, name, pattern, read(name).to(self.dtype))
        made = conversion.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(slots=True)
class Plan:
    groups: list[Group]
    tied: list[tuple[Group, Group]]
    """A group that makes a tied tensor, and the one that makes the tensor it is tied to: their values must be equal."""
    unexpected: dict[str, str]
    """Tensors of the files that the model does not take: the name it would have in the model -> the name in the files."""


def plan(model: PreTrainedModel, entries: dict[str, Entry]) -> Plan:
    """Group the tensors of the files by what they make. Raises ConfigError if they cannot be converted.

    Works with parameters that ZeRO-3 has sharded. entries: every tensor of the files, by name.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict(keep_vars=True)

    def renamed(name: str) -> tuple[str, str | None]:
        prefix = model.base_model_prefix
        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, prefix, expected)
        if found[0] not in expected and name in expected:
            found = rename_source_key(name, [], [], prefix, expected)
        return found

    groups: dict[str, Group] = {}
    unexpected: dict[str, str] = {}
    for name in sorted(entries, key=dot_natural_key):
        target, pattern = renamed(name)
        if target not in expected and _TEXT_PART.match(name):
            target, pattern = renamed(name.replace("language_model.", "", 1))
        if target not in expected:
            unexpected[target] = name
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(target, Group(target, converter, expected[target].dtype))
        if group.sources and (converter is None or group.converter is None):
            raise ConfigError(
                "model.path", f"{group.sources[0][0]} and {name} are both {target} of the model; remove what is stale"
            )
        group.sources.append((name, pattern or name))
    for group in groups.values():
        group.shapes = _shapes(model, group, entries)
    return _untied(list(groups.values()), unexpected, expected)


def _shapes(model: PreTrainedModel, group: Group, entries: dict[str, Entry]) -> dict[str, tuple[int, ...]]:
    """What a group makes, by converting tensors without values."""
    for pattern in dict.fromkeys(pattern for _, pattern in group.sources if "*" in pattern):
        numbered = re.compile(pattern.replace("*", r"(\d+)"))
        numbers = [
            int(found[1]) for name, source in group.sources if source == pattern and (found := numbered.search(name))
        ]
        if numbers != list(range(len(numbers))):
            missing = min(set(range(max(numbers))) - set(numbers), default=numbers[-1])
            raise ConfigError(
                "model.path",
                f"the files lack number {missing} of {pattern}, of which {group.first} is made; fetch them again",
            )

    def read(name: str) -> torch.Tensor:
        return torch.empty(entries[name].shape, device="meta")

    try:
        return {name: tuple(value.shape) for name, value in group.convert(model, read).items()}
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            "model.path",
            f"transformers cannot make {group.first} of {group.sources[0][0]} and {len(group.sources) - 1} more ({reason}); "
            "fetch the files again, or choose the model= that they were saved from",
        ) from error


def _untied(groups: list[Group], unexpected: dict[str, str], expected: dict[str, torch.Tensor]) -> Plan:
    """The plan, with each tied parameter made once: by its own name where the files have it, else by that of its twin."""
    owners: dict[int, Group] = {}
    tied: list[tuple[Group, Group]] = []
    # In the model's order, so that the embedding comes before the output projection that is tied to it.
    order = {name: position for position, name in enumerate(expected)}
    for group in sorted(groups, key=lambda group: order[group.first]):
        owner = owners.setdefault(id(expected[group.first]), group)
        if owner is not group:
            tied.append((group, owner))
    dropped = {id(group) for group, _ in tied}
    return Plan([group for group in groups if id(group) not in dropped], tied, unexpected)
