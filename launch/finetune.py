"""Fine-tune a pretrained checkpoint on whole texts: the tasks of GLUE, or contrastive pairs.

    deepspeed --num_gpus 8 launch/finetune.py --ds_config ds_configs/phase4_glue.json --init_from runs/phase3 \\
        --data_dir glue --output_dir runs/glue

The network is that of the checkpoint, of whatever layout. Every task of neomoba.finetune.tasks is trained with every
seed in a run folder of its own, OUTPUT/TASK/seed_N, which ends with its best weights, its scores (result.json) and its
predictions for the test set; OUTPUT/results.json and OUTPUT/submission put them together. What was interrupted goes on,
what is done stays.
"""

import argparse
import functools
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # under a launcher only launch/ is on the path

from launch.pretrain import REFUSED, UNLIKE, leave, run, shared_parser
from neomoba_dist.config import Config, ConfigError, load_config
from neomoba_dist.config.finetune import for_task
from neomoba_dist.config.load import read_tree
from neomoba_dist.config.paths import folder_problem
from neomoba_dist.config.text_tasks import TEXT_TASKS, names_of
from neomoba_dist.errors import INTERRUPTED

if TYPE_CHECKING:
    from neomoba_dist.data.examples import Examples
    from neomoba_dist.data.tokenizer import Tokenizer
    from neomoba_dist.parallel.mesh import Mesh
    from neomoba_dist.train.health import Watchdog

RESULT = "result.json"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser, add = shared_parser(__doc__)
    add("init_from", required=True, metavar="DIR", help="the pretrained run or checkpoint, or a folder of the hub")
    add("data_dir", metavar="DIR|hub", help="instead of neomoba.data.train: folder with a folder per task, or hub")
    add("tokenizer", metavar="DIR", help="the checkpoint's (default: the one beside its training corpus)")
    return parser.parse_args(arguments)


def begun_run(arguments: argparse.Namespace, name: str) -> Path | None:
    """A run folder of an earlier start, which knows the network and keeps the tokenizer. None: all begins with
    --init_from."""
    from neomoba_dist.checkpoint.layout import complete_checkpoints

    if arguments.resume == "none":
        return None
    folders = sorted(Path(arguments.output_dir or Path("runs") / name).glob("*/seed_*"))
    begun = (folder for folder in folders if (folder / RESULT).is_file() or complete_checkpoints(folder))
    return next((folder for folder in begun if (folder / "config.json").is_file()), None)


def load(arguments: argparse.Namespace) -> Config:
    """The configuration, with the checkpoint's model for what the file does not say of it."""
    from neomoba_dist.checkpoint.hf import open_checkpoint

    overrides = [*arguments.set, *([f"neomoba.data.train={arguments.data_dir}"] if arguments.data_dir else [])]
    phase = read_tree(arguments.ds_config, overrides)["neomoba"].get("phase")
    if begun := begun_run(arguments, str(phase.get("name") if isinstance(phase, dict) else None)):
        model: Mapping[str, Any] = vars(load_config(begun / "config.json").model)
    else:
        model = open_checkpoint(arguments.init_from).index["config"]["neomoba"]["model"]
    config = load_config(arguments.ds_config, overrides, model)
    if config.finetune.tasks is None:
        raise ConfigError(f"{config.source}: neomoba.finetune.tasks is null; name tasks, for example sst2,rte")
    return config


def read_splits(config: Config, task: str, tokenizer: "Tokenizer") -> dict[str, "Examples"]:
    """Every split that is there, by name: "train" and what the task calls the others. Raises DataError."""
    from neomoba_dist.data.errors import AgreedError
    from neomoba_dist.data.examples import encode_examples
    from neomoba_dist.data.text_files import read_split
    from neomoba_dist.model.text_heads import SCORE_UNIT

    found, about = {}, TEXT_TASKS[task]
    places = {"train": config.data.train}
    places |= dict.fromkeys(about.validation, config.data.validation or config.data.train)
    places |= dict.fromkeys(about.test, config.data.train)
    for split, place in places.items():
        if split != "train" and Path(place).is_file() and place == config.data.train:
            continue  # one file of pairs is a training set
        texts = read_split(place, task, about, split)
        if texts is None:
            if split == "train":
                raise AgreedError(
                    f"neomoba.data.train {place}: holds no {about.folder}/train.tsv, .jsonl or .parquet; give the "
                    "folder of GLUE's files, or hub, with --data_dir"
                )
            continue
        unit = 1.0 if about.labels else SCORE_UNIT
        name = f"{place} {task} {split}"
        found[split] = encode_examples(
            texts, tokenizer, config.phase.sequence_length, pairs=about.embeds, unit=unit, name=name
        )
        if split not in about.test and not about.embeds and any(e.label is None for e in found[split].examples):
            raise AgreedError(f"{name}: some examples have no label; give a split that has them all")
    return found


