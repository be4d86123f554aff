"""Expected bytes of one decoder layer on the device, by formula: what its forward pass keeps, and the peaks of its backward pass.
Imports no torch.

H: hidden size, I: MLP width, Q and K: total widths of query heads and of key heads, T: tokens per micro-batch, w: bytes per number
in compute precision. In a layer with experts, k: experts that compute a token, E: all experts, I: the width of one.
"""

from __future__ import annotations

from ldft.config import Config
from ldft.preflight import attention, decoder_layers, experts, parameter_counts, sequence_parallel
from ldft.preflight.selection import Selection


def tokens(config: Config) -> int:
    """Of one micro-batch on one rank."""
    return config.train.micro_batch_size * config.seq_len.tokens // config.launch.sequence_parallel


def hidden_bytes(config: Config) -> int:
    """One layer's input: w T H."""
    return parameter_counts.width(config) * tokens(config) * config.model.hidden_size


def attention_bytes(config: Config) -> int:
    """Bytes that attention returns in one layer: the output, w T Q, and the log-sum-exp, 4 B per head and token.

    Kernels pad heads to a multiple of 8, and the log-sum-exp's sequences to a multiple of 32.
    """
    model, batch = config.model, config.train.micro_batch_size
    output = parameter_counts.width(config) * tokens(config) * model.num_attention_heads * _round_up(model.head_dim, 8)
    heads = model.num_attention_heads // config.launch.sequence_parallel
    log_sum_exp = 4 * batch * heads * _round_up(config.seq_len.tokens, 32)
    return _round_up(output, 64) + _round_up(log_sum_exp, 64)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def backward(run: Selection, recomputed: bool) -> tuple[int, int]:
    """Bytes in a layer's backward pass at two moments, in its MLP and, later, in its attention, less what is kept in any case.

    Layers recomputed together each keep theirs.
    """
    mlp, of_attention = _mlp(run) + _scores(run, 2), _attention(run) - kept(run) + _scores(run, 2)
    if not recomputed:
        return mlp, of_attention
    every = run.config.checkpointing.every
    again = every * kept(run) + (every - 1) * hidden_bytes(run.config)
    return mlp + again, of_attention + again


def forward(run: Selection) -> int:
    """Bytes in the forward pass of a layer that is recomputed later, in its MLP: w T (3 H + 3 I), or for one of n tiles 3 I / n."""
    config = run.config
    model = config.model
    inner = (
        of_experts(config)
        if decoder_layers.largest(model).experts
        else -(-3 * model.intermediate_size // run.mlp_tiles)
    )
    return parameter_counts.width(config) * tokens(config) * (3 * model.hidden_size + inner) + _scores(run, 2)


def _mlp(run: Selection) -> int:
    """w T (H + I) in the backward pass of the MLP's last product: the gradients of the layer's output and of the MLP's inner width.

    With what the layer keeps, 4 H + 2 Q + 2 K + 4 I. Of an adapter on that product, w T (I + 2 H) more: a second gradient of its
    input, and the adapter's copy of its output gradient. An MLP in tiles has the arrays of one tile, and its weights' gradients in
    fp32.
    """
    config = run.config
    model = config.model
    layer = decoder_layers.largest(model)
    elements = model.hidden_size
    if run.mlp_tiles > 1:
        return hidden_bytes(config) + _tile(run)
    of_experts = model.num_experts_per_token * (model.hidden_size + experts.expert_width(model))
    elements += model.hidden_size + of_experts if layer.experts else model.intermediate_size
    if last := parameter_counts.adapted(config, layer).get(decoder_layers.last_product(model, layer)):
        elements += last[0] + 2 * model.hidden_size
    return parameter_counts.width(config) * tokens(config) * elements


def _tile(run: Selection) -> int:
    """w T (8 I + 2 H) / n for one of n tiles: both halves, the activation, the product, and a gradient of each; and of the weights'
    gradients the sums in fp32 and their rounded copies, 6 B each."""
    model = run.config.model
    size = -(-tokens(run.config) // run.mlp_tiles)
    arrays = parameter_counts.width(run.config) * size * (8 * model.intermediate_size + 2 * model.hidden_size)
    return arrays + (0 if run.config.lora.rank else 6 * 3 * model.intermediate_size * model.hidden_size)


def _attention(run: Selection) -> int:
    """Attention's backward pass by a fused kernel: w T (3 H + 4 Q + 4 K), 4 T Q, and 2 w T Q if heads are grouped.

    The norm's output and two gradients of the residual stream take 3 H; queries, keys, values, the output, and a gradient of each
    4 Q + 4 K. The kernel sums up the queries' gradient in fp32, and computes the gradients of keys and values for each query's head
    (cuDNN: seen in a memory snapshot of an H200; flash-attn: flash_api.cpp, mha_bwd, dk_expanded). Ranks that share a sequence
    exchange these gradients after that, where the kernel's arrays were. Scores are counted elsewhere.
    """
    config, width = run.config, parameter_counts.width(run.config)
    queries, keys = _heads(run)
    kernel = 4 * queries + (2 * width * queries if keys < queries else 0)
    kernel = max(kernel, width * sequence_parallel.exchanged(config))
    return tokens(config) * (width * (3 * config.model.hidden_size + 4 * queries + 4 * keys) + kernel)


def _heads(run: Selection) -> tuple[int, int]:
    """Q and K: elements of a token's queries, and of its keys as attention reads them."""
    model = run.config.model
    queries = model.num_attention_heads * model.head_dim
    return queries, queries if run.repeats_heads else sequence_parallel.key_heads(run.config) * model.head_dim


def kept(run: Selection) -> int:
    """Bytes that a layer's forward pass keeps besides its input: w T (3 H + 2 Q + 2 K + 3 I); no I if the MLP runs in tiles.

    With dropout, each adapter also keeps its own input, and a mask of one byte per element.
    """
    config = run.config
    model = config.model
    queries, keys = _heads(run)
    layer = decoder_layers.largest(model)
    elements = 3 * model.hidden_size + 2 * queries + 2 * keys
    if run.mlp_tiles == 1:
        elements += of_experts(config) if layer.experts else 3 * model.intermediate_size
    found = parameter_counts.width(config) * tokens(config) * elements + _scores(run, 4)
    if config.lora.dropout:
        inputs = sum(inputs for inputs, _ in parameter_counts.adapted(config, layer).values())
        found += (parameter_counts.width(config) + 1) * tokens(config) * inputs
    return found


def of_experts(config: Config) -> int:
    """Elements a token that a layer's experts keep: k (2 H + 4 I) + 3 E, and H + 4 times its width if there is a shared expert.

    Each of the k experts gets a copy of the token, H, and returns H; it keeps both halves of its MLP, the activation of one, and
    their product, some families more. The router keeps its logits and probabilities, the latter in fp32.
    """
    model = config.model
    each = 2 * model.hidden_size + decoder_layers.of(model).kept_by_expert * experts.expert_width(model)
    shared = decoder_layers.shared_width(model)
    return (
        model.num_experts_per_token * each + 3 * model.num_experts + (model.hidden_size + 4 * shared if shared else 0)
    )


def _scores(run: Selection, copies: int) -> int:
    """Attention that stores all scores: w T S heads for each copy of them; an fp32 copy counts as two."""
    config = run.config
    if not attention.SPECS[run.attention].stores_scores:
        return 0
    copy = parameter_counts.width(config) * tokens(config) * config.seq_len.tokens * config.model.num_attention_heads
    return copies * copy
