"""Each term of the predicted times, worked out by hand."""

from __future__ import annotations

import dataclasses

from ldft.config import AttentionKind, Device, OffloadDevice, Precision
from ldft.config.checkpointing import CheckpointingMode, KeepAttention
from ldft.planning import iteration_time
from ldft.planning.rates import HostTime
from ldft.preflight.selection import Selection
from tests.planning.small_machine import RATES, near, offload, run_of


def of_layer(run: Selection) -> tuple[float, ...]:
    return dataclasses.astuple(iteration_time._layer(run, RATES))


def test_a_layer_is_its_products_its_attention_and_what_it_reads_and_writes() -> None:
    run = run_of()
    # 672 weights and 30 tokens are 40.32 s, of which the last product, 160 weights, 9.6. Attention: 4 x 30 tokens x 5 others on
    # average x 8 = 4800, 24 s; backward 2.5 times at half of the rate, 120 s. A byte of 2 x 30 numbers costs 6 s: forward
    # 10 x 8 + 4 x 8 + 6 x 4 + 3 x 20 = 196 of them, backward 12 x 8 + 4 x 8 + 6 x 4 + 5 x 20 = 252.
    assert of_layer(run) == near((40.32 + 24 + 6 * 196, 2 * 40.32 + 120 + 6 * 252, 40.32 - 9.6 + 24 + 6 * 196, 24))
    # Each of 5 tiles writes gradients of 480 weights, 2 bytes each, reads them, and reads and writes the sums, 4 bytes each.
    tiled = dataclasses.replace(run, mlp_tiles=5)
    assert of_layer(tiled)[1] == near(of_layer(run)[1] + 5 * 480 * (2 + 2 + 4 + 4) / 10)
    assert of_layer(tiled)[::2] == of_layer(run)[::2]
    # Adapters at two modules: 8 + 6 x 8 and 20 + 6 x 8 more; backward 5 x 8 + 4 x 8 and 5 x 20 + 4 x 8. Frozen weights have no
    # gradients.
    run.config.lora.rank, run.config.lora.target_modules = 2, ["q_proj", "down_proj"]
    ahead, back, again, _ = of_layer(run)
    assert (ahead, back) == near((40.32 + 24 + 6 * (196 + 124), 40.32 + 120 + 6 * (252 + 204)))
    assert again == near(ahead - 9.6)
    assert of_layer(dataclasses.replace(run, mlp_tiles=5))[1] == back


def test_of_a_layer_with_experts_those_that_compute_a_token_count() -> None:
    run = run_of()
    model = run.config.model
    model.family, model.num_experts, model.num_experts_per_token = "qwen2_moe", 4, 2
    model.expert_intermediate_size = 12
    model.extra = {"decoder_sparse_step": 2, "shared_expert_intermediate_size": 6}
    # Of three layers the second has experts: 192 in attention, 4 x 8 in the router, 2 x 3 x 12 x 8 in two experts, and 3 x 48 + 8
    # in the shared one: 952. The mean of 672, 952 and 672 is 765.33. Its width is 2 x 12 + 6 = 30.
    products, down = 60 * (2 * 672 + 952) / 3 / 1000, 60 * 30 * 8 / 1000
    passes, back = 6 * (80 + 32 + 24 + 90), 6 * (96 + 32 + 24 + 150)
    expected = (products + 24 + passes, 2 * products + 120 + back, products - down + 24 + passes, 24)
    assert of_layer(run) == near(expected)
    # Adapters of the shared expert's down projection, 6 + 6 x 8, and of the dense layers', 20 + 6 x 8.
    run.config.lora.rank, run.config.lora.target_modules = 2, ["down_proj"]
    assert of_layer(run)[0] == near(expected[0] + 6 * (2 * 68 + 54) / 3)


def test_a_query_sees_the_half_before_it_or_its_window() -> None:
    run = run_of()
    assert iteration_time._seen(run) == 5
    run.config.model.family, run.config.model.sliding_window = "mistral", 4
    assert iteration_time._seen(run) == 10, "SDPA masks what lies outside, and computes all pairs"
    flash = dataclasses.replace(run, attention=AttentionKind.flash_attention_2)
    # Of 10 queries the first 4 see 2 on average, the others 4: 4 - 4 x 4 / 20.
    assert iteration_time._seen(flash) == near(3.2)
    run.config.model.extra = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    run.config.model.family = "qwen3"
    assert iteration_time._seen(flash) == near((3.2 + 2 * 5) / 3)


