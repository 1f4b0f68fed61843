"""The Triton kernels without a GPU: exact in Triton's interpreter, and compilable for the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.triton_runs import interpret, run_python

HERE = Path(__file__).resolve().parent


def test_kernels_are_exact_in_the_interpreter() -> None:
    interpret(HERE / "interpreted_triton.py")


def test_dq_by_atomics_is_exact_in_the_interpreter() -> None:
    interpret(HERE / "interpreted_atomics.py")


@pytest.mark.full
def test_dq_by_atomics_is_exact_in_the_whole_grid() -> None:
    interpret(HERE / "interpreted_atomics.py", "full")


def test_moba_by_libraries_is_exact_with_their_kernels_in_the_interpreter() -> None:
    interpret(HERE / "interpreted_library.py")


def compile_for_hopper(cases: list[str], cache: Path) -> None:
    output = run_python([str(HERE / "compiled_triton.py"), *cases], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))
    for case in cases:
        assert f"key_gradient_kernel {case.replace(':', ' ')} " in output


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    compile_for_hopper(["bf16:128"], tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", ["bf16:64", "bf16:96", "fp16:128", "bf16:256", "fp32:64", "fp32:128", "fp32:256"])
def test_kernels_compile_for_hopper_in_all_sizes(case: str, tmp_path: Path) -> None:
    compile_for_hopper([case], tmp_path)
