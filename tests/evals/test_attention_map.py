"""Attention maps against a plain softmax over the chosen blocks, and the same on every layout."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import evals.__main__ as program
from evals import attention_map
from evals.attention_map import cell_tokens
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.errors import MISTAKE
from neomoba_dist.generate.stage import batch_of
from tests.evals.runs import make_config, write_run
from tests.evals.test_layouts import require_close
from tests.ranks import run_ranks

TOKENS, BLOCK, TOP_K = 93, 8, 2  # twelve blocks, the last one incomplete; cells of 2 tokens
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}


def evaluate(run: Path, output: Path, *more: object) -> int:
    words = ["run", "--tasks", "attention_map", "--checkpoint", run, "--output", output, "--map-tokens", TOKENS, *more]
    return program.main([str(word) for word in words])


def read(output: Path) -> Any:
    return json.loads((output / "attention_map.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def fewer_tokens() -> Iterator[None]:
    """Whose routing is counted: 22 rows, the last one short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_map, "EXPERT_TOKENS", 2048)
        yield


@pytest.fixture(scope="module")
def checkpoints(runs: dict[str, Path], corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    config = make_config(corpus.folder, objective="clm", **EXPERTS)
    return {**runs, "moe": write_run(tmp_path_factory.mktemp("moe"), config)}


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of one process."""
    folder = tmp_path_factory.mktemp("maps")
    for kind, run in checkpoints.items():
        assert evaluate(run, folder / kind) == 0
    return {kind: folder / kind for kind in checkpoints}


def plain_weights(run: Path, text: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, weights of full attention, chosen) [heads, T, T] of a layer, from whole scores."""
    model, config = load_model(run)
    seen = []
    attention = model.blocks[layer].attention
    attention.register_forward_pre_hook(lambda _, given: seen.append(given[:3]))
    with torch.no_grad():
        model.hidden_states(batch_of([text], "cpu"))
        q, k, _ = (x.double() for x in attention.project(*seen[0]))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    place = torch.arange(len(text))
    seen_by = place[:, None] >= place if config.model.causal else torch.ones(len(text), len(text), dtype=torch.bool)
    full = scores.masked_fill(~seen_by, -torch.inf).softmax(-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    means = torch.stack([part.mean(0) for part in k.split(BLOCK)])  # [B, heads, D]
    for head in range(q.shape[1]):
        for query in range(len(text)):
            own = query // BLOCK
            rivals = [b for b in range(len(means)) if (b < own if config.model.causal else b != own)]
            rivals.sort(key=lambda b: float(means[b, head] @ q[query, head]), reverse=True)
            for block in (own, *rivals[: TOP_K - 1]):
                chosen[head, query, block * BLOCK : (block + 1) * BLOCK] = True
    return scores.masked_fill(~(seen_by & chosen), -torch.inf).softmax(-1), full, chosen


def by_cells(weights: torch.Tensor, cell: int) -> np.ndarray:
    """Summed over keys and averaged over queries of cells."""
    rows = [part.mean(0) for part in weights.split(cell)]
    return torch.stack([torch.stack([part.sum() for part in row.split(cell)]) for row in rows]).numpy()


@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_equals_plain_softmax(
    checkpoints: dict[str, Path], folders: dict[str, Path], corpus: Corpus, kind: str
) -> None:
    result = read(folders[kind])
    assert (result["tokens"], result["cell"], len(result["maps"])) == (TOKENS, 2, 3 * 4)
    lengths = np.asarray(corpus.document_lengths)
    start = int(lengths[: lengths.argmax()].sum())
    text = corpus.tokens_at(start, TOKENS).tolist()
    place = torch.arange(TOKENS)
    far = (place[:, None] - place).abs()
    own = place[:, None] // BLOCK == place // BLOCK
    for layer in (0, 2):
        weights, full, chosen = plain_weights(checkpoints[kind], text, layer)
        if layer == 2:
            weights = full
        for entry in result["maps"]:
            if entry["layer"] != layer:
                continue
            head = weights[entry["head"]]
            np.testing.assert_allclose(entry["mass"], by_cells(head, 2), atol=1e-4)
            np.testing.assert_allclose(np.sum(entry["mass"], 1), 1, atol=1e-2)
            assert entry["own_block"] == pytest.approx(float((head * own).sum(1).mean()), abs=1e-4)
            assert entry["first_token"] == pytest.approx(float(head[:, 0].mean()), abs=1e-4)
            assert entry["distance"] == pytest.approx(float((head * far).sum(1).mean()), rel=1e-3)
            if layer == 2:
                assert (entry["kind"], entry["chosen"], entry["caught"]) == ("full", None, None)
                continue
            mine = chosen[entry["head"]]
            expected = [part.double().mean(0)[::BLOCK] for part in mine.split(2)]
            np.testing.assert_allclose(entry["chosen"], torch.stack(expected).numpy(), atol=1e-4)
            assert entry["caught"] == pytest.approx(float((full[entry["head"]] * mine).sum(1).mean()), abs=1e-4)
            assert 0 < entry["caught"] < 1


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [
        ("clm", 2, ["--tp", 2]),
        ("clm", 2, ["--pp", 2]),
        ("clm", 2, ["--cp", 2]),
        ("mlm", 4, ["--tp", 2, "--cp", 2]),
        ("moe", 2, ["--ep", 2]),
        ("moe", 2, ["--cp", 2]),
        ("clm", 2, []),  # dp 2
    ],
)
def test_layouts(
    checkpoints: dict[str, Path],
    folders: dict[str, Path],
    kind: str,
    ranks: int,
    layout: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the first rank draws what is compared here as numbers, and takes ten times as long for it
    monkeypatch.setattr(attention_map, "figure", lambda *_: Figure())
    assert run_ranks(ranks, evaluate, checkpoints[kind], tmp_path, *layout) == [0] * ranks
    found, expected = read(tmp_path), read(folders[kind])
    for mine, one in zip(found["maps"], expected["maps"], strict=True):
        assert mine.keys() == one.keys()
        for key in ("mass", "chosen"):
            if one[key] is None:
                assert mine[key] is None
            else:
                np.testing.assert_allclose(mine[key], one[key], atol=1e-4)
        require_close(
            {key: mine[key] for key in attention_map.NUMBERS}, {key: one[key] for key in attention_map.NUMBERS}
        )
    assert found["experts"] == expected["experts"]


def test_experts(checkpoints: dict[str, Path], folders: dict[str, Path], corpus: Corpus) -> None:
    found = read(folders["moe"])["experts"]
    assert found["layers"] == [1, 2]
    assert found["tokens"] == min(attention_map.EXPERT_TOKENS, corpus.tokens)
    model, _ = load_model(checkpoints["moe"])
    counts = torch.zeros(2, 4)
    for number, layer in enumerate((1, 2)):
        router = model.blocks[layer].mlp.router

        def count(_: Any, given: Any, made: Any, number: int = number) -> None:
            counts[number] += torch.bincount(made[0].flatten(), minlength=4)

        router.register_forward_hook(count)
    for start in range(0, found["tokens"], 96):
        piece = corpus.tokens_at(start, min(96, found["tokens"] - start)).tolist()
        with torch.no_grad():
            model.eval().hidden_states(batch_of([piece], "cpu"))
    assert counts.sum() == 2 * 2 * found["tokens"]
    np.testing.assert_allclose(found["shares"], counts / counts.sum(1, keepdim=True), atol=1e-4)


def test_files(folders: dict[str, Path]) -> None:
    for kind, drawn in (("clm", 13), ("moe", 15)):
        result = read(folders[kind])
        figure = attention_map.figure(result)
        assert len(figure.get_axes()) == drawn  # heads of three layers, colour bars, experts
        header, *lines = csv.reader((folders[kind] / "attention_map.csv").open())
        assert header == ["map", "layer", "head_or_expert", "query", "key", "value"]
        assert sum(line[0] == "experts" for line in lines) == (8 if kind == "moe" else 0)
        whole = sum(float(line[-1]) for line in lines if line[:3] == ["attention", "1", "3"])
        assert whole == pytest.approx(len(result["maps"][0]["mass"]), rel=1e-2)
        assert "Tinted: the blocks of 8 tokens" in attention_map.caption(result)
        assert ("Experts: the router's choices" in attention_map.caption(result)) == (kind == "moe")
        table = attention_map.table(result)
        assert table[1][0] == "layer 0, head 0"
        assert table[-1][-1] == "-"
        assert (folders[kind] / "attention_map.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "model", [{"attention": "sliding_window", "sliding_window": 16}, {"position_embedding": "alibi"}], ids=str
)
def test_windows_and_biases(corpus: Corpus, model: dict[str, Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_config(corpus.folder, objective="clm", **model))
    assert evaluate(run, tmp_path, "--layers", 0, "--heads", 1) == 0
    (entry,) = read(tmp_path)["maps"]
    mass = np.array(entry["mass"])
    np.testing.assert_allclose(mass.sum(1), 1, atol=1e-2)
    if "attention" in model:
        query, key = np.indices(mass.shape)
        assert mass[query - key > 8].max() == 0  # cells of 2 tokens
        assert mass[query - key == 7].min() > 0
        assert (entry["kind"], entry["chosen"]) == ("sliding_window", None)
    else:
        assert entry["kind"] == "moba"
        assert 0 < entry["caught"] < 1


def test_full_attention_has_no_blocks(runs: dict[str, Path], tmp_path: Path) -> None:
    assert evaluate(runs["clm"], tmp_path, "--attn-prefill", "full", "--layers", 0, "--heads", "1,3") == 0
    result = read(tmp_path)
    assert [(entry["head"], entry["kind"], entry["chosen"]) for entry in result["maps"]] == [
        (1, "full", None), (3, "full", None)
    ]  # fmt: skip
    assert "Tinted" not in attention_map.caption(result)
    assert len(attention_map.table(result)[0]) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "1,3"], "--layers 3: the model has 3, counted from 0"),
        (["--heads", "4"], "--heads 4: the model has 4"),
        (["--map-tokens", 10**6], "--map-tokens 1000000: the longest document of"),
    ],
)
def test_mistakes(
    runs: dict[str, Path], more: list[object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(runs["clm"], tmp_path, *more) == MISTAKE
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_cells_divide_blocks_or_are_whole_ones() -> None:
    for count, block in ((93, 8), (512, 64), (4096, 512), (4096, 16), (100, 7), (10, 8)):
        cell = cell_tokens(count, block)
        assert -(-count // cell) <= attention_map.MOST_CELLS
        assert block % cell == 0 or cell % block == 0
