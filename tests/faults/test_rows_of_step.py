"""inspect_shards --rows-of-step: the rows that all ranks trained on, from the run folder alone."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.run_rows import find_step, read_rows
from neomoba_dist.config import Config, parse_config
from neomoba_dist.errors import MISTAKE
from neomoba_dist.train.engine import Engine
from neomoba_dist.train.metrics import METRICS_FILE, read_metrics
from tests.corpora import make_corpus
from tests.faults.test_skipped_steps import poison
from tests.programs import run_program
from tests.ranks import run_ranks
from tests.runs import run_config, train_here

Rows = dict[int, dict[int, list[int]]]  # step -> row -> ids as the model saw them


def train(config: Config, output: Path, last_step: int, resume: Path | None = None) -> Rows:
    """The rows of this rank; step 2 is skipped."""
    poison((2,), math.nan)
    seen: Rows = {}
    steps = iter(range(4 if resume else 1, last_step + 1))
    update = Engine.update

    def record(engine: Engine, batches: Any, *given: Any) -> Any:
        rows = seen[next(steps)] = {}
        for batch in batches:
            rows.update(zip(batch.row_ids.tolist(), batch.input_ids.view(batch.rows, -1).tolist(), strict=True))
        return update(engine, batches, *given)

    Engine.update = record  # type: ignore[method-assign]
    train_here(config, output, last_step, resume)
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """Three steps on two ranks, then three more on one, which takes 16 rows per update instead of 8."""
    folder = tmp_path_factory.mktemp("rows")
    corpus = make_corpus(folder / "corpus").folder
    seen: Rows = {}
    for world, tokens, last, resume in ((2, 1024, 3, None), (1, 2048, 6, folder / "run" / "checkpoints" / "step_3")):
        tree = run_config({}, tokens_per_update=tokens).to_dict()
        tree["neomoba"]["data"] |= {"train": str(corpus), "validation": None}
        for rows in run_ranks(world, train, parse_config(tree), folder / "run", last, resume):
            for step, found in rows.items():
                seen.setdefault(step, {}).update(found)
    return folder / "run", seen


def test_rows_are_those_that_all_ranks_saw(run: tuple[Path, Rows]) -> None:
    folder, seen = run
    log = read_metrics(folder / METRICS_FILE)
    assert [entry["step"] for entry in log] == list(seen) == [1, 2, 3, 4, 5, 6]
    assert log[1]["skipped"]
    for step, rows in seen.items():
        assert len(rows) == (8 if step <= 3 else 16)
        batches, _ = read_rows(folder, step, find_step(folder, step))
        assert {int(batch.row_ids): batch.input_ids.tolist() for batch in batches} == rows
    assert log[1]["row_ids"] == [int(b.row_ids) for b in read_rows(folder, 2, find_step(folder, 2))[0]]
    unfinished = find_step(folder, 7)  # under way when the run ended
    assert (unfinished.first, unfinished.rows, unfinished.entry) == (3 * 8 + 3 * 16, 16, None)


def test_text_is_shown(run: tuple[Path, Rows]) -> None:
    folder, seen = run
    done = run_program(
        "-m", "data_tools.inspect_shards", "--run", folder, "--rows-of-step", 2, "--max_characters", 9999
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"{folder}: step 2, skipped: the gradient norm is nan; rows 8 to 15 of the run\nrow {next(iter(seen[2]))}: "
    )
    assert done.stdout.count("tokens have a label") == 8
    batches, tokenizer = read_rows(folder, 2, find_step(folder, 2))
    unmasked = torch.where(batches[0].labels < 0)[0]
    assert tokenizer.token(int(batches[0].input_ids[unmasked[5]])).removeprefix("##") in done.stdout


def fails(*words: object) -> str:
    done = run_program("-m", "data_tools.inspect_shards", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (MISTAKE, "", 1), done.stderr
    return done.stderr


def test_mistakes_are_one_line(run: tuple[Path, Rows], tmp_path: Path) -> None:
    folder, _ = run
    assert f"error: --run {tmp_path}: not the folder of a training run" in fails("--run", tmp_path, "--rows-of-step", 1)
    assert f"the log of {folder} ends with step 6; give 1 to 7" in fails("--run", folder, "--rows-of-step", 8)
    for words in ([], ["--run", folder], ["--rows-of-step", 2], [folder, "--run", folder, "--rows-of-step", 2]):
        assert "error: give a folder of shards, or --run RUN with --rows-of-step N" in fails(*words)

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    config["neomoba"]["data"]["train"] = str(tmp_path / "gone")
    (other / "config.json").write_text(json.dumps(config))
    said = fails("--run", other, "--rows-of-step", 1)
    assert f"neomoba.data.train: no finished corpus in {tmp_path / 'gone'}" in said
    assert f"if the corpus has moved, say where in {other / 'config.json'}" in said
    config["neomoba"]["data"]["train"] = str(make_corpus(tmp_path / "changed", "wordpiece").folder)
    (other / "config.json").write_text(json.dumps(config))
    assert "is not the data of step 1 (fingerprint" in fails("--run", other, "--rows-of-step", 1)
