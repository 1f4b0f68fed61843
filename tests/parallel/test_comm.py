"""The collectives of parallel/comm.py: what arrives, what flows back, and what the ledger counts."""

import torch

from neomoba_dist.config import ParallelConfig
from neomoba_dist.parallel import comm, transfers
from neomoba_dist.parallel.mesh import Mesh
from tests.ranks import run_ranks

COUNTS = [1, 2, 0, 1]  # rows that every rank has for the ranks 0..3


def _collectives() -> dict[str, int]:
    mesh = Mesh.build(ParallelConfig(context_parallel_size=4))
    rank = mesh["cp"].index
    mine = torch.full((2, 3), float(rank))
    assert comm.all_gather(mine, mesh, "cp")[:, 0, 0].tolist() == [0, 1, 2, 3]
    parts = torch.arange(4.0)[:, None].expand(4, 2) + 10 * rank
    assert comm.reduce_scatter(parts, mesh, "cp").tolist() == [4 * rank + 60.0] * 2
    assert transfers.pass_on([mine], mesh, "cp").wait()[0].eq((rank - 1) % 4).all()

    rows = (torch.arange(4.0) + 10 * rank)[:, None].requires_grad_()
    received = comm.all_to_all(rows, mesh, "cp", COUNTS, [COUNTS[rank]] * 4)
    first = sum(COUNTS[:rank])
    assert received.flatten().tolist() == [10 * r + first + i for r in range(4) for i in range(COUNTS[rank])]
    (received * (rank + 1)).sum().backward()
    assert rows.grad.flatten().tolist() == [1, 2, 2, 4]  # what each row's receiver multiplied it with
    return {operation: entry.bytes for (_, operation), entry in mesh.ledger.entries.items()}


def test_collectives_and_their_bytes() -> None:
    for rank, counted in enumerate(run_ranks(4, _collectives)):
        forward, backward = 3 * COUNTS[rank], sum(COUNTS) - COUNTS[rank]
        assert counted == {
            "all_gather": 3 * 24,
            "reduce_scatter": 3 * 8,
            "ring": 24,
            "all_to_all": 4 * (forward + backward),
        }


def _half_precision_sum() -> list[float]:
    mesh = Mesh.build(ParallelConfig(context_parallel_size=4))
    value = 256.0 if mesh["cp"].index == 0 else 1.0
    return comm.reduce_scatter(torch.full((4, 1), value, dtype=torch.bfloat16), mesh, "cp").tolist()


def test_reduce_scatter_does_not_round_between_the_terms() -> None:
    assert run_ranks(4, _half_precision_sum) == [[260.0]] * 4  # 256 + 1 is 256 in bfloat16
