"""Names of ours in backticks, in documents and docstrings, exist: a signpost that points nowhere is worse than none."""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("neomoba_dist", "launch", "data_tools", "evals", "tests")
TEXTS = (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ds_configs" / "README.md")
# where a path in a text may begin
BASES = (
    *("", "neomoba_dist", "neomoba_dist/model", "neomoba_dist/model/attention", "neomoba_dist/model/attention/kernels"),
    *("docs", "evals", "ds_configs", "tests", "launch", "data_tools"),
)
GENERATED = ("runs", "checkpoints", "corpus", "tokenizer", "text", "evals", "tensorboard")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?:\(\))?")
PATH = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|json|sh|sbatch|toml)|(?:[\w-]+/)+")
# shape letters, prefixes, and folders or subsets of the reader's own
EXAMPLES = re.compile(r"[a-z]_[A-Z]+|\w+_|_\w+|my_texts|at_least_\d+")


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def docstring_nodes(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first.value


@cache
def known_names() -> frozenset[str]:
    """Every identifier and every word of a string in the code, docstrings apart, and every key of the shipped JSONs."""
    found: set[str] = set()
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = set(map(id, docstring_nodes(tree)))
        found.add(path.stem)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
                found.add(node.arg)
            elif isinstance(node, ast.alias):
                found.update(node.name.split("."))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.update(re.findall(r"\w+", node.value))
    for path in (ROOT / "ds_configs").rglob("*.json"):
        found.add(path.stem)
        found.update(re.findall(r"\w+", json.dumps(json.loads(path.read_text(encoding="utf-8")))))
    return frozenset(found)


def unknown(text: str) -> list[str]:
    """Names in backticks that look like ours and exist nowhere."""
    found = []
    without_blocks = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_blocks):
        if PATH.fullmatch(name):
            generated = name.split("/")[0] in GENERATED
            places = (*(f"{base}/{name}".lstrip("/") for base in BASES), f"neomoba_dist/**/{name}", f"tests/**/{name}")
            exists = any(any(ROOT.glob(place)) for place in places)
            stated = name.strip("/").split("/")[-1].split(".")[0] in known_names()
            if not (exists or generated or (stated and not name.endswith(".py"))):
                found.append(name)
        elif IDENTIFIER.fullmatch(name):
            words = name.removesuffix("()").split(".")
            ours = "_" in words[-1] or re.fullmatch(r"[A-Z][a-z]+[A-Z]\w*", words[-1])
            if ours and words[-1] not in known_names() and not EXAMPLES.fullmatch(name):
                found.append(name)
    return found


def test_documents_name_what_exists() -> None:
    found = {path.name: names for path in TEXTS if (names := unknown(path.read_text(encoding="utf-8")))}
    assert not found, found


def test_docstrings_name_what_exists() -> None:
    found = {}
    for path in sources():
        for node in docstring_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            if names := unknown(str(node.value)):
                found[f"{path.relative_to(ROOT)}:{node.lineno}"] = names
    assert not found, found


def test_the_check_can_fail() -> None:
    gone = "`NO_SUCH" + "_NAME`, `model/no_such" + "_file.py`, `Engine.no_such" + "_method()`, `update_bias`"
    assert unknown(gone) == ["NO_SUCH" + "_NAME", "model/no_such" + "_file.py", "Engine.no_such" + "_method()"]