def train(arguments: argparse.Namespace, config: Config, world_size: int) -> int:
    """All tasks and seeds, in one process of the launch; returns the exit code."""
    from neomoba_dist.checkpoint.hf import open_checkpoint
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.checkpoint.tokenizer import tokenizer_of
    from neomoba_dist.data.tokenizer import load_tokenizer
    from neomoba_dist.parallel.comm import on_first_rank
    from neomoba_dist.parallel.launcher import initialize_process_group
    from neomoba_dist.parallel.mesh import Mesh
    from neomoba_dist.train.guard import require_equal_start, versions
    from neomoba_dist.train.health import watched
    from neomoba_dist.train.memory import memory_explained

    config.plan(world_size)
    output = Path(arguments.output_dir or Path("runs") / config.phase.name)
    if problem := folder_problem(output):
        raise ConfigError(f"--output_dir {output}: {problem}; give a folder of your own that can be written")
    begun, start = begun_run(arguments, config.phase.name), Path(arguments.init_from)
    try:
        pretrained = open_checkpoint(start)
        start = pretrained.folder
    except CheckpointError:
        if begun is None:
            raise
    kept = arguments.tokenizer or begun
    tokenizer = load_tokenizer(kept) if kept else tokenizer_of(pretrained)
    if tokenizer is None or tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"--init_from {start}: its tokenizer is not here, or is another one; name it with --tokenizer"
        )
    splits = {task: read_splits(config, task, tokenizer) for task in names_of(config.finetune.tasks)}
    device = initialize_process_group()
    words = {f"--{name}": value for name, value in vars(arguments).items() if name not in UNLIKE}
    require_equal_start({**config.to_dict(), **words, **versions()})
    mesh = Mesh.build(config.parallel, device, num_key_value_heads=config.model.num_key_value_heads)
    with watched(mesh, config.health, output / "stacks") as watchdog, memory_explained(config, mesh):
        if mesh.rank == 0:
            (output / REFUSED).unlink(missing_ok=True)
        for task, examples in splits.items():
            for seed in range(config.phase.seed, config.phase.seed + config.finetune.seeds):
                folder = output / task / f"seed_{seed}"
                own = for_task(config, task, seed, len(examples["train"]))
                transferred = task in names_of(config.finetune.transfer)
                source = output / "mnli" / f"seed_{seed}" if transferred else start
                code = finetune(arguments, own, mesh, examples, tokenizer, source, folder, watchdog)
                if code is not None:
                    return code
        on_first_rank(mesh, lambda: summarize(output, list(splits)))
    return 0


