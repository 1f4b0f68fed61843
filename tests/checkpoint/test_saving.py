"""Saves while training goes on: what they hold, what they cost, which ones stay, and what a failure does."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neomoba_dist.checkpoint import save, write
from neomoba_dist.checkpoint.host_copy import HostCopy
from neomoba_dist.checkpoint.layout import CheckpointError, complete_checkpoints, step_folder
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.checkpoint.rank_file import write_rank_file
from neomoba_dist.checkpoint.resume import Candidates
from neomoba_dist.checkpoint.verify import find_damage
from neomoba_dist.config import Config
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.trainer import Trainer
from tests.ranks import RankError, run_ranks
from tests.runs import metrics, run_config, train_here


def listen(prepare: Callable[[], Any], config: Config, output: Path, steps: int) -> tuple[str, str]:
    """Train on this rank after `prepare`; what was said, and the CheckpointError that ended it."""
    prepare()
    said, error = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            train_here(config, output, steps)
        except CheckpointError as caught:
            error = str(caught)
    return said.getvalue(), error


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.name}:{k}": v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def steps_kept(output: Path, place: str = "checkpoints") -> list[str]:
    return sorted((f.name for f in (output / place).iterdir()), key=lambda name: int(name[5:]))


def write_slowly() -> None:
    """The thread sleeps before it looks at the state, longer than a step takes, and before it writes its copy."""

    def slow(path: Path, values: Any) -> Any:
        time.sleep(0.4)
        return write_rank_file(path, values)

    def slow_copy(self: HostCopy, fragments: Any) -> Any:
        time.sleep(0.3)
        return original(self, fragments)

    original = HostCopy.copy
    write.write_rank_file, HostCopy.copy = slow, slow_copy  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("world", "layout", "stage"),
    [(2, {}, 3), (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1)],
)
def test_training_goes_on_and_the_checkpoint_is_of_its_step(
    world: int, layout: dict[str, Any], stage: int, tmp_path: Path
) -> None:
    for name, prepare, background in (("async", write_slowly, True), ("sync", lambda: None, False)):
        config = run_config(layout, stage, checkpoint={"save_every": 2, "async_save": background})
        said, _ = run_ranks(world, listen, prepare, config, tmp_path / name, 4)[0]
        order = [line.split()[1] for line in said.splitlines() if line.startswith(("test ", "checkpoint "))]
        here = [Path(text).name if "step_" in text else text for text in order]
        assert sorted(here) == ["1/6", "2/6", "3/6", "4/6", "step_2", "step_4"]
        assert (here.index("step_2") > here.index("3/6")) == background
    for step in ("step_2", "step_4"):
        found, expected = (tensors(tmp_path / name / "checkpoints" / step) for name in ("async", "sync"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert find_damage(tmp_path / "async" / "checkpoints" / step) is None
    assert metrics(tmp_path / "async") == metrics(tmp_path / "sync")
    pauses = [
        [json.loads(line).get("checkpoint_pause_seconds") for line in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("async", "sync")
    ]
    for found in pauses:
        assert [value is not None for value in found] == [False, False, True, False]
    assert pauses[0][2] < 0.8  # what the thread sleeps before the two files


def limit_files() -> None:
    """The first file of the second checkpoint ends after 20,000 bytes on rank 1, as on a full disk."""
    original = write.write_rank_file
    calls = 0

    def limited(path: Path, values: Any) -> Any:
        nonlocal calls
        calls += 1
        if torch.distributed.get_rank() == 1:
            size = 20_000 if calls == 3 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return original(path, values)

    write.write_rank_file = limited


def test_a_failed_write_is_told_and_training_goes_on(tmp_path: Path) -> None:
    config = run_config({}, checkpoint={"save_every": 2})
    (said, error), _ = run_ranks(2, listen, limit_files, config, tmp_path, 6)
    assert not error
    lines = [line for line in said.splitlines() if line.startswith("warning")]
    assert len(lines) == 1
    assert "step_4.writing/weights-00001.safetensors: cannot be written (File too large)" in lines[0]
    assert "training goes on" in lines[0]
    assert steps_kept(tmp_path) == ["step_2", "step_6"]
    assert all(find_damage(tmp_path / "checkpoints" / name) is None for name in ("step_2", "step_6"))


@pytest.mark.parametrize("settings", [{"on_save_failure": "stop"}, {"on_save_failure": "stop", "async_save": False}])
def test_a_failed_write_ends_the_run_on_all_ranks(settings: dict[str, Any], tmp_path: Path) -> None:
    config = run_config({}, checkpoint={"save_every": 2, **settings})
    results = run_ranks(2, listen, limit_files, config, tmp_path, 6)
    assert len({error for _, error in results}) == 1
    assert "weights-00001.safetensors: cannot be written" in results[0][1]
    last = metrics(tmp_path)[-1]["step"]  # the step after, or the one after that on a busy machine
    assert last == 4 if "async_save" in settings else last in (5, 6)
    assert steps_kept(tmp_path) == ["step_2"]


def test_the_last_save_must_not_fail(tmp_path: Path) -> None:
    config = run_config({}, checkpoint={"save_every": 2})
    for _, error in run_ranks(2, listen, limit_files, config, tmp_path, 4):
        assert "step_4.writing" in error
    assert steps_kept(tmp_path) == ["step_2"]


def little_space() -> None:
    """Enough for one rank's share, not for both."""
    usage = shutil.disk_usage("/")
    save.shutil.disk_usage = lambda folder: usage._replace(free=400_000)  # type: ignore[assignment]


