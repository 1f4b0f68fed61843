"""How tokens are dealt to context-parallel ranks, and where segments and pieces then lie."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neomoba_dist.parallel.context_split import SPLITS, ContextSplit, pieces, segments, split_batch
from tests.models import tiny_batch

CASES = {
    "tokens": st.integers(1, 700),
    "ranks": st.integers(1, 6),
    "name": st.sampled_from(SPLITS),
    "block": st.integers(1, 40),
    "multiple": st.sampled_from([1, 2, 3]),
}


@given(**CASES)
def test_every_token_has_one_owner(tokens: int, ranks: int, name: str, block: int, multiple: int) -> None:
    split = ContextSplit.of_tokens(tokens, ranks, name, block, multiple)
    assert split == ContextSplit.of_local(split.local_tokens, ranks, name, block)
    assert split.local_tokens % multiple == 0
    assert tokens <= split.num_tokens <= tokens + ranks * (multiple + 1) * max(2, split.units)
    index = [split.global_index(rank) for rank in range(ranks)]
    assert torch.cat(index).sort().values.equal(torch.arange(split.num_tokens))
    assert all(i.equal(i.sort().values) for i in index)
    assert split.gathered_order()[torch.cat(index)].equal(torch.arange(split.num_tokens))
    for rank in range(ranks):
        for place in (0, 1, split.num_tokens // 2, split.num_tokens):
            assert split.tokens_before(rank, place) == int((index[rank] < place).sum())
        assert all(split.owner(start // split.unit) == rank for start in split.unit_starts(rank))


@pytest.mark.parametrize("group", [2, 4, 8])
@pytest.mark.parametrize("name", SPLITS)
def test_neighbouring_ranks_together_are_a_split_again(name: str, group: int) -> None:
    split = ContextSplit.of_tokens(1024, 8, name, 32)
    merged = split.merged(group)
    for index in range(8 // group):
        members = torch.cat([split.global_index(rank) for rank in range(index * group, (index + 1) * group)])
        assert merged.global_index(index).equal(members.sort().values)


@given(borders=st.lists(st.integers(0, 300), max_size=6), **{k: v for k, v in CASES.items() if k != "tokens"})
def test_segments_and_pieces_cover_everything(
    borders: list[int], ranks: int, name: str, block: int, multiple: int
) -> None:
    split = ContextSplit.of_tokens(300, ranks, name, block, multiple)
    cu = [0, *sorted(borders), split.num_tokens]
    cut = pieces(split, cu, block)
    blocks = [range(o, min(o + block, b)) for a, b in pairwise(cu) for o in range(a, b, block)]
    assert cut.num_blocks == len(blocks)
    for number, tokens in enumerate(blocks):
        first, last = cut.first[number : number + 2].tolist()
        assert [t for p in range(first, last) for t in range(cut.start[p], cut.start[p] + cut.length[p])] == [*tokens]
    for rank in range(ranks):
        index, mine = split.global_index(rank), cut.of(rank)
        assert index[cut.local[mine]].equal(cut.start[mine])
        assert int(cut.length[mine].sum()) == split.local_tokens
        assert cut.number[mine].equal(torch.arange(len(mine)))
        held = [t for s in segments(split, rank, cu) for t in range(s.start, s.stop)]
        assert held == index.tolist()
        assert all(s.document_start <= s.start < s.stop <= s.document_stop for s in segments(split, rank, cu))


def test_a_batch_is_split_with_its_labels_positions_and_borders() -> None:
    batch = tiny_batch(3, rows=1)
    split = ContextSplit.of_tokens(64, 3, "block_cyclic", 8)
    shares = [split_batch(batch, split, rank) for rank in range(3)]
    padding = split.num_tokens - 64
    assert padding > 0
    for name, fill in (("input_ids", 0), ("labels", -100), ("position_ids", -1)):
        whole = torch.cat([getattr(share, name) for share in shares])[split.gathered_order()]
        assert whole.equal(torch.cat((getattr(batch, name), torch.full((padding,), fill))))
    for share in shares:
        assert share.cu_seqlens.tolist() == [*batch.cu_seqlens.tolist(), split.num_tokens]
        assert share.num_valid == batch.num_valid
        assert share.row_ids.equal(batch.row_ids)
