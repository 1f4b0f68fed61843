"""Everything that wants a GPU, in at most 15 minutes: tests, attention, experts, training steps, retrieval.

Each stage is a command of its own under its own time limit; one that fails or runs out of time costs no other. OUTPUT
gets summary.json and summary.md after every stage, the stages' own results and their logs. --only runs some stages and
keeps what OUTPUT has of the others, so that several short calls make one summary. The last lines are its short table.
--toy runs all of it on a CPU in a minute, at sizes that mean nothing.
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

from evals.bench._profile import profile_lines
from evals.cli import EvalError, print_table

ROOT = Path(__file__).resolve().parents[2]
# forward + backward against the fastest full attention; memory against flash
RATIO_GOALS, RATIO_FLOOR, MEMORY_GOAL = {16384: 2.0, 32768: 4.0, 65536: 4.0, 131072: 10.0}, 1.0, 1.2
STEPS = ("phase1", "phase2", "phase3")


class Stage(NamedTuple):
    """A command, the seconds that it may take, and the files of results that it leaves in OUTPUT."""

    name: str
    words: list[str]
    limit: int
    results: list[str]


NAMES = ("tests", "moe", "attention", *STEPS, "million", "recall", "tune")
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
    """The stages of NAMES, in its order: what is most wanted first."""
    device = ["--device", "cpu" if toy else "cuda"]
    pytest = [
        "-m",
        "pytest",
        "-m",
        "gpu and not full",
        "tests/gpu",
        "-q",
        "-o",
        "addopts=-ra",
        "-p",
        "no:cacheprovider",
    ]
    bench = {name: ["-m", "evals", "bench", name, *device] for name in ("attention", "moe", "recall")}
    attention, moe, recall = ([*words, "--output", str(output)] for words in bench.values())
    million = [*bench["attention"], "--output", str(output / "million")]
    million += ["--forward-only", "1024:1" if toy else f"{1 << 20}:16"]
    if toy:
        pytest.append("--collect-only")
        sizes = ["--block-size", "64", "--top-k", "2", "--head-dim", "32", "--repetitions", "1"]
        million += sizes
        attention += [*sizes, "--cases", "256:2,512:2"]
        moe += ["--tokens", "256", "--hidden", "32", "--width", "32", "--repetitions", "1"]
        recall += ["--lengths", "128", "--block-size", "16", "--top-k", "2", "--hidden-size", "32"]
        recall += ["--tokens-per-step", "512", "--seconds", "3"]
    else:
        if importlib.util.find_spec("xdist"):
            pytest += ["-n", "auto"]  # compiling kernels is most of the work, and keeps one core busy each
        attention += ["--cases", ",".join(f"{length}:16" for length in (8192, 16384, 32768, 65536, 131072))]
        moe += ["--dtype", "bfloat16"]
        recall += ["--seconds", "170"]
    return [
        Stage("tests", pytest, 190, []),
        Stage("moe", moe, 40, ["moe.json"]),
        Stage("attention", attention, 120, ["attention.json"]),
        *(_steps_stage(phase, output, toy, profile) for phase in STEPS),
        Stage("million", million, 60, ["million/attention.json"]),
        Stage("recall", recall, 230, ["recall.json"]),
        Stage("tune", ["-m", "evals", "bench", "tune", *device, "--output", str(output)], 285, ["tune.json"]),
    ]


def _steps_stage(phase: str, output: Path, toy: bool, profile: bool) -> Stage:
    config = "ds_configs/cpu_tiny.json" if toy else f"ds_configs/{phase}.json"
    words = ["-m", "evals", "bench", "train_step", "--ds-config", config, "--output", str(output)]
    words += ["--set", f"neomoba.phase.name={phase}", "--micro-batches", "1" if toy else "4"]
    words += ["--steps", "1" if toy else "2"]
    return Stage(phase, words + ["--profile"] * profile, 110 if phase == "phase3" else 65, [f"{phase}.json"])


def run_stage(stage: Stage, output: Path) -> dict[str, Any]:
    """Run it to its end or its limit; what it printed goes to OUTPUT/STAGE.log."""
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
        "command": shlex.join(["python", *stage.words]),
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


def summary_lines(stages_done: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The short table: what was measured, the figure, the goal."""
    lines = [["what", "measured", "goal"]]
    for name, done in stages_done.items():
        last = next((line for line in reversed(done["last_lines"]) if line.strip()), "")
        figure = last[:60] if name == "tests" or done["status"] != "ok" else ""
        lines.append(
            [f"{name}: {done['status']}, {done['seconds']:.0f} s", figure, "all pass" if name == "tests" else ""]
        )
        for result in done["results"].values():
            lines += ROWS.get(name, _steps)(result)
    return lines


