"""Everything that wants a GPU: attention, experts and training steps against their goals, tests, retrieval.

Each stage is a command of its own under its own time limit; one that fails or runs out of time costs no other, and what
one leaves of its time the next may use. OUTPUT gets summary.json and summary.md after every stage, the stages' own
results and their logs. --only runs some stages and keeps what OUTPUT has of the others, so that several short calls
make one summary. The last lines are its short table: what must be reached, what was measured; below it the stages.
--toy runs all of it on a CPU in two minutes, at sizes that mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from evals.bench._gpu_table import must_lines, stage_lines
from evals.bench._profile import profile_lines
from evals.bench.attention import FLASH_2, SDPA
from evals.cli import EvalError, print_table

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("phase1", "phase2", "phase3", "phase1_graphs")  # those that --profile profiles


class Stage(NamedTuple):
    """A command, the seconds that it may take, and the files of results that it leaves in OUTPUT."""

    name: str
    words: list[str]
    limit: int
    results: list[str]
    left_out: str = ""  # why it is not run


# two calls of five minutes with all that must be reached, each ending with what may need more time; then the others
NAMES = (
    "moe", "moe_large", "phase2", "phase3_shape", "flash_moba", "attention", "phase1", "phase3", "peer",
    "phase1_graphs", "million", "tests", "recall", "tune",
)  # fmt: skip
USUAL = NAMES[:-1]  # tuning changes what the code runs from then on: only where it is asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m evals bench gpu`."""
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench-gpu"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--only", metavar="STAGE,...", help=f"of {', '.join(NAMES)}; default: all but tune")
    parser.add_argument("--profile", action="store_true", help="also the time of an update of each phase by kernel")
    parser.add_argument("--toy", action="store_true", help="run everything at toy size on the CPU")


def stages(output: Path, toy: bool, profile: bool = False) -> list[Stage]:
    """The stages of NAMES, in its order."""
    device = ["--device", "cpu" if toy else "cuda"]
    tune = ["-m", "evals", "bench", "tune", *device, "--output", str(output)]
    recall = ["-m", "evals", "bench", "recall", *device, "--output", str(output)]
    if toy:
        recall += ["--lengths", "128", "--block-size", "16", "--top-k", "2", "--hidden-size", "32"]
        recall += ["--tokens-per-step", "512", "--seconds", "3"]
    else:
        recall += ["--seconds", "170"]
    large = ["--tokens", "32768", "--hidden", "768", "--experts", "32", "--top-k", "4"]
    lengths = ",".join(f"{length}:16" for length in (8192, 16384, 32768, 65536, 131072))
    flash_moba = ["--cases", "32768:16,65536:16", "--block-size", "128", "--top-k", "8", "--rivals", ",".join(FLASH_2)]
    found = [
        _moe_stage("moe", 35, output, toy, []),
        _moe_stage("moe_large", 30, output, toy, large),
        _steps_stage("phase2", 50, output, toy, profile),
        _attention_stage("phase3_shape", 30, output, toy, _phase3_shape()),
        _attention_stage("flash_moba", 35, output, toy, flash_moba),
        _attention_stage("attention", 105, output, toy, ["--cases", lengths]),
        _steps_stage("phase1", 60, output, toy, profile),
        _steps_stage("phase3", 95, output, toy, profile),
        _peer_stage(130, output, toy),
        _graphs_stage(55, output, toy, profile),
        _attention_stage("million", 40, output, toy, ["--forward-only", f"{1 << 20}:16"]),
        _tests_stage(190, toy),
        Stage("recall", recall, 230, ["recall.json"]),
        Stage("tune", tune, 285, ["tune.json"]),
    ]
    assert tuple(stage.name for stage in found) == NAMES
    return found


def _folder(name: str, usual: str, output: Path) -> tuple[Path, str]:
    """Where a stage writes, and its result in OUTPUT: those that run one command with other options have their own."""
    return (output, f"{usual}.json") if name == usual else (output / name, f"{name}/{usual}.json")