def test_ranks_that_share_sequences_exchange_heads_for_tokens() -> None:
    run = run_of()
    assert iteration_time._exchange(run, RATES) == 0
    run.config.launch.num_ranks = run.config.launch.sequence_parallel = 2
    # 15 tokens; 2 heads of queries and of outputs, and the key head, of which each rank has one, twice: 8 heads of 4, 2 bytes each.
    # Half of that is another rank's.
    assert iteration_time._exchange(run, RATES) == near(15 * 8 * 4 * 2 / 2 / 2)
    # The layer's own work is that of half of the tokens, each of which sees as many others.
    assert of_layer(run) == near([seconds / 2 for seconds in of_layer(run_of())])


def test_the_loss_is_a_product_and_with_liger_its_gradients_too() -> None:
    run = run_of()
    liger = dataclasses.replace(run, liger=True)
    assert [iteration_time._loss(one, RATES) for one in (run, liger)] == near([24, 72])
    run.config.lora.rank = 2
    assert [iteration_time._loss(one, RATES) for one in (run, liger)] == near([24, 48])


def test_copies_over_the_link_and_between_gpus() -> None:
    run = run_of()
    config = run.config
    config.model.tie_word_embeddings = False  # 2872 parameters
    link = iteration_time._link(run, RATES)
    assert (link.forward, link.moved) == (near((5744 / 5, 0, 0)), 5744) and link.backward == near(
        (5744 / 5, 5744 / 4, 0)
    )
    assert (link.fetch, link.tail) == near((2 * 688 / 5, 2 * 400 / 4))
    # On two GPUs each copies half and gathers the other half; a quarter of the parameters' state is in GPU memory.
    config.launch.num_ranks = 2
    link = iteration_time._link(dataclasses.replace(run, gpu_share=359), RATES)
    weights, gathered = 0.75 * 5744 / 2, 5744 / 2 / 2
    assert (link.forward, link.moved) == (near((weights / 5, 0, gathered)), near(2 * weights))
    assert link.backward == near((weights / 5, weights / 4, 2 * gathered))
    assert (link.fetch, link.tail) == near((688 / 5, 0)), "the embedding's gradient stays"
    config.launch.num_hosts = 2
    assert iteration_time._link(dataclasses.replace(run, gpu_share=359), RATES).moved == near(weights)
    config.launch.num_ranks, config.launch.num_hosts = 3, 1
    link = iteration_time._link(dataclasses.replace(run, gpu_share=10_000), RATES)
    assert link.forward == near((0, 0, 5744 * 2 / 3 / 2)), "no more than all is on the GPU"
    # Stage 2 holds all weights on each GPU: only gradients leave, in fp32, and nothing hides that.
    offload(config, 2, OffloadDevice.none, OffloadDevice.cpu)
    link = iteration_time._link(run, RATES)
    assert link.forward == (0, 0, 0) and link.backward == near((0, 0, 5744 * 2 / 3 / 2))
    assert (link.fetch, link.tail) == near((0, 4 * 2872 / 3 / 4))
    config.lora.rank, config.lora.target_modules = 2, ["q_proj"]
    assert iteration_time._link(run, RATES).tail == near(4 * 3 * 2 * 16 / 3 / 4)
    config.lora.rank = 0
    offload(config, 0, OffloadDevice.none, OffloadDevice.none)
    link = iteration_time._link(run, RATES)
    assert link.backward == near((0, 0, 5744 * 2 / 3 / 2)) and (link.fetch, link.tail) == (0, 0)
    config.launch.device = Device.cpu
    nothing = iteration_time._link(run, RATES)
    assert (nothing.forward, nothing.backward, nothing.fetch, nothing.tail) == ((0,), (0,), 0, 0)


def test_with_adapters_only_their_gradients_leave_and_the_embedding_has_none() -> None:
    run = run_of()
    run.config.lora.rank, run.config.lora.target_modules = 2, ["q_proj"]
    link = iteration_time._link(run, RATES)
    assert link.backward == near((2 * 2472 / 5, 2 * 3 * 2 * 16 / 4, 0)) and link.tail == 0


