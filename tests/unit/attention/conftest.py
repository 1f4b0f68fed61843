"""What the files for Triton's interpreter share."""

from functools import partial

import pytest


@pytest.fixture
def short_index_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many queries per tile of an index as small cases have: the interpreter computes a tile's empty places too."""
    from neomoba_dist.model.attention.kernels.library import moba
    from neomoba_dist.model.attention.kernels.triton import backward, forward, index

    for module in (forward, backward, moba):
        monkeypatch.setattr(module, "build_index", partial(index.build_index, query_tile=64))