def _moe_stage(name: str, limit: int, output: Path, toy: bool, options: list[str]) -> Stage:
    folder, result = _folder(name, "moe", output)
    words = ["-m", "evals", "bench", "moe", "--device", "cpu" if toy else "cuda", *options, "--output", str(folder)]
    words += ["--tokens", "256", "--hidden", "32", "--width", "32", "--repetitions", "1"] * toy
    return Stage(name, words if toy else [*words, "--dtype", "bfloat16"], limit, [result])


def _attention_stage(name: str, limit: int, output: Path, toy: bool, options: list[str]) -> Stage:
    folder, result = _folder(name, "attention", output)
    words = ["-m", "evals", "bench", "attention", "--device", "cpu" if toy else "cuda", "--output", str(folder)]
    if toy:  # one case for each that there would be
        flag, sizes = ("--forward-only", "1024:1") if name == "million" else ("--cases", "256:2,512:2")
        options = [flag, sizes, "--block-size", "64", "--top-k", "2", "--head-dim", "32", "--repetitions", "1"]
    return Stage(name, words + options, limit, [result])


def _phase3_shape() -> list[str]:
    """One row of phase 3 as its JSON has it, against SDPA."""
    found = json.loads((ROOT / "ds_configs/phase3.json").read_text(encoding="utf-8"))["neomoba"]
    model, heads = found["model"], found["model"]["num_attention_heads"]
    words = ["--cases", f"{found['phase']['sequence_length']}:{heads}", "--bidirectional", "--rivals", ",".join(SDPA)]
    sizes = {
        "group": heads // model["num_key_value_heads"],
        "head-dim": model["hidden_size"] // heads,
        "block-size": model["moba_block_size"],
        "top-k": model["moba_top_k"],
    }
    return words + [word for name, size in sizes.items() for word in (f"--{name}", str(size))]


def _steps_stage(name: str, limit: int, output: Path, toy: bool, profile: bool, phase: str = "") -> Stage:
    """Steps of a phase as the planner lays it out on one GPU, with micro-batches as large as fit; they are called
    `name`, so that each has its own result. phase: `name` where none is given."""
    config = f"ds_configs/{'cpu_tiny' if toy else f'cluster/{phase or name}_1'}.json"
    words = ["-m", "evals", "bench", "train_step", "--ds-config", config, "--output", str(output)]
    words += ["--set", f"neomoba.phase.name={name}", "--micro-batches", "1" if toy else "4"]
    words += ["--steps", "1" if toy else "2"]
    return Stage(name, words + ["--profile"] * profile, limit, [f"{name}.json"])


def _peer_stage(limit: int, output: Path, toy: bool) -> Stage:
    """Phase 1 against transformers, whose model is compiled as a whole: most of the time that it takes."""
    stage = _steps_stage("peer", limit, output, toy, False, "phase1")
    fewer = [] if toy else ["--set", "train_micro_batch_size_per_gpu=16"]  # more do not fit for transformers
    return stage._replace(words=[*stage.words, *fewer, "--peer", "hf"])


def _graphs_stage(limit: int, output: Path, toy: bool, profile: bool) -> Stage:
    """Phase 1 by CUDA graphs, which a CPU refuses."""
    stage = _steps_stage("phase1_graphs", limit, output, toy, profile, "phase1")
    words = [*stage.words, "--set", "neomoba.phase.compile=cuda_graphs"]
    return stage._replace(words=words, left_out="CUDA graphs need a GPU" if toy else "")


def _tests_stage(limit: int, toy: bool) -> Stage:
    words = ["-m", "pytest", "-m", "gpu and not full", "tests/gpu", "-q", "-o", "addopts=-ra", "-p", "no:cacheprovider"]
    if toy:
        words.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        words += ["-n", "auto"]  # compiling kernels is most of the work, and keeps one core busy each
    return Stage("tests", words, limit, [])