def test_space_is_looked_at_for_all_ranks_together(tmp_path: Path) -> None:
    config = run_config({}, checkpoint={"save_every": 1})
    (said, first), (_, second) = run_ranks(2, listen, little_space, config, tmp_path, 2)
    assert first == second
    assert "step_2.writing: 0.00 GiB are needed" in first
    assert "\n" not in first
    assert "step_1.writing: 0.00 GiB are needed" in said  # and training went on
    assert steps_kept(tmp_path) == []


def ask(*names: str) -> Callable[[], None]:
    """Somebody touches files in the run folder during step 2."""

    def prepare() -> None:
        original = Trainer._train_step

        def step(self: Trainer, *args: Any) -> Any:
            if self.step == 1 and self.mesh.rank == 0:
                for name in names:
                    (self.output / name).touch()
            return original(self, *args)

        Trainer._train_step = step  # type: ignore[method-assign]

    return prepare


def test_files_ask_for_a_checkpoint_and_for_the_end(tmp_path: Path) -> None:
    config = run_config({}, checkpoint={"save_every": 100})
    run_ranks(2, listen, ask("SAVE"), config, tmp_path / "save", 4)
    assert steps_kept(tmp_path / "save") == ["step_2", "step_4"]
    said, error = run_ranks(2, listen, ask("STOP"), config, tmp_path / "stop", 4)[0]
    assert not error
    assert "stopped after step 2" in said
    assert steps_kept(tmp_path / "stop") == ["step_2"]
    assert [line["step"] for line in metrics(tmp_path / "stop")] == [1, 2]
    for run in ("save", "stop"):
        assert not {"SAVE", "STOP"} & {path.name for path in (tmp_path / run).iterdir()}


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    config = run_config({}, 3, checkpoint={"save_every": 1, "keep_last": 2, "keep_every": 3, "export_every": 2})
    left = tmp_path / "checkpoints" / "step_9.writing"
    left.mkdir(parents=True)
    run_ranks(2, train_here, config, tmp_path, 6)
    assert steps_kept(tmp_path) == ["step_3", "step_5", "step_6"]
    assert steps_kept(tmp_path, "exports") == ["step_2", "step_4", "step_6"]
    export, whole = tmp_path / "exports" / "step_6", tmp_path / "checkpoints" / "step_6"
    assert find_damage(export) is None
    assert sorted(f.name for f in export.glob("*.safetensors")) == [f"weights-0000{r}.safetensors" for r in (0, 1)]
    found, expected = load_model(export)[0].state_dict(), load_model(whole)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(CheckpointError, match="weights alone; start from them with --init_from"):
        Candidates(tmp_path, str(export), Mesh.single(), print)


def fail_at_step_4(rank: int, how: Callable[[], Any]) -> Callable[[], None]:
    """A save is slowly written when step 4 begins; there `how` happens on a rank (-1: on all)."""

    def prepare() -> None:
        write_slowly()
        original = Trainer._train_step

        def step(self: Trainer, *args: Any) -> Any:
            if self.step == 3 and rank in (self.mesh.rank, -1):
                how()
            return original(self, *args)

        Trainer._train_step = step  # type: ignore[method-assign]

    return prepare


def cannot_go_on() -> None:
    raise CheckpointError("cannot go on")


def test_a_save_survives_the_end_of_training(tmp_path: Path) -> None:
    """Training fails on all ranks while a checkpoint is written: it is completed all the same."""
    config = run_config({}, checkpoint={"save_every": 3})
    results = run_ranks(2, listen, fail_at_step_4(-1, cannot_go_on), config, tmp_path, 6)
    assert [error for _, error in results] == ["cannot go on"] * 2
    assert steps_kept(tmp_path) == ["step_3"]
    assert find_damage(tmp_path / "checkpoints" / "step_3") is None


def test_a_rank_that_dies_in_mid_save_costs_that_save_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "LAST_NOTE_SECONDS", 1.0)
    config = run_config({}, checkpoint={"save_every": 1})
    dies = fail_at_step_4(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RankError):
        run_ranks(2, listen, dies, config, tmp_path, 6)
    assert "step_3.writing" in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert complete_checkpoints(tmp_path) == [step_folder(tmp_path, step) for step in (1, 2)]
    run_ranks(2, train_here, config, tmp_path, 6, tmp_path)
    assert steps_kept(tmp_path) == [f"step_{step}" for step in range(1, 7)]
    run_ranks(2, train_here, config, tmp_path / "undisturbed", 6)
    assert metrics(tmp_path) == metrics(tmp_path / "undisturbed")
    whole, found = (tensors(step_folder(run, 6)) for run in (tmp_path / "undisturbed", tmp_path))
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
