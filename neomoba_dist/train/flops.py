"""Floating-point operations of a training step, counted honestly: sparse attention by the pairs that it computes.

Convention of MFU (PaLM, arXiv 2204.02311, appendix B): a multiply-add is two operations, the backward pass costs twice
the forward pass, recomputation does not count, neither do norms and softmax.
"""

from collections import Counter

import torch

from neomoba_dist.config import ModelConfig


def last_block_choices(blocks: torch.Tensor, tail: torch.Tensor, size: int, others: int) -> torch.Tensor:
    """Probability that a query chooses the short last block of its document, float64 in the shape of `blocks`.

    blocks, tail: int64, how many blocks a document has, and the tokens of the last one (1 to size - 1). others: how
    many a query chooses besides its own, below blocks - 1.

    Exact for keys drawn independently from one normal law: a mean of fewer keys varies more, its score with it, and so
    it comes to the top more often than its share of the blocks (and to the bottom too). The score of a whole block has
    deviation 1 here, that of the short one sqrt(size / tail); the short one is chosen if it exceeds the others-th
    largest of the blocks - 2 whole ones.
    """
    rivals = (blocks - 2).double()[..., None]
    score = torch.linspace(-9.0, 9.0, 513, dtype=torch.float64, device=blocks.device)
    below, above = torch.special.log_ndtr(score), torch.special.log_ndtr(-score)
    # density of the others-th largest of `rivals` normal numbers, up to its factor
    density = ((rivals - others) * below + (others - 1) * above - score.square() / 2).softmax(-1)
    exceeds = torch.special.ndtr(-score * (tail.double() / size).sqrt()[..., None])
    return (density * exceeds).sum(-1)


