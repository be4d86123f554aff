"""The values among which a plan chooses, counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from ldft.config import Config, Goal, NumaStrategy, OffloadDevice
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.config.numa import NumaScope
from ldft.errors import CombinationError, ConfigError
from ldft.memory.topology import Node, Topology
from ldft.planning import candidates
from ldft.planning.candidates import OFFLOADS, Choice

CPU, GPU, NONE = CheckpointingMode.cpu, CheckpointingMode.gpu, CheckpointingMode.none


def config_of(*keep: str, layers: int = 2) -> Config:
    config = Config()
    config.model.num_layers, config.plan.goal, config.plan.keep = layers, Goal.fastest, list(keep)
    return config


def values(config: Config, name: str) -> set[object]:
    return {getattr(choice, name) for choice in candidates.choices(config)}


def test_every_combination_of_what_is_free() -> None:
    # Three offloads. Each with a plain pass, or with one of 2 modes and 3 ways to keep attention, of one layer or, with or without
    # tiles, of both: 1 + 2 x 3 x (1 + 2) = 19.
    found = list(candidates.choices(config_of()))
    assert len(found) == len(set(found)) == 57
    assert {choice.offload for choice in found} == {OFFLOADS["none"], OFFLOADS["optimizer"], OFFLOADS["full"]}
    recomputed = [choice for choice in found if choice.mode is not NONE]
    assert {(choice.layers, choice.mlp_tiles) for choice in recomputed} == {(1, None), (-1, None), (-1, 16)}
    assert {(c.layers, c.every, c.mlp_tiles) for c in found if c.mode is NONE} == {(-1, 1, None)}
    assert {(c.micro_batch_size, c.gradient_accumulation_steps) for c in found} == {(1, 1)}
    several = config_of()
    several.launch.num_ranks = 2  # shards without offload, too
    assert values(several, "offload") == set(OFFLOADS.values()) and len(list(candidates.choices(several))) == 76


def test_only_the_longest_plan_keeps_every_kth_input() -> None:
    config = config_of(layers=3)
    config.plan.goal = Goal.longest
    assert {choice.every for choice in candidates.choices(config)} == {1, 2, 3}
    config.model.num_layers = 9
    assert values(config, "every") == {1, 2, 3, 4}
    config.checkpointing.every = 7
    assert values(config, "every") == {7}
    config = config_of("checkpointing.every")
    config.plan.goal = Goal.longest
    assert values(config, "every") == {1}


def test_what_was_set_stays() -> None:
    config = config_of("checkpointing", "checkpointing.keep_attention", "offload")
    assert values(config, "mode") == {CPU} and values(config, "keep_attention") == {KeepAttention.none}
    assert values(config, "offload") == {OFFLOADS["full"]} and values(config, "layers") == {1, -1}
    config = config_of("kernels.mlp_tiles", "offload.gpu_share")
    config.kernels.mlp_tiles = 4  # then also where it is not possible, so that the refusal says why
    assert values(config, "mlp_tiles") == {4} and {c.layers for c in candidates.choices(config)} == {1, -1}
    assert len(values(config, "offload")) == 3, "a share of the GPU does not decide what is offloaded"
    # Values of a file of defaults are none of ldft's.
    config = config_of()
    config.checkpointing.layers = 1
    assert values(config, "layers") == {1}
    config.offload.parameters = OffloadDevice.none
    assert values(config, "offload") == {(3, OffloadDevice.none, OffloadDevice.cpu)}
    for key, value in (("deepspeed", {"a": 1}), ("deepspeed_file", "a.json")):
        config = config_of()
        setattr(config.offload, key, value)
        assert values(config, "offload") == {OFFLOADS["full"]}
    assert candidates.free(config_of("checkpointing"), "checkpointing.layers")
    assert not candidates.free(config_of("checkpointing"), "checkpointing.mode")
    assert not candidates.free(config_of("checkpointing.mode"), "checkpointing.mode")


def test_the_leanest_recompute_all_and_keep_no_attention() -> None:
    found = list(candidates.leanest(config_of()))
    # Three offloads, each with a plain pass, or with one of 2 modes and with or without tiles.
    assert len(found) == 15 and {choice.layers for choice in found} == {-1}
    assert {choice.keep_attention for choice in found} == {KeepAttention.none}
    config = config_of("checkpointing.layers", "checkpointing.keep_attention")
    config.checkpointing.layers, config.checkpointing.keep_attention = 1, KeepAttention.host
    # What was set is the least; tiles need all layers.
    assert len(list(candidates.leanest(config))) == 3 * 3
    assert sum(choice.mode is CPU for choice in candidates.leanest(config)) == 3


def test_a_choice_is_put_into_a_copy_of_the_config() -> None:
    config = config_of()
    choice = Choice(OFFLOADS["optimizer"], GPU, 1, 2, KeepAttention.host, 16, 3, 5, 2)
    found = candidates.applied(config, choice)
    assert (found.offload.stage, found.offload.parameters, found.offload.optimizer) == OFFLOADS["optimizer"]
    settings = found.checkpointing
    assert (settings.mode, settings.layers, settings.every, settings.keep_attention) == (GPU, 1, 2, KeepAttention.host)
    assert (found.kernels.mlp_tiles, found.train.micro_batch_size) == (16, 3)
    assert (found.train.gradient_accumulation_steps, found.launch.sequence_parallel) == (5, 2) and config == config_of()
    assert choice.kind == (OFFLOADS["optimizer"], GPU, KeepAttention.host, 2)
    with pytest.raises(CombinationError, match=r"checkpointing\.layers: 1 needs"):
        candidates.applied(config, dataclasses.replace(choice, mode=NONE))
    config.offload.gpu_share = 0.25
    assert candidates.applied(config, choice).offload.gpu_share == 0.25
    with pytest.raises(CombinationError, match=r"offload\.gpu_share: 0\.25 needs the optimizer in host memory"):
        candidates.applied(config, dataclasses.replace(choice, offload=OFFLOADS["zero3"]))
    config.offload.gpu_share = 0.0
    candidates.applied(config, dataclasses.replace(choice, offload=OFFLOADS["zero3"]))


def of_nodes(*sizes: int) -> Topology:
    nodes = tuple(Node(id=id, cpus=(id,), total_bytes=size, distances={}) for id, size in enumerate(sizes))
    return Topology(nodes=nodes, gpus={}, weights={}, weights_auto=None, allowed=tuple(range(len(sizes))))


def test_roles_are_placed_where_two_nodes_have_memory_and_nothing_was_set() -> None:
    config, two = config_of(), of_nodes(1, 1)
    numa = candidates.placed(config, two).numa
    assert (numa.name, numa.scope, numa.strategy) == ("optimal", NumaScope.roles, NumaStrategy.optimal)
    assert candidates.placed(config, of_nodes(1, 0)) is config
    for key, stays in (("numa", True), ("numa.kind", True), ("numa.bandwidth", False), ("numas", False)):
        config = config_of(key)
        assert (candidates.placed(config, two) is config) is stays, key
    config = config_of()
    config.numa.bandwidth = {"node0": {"cpu": 1}}
    assert candidates.placed(config, two).numa.bandwidth == config.numa.bandwidth
    config.numa.local_budget_gib = 1
    assert candidates.placed(config, two) is config


def test_tokens_of_an_update_are_divided_in_every_way() -> None:
    config = config_of("checkpointing.layers", "checkpointing.keep_attention", "offload", "launch.sequence_parallel")
    config.launch.num_ranks, config.seq_len.tokens, config.plan.tokens_per_update = 2, 10, 120

    def pairs() -> set[tuple[int, int]]:
        return {(c.micro_batch_size, c.gradient_accumulation_steps) for c in candidates.choices(config)}

    assert pairs() == {(1, 6), (2, 3), (3, 2), (6, 1)}
    config.train.micro_batch_size, config.train.gradient_accumulation_steps = 3, 2
    config.plan.keep.append("train.gradient_accumulation_steps")
    assert pairs() == {(3, 2)}
    config.plan.keep.append("train.micro_batch_size")
    assert pairs() == {(3, 2)}
    config.train.micro_batch_size = 2
    with pytest.raises(CombinationError, match=r"120 are 6 sequences a rank, .*size=2 and .*steps=2 do not give"):
        pairs()
    config.plan.tokens_per_update = 0
    assert pairs() == {(2, 2)}
    for tokens, example in ((130, 120), (19, 20), (59, 40)):
        config.plan.tokens_per_update = tokens
        with pytest.raises(ConfigError, match=f"{tokens} is no multiple of 20, .*; use e.g. {example}$"):
            pairs()


def test_sequences_are_shared_where_the_tokens_of_an_update_are_set_or_the_longest_are_asked_for() -> None:
    config = config_of("checkpointing.layers", "checkpointing.keep_attention", "offload")
    config.launch.num_ranks, config.seq_len.tokens = 4, 20

    def found() -> set[tuple[int, int]]:
        choices = [one for one in candidates.choices(config) if one.micro_batch_size == 1]
        return {(one.sequence_parallel, one.gradient_accumulation_steps) for one in choices}

    assert found() == {(1, 1)}
    config.plan.goal = Goal.longest
    assert found() == {(1, 1), (2, 1), (4, 1)}
    config.plan.goal, config.plan.tokens_per_update = Goal.fastest, 40  # not one for each of four
    assert found() == {(2, 1), (4, 2)}
    config.launch.sequence_parallel = 4  # was set
    assert found() == {(4, 2)}
    config.plan.tokens_per_update = 10
    with pytest.raises(ConfigError, match=r"10 is no multiple of 20, .*; use e.g. 20$"):
        found()


def test_only_ranks_that_can_share_a_sequence_are_tried_and_what_was_set_says_why_not() -> None:
    config = config_of("checkpointing.layers", "checkpointing.keep_attention", "offload")
    config.launch.num_ranks, config.seq_len.tokens = 6, 9
    config.plan.goal = Goal.longest

    def ranks() -> set[int]:
        return {choice.sequence_parallel for choice in candidates.choices(config)}

    config.model.num_attention_heads = config.model.num_key_value_heads = 6
    assert ranks() == {1, 3}
    assert "9 is not divisible by launch.sequence_parallel=6" in str(candidates.why_not_shared(config, 6))
    config.plan.goal, config.plan.tokens_per_update = Goal.fastest, 9  # one sequence: all six
    with pytest.raises(
        ConfigError, match=r"^seq_len.tokens: 9 is not divisible by launch.sequence_parallel=6; use 6 or 12$"
    ):
        ranks()
    config.launch.sequence_parallel = 2
    with pytest.raises(
        ConfigError, match=r"^seq_len.tokens: 9 is not divisible by launch.sequence_parallel=2; use 8 or 10$"
    ):
        ranks()
