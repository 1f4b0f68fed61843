"""The file map in docs/architecture.md names every file of the code, and nothing that is not there."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("neomoba_dist", "launch", "data_tools", "evals", "ds_configs")


def map_lines() -> dict[str, str]:
    """Path -> description. A folder's line stands for its __init__.py; the lines below it are its files."""
    section = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n## File map\n")[1]
    block = section.split("```text\n")[1].split("```")[0]
    lines: dict[str, str] = {}
    folder = ""
    for line in block.splitlines():
        name, _, description = line.strip().partition(" ")
        if not line.startswith(" "):
            assert name.endswith("/"), f"a folder of the map ends with a slash: {line}"
            folder, name = name, ""
        assert folder + name not in lines, f"{folder}{name} stands twice in the map"
        lines[folder + name] = description.strip()
    return lines


def code_files() -> list[str]:
    """Python files and configurations, of git where there is git; `__init__.py` counts as its folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:  # an unpacked archive
        found = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")))
        listed = [path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts]
    return [
        file.removesuffix("__init__.py")
        for file in listed
        if file.endswith(".py") or (file.startswith("ds_configs/") and file.endswith(".json"))
    ]


def test_every_file_is_in_the_map() -> None:
    files = code_files()
    assert "neomoba_dist/train/trainer.py" in files
    missing = [file for file in files if file not in map_lines()]
    assert not missing, f"add a line to the file map in docs/architecture.md for each of: {missing}"


def test_everything_in_the_map_exists() -> None:
    gone = [path for path in map_lines() if not (ROOT / path).exists()]
    assert not gone, f"take these lines out of the file map in docs/architecture.md: {gone}"


def test_every_line_says_something() -> None:
    assert [path for path, description in map_lines().items() if len(description) < 6] == []