def finetune(
    arguments: argparse.Namespace,
    config: Config,
    mesh: "Mesh",
    splits: dict[str, "Examples"],
    tokenizer: "Tokenizer",
    source: Path,
    output: Path,
    watchdog: "Watchdog | None",
) -> int | None:
    """One task with one seed. The exit code, where a signal or the file STOP ended it. Collective over the world."""
    from neomoba_dist.checkpoint.body import BodyReader
    from neomoba_dist.checkpoint.hf import open_checkpoint
    from neomoba_dist.checkpoint.resume import Candidates, check_resume, require_whole_weights
    from neomoba_dist.data.examples import ExampleStream
    from neomoba_dist.parallel.comm import any_rank, on_first_rank
    from neomoba_dist.train.engines import FlatEngine
    from neomoba_dist.train.finetune import FinetuneTrainer, split_outputs, write_predictions
    from neomoba_dist.train.text_scores import predictions

    if any_rank([mesh.rank == 0 and (output / RESULT).is_file()], mesh)[0]:
        return None
    task = config.phase.name
    plan, about = config.plan(mesh["world"].size), TEXT_TASKS[task]
    stream = ExampleStream(
        splits["train"],
        micro_batch_size=plan.micro_batch_size,
        accumulation=plan.gradient_accumulation_steps,
        seed=config.phase.seed,
        dp_rank=mesh["dp"].index,
        dp_size=plan.data_parallel_size,
    )
    validation = {name: splits[name] for name in about.validation if name in splits}
    engine = FlatEngine(config, plan, mesh)
    trainer = FinetuneTrainer(config, mesh, engine, stream, validation, output, watchdog)
    say = functools.partial(print, flush=True) if mesh.rank == 0 else lambda line: None
    if check_resume(output, arguments.resume):
        origin = Candidates(output, arguments.resume, mesh, say).load(trainer.resume)
    else:
        origin = open_checkpoint(source)
        require_whole_weights(origin, mesh, ())
        trainer.start_from(BodyReader(origin, config))
    on_first_rank(mesh, lambda: keep(tokenizer, output))
    counts = ", ".join(f"{name} {len(examples)} ({examples.cut} cut)" for name, examples in splits.items())
    last = config.phase.steps if arguments.max_steps is None else min(arguments.max_steps, config.phase.steps)
    say(f"{output}: {counts}; from {origin.folder}, steps {trainer.step + 1} to {last}")
    if not trainer.finished:
        trainer.run(last)
    if not trainer.finished and trainer.step < config.phase.steps:
        engine.engine.destroy()
        return INTERRUPTED if trainer.interrupted else None
    tests = {name: predictions(about, split_outputs(engine, splits[name])) for name in about.test if name in splits}

    def write() -> None:
        for name, guesses in tests.items():
            write_predictions(output / f"{name}.tsv", task, splits[name], guesses.tolist())
        result = {
            "task": task,
            "seed": config.phase.seed,
            "init_from": str(source),
            "best_step": trainer.best["step"],
            "last_step": trainer.step,
            "mean": trainer.best["mean"],
            "scores": trainer.best["scores"],
            "majority": majority(splits, about.validation) if about.labels else None,
            "examples": {name: len(examples) for name, examples in splits.items()},
        }
        (output / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(output / "checkpoints", ignore_errors=True)  # the best weights, exported, are what counts
        for export in (output / "exports").glob("step_*"):
            if export.name != f"step_{trainer.best['step']}":
                shutil.rmtree(export)

    on_first_rank(mesh, write)
    engine.engine.destroy()  # its hooks would keep the model alive for the next run
    return None


def keep(tokenizer: "Tokenizer", folder: Path) -> None:
    """Put the tokenizer into the run folder, where `tokenizer_of` finds it."""
    tokenizer.save(folder)


def majority(splits: dict[str, "Examples"], names: tuple[str, ...]) -> float | None:
    """The accuracy of always answering with the commonest label of the training set."""
    labels = [example.label for example in splits["train"].examples]
    commonest = max(set(labels), key=labels.count)
    judged = [example.label for name in names if name in splits for example in splits[name].examples]
    return judged.count(commonest) / len(judged) if judged else None


def summarize(output: Path, tasks: list[str]) -> None:
    """Write results.json (mean and standard deviation over seeds) and submission/, of the best seed; print a table."""
    table, summary = [], {}
    for task in tasks:
        folders = sorted((output / task).glob(f"seed_*/{RESULT}"))
        if not folders:  # --max_steps
            continue
        results = [json.loads(path.read_text(encoding="utf-8")) for path in folders]
        best = max(range(len(results)), key=lambda i: results[i]["mean"])
        entry: dict[str, Any] = {"seeds": [result["seed"] for result in results], "majority": results[0]["majority"]}
        for name in results[0]["scores"]:
            values = [result["scores"][name] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            metric = name.removeprefix("validation_")
            entry[metric] = {"mean": statistics.mean(values), "deviation": spread}
            table.append(f"{task:12} {metric:22} {statistics.mean(values):7.4f} ± {spread:.4f}")
        summary[task] = entry
        submit(output, task, folders[best].parent)
    (output / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print("\n".join([f"{'task':12} {'metric':22} mean ± deviation over seeds", *table]), flush=True)


def submit(output: Path, task: str, run_folder: Path) -> None:
    """Copy the test predictions under the names that GLUE's server wants: SST-2.tsv, MNLI-m.tsv, ..."""
    for name in TEXT_TASKS[task].test:
        if (path := run_folder / f"{name}.tsv").is_file():
            ending = {"test_matched": "-m", "test_mismatched": "-mm"}.get(name, "")
            (output / "submission").mkdir(exist_ok=True)
            shutil.copyfile(path, output / "submission" / f"{TEXT_TASKS[task].folder}{ending}.tsv")


def main(command_line: list[str]) -> int:
    """Returns the exit code."""
    return run(parse_arguments(command_line), load, train)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
