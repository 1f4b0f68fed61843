"""The held-out loss is that of training's validation, for every objective; what else runs encoder-decoders."""

import json
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evals import __main__ as program
from evals import validation_loss
from evals.cli import EvalError
from evals.report import missing_section
from evals.runs import read_run
from evals.work import Workers, item_key
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.validation import validation_batches
from neomoba_dist.errors import MISTAKE
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.parallel.mesh import Mesh
from tests.corpora import make_corpus
from tests.evals.runs import LENGTH, make_config, write_run


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an encoder-decoder."""
    folder = tmp_path_factory.mktemp("pairs")
    corpus = make_corpus(folder, sentinels=16)
    config = make_config(corpus.folder, objective="span_corruption", num_decoder_layers=2)
    return write_run(folder / "run", config)


@pytest.mark.parametrize("objective", ["mlm", "clm", "span_corruption"])
def test_it_is_the_loss_of_validation(
    objective: str, runs: dict[str, Path], pair_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.get(objective, pair_run)
    words = ["run", "--tasks", "validation_loss", "--checkpoint", str(folder), "--output", str(tmp_path)]
    assert program.main([*words, "--validation-rows", "6", "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "validation_loss.json").read_text())
    model, config = load_model(folder)
    corpus = open_corpus(Path(str(config.data.validation)))
    batches = validation_batches(
        corpus, config.data, objective=objective, sequence_length=LENGTH, micro_batch_size=2, rows=6
    )
    assert [row["name"] for row in result["rows"]] == ["moba", "full"]
    assert result["tokens"] == sum(batch.local_valid() for batch in batches)
    for row in result["rows"]:
        set_full_attention(model, row["name"] == "full")
        with torch.no_grad():
            losses = sum(float(model.token_losses(batch).double().sum()) for batch in batches)
        assert row["value"] == pytest.approx(losses / result["tokens"], rel=1e-6)
    assert result["rows"][0]["value"] != result["rows"][1]["value"]
    assert f"{result['rows'][0]['value']:.4f}" in capsys.readouterr().out


@dataclass(frozen=True)
class CountedWorkers(Workers):
    """Rows that are measured in one round, which must be as many for all who share experts."""

    def _measured(self, measure: Any, values: list[Any]) -> list[dict[str, Any]]:
        assert len(values) == 1
        return super()._measured(measure, values)


def test_rounds_of_one_row_no_folder_for_plans_and_a_broken_model(pair_run: Path, tmp_path: Path) -> None:
    config = read_run(pair_run).config
    cache = tmp_path / "cache"
    subject: Any = SimpleNamespace(
        config=replace(config, data=replace(config.data, cache=str(cache))),
        corpus=open_corpus(Path(str(config.data.validation))),
        checkpoint=pair_run,
        attentions=["full"],
        key=item_key,
        workers=CountedWorkers(Mesh.single()),
        model=SimpleNamespace(use=lambda kind: None, log_likelihoods=lambda batch: (-torch.ones(batch.local_valid()),)),
    )
    plan = validation_loss.prepare(subject, Namespace(validation_rows=3, limit=None))
    assert not cache.exists()
    assert validation_loss.run(subject, plan)["rows"][0]["value"] == 1.0
    subject.model.log_likelihoods = lambda batch: (torch.full((1,), torch.nan),)
    with pytest.raises(EvalError, match=r"validation_loss: the loss is not a number; the weights of .* are damaged"):
        validation_loss.run(subject, plan)


def test_other_tasks_do_not_run_an_encoder_decoder(
    pair_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--tasks", "position_loss", "--checkpoint", str(pair_run), "--output", str(tmp_path)]
    assert program.main(words) == MISTAKE
    said = capsys.readouterr().err
    assert "--tasks position_loss: does not run an encoder-decoder" in said
    assert said.endswith("give --tasks validation_loss\n")
    assert said.count("\n") == 1
    assert "validation_loss" in "".join(missing_section([read_run(pair_run)], {})), "a report asks for what there is"
