"""What the layers of a rank keep of one micro-batch for their backward pass, tensor by tensor, and what passes by then.

As the layers run when they are not compiled. The heads and features of a rank are read off a module that may lie on
the meta device; tests/parallel/test_memory_plan.py holds the sums against the most that real ranks allocate.
"""

from dataclasses import dataclass

from neomoba_dist.config import Config, ModelConfig
from neomoba_dist.data.batch import COUNTED_STEPS
from neomoba_dist.model.attention.cross import CrossAttention
from neomoba_dist.model.attention.layer import Attention
from neomoba_dist.model.block import Block
from neomoba_dist.model.cross_entropy import CHUNK_TOKENS
from neomoba_dist.model.encoder_decoder import DecoderBlock
from neomoba_dist.model.mlp import MLP
from neomoba_dist.model.moe.layer import MoE
from neomoba_dist.parallel.context_cost import AttentionShape, choose, kept_bytes, passing_bytes
from neomoba_dist.parallel.context_split import padded_split
from neomoba_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Tokens:
    """Tokens of a micro-batch on a rank: here, in attention and MLP; between, in the residual stream (a part of them
    with sequence parallelism); counted, in the loss. element: bytes of a number in the compute dtype."""

    here: int
    between: int
    counted: int
    element: int

    @classmethod
    def of(cls, config: Config, mesh: Mesh, *, encoder: bool = False) -> "Tokens":
        """Of the rank at `mesh`; in an encoder-decoder those of the decoder, or of the encoder."""
        length = config.phase.sequence_length
        if config.model.num_decoder_layers:
            length = config.corrupted_lengths.encoder if encoder else config.corrupted_lengths.decoder
        here = config.micro_batch_size * length
        if mesh["cp"].size > 1:
            here = padded_split(here, mesh, config.model).local_tokens
        between = here // mesh["tp"].size if mesh.sequence_parallel else here
        step = max(1, here // COUNTED_STEPS)  # Batch.with_counted brings them to whole steps, mostly the next one
        masked = (int(here * config.data.mlm_probability) // step + 1) * step
        counted = min(here, masked) if config.model.objective == "mlm" else here
        return cls(here, between, counted, 4 if config.dtype_name == "float32" else 2)

    @classmethod
    def of_block(cls, block: Block, config: Config, mesh: Mesh) -> "Tokens":
        """Those that pass a block."""
        return cls.of(config, mesh, encoder=not isinstance(block, DecoderBlock))


@dataclass(frozen=True)
class Held:
    """Bytes that a layer keeps for its backward pass, and that this pass holds beside them.

    core: what the attention core keeps beside its operands and its result.
    """

    kept: float
    passing: float
    core: float = 0.0


def block_memory(block: Block, config: Config, mesh: Mesh, tokens: Tokens, recompute: str) -> Held:
    """A block with its input, in the costliest kind of step that the phase has."""
    residual = tokens.element * tokens.between * config.model.hidden_size
    attention = attention_memory(block.attention, config, mesh, tokens)
    mlp = mlp_memory(block.mlp, config.model, tokens)
    cross = Held(0, 0)
    if isinstance(block, DecoderBlock):
        cross = cross_memory(block.cross_attention, config, mesh, tokens)
    layers = 2 + isinstance(block, DecoderBlock)
    norms = layers * (residual_norm_memory(config.model, mesh, tokens) + residual)
    dropped = layers * tokens.between * config.model.hidden_size * (config.model.dropout > 0)  # a byte each
    kept = norms + attention.kept + cross.kept + mlp.kept + dropped
    # what later layers kept is gone when attention's turn comes
    passing = max(attention.passing - cross.kept - mlp.kept, cross.passing - mlp.kept, mlp.passing) + 2 * residual
    core = attention.core + cross.core
    again = {"none": 0.0, "selective": core, "full": kept - residual}[recompute]
    return Held(kept - again, passing + again)


def rms_norm_memory(vectors: int, size: int, element: int, mesh: Mesh) -> float:
    """An RMSNorm without its result: input and 1 / rms; on a CPU, where nothing is fused, both factors in float32."""
    return vectors * (4 + size * (8 if mesh.device.type == "cpu" else element))


def layer_norm_memory(vectors: int, size: int, element: int, mesh: Mesh) -> float:
    """A LayerNorm without its result: input, mean and 1 / deviation."""
    return vectors * (8 + size * element)


NORM_MEMORY = {
    "rmsnorm": rms_norm_memory,
    "layernorm": layer_norm_memory,
    "layernorm_no_bias": layer_norm_memory,
}


def residual_norm_memory(model: ModelConfig, mesh: Mesh, tokens: Tokens) -> float:
    """A norm of the residual stream without its result."""
    return NORM_MEMORY[model.norm](tokens.between, model.hidden_size, tokens.element, mesh)


def attention_memory(layer: Attention, config: Config, mesh: Mesh, tokens: Tokens) -> Held:
    """Projections and the attention core; the tables of RoPE are shared by all layers."""
    model, ranks, element = config.model, mesh["cp"].size, tokens.element
    shape = AttentionShape.of(config)
    queries, keys = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = element * model.hidden_size * (queries + 2 * keys)  # of q | k | v, and of its gradient
    product: float = element * tokens.here * (queries + keys) * (ranks == 1)  # of which v, counted below, is a part
    if model.qk_norm:
        vectors = tokens.here * (shape.query_heads + shape.kv_heads)
        product = max(product, rms_norm_memory(vectors, shape.head_dim, element, mesh))
    kept = core = passing = 0.0
    for kind in attention_kinds(layer, config):
        strategy = attention_strategy(kind, config, shape, tokens.here)
        blocks = 4 * model.moba_top_k
        if mesh.device.type == "cuda":  # and the queries of every block but the own one: kernels/triton/index.py
            blocks += 8 * (model.moba_top_k - 1)
        chosen = tokens.here * shape.query_heads * blocks * (kind == "moba")
        kept = max(kept, kept_bytes(strategy, shape, tokens.here, ranks) + chosen)
        core = max(core, 4 * tokens.here * shape.query_heads + chosen)
        passing = max(passing, passing_bytes(strategy, shape, tokens.here, ranks))
    gradients = tokens.here * (element * (2 * queries + 2 * keys) + 12 * queries)  # RoPE's are in float32
    put_together = weights * layer.replicate_kv  # of two parameters, in every pass
    return Held(put_together + product + kept, passing + gradients + weights, core)


def cross_memory(layer: CrossAttention, config: Config, mesh: Mesh, tokens: Tokens) -> Held:
    """Cross attention; the encoder's states are kept once for all layers. tokens: of the decoder."""
    shape, element, there = AttentionShape.of(config), tokens.element, Tokens.of(config, mesh, encoder=True).here
    queries, keys = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = element * config.model.hidden_size * 2 * keys
    operands = element * (tokens.here * queries + 2 * there * keys)
    core = 4 * tokens.here * shape.query_heads
    kept: float = operands + element * tokens.here * queries + core + weights * layer.replicate_kv
    if config.model.qk_norm:
        kept += rms_norm_memory(tokens.here * shape.query_heads, shape.head_dim, element, mesh)
        kept += rms_norm_memory(there * shape.kv_heads, shape.head_dim, element, mesh)
    states = element * there * config.model.hidden_size  # their gradient, and that of all layers so far
    return Held(kept, operands + element * tokens.here * queries + weights + 2 * states, core)


def encoder_end_memory(config: Config, mesh: Mesh) -> float:
    """The final norm of an encoder, and its result, to which all layers of the decoder attend."""
    tokens = Tokens.of(config, mesh, encoder=True)
    norm = residual_norm_memory(config.model, mesh, tokens) * (config.model.norm_placement == "pre")
    return norm + tokens.element * tokens.between * config.model.hidden_size


def mlp_memory(layer: MLP | MoE, model: ModelConfig, tokens: Tokens) -> Held:
    """A dense feed-forward layer or a mixture, whose tokens are taken to choose all experts alike."""
    element = tokens.element
    if not isinstance(layer, MoE):
        width, matrix = layer.down_proj.shape[1], element * next(layer.parameters()).numel()
        # the first product, f of it (or of half of it), the input of the second one; then the first matrix's gradient
        # and two beyond what has a kept tensor's place
        return Held(layer.kept * element * tokens.here * width, matrix + 2 * element * tokens.here * width)
    experts, width, hidden = layer.experts, layer.experts.down_proj.shape[2], model.hidden_size
    rows = tokens.here * model.num_experts_per_tok
    scores = 12 * tokens.between * model.num_experts
    # rows in, gate, up, rows out; their order
    kept: float = element * rows * (2 * hidden + 2 * width) + 24 * rows + scores
    passing: float = element * rows * (2 * hidden + 3 * width) + 3 * element * experts.gate_proj.numel()
    if layer.shared is not None:
        shared = mlp_memory(layer.shared, model, tokens)
        kept, passing = kept + shared.kept, max(passing, shared.passing)
    return Held(kept, passing)


def head_memory(rows: int, config: Config, mesh: Mesh, tokens: Tokens) -> Held:
    """Final norm, prediction head if any, and loss. rows: of the output matrix on this rank."""
    element, hidden, counted = tokens.element, config.model.hidden_size, tokens.counted
    chunk, matrix = min(CHUNK_TOKENS, counted) * rows, rows * hidden
    last_norm = residual_norm_memory(config.model, mesh, tokens) * (config.model.norm_placement == "pre")
    kept = last_norm + element * hidden * counted + 20 * counted
    if config.model.prediction_head:  # inputs of the square matrix and of GELU, and the norm
        kept += 2 * element * hidden * tokens.between + residual_norm_memory(config.model, mesh, tokens)
    # the matrix's gradient is summed in float32; logits, their gradients, those in the compute dtype
    logits = max(chunk * (8 + element), 4 * chunk + element * (chunk + matrix))
    passing = 4 * matrix + logits + element * hidden * (counted + tokens.here)
    return Held(kept, passing)


def attention_kinds(layer: Attention, config: Config) -> set[str]:
    """What the layer runs in some step of the phase."""
    fraction = config.phase.full_attention_fraction
    return {kind for kind, part in ((layer.kind, 1 - fraction), ("full", fraction)) if part}


def attention_strategy(kind: str, config: Config, shape: AttentionShape, tokens: int) -> str:
    """How a layer exchanges tokens over cp; on one rank every strategy is none."""
    parallel = config.parallel
    ranks = parallel.context_parallel_size
    if ranks == 1 or kind == "sliding_window":
        return "ulysses"
    name = parallel.context_parallel_moba if kind == "moba" else parallel.context_parallel_full
    return choose(kind, shape, tokens, ranks) if name == "auto" else name
