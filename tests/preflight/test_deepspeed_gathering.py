"""Weights on the device as ZeRO-3 gathers them: against DeepSpeed itself, and what several ranks hold besides."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from ldft.config import to_dict
from ldft.preflight import deepspeed_gathering, parameter_counts
from ldft.preflight.selection import Selection, select
from tests.conftest import compose, long

MODEL = ("model=nano", "model.num_layers=6", "model.hidden_size=512", "model.intermediate_size=1536", "model.num_attention_heads=4",
         "model.num_key_value_heads=2", "model.head_dim=128", "model.vocab_size=20000", "seq_len.tokens=16", "offload=full",
         "launch.device=cpu", "memory.pinning=none", "optimizer.fused_step=false", "checkpointing=gpu")  # fmt: skip
UNTIED = "model.tie_word_embeddings=false"
# Elements of a layer and of the embedding.
LAYER, EMBEDDING = 2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1536, 20000 * 512
FIRST = 512 * 512  # the layer's first matrix, which is fetched one layer early: it passes the limit


def sizes(live: int, prefetch: int, reuse: int) -> str:
    values = (
        f"stage3_max_live_parameters:{live},stage3_prefetch_bucket_size:{prefetch},stage3_max_reuse_distance:{reuse}"
    )
    return f"offload.deepspeed.zero_optimization={{{values}}}"


CASES = {
    "tied": (),
    "untied": (UNTIED,),
    "small head": ("model.vocab_size=2000",),
    "adapters": (UNTIED, "lora=r16"),
    "module by module": (UNTIED, sizes(7_000_000, 1_000_000, 7_000_000)),
    "module by module, tied": (sizes(7_000_000, 1_000_000, 7_000_000),),
    "nothing early": (UNTIED, sizes(0, 0, 0)),
    "DeepSpeed's own": (UNTIED, sizes(10**9, 5 * 10**7, 10**9)),
    "no recomputation": (UNTIED, sizes(7_000_000, 1_000_000, 7_000_000), "checkpointing=none"),
}


def run_of(*more: str) -> Selection:
    return select(compose(*MODEL, *more, "train.iterations=3", "train.warmup_iterations=0"))


@long
def test_deepspeed_has_as_many_elements_on_the_device(tmp_path: Path) -> None:
    runs = {name: run_of(*more) for name, more in CASES.items()}
    for name, run in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(to_dict(run.config)))
    line = [sys.executable, str(Path(__file__).with_name("gathered_by_deepspeed.py")), str(tmp_path)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja of this environment
    env = os.environ | {"PATH": path, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, dict[str, int]] = {}
    for text in done.stdout.splitlines():
        if text.startswith("GATHERED "):
            found |= json.loads(text.removeprefix("GATHERED "))
    assert found.keys() == runs.keys()
    for name, run in runs.items():
        expected = dataclasses.asdict(deepspeed_gathering.of(run))
        if run.config.lora.rank:
            del expected["embedding"]  # frozen: it has no backward pass
            # Of the first layer, only the MLP is fetched as a whole (zero_buckets.leaf_modules), which the simulation leaves out.
            assert abs(found[name].pop("other_layers") - expected.pop("other_layers")) <= 2 * FIRST
        assert found[name] == expected, name


def gathered(*more: str) -> dict[str, int]:
    """On GPUs."""
    line = (*MODEL, "launch.device=cuda", "train.precision=bf16", UNTIED, *more)
    return dataclasses.asdict(deepspeed_gathering.of(select(compose(*line))))


def test_several_ranks_copy_what_arrives_together_out_of_a_block() -> None:
    """The output projection comes with all but the first matrix of the last layer, the embedding likewise with the first layer."""
    one, two, four = (gathered(f"launch.num_ranks={ranks}") for ranks in (1, 2, 4))
    assert one["other_layers"] == 2 * LAYER + EMBEDDING and one["forward"] == 2 * LAYER + EMBEDDING
    assert two["other_layers"] == two["forward"] == (LAYER + EMBEDDING) + (LAYER - FIRST + EMBEDDING)
    assert two["embedding"] == one["embedding"] == EMBEDDING and four == two


def test_a_parameter_that_comes_by_itself_has_its_shard_beside_it() -> None:
    by_matrix = sizes(7_000_000, 1_000_000, 7_000_000)
    one, two, four = (gathered(by_matrix, f"launch.num_ranks={ranks}") for ranks in (1, 2, 4))
    assert two["other_layers"] - one["other_layers"] >= EMBEDDING // 2
    assert two["other_layers"] - four["other_layers"] >= EMBEDDING // 4


def test_the_first_pass_fetches_nothing_early() -> None:
    once = ("train.iterations=1", "train.warmup_iterations=0")
    assert gathered(*once) == {
        "forward": LAYER,
        "loss": EMBEDDING,
        "last_layer": LAYER,
        "other_layers": LAYER,
        "embedding": EMBEDDING,
    }
    assert gathered(*once, "train.gradient_accumulation_steps=2") == gathered()


def test_what_the_gpu_updates_is_there_anyway() -> None:
    run = select(compose(*MODEL, "launch.device=cuda", "train.precision=bf16", UNTIED))
    layer = parameter_counts.layer_parameters(run.config.model)
    part = deepspeed_gathering.of(dataclasses.replace(run, gpu_share=EMBEDDING + 4 * layer))
    assert part.last_layer == 2 * LAYER and part.other_layers == LAYER and part.embedding == 0
    whole = deepspeed_gathering.of(
        dataclasses.replace(run, gpu_share=parameter_counts.num_parameters(run.config.model))
    )
    assert set(dataclasses.astuple(whole)) == {0}
