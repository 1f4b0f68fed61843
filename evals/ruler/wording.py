"""RULER's prompt templates, read as text when data are prepared: none of them stands in this project.

Source: the installed lm-eval package, or a checkout of RULER. The files are parsed, not imported: importing lm-eval's
tries to download. lm-eval's wording is RULER's but for a misspelt word in variable tracking.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from evals.cli import EvalError

KINDS = ("niah", "variable_tracking", "common_words_extraction", "freq_words_extraction", "qa")


@dataclass(frozen=True)
class Wording:
    """templates, prefixes: of each kind, with {context}, {query} and others to fill in. noise: a line of haystack.

    needle: with {type_needle_v}, {key} and {value}. document: with {i} and {document}. source: where from, and sha256
    of the files.
    """

    templates: dict[str, str]
    prefixes: dict[str, str]
    needle: str
    noise: str
    document: str
    source: str
    sha256: str

    def fill(self, kind: str, **values: Any) -> tuple[str, str]:
        """(the whole prompt, the answer prefix at its end)."""
        prefix = self.prefixes[kind].format(**values)
        return self.templates[kind].format(**values) + prefix, prefix


def read_wording(ruler_root: Path | None) -> Wording:
    """Of a checkout of RULER, or of the installed lm-eval package. Raises EvalError where it is not there."""
    if ruler_root is not None:
        return _from_ruler(ruler_root / "scripts" / "data" / "synthetic", ruler_root)
    try:
        package = distribution("lm-eval")
    except PackageNotFoundError as error:
        raise EvalError(
            "ruler: its prompts are read from the lm-eval package, which is not installed; install the "
            "requirements, or name a checkout of RULER with --ruler-root"
        ) from error
    return _from_lm_eval(Path(str(package.locate_file("lm_eval/tasks/ruler"))), package.version)


def _from_ruler(folder: Path, root: Path) -> Wording:
    trees, digest = _parse(folder, ["constants", "niah", "qa"], f"--ruler-root {root}")
    tasks = next(_values(trees["constants"], "TASKS"))
    return Wording(
        {kind: tasks[kind]["template"] for kind in KINDS},
        {kind: tasks[kind]["answer_prefix"] for kind in KINDS},
        next(_values(trees["niah"], "needle")),
        _noise(trees["niah"]),
        next(_values(trees["qa"], "DOCUMENT_PROMPT")),
        "RULER",
        digest,
    )


def _from_lm_eval(folder: Path, version: str) -> Wording:
    names = ["niah_utils", "prepare_niah", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils"]
    trees, digest = _parse(folder, names, "lm-eval")
    files = dict(zip(KINDS[1:], names[2:], strict=True))
    configs = {kind: next(_values(trees[file], "CONFIG")) for kind, file in files.items()}
    configs["variable_tracking"] = configs["variable_tracking"]["variable_tracking"]
    # the needle's prefix is a formatted string; of its two forms the plural one is RULER's template
    niah = [_template(node) for node in ast.walk(trees["prepare_niah"]) if isinstance(node, ast.JoinedStr)]
    prefix = next(text for text in niah if text.endswith(" are"))
    prefixes = {"niah": prefix, **{kind: config["answer_prefix"] for kind, config in configs.items()}}
    return Wording(
        {"niah": next(_values(trees["niah_utils"], "TEMPLATE")), **{k: c["template"] for k, c in configs.items()}},
        {kind: text if text.startswith(" ") else f" {text}" for kind, text in prefixes.items()},
        next(_values(trees["prepare_niah"], "NEEDLE")),
        _noise(trees["prepare_niah"]),
        next(_values(trees["qa_utils"], "DOCUMENT_PROMPT")),
        f"lm-eval {version}",
        digest,
    )


def _parse(folder: Path, names: list[str], what: str) -> tuple[dict[str, ast.Module], str]:
    """(syntax trees by name, sha256 over the files)."""
    trees, digest = {}, hashlib.sha256()
    for name in names:
        file = folder / f"{name}.py"
        try:
            text = file.read_bytes()
            trees[name] = ast.parse(text)
        except (OSError, SyntaxError) as error:
            raise EvalError(f"{what}: {file} cannot be read ({error}); RULER's prompts stand there") from error
        digest.update(text)
    return trees, digest.hexdigest()


def _values(tree: ast.Module, name: str) -> Iterator[Any]:
    """What is assigned to `name` anywhere in a file, where it is a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            try:
                yield ast.literal_eval(node.value)
            except ValueError:
                continue


def _noise(tree: ast.Module) -> str:
    """The one haystack that is written out in a file."""
    return next(value for value in _values(tree, "haystack") if isinstance(value, str))


def _template(node: ast.JoinedStr) -> str:
    """A formatted string as a template."""
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue):
            parts.append("{" + ast.unparse(part.value) + "}")
    return "".join(parts)
