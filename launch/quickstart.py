"""The whole system on a laptop, in minutes: `make quickstart`.

Real text, and passages of it with a passkey -> tokenizer -> tar shards -> phase 1 (dp 4) -> phase 2 (tp 2 x dp 2) ->
phase 3 (pp 2 x dp 2, MoBA) through the deepspeed launcher on four CPU ranks -> evaluation of the sharded checkpoints ->
report.html. Every line that it runs is printed and can be run by hand; rerun it to resume.
"""

import argparse
import json
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANKS = 4
PHASES = (1, 2, 3)
DIGITS = "2"  # of a passkey
# texts with a passkey, for one phase each: words of the shortest and the longest, further mentions, how many texts
PASSKEYS = {"short": (4, 40, 6, 12000), "middle": (4, 200, 4, 3000), "long": (150, 760, 4, 2500)}
# the short version: the same path, too few steps to learn anything
FEW = [
    "neomoba.phase.steps=4",
    "neomoba.phase.warmup_steps=1",
    "neomoba.checkpoint.save_every=2",
    "neomoba.log.validate_every=2",
]


class Quickstart:
    """The commands, run one after the other with their times."""

    def __init__(self, output: Path, inputs: list[str], few: bool) -> None:
        self.output, self.inputs, self.few = output, inputs, few
        self.times: list[tuple[str, float]] = []

    def run(self, title: str, *command: str | Path) -> None:
        """Print and run one command; a failure ends the quickstart with the command's own message."""
        words = [str(word) for word in command]
        print(f"\n== {title}\n$ {shlex.join(words)}", flush=True)
        start = time.monotonic()
        code = subprocess.run(words, cwd=ROOT, check=False).returncode
        if code:
            sys.exit(f"error: the step '{title}' failed (exit code {code}); its last lines are above")
        self.times.append((title, time.monotonic() - start))

    def module(self, title: str, name: str, *arguments: str | Path) -> None:
        """Run one of the project's commands with this Python."""
        self.run(title, sys.executable, "-m", name, *arguments)

    def corpus(self) -> None:
        """Text, tokenizer and shards."""
        text, tokenizer = self.output / "text", self.output / "tokenizer"
        source = ["--input", *self.inputs] if self.inputs else []
        self.module("text", "data_tools.sample_corpus", "--output", text, *source)
        self.module(
            "tokenizer", "data_tools.train_tokenizer", "--input", text / "train", "--output", tokenizer,
            "--vocab_size", "4096",
        )  # fmt: skip
        for part in ("train", "validation"):
            self.module(
                f"{part} shards", "data_tools.tokenize_corpus", "--input", text / part, "--tokenizer", tokenizer,
                "--output", self.output / "corpus" / part, "--workers", "2",
            )  # fmt: skip
        for name, (least, most, copies, documents) in PASSKEYS.items():
            passkeys = self.output / "passkeys" / name
            self.module(
                f"{name} texts with a passkey", "data_tools.passkeys", "--input", text / "train",
                "--output", passkeys.with_suffix(".text"), "--words", str(least), str(most), "--copies", str(copies),
                "--digits", DIGITS, "--documents", str(documents // 20 if self.few else documents),
            )  # fmt: skip
            self.module(
                f"their shards, {name}", "data_tools.tokenize_corpus", "--input", passkeys.with_suffix(".text"),
                "--tokenizer", tokenizer, "--output", passkeys, "--workers", "2",
            )  # fmt: skip

    def phase(self, number: int) -> None:
        """One phase on four ranks, from the weights of the phase before."""
        train = _phase(number)["data"]["train"].replace("runs/quickstart", str(self.output))
        settings = [
            f"neomoba.data.train={train}", f"neomoba.data.validation={self.output / 'corpus' / 'validation'}",
        ]  # fmt: skip
        before = self.output / f"phase{number - 1}"
        start: list[str | Path] = ["--init_from", before] if number > 1 else []
        self.run(
            f"phase {number}", Path(sys.executable).with_name("deepspeed"), "--num_gpus", str(RANKS),
            "--master_port", str(_free_port()), "launch/pretrain.py",
            "--ds_config", f"ds_configs/quickstart_phase{number}.json",
            "--output_dir", self.output / f"phase{number}", *start,
            "--set", *settings, *(FEW if self.few else []),
        )  # fmt: skip

    def evaluate(self) -> None:
        """Loss by position before and after phase 3, needle after it, and the report."""
        rows, needles = ("2", ["--samples", "1", "--lengths", "256,512"]) if self.few else ("16", ["--samples", "8"])
        needles += ["--digits", DIGITS]
        common = ["--length", str(_sequence_length(3)), "--border", str(_sequence_length(2)), "--rows", rows]
        self.module(
            "evaluation before phase 3", "evals", "run", "--tasks", "position_loss", *common,
            "--checkpoint", self.output / "phase2", "--output", self.output / "evals" / "phase2",
        )  # fmt: skip
        self.module(
            "evaluation after phase 3", "evals", "run", "--tasks", "position_loss,needle", *common, *needles,
            "--checkpoint", self.output / "phase3", "--output", self.output / "evals" / "phase3",
        )  # fmt: skip
        runs = [self.output / f"phase{number}" for number in PHASES]
        self.module(
            "report", "evals", "report", "--run", *runs, "--eval", self.output / "evals" / "phase2",
            self.output / "evals" / "phase3",            "--output", self.output / "report.html",
        )  # fmt: skip

    def summary(self) -> None:
        """What came out, where it lies, and how long it took."""
        index = _read(self.output / "corpus" / "validation" / "index.json")
        print(f"\n== summary\nunigram entropy of the validation text: {index['unigram_entropy']:.3f} nats per token")
        for number in PHASES:
            lines = (self.output / f"phase{number}" / "metrics.jsonl").read_text().splitlines()
            losses = [entry["validation_loss"] for entry in map(json.loads, lines) if "validation_loss" in entry]
            print(f"phase {number}: validation loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        for number, when in ((2, "before"), (3, "after")):
            result = _read(self.output / "evals" / f"phase{number}" / "position_loss.json")["summary"]
            print(f"loss within / beyond {_sequence_length(2)} tokens {when} phase 3: {_within_beyond(result)}")
        curve = _read(self.output / "evals" / "phase3" / "needle.json")["curves"]["moba"]["by_length"]
        shares = ", ".join(f"{100 * entry['exact']:.0f} % at {entry['length']:,} tokens" for entry in curve)
        print(f"passkeys of {DIGITS} digits found by MoBA: {shares} (chance {100 * 0.1 ** int(DIGITS):.1f} %)")
        for title, seconds in self.times:
            print(f"{seconds:7.1f} s  {title}")
        print(f"{sum(seconds for _, seconds in self.times):7.1f} s  in all")
        for what in (
            "corpus",
            "passkeys",
            "tokenizer",
            *(f"phase{n}/checkpoints" for n in PHASES),
            "evals",
            "report.html",
        ):
            print(f"{what:20s} {self.output / what}")


def _free_port() -> int:
    """A port that nobody uses: the default one may belong to another run on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _phase(number: int) -> dict[str, Any]:
    """The neomoba block of a phase's JSON."""
    return _read(ROOT / "ds_configs" / f"quickstart_phase{number}.json")["neomoba"]


def _sequence_length(number: int) -> int:
    return _phase(number)["phase"]["sequence_length"]


def _within_beyond(result: dict[str, Any]) -> str:
    return ", ".join(f"{mode} {value['within']:.3f} / {value['beyond']:.3f}" for mode, value in result.items())


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Parse, run all steps, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", choices=("all", "few"), default="all", help="few: a short run of every step")
    parser.add_argument("--input", nargs="+", default=[], help="your own txt, jsonl or parquet files or folders")
    parser.add_argument("--output", type=Path, help="folder (default: runs/quickstart, few: runs/quickstart_few)")
    arguments = parser.parse_args()
    few = arguments.steps == "few"
    output = arguments.output or Path("runs") / ("quickstart_few" if few else "quickstart")
    quickstart = Quickstart(output, arguments.input, few)
    quickstart.corpus()
    for number in PHASES:
        quickstart.phase(number)
    quickstart.evaluate()
    quickstart.summary()


if __name__ == "__main__":
    main()
