"""Floating-point operations of a training step, counted honestly: sparse attention by the pairs that it computes.

Convention of MFU (PaLM, arXiv 2204.02311, appendix B): a multiply-add is two operations, the backward pass costs twice
the forward pass, recomputation does not count, neither do norms and softmax.
"""

from collections import Counter

import torch

from neomoba_dist.config import ModelConfig


def attention_pairs(lengths: torch.Tensor, config: ModelConfig, full: bool) -> int:
    """Query-key pairs per head of one layer over documents of `lengths` tokens, the gate's dot products included.

    A gate score is one dot product where a pair needs two (scores and values), so it counts half a pair.
    """
    n = lengths.to(torch.int64)
    if full:
        return int((n * (n + 1) // 2 if config.causal else n * n).sum())
    size, top_k = config.moba_block_size, config.moba_top_k
    blocks, tail = n // size, n % size
    others = top_k - 1
    if config.causal:
        own = blocks * (size * (size + 1) // 2) + tail * (tail + 1) // 2
        # a query of block b has b complete blocks behind it and takes min(b, others) of them
        few = torch.minimum(blocks, torch.tensor(others))
        chosen = size * size * (few * (few - 1) // 2 + (blocks - few) * others)
        chosen += tail * size * torch.minimum(blocks, torch.tensor(others))
        gate = size * blocks * (blocks - 1) // 2 + tail * blocks
    else:
        total = blocks + (tail > 0)
        own = blocks * size * size + tail * tail
        chosen = n * torch.minimum(total - 1, torch.tensor(others)).clamp(min=0) * size
        gate = n * total
    dense = n * (n + 1) // 2 if config.causal else n * n
    fits = blocks + (tail > 0) <= top_k  # all blocks chosen: the dense path runs, without a gate
    return int(torch.where(fits, dense, torch.minimum(own + chosen, dense) + gate // 2).sum())


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
    weights = (config.num_hidden_layers - sparse) * 3 * config.hidden_size * config.intermediate_size
    if sparse:
        assert config.moe_intermediate_size is not None  # resolved by ModelConfig
        active = (config.num_experts_per_tok + config.num_shared_experts) * config.moe_intermediate_size
        weights += sparse * config.hidden_size * (config.num_experts + 3 * active)
    return weights


def step_flops(config: ModelConfig, lengths: torch.Tensor, counted: int, full: bool) -> int:
    """Operations of forward and backward over documents of `lengths` tokens, `counted` of which enter the loss.

    lengths: int64 [documents]. full: whether the MoBA layers run full attention in this step.
    """
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
    forward = 2 * tokens * matrices
    forward += 4 * pairs * queries
    forward += 2 * counted * hidden * config.vocab_size
    return 3 * forward
