"""launch/distill.py as its users start it: a teacher of another layout, resume, what a student learns, bad input."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.config import parse_config
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.tokenizer import load_tokenizer
from neomoba_dist.errors import MISTAKE
from tests.checkpoint.test_resume import folder_state
from tests.corpora import make_tokenizer
from tests.programs import run_program
from tests.ranks import run_ranks
from tests.runs import metrics, run_config, train_here

WIDE = {"hidden_size": 48, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps by tp 2."""
    folder = tmp_path_factory.mktemp("teacher")
    layout = {"tensor_model_parallel_size": 2}
    config = run_config(layout, model=WIDE, steps=8, full_attention_fraction=0.0, checkpoint={"save_every": 8})
    run_ranks(2, train_here, config, folder, 8)
    return folder


@pytest.fixture(scope="module")
def config_file(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = run_config({}, 1, steps=8, full_attention_fraction=0.0, checkpoint={"save_every": 4}).to_dict()
    tree["neomoba"]["distill"] = {"teacher": str(teacher), "hidden_weight": 0.5}
    path = tmp_path_factory.mktemp("config") / "distill.json"
    path.write_text(json.dumps(parse_config(tree).to_dict()))
    return path


def distill(*words: object) -> subprocess.CompletedProcess[str]:
    return run_program("launch/distill.py", *words, timeout=240)


def test_a_student_learns_and_resumes(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    files = {path: path.read_bytes() for path in teacher.rglob("*.safetensors")}
    found = distill("--ds_config", config_file, "--output_dir", tmp_path / "whole")
    assert found.returncode == 0, found.stderr
    assert f"taught by {teacher / 'checkpoints' / 'step_8'}" in found.stdout
    lines = metrics(tmp_path / "whole")
    for name in ("loss", "label_loss", "logit_loss", "hidden_loss"):
        assert lines[-1][name] < lines[0][name], name
    weighted = lines[0]["label_loss"] + lines[0]["logit_loss"] + 0.5 * lines[0]["hidden_loss"]
    assert lines[0]["loss"] == pytest.approx(weighted, rel=1e-6)
    assert lines[-1]["validation_loss"] < math.log(1200) - 0.5, "better than chance"
    assert {path: path.read_bytes() for path in teacher.rglob("*.safetensors")} == files

    part = distill("--ds_config", config_file, "--output_dir", tmp_path / "part", "--max_steps", 5)
    assert part.returncode == 0, part.stderr
    rest = distill("--ds_config", config_file, "--output_dir", tmp_path / "part", "--resume", "must")
    assert rest.returncode == 0, rest.stderr
    assert metrics(tmp_path / "part") == [line | _validated(line, tmp_path / "part") for line in lines]
    whole, parts = (folder_state(tmp_path / run / "checkpoints" / "step_8") for run in ("whole", "part"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert value == parts[name] if isinstance(value, str) else bool((value == parts[name]).all()), name

    model, config = load_model(tmp_path / "whole")  # an ordinary checkpoint; the projection is beside it
    assert config.model.num_hidden_layers == len(model.blocks) == 3
    assert "model.distill.projection" in CheckpointReader(tmp_path / "whole").tensors
    again = distill(
        *("--ds_config", config_file, "--output_dir", tmp_path / "next", "--max_steps", 1),
        *("--init_from", tmp_path / "whole"),
    )
    assert again.returncode == 0, again.stderr
    assert metrics(tmp_path / "next")[0]["label_loss"] < lines[0]["label_loss"] - 0.5


def _validated(line: dict, run: Path) -> dict:
    """A run that ends at step 5 validates there."""
    found = next(other for other in metrics(run) if other["step"] == line["step"])
    return {key: found[key] for key in ("validation_loss",) if line["step"] == 5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher", "nowhere"], "nowhere: no checkpoint here"),
        (["--set", "neomoba.distill.teacher=null"], "no teacher given; name its run or checkpoint with --teacher"),
        (["--set", "neomoba.model.vocab_size=1300"], "its vocab_size is 1200, and neomoba.model.vocab_size is 1300"),
        (["--set", "neomoba.model.objective=clm"], "its objective is mlm"),
        (["--set", "neomoba.model.num_hidden_layers=4"], "set neomoba.model.num_hidden_layers to one of [1, 2, 3, 6]"),
        (["--set", "neomoba.distill.temperature=0"], "neomoba.distill.temperature"),
        (
            [
                *("--set", "neomoba.distill.logit_weight=0", "neomoba.distill.hidden_weight=0"),
                "neomoba.distill.label_weight=0",
            ],
            "nothing is learned",
        ),
        (["--set", "neomoba.phase.recompute=auto"], "plans without the teacher's memory"),
    ],
)
def test_mistakes_are_one_line(config_file: Path, tmp_path: Path, words: list[str], message: str) -> None:
    found = distill("--ds_config", config_file, "--output_dir", tmp_path / "out", *words)
    assert found.returncode == MISTAKE
    assert found.stderr.startswith("error: ")
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_layout_that_does_not_divide_the_teacher_is_refused(config_file: Path, teacher: Path) -> None:
    found = distill(
        *("--ds_config", config_file, "--set", "neomoba.parallel.tensor_model_parallel_size=3"),
        *("neomoba.model.num_attention_heads=6", "neomoba.model.head_dim=8", "neomoba.model.num_key_value_heads=3"),
    )
    assert found.returncode == MISTAKE
    assert found.stderr.startswith(f"error: --teacher {teacher}: neomoba.model.num_attention_heads 4 is not a multiple")


def test_a_teacher_of_other_tokens_is_refused(config_file: Path, teacher: Path, tmp_path: Path) -> None:
    """As many of them, and one line names both tokenizers. The teacher's own corpus is the student's in other tests."""
    other = load_tokenizer(make_tokenizer(shutil.copytree(teacher, tmp_path / "other"), "wordpiece"))
    found = distill("--ds_config", config_file, "--output_dir", tmp_path / "out", "--teacher", tmp_path / "other")
    assert found.returncode == MISTAKE
    assert len(found.stderr.splitlines()) == 1
    ours = open_corpus(parse_config(json.loads(config_file.read_text())).data.train).index.tokenizer.sha256
    assert f"its tokenizer (sha256 {other.sha256[:12]}) is not that of" in found.stderr
    assert f"(sha256 {ours[:12]}); tokenize the text with the teacher's" in found.stderr


def test_pretraining_refuses_a_configuration_of_distillation(config_file: Path) -> None:
    found = run_program("launch/pretrain.py", "--ds_config", config_file)
    assert found.returncode == MISTAKE
    assert "start it with launch/distill.py" in found.stderr
