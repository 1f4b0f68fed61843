"""The tiny model with experts on many ranks, in float64 and without DeepSpeed: what every rank computes and sends."""

from dataclasses import dataclass, replace

import torch

from neomoba_dist.config import ModelConfig, ParallelConfig
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.init import shard_of
from neomoba_dist.model.moe.layer import moe_layers
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.context_split import local_share
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.layer_stats import LayerStatistics
from tests.equivalence import Pieces, assemble, pieces
from tests.models import LENGTH, tiny_batch, tiny_model

LOSSES = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.1}


def moe_model(**changes: object) -> ModelConfig:
    """Experts in the last two of three layers, both with MoBA or full attention, and a shared one."""
    settings = {"num_experts": 8, "moe_intermediate_size": 16, "num_shared_experts": 1, "first_k_dense_replace": 1}
    return tiny_model(**{**settings, **LOSSES, **changes})


def padded_batches(count: int, objective: str = "mlm", rows: int = 2) -> list[Batch]:
    """Micro-batches whose last document is padding in every second one."""
    batches = []
    for seed in range(count):
        batch = tiny_batch(seed, rows, objective)
        if seed % 2:
            batch.position_ids[-5:], batch.labels[-5:] = -1, -100
        batches.append(batch)
    total = sum(batch.local_valid() for batch in batches)
    return [replace(batch, num_valid=total) for batch in batches]


@dataclass
class Outcome:
    """Loss and auxiliary loss of all batches, records of the layers [layers, 4 + E], gradients.

    moved: bytes of all-to-alls over ep on this rank. away: (token, expert) pairs of its tokens that live elsewhere.
    """

    loss: float
    aux_loss: float
    records: torch.Tensor
    gradients: Pieces
    moved: int
    away: int


def set_bias(model: NeoBERT, bias: list[float] | None) -> None:
    """Steer all tokens: the bias of every router."""
    for layer in moe_layers(model):
        if bias is not None:
            layer.router.bias.copy_(torch.tensor(bias))


def own_records(statistics: LayerStatistics) -> torch.Tensor:
    """This rank's sums [layers with experts, 4 + E]."""
    return statistics.sums[list(statistics.config.moe_layers), 2:].clone()


def on_this_rank(
    config: ModelConfig, parallel: ParallelConfig, batches: list[Batch], bias: list[float] | None = None
) -> Outcome:
    """Data-parallel ranks take turns with the batches; all sums are over all ranks, the bytes this rank's."""
    mesh = Mesh.build(parallel, num_key_value_heads=config.num_key_value_heads)
    model = NeoBERT(config, mesh, dtype=torch.float64, seed=5, row_length=LENGTH)
    set_bias(model, bias)
    statistics = LayerStatistics(model, config, mesh)
    mine = batches[mesh["dp"].index :: mesh["dp"].size]
    loss, aux_loss = torch.zeros(2, dtype=torch.float64)
    for batch in mine:
        token_loss, added = model(local_share(batch, mesh, config))
        # what DeepSpeed's averages over micro-batches and dp x cp leave of both
        (token_loss / batch.num_valid + added / len(batches) / mesh["cp"].size).backward()
        loss += token_loss.detach() / batch.num_valid
        aux_loss += added.detach() / len(batches) / mesh["cp"].size
    entry = mesh.ledger.entries.get(("ep", "all_to_all"))
    records = own_records(statistics)
    experts = torch.arange(config.num_experts) // (config.num_experts // mesh["ep"].size)
    away = int(records[:, 4:][:, experts != mesh["ep"].index].sum())
    if mesh.sequence_parallel:
        records = all_reduce(records, mesh, "tp")
    for parameter in model.parameters():
        axis = "expert_dp" if "ep" in shard_of(parameter).axes else "dp_cp"
        parameter.grad = all_reduce(parameter.grad, mesh, axis)
    return Outcome(
        float(all_reduce(loss, mesh, "dp_cp")),
        float(all_reduce(aux_loss, mesh, "dp_cp")),
        all_reduce(records, mesh, "dp_cp"),
        pieces(model, "grad"),
        entry.bytes if entry else 0,
        away,
    )


def in_one_process(
    config: ModelConfig, batches: list[Batch], bias: list[float] | None = None
) -> tuple[Outcome, dict[str, torch.Tensor]]:
    """The yardstick, and its gradients by logical name."""
    model = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5, row_length=LENGTH)
    set_bias(model, bias)
    statistics = LayerStatistics(model, config, model.mesh)
    loss, aux_loss = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        token_loss, added = model(batch)
        (token_loss / batch.num_valid + added / len(batches)).backward()
        loss += token_loss.detach() / batch.num_valid
        aux_loss += added.detach() / len(batches)
    records = own_records(statistics)
    gradients = pieces(model, "grad")
    return Outcome(float(loss), float(aux_loss), records, gradients, 0, 0), assemble([gradients])
