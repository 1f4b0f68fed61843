"""`--fit nvidia`: the scripts of a checkout run as they are, and what goes wrong there is said in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import evals.__main__ as program
from evals.ruler import nvidia
from evals.ruler.wording import KINDS
from neomoba_dist.data.tokenizer import load_tokenizer
from tests.corpora import make_tokenizer

# a generator with the interface of RULER's scripts: global random state, imports by their short names
SCRIPT = """
import argparse, json, random, sys
from pathlib import Path
from constants import TASKS
from tokenizer import select_tokenizer
from manifest_utils import write_manifest

parser = argparse.ArgumentParser()
for name in ("save_dir", "save_name", "subset", "tokenizer_path", "tokenizer_type", "template", "type_haystack"):
    parser.add_argument(f"--{name}")
for name in ("max_seq_length", "tokens_to_generate", "num_samples", "random_seed", "num_chains", "num_hops"):
    parser.add_argument(f"--{name}", type=int)
args = parser.parse_args()
random.seed(args.random_seed)
count = select_tokenizer(args.tokenizer_type, args.tokenizer_path).text_to_tokens
assert args.template == TASKS["variable_tracking"]["template"] + TASKS["variable_tracking"]["answer_prefix"]
while args.max_seq_length < 100:
    pass
lines = []
for index in range(args.num_samples):
    text = args.template.format(context=" ".join(random.choices("abcdef", k=20)), query=random.random())
    length = len(count(text)) + args.tokens_to_generate
    prefix = TASKS["variable_tracking"]["answer_prefix"]
    lines.append({"index": index, "input": text.removesuffix(prefix), "outputs": ["\\u00e4"], "length": length,
                  "length_w_model_temp": length, "answer_prefix": prefix})
file = Path(args.save_dir) / args.save_name / f"{args.subset}.jsonl"
file.parent.mkdir(parents=True, exist_ok=True)
write_manifest(file, lines)
"""
MANIFEST = """
import json
def write_manifest(path, lines):
    with open(path, "w") as file:
        for line in lines:
            json.dump(line, file)
            file.write("\\n")
"""
# counts as the real one does, without our stand-in
TOKENIZER = """
import sys
sys.path.insert(0, {root!r})
from neomoba_dist.data.tokenizer import load_tokenizer
class select_tokenizer:
    def __init__(self, kind, path):
        self.text_to_tokens = load_tokenizer(path).encode
"""
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    scripts = root / "scripts" / "data" / "synthetic"
    scripts.mkdir(parents=True)
    tasks = {kind: {"template": f"{kind}: {{context}}\n{{query}}?", "answer_prefix": " so"} for kind in KINDS}
    (scripts / "constants.py").write_text(f"TASKS = {tasks!r}\n")
    (scripts / "niah.py").write_text("needle = '{key}'\nhaystack = 'Hay.'\n")
    (scripts / "qa.py").write_text("DOCUMENT_PROMPT = '{document}'\n")
    (scripts / "variable_tracking.py").write_text(SCRIPT)
    (scripts / "freq_words_extraction.py").write_text("raise RuntimeError('no such thing')\n")
    (scripts.parent / "manifest_utils.py").write_text(MANIFEST)
    (scripts.parent / "tokenizer.py").write_text(TOKENIZER.format(root=str(ROOT)))
    settings = "  args:\n    type_haystack: noise\n    num_chains: 1\n    num_hops: 4\n"
    names = ("vt", "fwe", "qa_1")
    (root / "scripts" / "synthetic.yaml").write_text("".join(f"{name}:\n{settings}" for name in names))
    return root


def prepare(checkout: Path, output: Path, task: str, length: int = 200) -> int:
    tokenizer = make_tokenizer(output / "made", "byte_bpe")
    words = ["prepare", "ruler", "--tokenizer", tokenizer, "--output", output, "--lengths", length, "--samples", 4]
    words += ["--fit", "nvidia", "--ruler-root", checkout, "--only", task]
    return program.main([str(word) for word in words])


def test_bytes_are_those_of_the_script(checkout: Path, tmp_path: Path) -> None:
    assert prepare(checkout, tmp_path / "ours", "vt") == 0
    script = checkout / "scripts" / "data" / "synthetic" / "variable_tracking.py"
    template = "variable_tracking: {context}\n{query}? so"
    words = ["--save_dir", tmp_path / "theirs", "--save_name", "vt", "--subset", "validation", "--max_seq_length", 200]
    words += ["--tokenizer_path", tmp_path / "ours" / "made", "--tokens_to_generate", 30, "--num_samples", 4]
    words += ["--random_seed", 42, "--template", template]
    path = {"PYTHONPATH": str(script.parents[1])}
    subprocess.run([sys.executable, str(script), *map(str, words)], check=True, env=path, timeout=120)
    theirs = (tmp_path / "theirs" / "vt" / "validation.jsonl").read_bytes()
    assert (tmp_path / "ours" / "200" / "vt" / "validation.jsonl").read_bytes() == theirs
    assert b"\\u00e4" in theirs
    lengths = [json.loads(line)["length"] for line in theirs.splitlines()]
    first = json.loads(theirs.splitlines()[0])
    tokenizer = load_tokenizer(tmp_path / "ours" / "made")
    assert lengths[0] == len(tokenizer.encode(first["input"] + first["answer_prefix"])) + 30
    facts = json.loads((tmp_path / "ours" / "manifest.json").read_text())["sets"]["200/vt"]
    assert (facts["fit"], facts["wording"]) == ("nvidia", "RULER")


@pytest.mark.parametrize(
    ("task", "length", "said"),
    [
        ("vt", 50, "did not end within"),
        ("fwe", 200, "RULER's script failed: RuntimeError: no such thing"),
        ("qa_1", 200, "squad.json is missing"),
        ("cwe", 200, "english_words.json is missing"),
    ],
)
def test_what_goes_wrong(
    checkout: Path,
    tmp_path: Path,
    task: str,
    length: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(nvidia, "BASE_SECONDS", 3 if length == 50 else 100)
    assert prepare(checkout, tmp_path, task, length) != 0
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
