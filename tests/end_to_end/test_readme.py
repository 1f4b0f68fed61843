"""What README.md promises: the quickstart leaves what is listed, and every command in the texts exists as printed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from neomoba_dist.config import load_config
from tests.programs import ROOT, run_program

README = ROOT / "README.md"
FRENCH = ROOT / "README.fr.md"
TEXTS = (README, FRENCH, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
# programs of other people, whose arguments are not checked
FOREIGN = ("source", "eval", "pip", "py-spy", "apt-get")


@dataclass(frozen=True)
class Command:
    """One line of a shell block. program: ("launch/pretrain.py",) or ("-m", "evals", "run"), with Python before it."""

    line: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]

    def values(self, flag: str) -> list[str]:
        """What stands behind a flag, up to the next one."""
        found: list[str] = []
        for word in self.arguments[self.arguments.index(flag) + 1 :] if flag in self.arguments else ():
            if word.startswith("--"):
                break
            found.append(word)
        return found


def shell_lines(text: Path) -> list[str]:
    """The commands of the ```sh blocks; what stands between <<'EOF' and EOF is not one."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    joined = re.sub(r" <<'EOF'\n.*?^EOF$", "", "".join(blocks).replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    return [line for line in joined.splitlines() if line.strip()]


def parse(line: str) -> Command | None:
    """The command of our own in a line, None where it is a make target or not ours."""
    words = shlex.split(line)
    if words[0] in ("mpirun", "torchrun"):  # -n K
        words = words[3:]
    if words[0] == "-m":  # of torchrun
        words = ["python", *words]
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    script = next((i for i, word in enumerate(words) if word.startswith("launch/")), None)
    if (words[0] in ("python", "deepspeed") and script is not None) or script == 0:
        return Command(line, (words[script],), tuple(words[script + 1 :]))
    if words[:2] == ["python", "-m"]:
        # the first argument of evals is a command of its own, and so are those of bench and prepare
        end = 3 if words[2] != "evals" else 4 + (words[3:4] in (["bench"], ["prepare"]))
        return Command(line, tuple(words[1:end]), tuple(words[end:]))
    assert words[0] in ("make", *FOREIGN) or words[:2] == ["python", "-"], f"what is this? {line}"
    return None


def commands() -> list[Command]:
    return [command for text in TEXTS for line in shell_lines(text) if (command := parse(line))]


@cache
def help_text(program: tuple[str, ...]) -> str:
    result = run_program(*program, "--help")
    assert result.returncode == 0, f"{shlex.join(program)} --help: {result.stderr}"
    return result.stdout


def test_the_texts_hold_the_commands_of_the_project() -> None:
    """So that the other tests cannot pass on nothing."""
    lines = shell_lines(README)
    assert lines[:2] == ["make quickstart", "make test"]
    assert "deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/phase3.json" in lines
    assert {command.program for command in commands()} >= {
        ("launch/pretrain.py",),
        ("launch/quickstart.py",),
        ("-m", "data_tools.tokenize_corpus"),
        ("-m", "evals", "run"),
        ("-m", "evals", "report"),
    }


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for text in TEXTS:
        named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text.read_text(encoding="utf-8"), re.MULTILINE))
        assert {first or second for first, second in named} <= targets, text.name


@pytest.mark.parametrize("program", sorted({command.program for command in commands()}), ids=" ".join)
def test_flags_of_the_printed_commands_exist(program: tuple[str, ...]) -> None:
    known = set(re.findall(r"--[a-zA-Z0-9_-]+", help_text(program)))
    for command in commands():
        if command.program == program:
            used = {word.partition("=")[0] for word in command.arguments if word.startswith("--")}
            assert used <= known, command.line


@pytest.mark.parametrize(
    "command", [c for c in commands() if c.program == ("launch/pretrain.py",)], ids=lambda c: c.line
)
def test_printed_training_commands_load(command: Command) -> None:
    """The file is there, every --set path exists, and the batch closes for the number of ranks."""
    (file,) = command.values("--ds_config")
    config = load_config(ROOT / file, command.values("--set"))
    words = shlex.split(command.line)
    gpus = words[words.index("--num_gpus") + 1] if "--num_gpus" in words else "1"  # plain python is one rank
    ranks = command.values("--world_size") or [gpus]
    assert config.plan(int(ranks[0])).gradient_accumulation_steps >= 1


def test_links_lead_somewhere() -> None:
    """Relative links between the texts, headings included."""
    for text in (*TEXTS, ROOT / "ds_configs" / "README.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", text.read_text(encoding="utf-8")):
            file, _, anchor = target.partition("#")
            if file.startswith(("http:", "https:")):
                continue
            path = (text.parent / file) if file else text
            assert path.exists(), f"{text.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{text.name}: {target}"


def test_the_french_readme_says_the_same() -> None:
    """Commands, headings by level, rows of tables, code, links and figures are those of the English one."""
    assert shell_lines(FRENCH) == shell_lines(README)
    english, french = (
        re.sub(r"^```.*?^```", "", text.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for text in (README, FRENCH)
    )
    assert re.findall(r"^(#+) |^(\|)", english, re.MULTILINE) == re.findall(r"^(#+) |^(\|)", french, re.MULTILINE)
    for pattern in (r"`[^`]+`", r"\]\(([^)\s]+)\)", r"\b\d[\d,. ]*\d\b|\b\d\b"):
        english_found, french_found = (
            sorted(re.sub(r"[,. ]", "", found) for found in re.findall(pattern, text) if "README" not in found)
            for text in (english, french)
        )
        assert english_found == french_found, pattern


def run_to_the_end(*words: str | Path, timeout: float) -> str:
    """Run a command that starts processes of its own; a time-out ends all of them."""
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end after {timeout} s:\n{output[-4000:]}")
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.mark.timeout(280)
def test_quickstart_leaves_what_the_readme_lists(tmp_path: Path) -> None:
    """`make quickstart STEPS=few`, with this Python and into a folder of its own."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "launch/quickstart.py --steps $(STEPS)" in recipe
    quickstart = (sys.executable, "launch/quickstart.py", "--steps", "few", "--output", tmp_path)
    printed = run_to_the_end(*quickstart, timeout=260)
    table = README.read_text(encoding="utf-8").split("| under `runs/quickstart/` |")[1].split("\n\n")[0]
    listed = [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(listed) >= 8
    for name in listed:
        assert (tmp_path / name).exists(), name
        assert str(tmp_path / name.split("/")[0]) in printed
    for number in (1, 2, 3):
        run = tmp_path / f"phase{number}"
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
        assert "validation_loss" in steps[-1]
        assert load_config(run / "config.json").phase.name == f"phase{number}"
        assert (run / "checkpoints" / "step_4" / "index.json").is_file()
        assert list((run / "tensorboard").iterdir())
    for name in ("position_loss.json", "position_loss.png", "needle.json", "needle.png"):
        assert (tmp_path / "evals" / "phase3" / name).stat().st_size > 500
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("Training report: phase1, phase2, phase3", "Loss by position", "Needle in a haystack", "Reproduce"):
        assert heading in report
    assert report.count("data:image/svg+xml;base64,") >= 6
    assert "unigram entropy of the validation text" in printed
    assert re.search(r"[\d.]+ s  in all", printed)