def _attention(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for row in result["rows"]:
        rival, goal = row["full"]["name"], max(RATIO_FLOOR, RATIO_GOALS.get(row["length"], RATIO_FLOOR))
        speed = f"fwd {row['forward_ratio']:.2f} f+b {row['both_ratio']:.2f} x {rival}"
        speed += f", {row['moba_tflops']:.3g} / {row['full_tflops']:.3g} TFLOP/s"
        if "moba_peak_bytes" in row:
            speed += f", memory {row['moba_peak_bytes'] / max(1, row['full_peak_bytes']):.2f}"
        lines.append([f"  {row['length']} tokens x {row['heads']}", speed, f"f+b {goal:g}, memory {MEMORY_GOAL}"])
    for row in result["forward_only"]:
        measured = f"{row['moba_forward']:.4g} s, {row['moba_forward_tflops']:.3g} TFLOP/s"
        lines.append([f"  {row['length']} tokens x {row['heads']}, MoBA forward", measured, "runs"])
    return lines


def _steps(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for row in result["rows"]:
        mfu = "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
        peak = "" if row["peak_gib"] is None else f", {row['peak_gib']:.0f} GiB"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s, MFU {mfu}{peak}"
        lines.append([f"  rows of {row['length']}, {row['attention']}", speed, ""])
    return lines


def _moe(result: dict[str, Any]) -> list[list[str]]:
    speed = f"{result['ratio']:.3f} x a dense layer, {result['moe_seconds']:.4g} s, {result['dtype']}"
    return [["  experts, forward + backward", speed, f"at most {result['goal']:g}"]]


def _recall(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for cells in zip(*result["cells"].values(), strict=True):
        head = cells[0]
        shown = ", ".join(f"{name} {100 * c['accuracy']:.0f} %" for name, c in zip(result["cells"], cells, strict=True))
        lines.append([f"  {head['length']} tokens, distance {head['from']}-{head['to']}", shown, ""])
    return lines


def _tune(result: dict[str, Any]) -> list[list[str]]:
    from evals.bench.tune import cells

    rows = (cells(row) for row in result["rows"])
    return [
        [f"  {what}", f"{best}: {figures} (ms, MiB)", f"others: {others[:60]}"] for what, best, figures, others in rows
    ]


ROWS = {"tune": _tune, "attention": _attention, "million": _attention, "moe": _moe, "recall": _recall}


def write_summary(output: Path, head: dict[str, str], stages_done: dict[str, dict[str, Any]]) -> None:
    """summary.json with all results, summary.md with commands and what they printed."""
    everything = {"machine": head, "stages": stages_done}
    (output / "summary.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    text = [f"# {head['device']}, torch {head['torch']}, triton {head['triton']}, Python {head['python']}", ""]
    header, *rows = summary_lines(stages_done)
    text += [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
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
    head = machine()
    done = earlier_stages(output, head) if args.only else {}
    for stage in stages(output, args.toy, args.profile):
        if stage.name in wanted:
            print(f"{stage.name}: at most {stage.limit} s", file=sys.stderr, flush=True)
            done[stage.name] = run_stage(stage, output)
            done = {name: done[name] for name in NAMES if name in done}
            write_summary(output, head, done)
    print(f"{head['device']}, torch {head['torch']}, triton {head['triton']}, Python {head['python']}; {output}")
    print_table(summary_lines(done))
    for name in [name for name in STEPS if name in wanted] if args.profile else []:
        for row in (row for result in done[name]["results"].values() for row in result["rows"] if "profile" in row):
            print(f"\n{name}, {row['attention']}: one update")
            print_table(profile_lines(row["profile"]))
    return 0 if all(done[name]["status"] == "ok" for name in wanted) else 1
