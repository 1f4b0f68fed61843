"""The Triton kernels without a GPU: exact in Triton's interpreter, and compilable for the real thing.

Both need a process of their own, because Triton reads its mode when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def run(arguments: list[str], **environment: str) -> str:
    """Output of a Python process, which must succeed."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    return process.stdout


def test_kernels_are_exact_in_the_interpreter() -> None:
    output = run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_triton.py")], TRITON_INTERPRET="1"
    )
    assert " passed" in output


def compile_for_hopper(cases: list[str], cache: Path) -> None:
    output = run([str(HERE / "compiled_triton.py"), *cases], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))
    for case in cases:
        assert f"key_gradient_kernel {case.replace(':', ' ')} " in output


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    compile_for_hopper(["bf16:128"], tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", ["bf16:64", "bf16:96", "fp16:128", "bf16:256", "fp32:64", "fp32:128", "fp32:256"])
def test_kernels_compile_for_hopper_in_all_sizes(case: str, tmp_path: Path) -> None:
    compile_for_hopper([case], tmp_path)