def moba_pairs(lengths: torch.Tensor, *, size: int, top_k: int, causal: bool, pooling: str = "mean") -> torch.Tensor:
    """Expected query-key pairs per head of MoBA, its gate left out, over documents of `lengths`: float64 [documents].

    Exact for any choice of blocks, but where a query may choose the short last block of a bidirectional document: see
    `last_block_choices`. Under another pooling than means all blocks are taken to be chosen alike.
    """
    n = lengths.to(torch.int64)
    whole, tail = n // size, n % size
    blocks, others = whole + (tail > 0), top_k - 1
    dense = n * (n + 1) // 2 if causal else n * n
    if causal:
        own = whole * (size * (size + 1) // 2) + tail * (tail + 1) // 2
        # a query of block b has b complete blocks behind it and takes min(b, others) of them
        few = whole.clamp(max=others)
        chosen = (size * size * (few * (few - 1) // 2 + (whole - few) * others) + tail * size * few).double()
    else:
        own = whole * size * size + tail * tail
        chosen = (n * others * size).double()
        short = (tail > 0) & (blocks > top_k)
        if others and short.any():
            share = others / (blocks[short] - 1).double()
            if pooling == "mean":
                share = last_block_choices(blocks[short], tail[short], size, others)
            chosen[short] -= (n - tail)[short] * share * (size - tail)[short]
    # with all blocks chosen the dense path runs
    return torch.where(blocks <= top_k, dense.double(), own + chosen)


def gate_pairs(lengths: torch.Tensor, *, size: int, top_k: int, causal: bool) -> torch.Tensor:
    """Pairs per head that the scores of blocks count for, float64 [documents]; none where all blocks are chosen.

    A score is one dot product where a pair needs two (scores and values), so it counts half a pair.
    """
    n = lengths.to(torch.int64)
    whole, tail = n // size, n % size
    blocks = whole + (tail > 0)
    scores = size * whole * (whole - 1) // 2 + tail * whole if causal else n * blocks
    return torch.where(blocks <= top_k, 0.0, scores / 2.0)


def attention_pairs(lengths: torch.Tensor, config: ModelConfig, full: bool) -> int:
    """Query-key pairs per head of one layer over documents of `lengths` tokens, the gate's dot products included.

    Expected ones where they depend on the chosen blocks (`moba_pairs`), rounded.
    """
    n = lengths.to(torch.int64)
    if full:
        return int((n * (n + 1) // 2 if config.causal else n * n).sum())
    size, top_k, causal = config.moba_block_size, config.moba_top_k, config.causal
    scores = gate_pairs(n, size=size, top_k=top_k, causal=causal).sum()
    scores *= 2 if config.moba_pooling == "minmax" else 1
    if config.moba_gate == "kv_group":  # a score for each KV head
        scores *= config.num_key_value_heads / config.num_attention_heads
    pairs = moba_pairs(n, size=size, top_k=top_k, causal=causal, pooling=config.moba_pooling)
    return round(float(pairs.sum() + scores))


def window_pairs(lengths: torch.Tensor, config: ModelConfig) -> int:
    """Query-key pairs per head of one sliding-window layer: those that are seen, whatever a kernel computes besides."""
    length = torch.repeat_interleave(lengths, lengths)
    ends = lengths.cumsum(0)
    query = torch.arange(len(length), device=lengths.device) - torch.repeat_interleave(ends - lengths, lengths)
    window, far = config.sliding_window, config.global_tokens
    low = (query - window + 1).clamp(min=0)
    high = query + 1 if config.causal else torch.minimum(query + window, length)
    pairs = high - low + low.clamp(max=far)  # the window, and global tokens before it
    if not config.causal:
        pairs += (length.clamp(max=far) - high).clamp(min=0)  # global tokens after it
        pairs = torch.where(query < far, length, pairs)
    return int(pairs.sum())


def feed_forward_weights(config: ModelConfig) -> int:
    """Weights of all feed-forward parts that one token passes: of a mixture its router, its experts and shared ones."""
    sparse = len(config.moe_layers)
    weights = (config.num_layers - sparse) * config.mlp_matrices * config.hidden_size * config.intermediate_size
    if sparse:
        assert config.moe_intermediate_size is not None  # resolved by ModelConfig
        active = (config.num_experts_per_tok + config.num_shared_experts) * config.moe_intermediate_size
        weights += sparse * config.hidden_size * (config.num_experts + 3 * active)
    return weights


def step_flops(
    config: ModelConfig, lengths: torch.Tensor, counted: int, full: bool, encoder_lengths: torch.Tensor | None = None
) -> int:
    """Operations of forward and backward over documents of `lengths` tokens, `counted` of which enter the loss.

    lengths: int64 [documents]. full: whether the MoBA layers run full attention in this step. encoder_lengths: of an
    encoder-decoder, whose decoder's `lengths` then are, document by document.
    """
    if encoder_lengths is None:
        forward = layers_flops(config, lengths, full)
    else:
        forward = layers_flops(config.encoder, encoder_lengths, full) + layers_flops(config.decoder, lengths, full)
        forward += cross_flops(config, lengths, encoder_lengths)
    tokens = int(lengths.sum())
    forward += 2 * counted * config.hidden_size * config.vocab_size
    return 3 * (forward + 2 * tokens * config.hidden_size**2 * config.prediction_head)


def cross_flops(config: ModelConfig, lengths: torch.Tensor, encoder_lengths: torch.Tensor) -> int:
    """Operations of the forward pass of all cross attention: four projections, and every pair of a document."""
    assert config.head_dim is not None  # resolved by ModelConfig
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    projections = 4 * config.hidden_size * (queries * int(lengths.sum()) + keys * int(encoder_lengths.sum()))
    return config.num_decoder_layers * (projections + 4 * queries * int((lengths * encoder_lengths).sum()))


def layers_flops(config: ModelConfig, lengths: torch.Tensor, full: bool) -> int:
    """Operations of the forward pass of all layers, but for the head and cross attention."""
    tokens = int(lengths.sum())
    hidden, head_dim = config.hidden_size, config.head_dim
    assert head_dim is not None  # resolved by ModelConfig
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    matrices = hidden * (2 * queries + 2 * keys) + keys * config.key_conv_width
    matrices = matrices * config.num_hidden_layers + feed_forward_weights(config)
    kinds = Counter("full" if full else kind for kind in config.layer_attentions)
    pairs = sum(
        count
        * (
            window_pairs(lengths, config)
            if kind == "sliding_window"
            else attention_pairs(lengths, config, kind == "full")
        )
        for kind, count in kinds.items()
    )
    return 2 * tokens * matrices + 4 * pairs * queries
