"""RULER's own generators, run as they are: `--fit nvidia`. Their output is kept byte for byte.

A script runs in an interpreter of its own, because it seeds and uses the global random streams. The one thing that is
replaced is the module `tokenizer`, which would load the tokenizer through other libraries. The scripts repeat for ever
a sample that cannot be made shorter, so they get a time limit.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli import EvalError
from evals.ruler.sets import RULER_TASKS
from evals.ruler.wording import Wording

if TYPE_CHECKING:
    from evals.ruler.request import Request

BASE_SECONDS = 300  # the scripts sort six million words first
TOKENS_PER_SECOND = 10_000  # far below what a script makes
DATA = {"essay": "PaulGrahamEssays.json", "squad": "squad.json", "hotpotqa": "hotpotqa.json"}


def run_script(request: Request, name: str, length: int, wording: Wording) -> None:
    """Write request.folder/LENGTH/NAME/validation.jsonl. Raises EvalError."""
    assert request.ruler_root is not None
    task, root = RULER_TASKS[name], request.ruler_root.resolve()
    scripts = root / "scripts" / "data" / "synthetic"
    words = "english_words.json" if task.kind == "common_words_extraction" else None
    essay = task.haystack if task.kind == "niah" else ""
    for file in filter(None, (DATA.get(essay), DATA.get(task.dataset), words)):
        if not (scripts / "json" / file).is_file() or (scripts / "json" / file).stat().st_size < 200:
            raise EvalError(f"{name}: {scripts / 'json' / file} is missing; fetch it as RULER's README says")
    settings = {
        "save_dir": (request.folder / str(length)).resolve(),
        "save_name": name,
        "subset": "validation",
        "tokenizer_path": request.tokenizer.save(request.folder / "tokenizer").resolve(),
        "tokenizer_type": "hf",
        "max_seq_length": length,
        "tokens_to_generate": task.generated,
        "num_samples": request.samples,
        "random_seed": request.seed,
        **_script_settings(root, name),
        **({"pre_samples": 0} if task.kind == "qa" else {}),
        "template": wording.templates[task.kind] + wording.prefixes[task.kind],
    }
    words_of_command = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    seconds = BASE_SECONDS + request.samples * length / TOKENS_PER_SECOND
    try:
        done = subprocess.run(
            [sys.executable, "-m", "evals.ruler.nvidia", str(scripts / f"{task.kind}.py"), *words_of_command],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EvalError(
            f"{name} at {length} tokens: RULER's script did not end within {seconds:.0f} s; it never does where a "
            "sample does not fit; give longer --lengths, or --fit exact"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvalError(f"{name}: RULER's script failed: {last}")


def _script_settings(root: Path, name: str) -> dict[str, Any]:
    """What RULER's synthetic.yaml says of a task."""
    import yaml

    file = root / "scripts" / "synthetic.yaml"
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8"))[name]["args"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise EvalError(f"--ruler-root {root}: {file} says nothing of {name} ({error})") from error


def main(argv: list[str]) -> None:
    """Inside the new interpreter: SCRIPT and its own options."""
    from neomoba_dist.data.tokenizer import load_tokenizer

    script = argv[0]

    class Texts:
        """What the scripts ask of a tokenizer."""

        def __init__(self, path: str) -> None:
            self._encode = load_tokenizer(path).encode

        def text_to_tokens(self, text: str) -> list[int]:
            """As many entries as the text has tokens."""
            return self._encode(text)

    stand_in = types.ModuleType("tokenizer")
    stand_in.__dict__["select_tokenizer"] = lambda _kind, path: Texts(path)
    sys.modules["tokenizer"] = stand_in
    sys.argv = argv
    sys.path[:0] = [str(Path(script).parent), str(Path(script).parents[1])]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
