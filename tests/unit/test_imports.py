"""The import rules of the architecture, read off the syntax trees (docs: CONTRIBUTING.md, "Import rules")."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# a package may import those of lower levels and itself
LEVELS = {"config": 0, "parallel": 1, "model": 2, "data": 2, "checkpoint": 3, "generate": 3, "train": 4}
TOPS = ("launch", "evals", "data_tools", "tests")

# heavy or optional libraries and the only places that may import them
DOORS = {
    "deepspeed": ("neomoba_dist/train/engine.py", "neomoba_dist/parallel/pipeline.py"),
    "megatron": ("neomoba_dist/parallel/",),
    "webdataset": ("neomoba_dist/data/", "data_tools/"),
    "triton": ("neomoba_dist/model/attention/kernels/", "neomoba_dist/model/moe/"),
    "flash_attn": ("neomoba_dist/model/attention/kernels/",),
    "quack": ("neomoba_dist/model/moe/",),
    "apex": ("neomoba_dist/model/optional.py",),
    "torch.distributed": ("neomoba_dist/parallel/",),
}
FREE = ("tests/", "evals/bench/")

# rooms of the model that know nothing of each other
ROOMS = (
    ("neomoba_dist/model/attention/", "neomoba_dist.model.moe"),
    ("neomoba_dist/model/moe/", "neomoba_dist.model.attention"),
)


def source_files() -> list[Path]:
    folders = ("neomoba_dist", "launch", "data_tools", "evals", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_names(path: Path) -> list[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def violations(file: str, names: list[str]) -> list[str]:
    """What in `names` the file at `file` (relative to the root) may not import."""
    found = []
    parts = file.split("/")
    level = LEVELS.get(parts[1], -1) if parts[0] == "neomoba_dist" and len(parts) > 2 else 99
    for name in names:
        words = name.split(".")
        if level < 99 and words[0] in TOPS:
            found.append(f"{file} imports {name}: the library knows nothing of its users")
        if words[0] == "neomoba_dist" and len(words) > 1 and words[1] in LEVELS and level < 99:
            same = words[1] == parts[1]
            if not same and LEVELS[words[1]] >= level:
                found.append(f"{file} imports {name}: wrong direction")
        for room, other in ROOMS:
            if file.startswith(room) and (name == other or name.startswith(other + ".")):
                found.append(f"{file} imports {name}: attention and experts know nothing of each other")
        for door, places in DOORS.items():
            if (name == door or name.startswith(door + ".")) and not file.startswith((*places, *FREE)):
                found.append(f"{file} imports {name}: only {', '.join(places)} may")
    return found


def test_arrows() -> None:
    found = [v for path in source_files() for v in violations(path.relative_to(ROOT).as_posix(), imported_names(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("neomoba_dist/parallel/mesh.py", "neomoba_dist.model.neobert"),
        ("neomoba_dist/data/batch.py", "neomoba_dist.model.init"),
        ("neomoba_dist/model/block.py", "torch.distributed"),
        ("neomoba_dist/train/trainer.py", "deepspeed"),
        ("neomoba_dist/model/attention/moba.py", "triton.language"),
        ("neomoba_dist/config/load.py", "launch.pretrain"),
        ("evals/load.py", "megatron.core"),
        ("neomoba_dist/model/moe/layer.py", "neomoba_dist.model.attention.moba.attend"),
        ("neomoba_dist/model/attention/layer.py", "neomoba_dist.model.moe"),
    ],
)
def test_the_check_can_fail(file: str, name: str) -> None:
    assert violations(file, [name])


def circles(imports: dict[str, set[str]]) -> list[str]:
    """The modules that import one another in a circle, if any; imports: of each module, by dotted name."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def module_imports() -> dict[str, set[str]]:
    """Which of our modules each of them imports; a package counts as its __init__.py."""
    found = {}
    for path in source_files():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[module] = imported_names(path)
    known = set(found)

    def module_of(name: str) -> str:
        return name if name in known else name.rpartition(".")[0]

    return {module: {module_of(name) for name in names} & known - {module} for module, names in found.items()}


def test_no_circles() -> None:
    found = circles(module_imports())
    assert not found, " imports ".join(reversed(found))


def test_the_check_of_circles_can_fail() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "c", "b", "a"]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_environment_is_read_in_three_places_only() -> None:
    allowed = ("launch/", "tests/", "neomoba_dist/parallel/launcher.py", "neomoba_dist/completion.py")
    for path in source_files():
        file = path.relative_to(ROOT).as_posix()
        if not file.startswith(allowed):
            assert "os.environ" not in path.read_text(encoding="utf-8"), f"{file} reads the environment"


@pytest.mark.parametrize(
    "module",
    ["neomoba_dist.config", "neomoba_dist.model.neobert", "neomoba_dist.data.stream", "evals", "launch.pretrain"],
)
def test_imports_no_engine(module: str) -> None:
    """Models, data and command lines start without DeepSpeed and megatron-core (torch itself may import triton)."""
    code = f"import sys, {module}; print([m for m in ('deepspeed', 'megatron') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
