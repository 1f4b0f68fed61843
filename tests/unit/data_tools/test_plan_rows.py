"""plan_rows: the plan that a job would make, from flags or a configuration, with any number of workers, after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_tools import plan_rows
from neomoba_dist.config import DataConfig
from neomoba_dist.data import plan as plan_module
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.plan import ROWS_FILE, Planner
from neomoba_dist.data.rows import Source
from neomoba_dist.data.stream import UpdateStream
from neomoba_dist.data.validation import validation_batches
from neomoba_dist.errors import MISTAKE
from tests.corpora import folder_digests, make_corpus
from tests.programs import ROOT, run_program


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), shard_bytes=20_000)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "PART_DOCUMENTS", 40)


def _plans(cache: Path) -> dict[str, str]:
    return folder_digests(cache / "plans")


def _train(corpus: Corpus, cache: Path, length: int, **settings: Any) -> UpdateStream:
    """What training does at start."""
    sources = [Source(corpus), Source(corpus, min_length=300)]
    return UpdateStream(
        sources,
        DataConfig(train="", cache=str(cache), prefetch=0, **settings),
        objective="clm",
        sequence_length=length,
        micro_batch_size=1,
        accumulation=1,
        seed=0,
    )


def test_the_files_that_training_would_make(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = f"{corpus.name}*0.5,{corpus.name}@300"
    settings: dict[str, Any] = {"packing": "concat", "align": 4, "max_documents_per_row": 8}
    for length in (128, 512):
        stream = _train(corpus, tmp_path / "job", length, **settings)
    expected = _plans(tmp_path / "job")
    assert len(expected) > 4 * 4
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    for workers in ("1", "3"):
        cache = tmp_path / workers
        command = ["--train", mixture, "--sequence-length", "128", "512", "--cache", str(cache), "--workers", workers]
        plan_rows.main([*command, *flags])
        assert _plans(cache) == expected
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    rows = [reader.plan.rows for reader in stream.rows.readers]
    assert [f"in {count} rows of 512 tokens" in line for count, line in zip(rows, lines[2:4], strict=True)]
    monkeypatch.delattr(Planner, "make")  # training finds all of it made
    assert _train(corpus, tmp_path / "3", 512, **settings).rows_in_epoch == stream.rows_in_epoch


def test_a_configuration_says_the_same(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((ROOT / "ds_configs" / "cpu_tiny.json").read_text())
    data = config["neomoba"]["data"]
    data |= {"train": f"{corpus.name},{corpus.name}@300", "validation": corpus.name, "cache": str(tmp_path / "cache")}
    (tmp_path / "c.json").write_text(json.dumps(config))
    plan_rows.main(["--ds_config", str(tmp_path / "c.json"), "--set", "neomoba.data.align=2"])
    monkeypatch.delattr(Planner, "make")
    settings: dict[str, Any] = {"max_documents_per_row": 16, "align": 2}
    assert _train(corpus, tmp_path / "cache", 256, **settings).rows_in_epoch
    validation = DataConfig(train="", cache=str(tmp_path / "cache"), **settings)
    assert validation_batches(corpus, validation, objective="mlm", sequence_length=256, micro_batch_size=1, rows=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to plan: give --ds_config FILE, or --train and --sequence_length"),
        (["--train", "a"], "nothing to plan"),
        (["--train", "a*0", "--sequence_length", "8"], '--train "a\\*0" gives a source the weight 0'),
        (["--train", "none", "--sequence_length", "8"], "no finished corpus in none"),
        (["--set", "a=1"], "--set changes keys of --ds_config"),
        (["--ds_config", "ds_configs/cpu_tiny.json", "--align", "4"], "change it with --set instead of flags"),
        (["--ds_config", "ds_configs/none.json"], "none.json"),
        (["--ds_config", "ds_configs/cpu_tiny.json", "--set", "neomoba.data.cache=null"], "set it to a folder"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(DataError, match=message):
        plan_rows.main(words)


def test_a_mistake_at_the_shell_is_one_line() -> None:
    result = run_program("-m", "data_tools.plan_rows", "--ds_config", "ds_configs/none.json")
    assert result.returncode == MISTAKE
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


_SLOW = """
import sys, time
from neomoba_dist.data import plan, stored
plan.PART_DOCUMENTS, write = 40, stored.write_shared
plan.write_shared = lambda *arguments: (time.sleep(0.03), write(*arguments))
from data_tools.plan_rows import main
main(sys.argv[1:])
"""


def test_killed_anywhere_beside_another_job(corpus: Corpus, tmp_path: Path) -> None:
    """kill -9 of one of two commands on one cache; the other one, and the same command again, end with the plan."""
    planner_words = ["--train", corpus.name, "--sequence_length", "256", "--workers", "2", "--cache"]
    plan_rows.main([*planner_words, str(tmp_path / "whole")])
    expected = _plans(tmp_path / "whole")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for number in range(4):
        cache = tmp_path / str(number)
        words = [sys.executable, "-c", _SLOW, *planner_words, str(cache)]
        jobs = [
            subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) for _ in range(1 + number % 2)
        ]
        while not list(cache.glob("plans/*/part-*")) and jobs[0].poll() is None:
            time.sleep(0.005)
        time.sleep(random.Random(number).uniform(0, 0.3))
        jobs[0].send_signal(signal.SIGKILL)
        assert [job.wait(60) for job in jobs][1:] == [0] * (number % 2)
        if number % 2:
            assert _plans(cache) == expected
        elif not list(cache.rglob(ROWS_FILE)):
            assert list(cache.rglob("part-*"))
        plan_rows.main([*planner_words, str(cache)])
        assert _plans(cache) == expected