def test_what_waits_in_host_memory() -> None:
    run = run_of(device_inputs=2)
    settings, layers = run.config.checkpointing, run.config.model
    layers.num_layers, settings.mode = 7, CheckpointingMode.cpu
    # One input: 2 bytes x 30 tokens x 8. One attention output, padded: 2 x 30 x 2 heads of 8 = 960, and 4 x 3 x 2 x 32 = 768.
    assert iteration_time._waiting_bytes(run) == 5 * 480
    settings.every = 3  # three groups: the last one's outputs stay
    assert iteration_time._waiting_bytes(run) == 480
    settings.keep_attention = KeepAttention.host
    assert iteration_time._waiting_bytes(run) == 480 + 2 * 3 * (960 + 768)
    settings.mode = CheckpointingMode.gpu
    assert iteration_time._waiting_bytes(run) == 2 * 3 * (960 + 768)
    settings.layers = 0
    assert iteration_time._waiting_bytes(dataclasses.replace(run, device_inputs=1)) == 0
    settings.mode, settings.layers, settings.keep_attention = CheckpointingMode.cpu, 2, KeepAttention.none
    assert iteration_time._waiting_bytes(run) == 0, "fewer inputs than may stay"
    settings.layers, settings.every = 3, 1
    link = iteration_time._link(run, RATES)
    assert (link.forward[1], link.backward[0] - link.forward[0]) == near((480 / 4, 480 / 5))
    assert link.moved == 5 * link.forward[0] + 480


def test_the_hosts_update_reads_and_writes_each_state() -> None:
    run = run_of()
    config = run.config
    # 12 bytes of state and 2 of the weight, each read and written; stock DeepSpeed reads and writes 24 more, and needs the time of
    # 24 more where each matrix is a group. Stages 1 and 2, which have no groups, take 28 more even with ldft's kernel.
    stock = dataclasses.replace(run, fused_step=False)
    assert [iteration_time._update(one, RATES) for one in (run, stock)] == near([28 * 2472 / 10, 52 * 2472 / 10])
    single = dataclasses.replace(stock, deepspeed={"zero_optimization": {"sub_group_size": 687}})
    assert iteration_time._update(single, RATES) == near(76 * 2472 / 10)
    config.offload.stage = 2
    single = dataclasses.replace(stock, deepspeed={"zero_optimization": {}})
    assert [iteration_time._update(one, RATES) for one in (run, single)] == near([56 * 2472 / 10, 52 * 2472 / 10])
    config.offload.stage = 3
    # What bench measures is not quite reached.
    measured = dataclasses.replace(RATES, measured=True)
    assert [iteration_time._update(one, measured) for one in (run, stock)] == near([28 * 2472 / 8.3, 52 * 2472 / 10])
    config.train.precision = Precision.fp32
    assert iteration_time._update(stock, RATES) == near((32 + 12 + 16) * 2472 / 10)
    config.launch.num_ranks, config.optimizer.name = 2, "lion"
    assert iteration_time._update(dataclasses.replace(run, gpu_share=36), RATES) == near(24 * 2400 / 10)
    config.launch.num_hosts = 2  # each has memory of its own
    assert iteration_time._update(dataclasses.replace(run, gpu_share=36), RATES) == near(12 * 2400 / 10)
    config.offload.optimizer = OffloadDevice.none
    assert iteration_time._update(run, RATES) == 0


def test_the_rest_of_the_step() -> None:
    run = run_of(gpu_share=100)
    config = run.config
    config.launch.num_ranks = 2
    assert iteration_time._step(run, RATES) == near(0.015 + 28 * 100 / 10)
    # The updated weights go to a GPU that holds them; on a CPU nothing is copied.
    offload(config, 2, OffloadDevice.none, OffloadDevice.cpu)
    assert iteration_time._step(run, RATES) == near(0.015 + 280 + 2 * 2472 / 2 / 5)
    config.launch.device = Device.cpu
    assert iteration_time._step(run, RATES) == near(0.015 + 280)
    # All on the GPU: 120 bytes a parameter, of the rank's shard from stage 1 on, and Python's time as for 5 layers.
    found, slow = [], dataclasses.replace(RATES, resident=HostTime(3.0, 1.0, 1.0))
    for stage in (0, 1, 3):
        offload(config, stage, OffloadDevice.none, OffloadDevice.none)
        found.append(iteration_time._step(run, slow))
    assert found == near([15 + 120 * 247.2, 15 + 120 * 123.6, 15 + 120 * 123.6])