def run_stage(stage: Stage, output: Path) -> dict[str, Any]:
    """Run it to its end or its limit; what it printed goes to OUTPUT/STAGE.log."""
    command = shlex.join(["python", *stage.words])
    if stage.left_out:
        status = f"left out: {stage.left_out}"
        return {"command": command, "status": status, "seconds": 0.0, "last_lines": [], "results": {}}
    for name in stage.results:
        (output / name).unlink(missing_ok=True)  # a result of an earlier run would pass for this one's
    began, log = time.monotonic(), output / f"{stage.name}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *stage.words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(stage.limit)
            status = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: what it started goes with it
            process.wait()
            status = f"stopped after {stage.limit} s"
    results = {}
    for name in stage.results:
        path = output / name
        if path.exists():
            results[name] = json.loads(path.read_text(encoding="utf-8"))
    return {
        "command": command,
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "last_lines": log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:],
        "results": results,
    }


def machine() -> dict[str, str]:
    """Device and versions, from a process that ends: the stages want the device's memory for themselves."""
    code = (
        "import json, platform, torch\n"
        "try:\n import triton\n version = triton.__version__\nexcept ImportError:\n version = 'none'\n"
        "device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'\n"
        "print(json.dumps(dict(device=device, torch=torch.__version__, triton=version, "
        "python=platform.python_version())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def tables(head: dict[str, str], stages_done: dict[str, dict[str, Any]]) -> list[list[list[str]]]:
    """The short table: what must be reached, and the stages. At toy sizes nothing counts as measured."""
    return [must_lines({} if head["sizes"] == "toy" else stages_done), stage_lines(stages_done)]


def title(head: dict[str, str]) -> str:
    """Device and versions, as the summary's first line has them."""
    versions = ", ".join(f"{name} {head[name]}" for name in ("torch", "triton", "python"))
    return f"{head['device']}, {versions}{', toy sizes' * (head['sizes'] == 'toy')}"


def write_summary(output: Path, head: dict[str, str], stages_done: dict[str, dict[str, Any]]) -> None:
    """summary.json with all results, summary.md with commands and what they printed."""
    everything = {"machine": head, "stages": stages_done}
    (output / "summary.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    text = [f"# {title(head)}"]
    for header, *rows in tables(head, stages_done):
        text += ["", *(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))]
    for name, done in stages_done.items():
        text += ["", f"## {name}: {done['status']}, {done['seconds']} s", "", f"`{done['command']}`", "", "```text"]
        text += [*done["last_lines"], "```"]
    (output / "summary.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def earlier_stages(output: Path, head: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What an earlier call left in OUTPUT. Raises EvalError where that was another machine."""
    path = output / "summary.json"
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["machine"] != head:
        raise EvalError(f"{path} is of another machine ({earlier['machine']}, here {head}); give another --output")
    return earlier["stages"]


def run(args: argparse.Namespace) -> int:
    """Run the stages one after the other; 0 if all that were run ended well."""
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    wanted = args.only.split(",") if args.only else USUAL
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise EvalError(f"--only {','.join(unknown)}: no such stage; choose of {', '.join(NAMES)}")
    head = {**machine(), "sizes": "toy" if args.toy else "whole"}
    done = earlier_stages(output, head) if args.only else {}
    spare = 0.0  # seconds that earlier stages left
    todo = [stage for stage in stages(output, args.toy, args.profile) if stage.name in wanted]
    for stage in todo:
        limit = int(stage.limit + spare)
        print(f"{stage.name}: at most {limit} s", file=sys.stderr, flush=True)
        done[stage.name] = run_stage(stage._replace(limit=limit), output)
        spare = max(0.0, limit - done[stage.name]["seconds"])
        done = {name: done[name] for name in NAMES if name in done}
        write_summary(output, head, done)
    for name in [stage.name for stage in todo if stage.name in STEPS and args.profile]:
        for row in (row for result in done[name]["results"].values() for row in result["rows"] if "profile" in row):
            print(f"{name}, {row['attention']}: one update")
            print_table(profile_lines(row["profile"]))
            print()
    print(f"{title(head)}; {output}")
    for table in tables(head, done):
        print_table(table)
        print()
    return 0 if all(stage.left_out or done[stage.name]["status"] == "ok" for stage in todo) else 1
