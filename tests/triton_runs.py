"""For tests of Triton kernels without a GPU: processes of their own, because Triton reads its mode when it is imported,
and a count of what the host launches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
FREE = ("aten.empty", "aten.new_empty", "aten.view", "aten.slice", "aten.select", "aten.detach", "aten.alias")


def run_python(arguments: list[str], **environment: str) -> str:
    """Output of a Python process, which must succeed."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    return process.stdout


def interpret(tests: Path, marked: str = "not full") -> None:
    """Run those tests of a file that are so marked in Triton's interpreter; all must pass."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(tests)]
    output = run_python(words, TRITON_INTERPRET="1")
    assert " passed" in output


class Operators(TorchDispatchMode):
    """Counts the operators that launch something; views and allocations do not."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not str(func).startswith(FREE)
        return func(*args, **(kwargs or {}))