def beside(run: Selection, *, update_s: float, fetch_s: float = 7.0, slowed: float = 10.0) -> float:
    return iteration_time._beside(run, 0.5, (10.0, slowed), 3.0, update_s, fetch_s)


def test_a_layer_starts_when_its_weights_are_updated_and_fetched() -> None:
    run = run_of()
    # A second for each of 2472 elements: the embedding is updated at 400, each layer 688 later, the last at 2464; then it is
    # fetched and computed, and the loss follows.
    assert beside(run, update_s=2472.0) == near(2464 + 7 + 10 + 3)
    # A quick update: the first layer waits for it and for its fetch, the others only for each other.
    embedding, layer = 0.4, 0.688
    assert beside(run, update_s=2.472, fetch_s=1.0) == near(embedding + layer + 1 + 3 * 10 + 3)
    run.config.model.tie_word_embeddings = False  # the output's own weights come last, of 2872
    assert beside(run, update_s=2872.0) == near(2872 + 7 * 400 / 688 + 3)
    assert beside(run, update_s=2.872, fetch_s=1.0) == near(embedding + layer + 1 + 3 * 10 + 3)
    # What is done of a layer while the update runs takes longer: one layer, and half of the second.
    assert beside(run_of(gpu_share=2472), update_s=30.0, slowed=20.0) == near(0.5 + 20 + 9.5 + 0.5 * 10.5 + 10 + 3)
    # An embedding larger than a layer is waited for longer: 1600 of 1600 + 3 x 688 + 8.
    run.config.model.tie_word_embeddings, run.config.model.vocab_size = True, 200
    assert beside(run, update_s=3.672, fetch_s=20.0) == near(1.6 + 20 * 1600 / 688 + 3 * 10 + 3)


def test_what_the_gpu_updates_itself_waits_for_nothing() -> None:
    # The embedding and one layer are on the GPU; 1384 elements are not, of which the norm's 8 are in no layer.
    run = run_of(gpu_share=1088)
    assert beside(run, update_s=1384.0) == near(2 * 688 + 7 + 10 + 3)
    assert beside(run, update_s=1.384, fetch_s=0.0) == near(0.5 + 3 * 10 + 3)
    # One element less: the first layer waits for it, and for its fetch. The last is updated after 1377 of the 1385.
    run = run_of(gpu_share=1087)
    assert beside(run, update_s=1385.0) == near(1377 + 7 + 10 + 3)
    assert beside(run, update_s=1.385, fetch_s=20.0) == near(0.001 + 20 + 3 * 10 + 3)
    # All, or more, is on the GPU.
    assert [beside(run_of(gpu_share=share), update_s=9e9) for share in (2472, 2473)] == near([33.5, 33.5])
    # All but one element of the embedding waits for the host.
    run = run_of(gpu_share=1)
    assert beside(run, update_s=2471.0) == near(2463 + 7 + 10 + 3)
    run.config.model.vocab_size = 200  # 1600
    assert beside(run, update_s=3.671, fetch_s=20.0) == near(1.599 + 20 * 1600 / 688 + 3 * 10 + 3)
    # Only the last element of the output's own weights does: no weight is updated after the update ends.
    run = run_of(gpu_share=2871)
    run.config.model.tie_word_embeddings = False
    assert beside(run, update_s=50.0) == near(50 + 7 * 400 / 688 + 3)
    # On three GPUs each has a third, rounded up: 134 of the embedding; a layer has 2 x 22 + 2 x 11 + 3 x 54 + 2 x 3 = 234.
    run = run_of()
    run.config.launch.num_ranks = 3
    assert beside(run, update_s=134 + 3 * 234 + 3) == near(134 + 3 * 234 + 7 + 10 + 3)
