"""launch/finetune.py as its users start it: tasks, seeds, resume, submission, bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neomoba_dist.checkpoint.hf import export_folder
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.checkpoint.tokenizer import tokenizer_of
from neomoba_dist.errors import MISTAKE
from neomoba_dist.model.init import ShardedTensorSpec
from tests.corpora import make_corpus
from tests.evals.runs import make_config, write_run
from tests.glue import write_mnli_and_rte, write_pairs, write_sst2
from tests.pairs import PAIRS
from tests.programs import run_program
from tests.runs import metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "ds_configs" / "cpu_tiny_glue.json"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of random weights, with a tokenizer beside its corpus."""
    folder = tmp_path_factory.mktemp("pretrained")
    corpus = make_corpus(folder / "corpus", "wordpiece")
    return write_run(folder / "run", make_config(corpus.folder))


def finetune(pretrained: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return run_program("launch/finetune.py", "--init_from", pretrained, *words, timeout=240)


def test_learns_resumes_and_writes_a_submission(pretrained: Path, tmp_path: Path) -> None:
    glue = write_sst2(tmp_path / "glue")
    words = ("--ds_config", TINY, "--data_dir", glue, "--set", "neomoba.finetune.epochs=8")
    words += ("neomoba.phase.learning_rate=3e-3",)
    whole = finetune(pretrained, *words, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "whole" / "sst2" / "seed_1234"
    result = json.loads((run / "result.json").read_text())
    assert result["majority"] == 0.5
    assert result["scores"]["validation_accuracy"] >= 0.9
    assert result["examples"] == {"train": 64, "dev": 24, "test": 5}
    submission = (tmp_path / "whole" / "submission" / "SST-2.tsv").read_text().splitlines()
    assert submission[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in submission[1:]] == ["0", "1", "2", "3", "4"]
    assert {line.split("\t")[1] for line in submission[1:]} == {"0", "1"}
    best = result["best_step"]
    assert [path.name for path in (run / "exports").iterdir()] == [f"step_{best}"]
    assert not (run / "checkpoints").exists()
    found = {line["step"]: line.get("validation_accuracy") for line in metrics(run)}
    assert found[best] == max(value for value in found.values() if value is not None)
    assert min(step for step, value in found.items() if value == found[best]) == best

    original = shutil.copytree(pretrained, tmp_path / "original")
    part = finetune(original, *words, "--output_dir", tmp_path / "part", "--max_steps", 4)
    assert part.returncode == 0, part.stderr
    resumed = tmp_path / "part" / "sst2" / "seed_1234"
    assert not (resumed / "result.json").exists()
    shutil.rmtree(original)  # what goes on needs it no more
    rest = finetune(original, *words, "--output_dir", tmp_path / "part")
    assert rest.returncode == 0, rest.stderr
    assert metrics(resumed) == metrics(run)
    again = json.loads((resumed / "result.json").read_text())
    assert again | {"init_from": result["init_from"]} == result
    assert (resumed / "test.tsv").read_text() == (run / "test.tsv").read_text()
    done = finetune(original, *words, "--output_dir", tmp_path / "part")
    assert done.returncode == 0
    assert "steps" not in done.stdout
    fresh = finetune(original, *words, "--output_dir", tmp_path / "part", "--resume", "none")
    assert fresh.returncode == MISTAKE
    assert fresh.stderr.startswith(f"error: {original}: no checkpoint here; ")
    assert len(fresh.stderr.splitlines()) == 1


@pytest.mark.full
def test_two_ranks_begin_and_one_goes_on(pretrained: Path, tmp_path: Path) -> None:
    """Under torchrun, ZeRO-3; the run is the one that a single rank makes, within rounding."""
    words = ("--ds_config", TINY, "--data_dir", write_sst2(tmp_path / "glue"), "--set", "neomoba.finetune.epochs=4")
    words += ("zero_optimization.stage=3",)
    assert finetune(pretrained, *words, "--output_dir", tmp_path / "one").returncode == 0
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", 2, "launch/finetune.py"]
    command += ["--init_from", pretrained, *words, "--output_dir", tmp_path / "two", "--max_steps", 4]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, timeout=240, check=True)
    assert finetune(pretrained, *words, "--output_dir", tmp_path / "two").returncode == 0
    one, two = (metrics(tmp_path / name / "sst2" / "seed_1234") for name in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for line, expected in zip(two, one, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_transfer_from_mnli_seeds_and_early_stopping(pretrained: Path, tmp_path: Path) -> None:
    glue = write_mnli_and_rte(tmp_path / "glue")
    settings = ("tasks=mnli,rte", "transfer=rte", "epochs=2", "seeds=2", "patience=1")
    found = finetune(
        pretrained,
        *("--ds_config", TINY, "--data_dir", glue, "--output_dir", tmp_path / "out", "--set"),
        *(f"neomoba.finetune.{setting}" for setting in settings),
        "neomoba.phase.learning_rate=1e-12",
    )
    assert found.returncode == 0, found.stderr
    results = {
        (task, seed): json.loads((tmp_path / "out" / task / f"seed_{seed}" / "result.json").read_text())
        for task in ("mnli", "rte")
        for seed in (1234, 1235)
    }
    for (task, seed), result in results.items():
        assert result["best_step"] < result["last_step"] <= 4  # no learning rate, so nothing gets better: one more
        transferred, start = tmp_path / "out" / "mnli" / f"seed_{seed}", pretrained / "checkpoints" / "step_20"
        assert Path(result["init_from"]) == (transferred if task == "rte" else start)
    assert set(results["mnli", 1234]["scores"]) == {"validation_accuracy_matched", "validation_accuracy_mismatched"}
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    accuracies = [results["rte", seed]["scores"]["validation_accuracy"] for seed in (1234, 1235)]
    assert summary["rte"]["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert {path.name for path in (tmp_path / "out" / "submission").iterdir()} == {"MNLI-m.tsv", "MNLI-mm.tsv"}
    lines = (tmp_path / "out" / "submission" / "MNLI-m.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in lines} <= {"entailment", "neutral", "contradiction"}


def test_pairs_of_a_checkpoint_with_segments(pretrained: Path, tmp_path: Path) -> None:
    """Its segments are trained on; its head for pairs is not taken over."""
    run = write_run(tmp_path / "run", make_config(pretrained.parent / "corpus" / "shards", **PAIRS))
    words = ("--ds_config", TINY, "--data_dir", write_mnli_and_rte(tmp_path / "glue"), "--output_dir", tmp_path / "out")
    found = finetune(run, *words, "--set", "neomoba.finetune.tasks=rte", "neomoba.finetune.epochs=2")
    assert found.returncode == 0, found.stderr
    before, after = CheckpointReader(run), CheckpointReader(tmp_path / "out" / "rte" / "seed_1234")
    types = ShardedTensorSpec("embedding.token_types", (2, 32))
    moved = (after.read("model", types) - before.read("model", types)).abs().amax(dim=1)
    assert moved.min() > 0, "both types"
    assert not [name for name in after.tensors if "next_sentence" in name]


def test_contrastive_pairs_find_their_positives(pretrained: Path, tmp_path: Path) -> None:
    train, validation = (write_pairs(tmp_path / f"{name}.jsonl", 64, seed) for seed, name in enumerate(("t", "v")))
    found = finetune(
        pretrained,
        *("--ds_config", ROOT / "ds_configs" / "cpu_tiny_mteb.json", "--output_dir", tmp_path / "out"),
        *("--data_dir", train, "--set", f"neomoba.data.validation={validation}"),
        *("neomoba.phase.steps=8", "neomoba.phase.warmup_steps=1", "neomoba.log.validate_every=4"),
    )
    assert found.returncode == 0, found.stderr
    result = json.loads((tmp_path / "out" / "contrastive" / "seed_1234" / "result.json").read_text())
    assert result["scores"]["validation_retrieval"] > 0.5  # chance is 1 in 128


def test_starts_from_a_folder_of_the_hub(pretrained: Path, tmp_path: Path) -> None:
    """With the tokenizer in it; a causal model's texts are means of their states."""
    config = make_config(
        pretrained.parent / "corpus" / "shards", objective="clm", attention="full", hybrid_layer_count=0
    )
    reader = CheckpointReader(write_run(tmp_path / "run", config))
    export_folder(reader, tmp_path / "hub", torch.float32, tokenizer_of(reader))
    found = finetune(
        tmp_path / "hub",
        *("--ds_config", TINY, "--data_dir", write_sst2(tmp_path / "glue"), "--output_dir", tmp_path / "out"),
        *("--set", "neomoba.finetune.epochs=1"),
    )
    assert found.returncode == 0, found.stderr
    assert f"from {tmp_path / 'hub'}, steps 1 to 2" in found.stdout
    run = tmp_path / "out" / "sst2" / "seed_1234"
    trained = CheckpointReader(run)
    assert (trained.config.model.objective, set(trained.config.model.layer_attentions)) == ("clm", {"full"})
    spec = ShardedTensorSpec("blocks.1.attention_norm.weight", (32,))
    assert (trained.read("model", spec) - reader.read("model", spec)).abs().max() < 1e-2, "two steps from there"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data_dir", "nowhere"], "nowhere: holds no SST-2/train.tsv"),
        (["--set", "neomoba.finetune.tasks=sst3"], "neomoba.finetune.tasks 'sst3' is no task; did you mean sst2?"),
        (["--set", "neomoba.finetune.tasks=null"], "neomoba.finetune.tasks is null"),
        (["--set", "neomoba.finetune.transfer=sst2"], "let neomoba.finetune.tasks begin with mnli"),
        (["--init_from", "nowhere"], "nowhere: no checkpoint here"),
    ],
)
def test_mistakes_are_one_line(pretrained: Path, words: list[str], message: str) -> None:
    found = finetune(pretrained, "--ds_config", TINY, *words)
    assert found.returncode == MISTAKE
    assert found.stderr.startswith("error: ")
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_pretraining_refuses_a_configuration_of_fine_tuning() -> None:
    found = run_program("launch/pretrain.py", "--ds_config", TINY)
    assert found.returncode == MISTAKE
    assert "start it with launch/finetune.py" in found.stderr
