"""Compile the Triton kernels of experts for an H100/H200 without one: run by test_moe_triton.py in its own process.

Prints one line per kernel: name and bytes of shared memory.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.compiler import ASTSource

from neomoba_dist.model.moe import kernels
from tests.unit.compiled_triton import SHARED_MEMORY, TARGET

BFLOAT16 = ("x", "rows", "more", "out", "gate", "up", "grad", "grad_gate", "grad_up")
INT64, SIZES = ("expert",), ("pairs", "section", "sections", "tokens")


def compile_kernel(kernel: Any, warps: int = 4, **constants: Any) -> None:
    """Down to machine code, with pointers aligned as torch's are."""
    names = kernel.arg_names

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in SIZES:
            return "i32"
        if "weight" in name:
            return "*fp32"
        return "*bf16" if name in BFLOAT16 else "*i64" if name in INT64 else "*i32"

    signature = {name: kind(name) for name in names}
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps})
    assert "cubin" in compiled.asm
    assert compiled.metadata.shared <= SHARED_MEMORY
    print(kernel.__name__, compiled.metadata.shared, flush=True)


def main() -> None:
    """The sizes of `evals bench moe`, and of DeepSeek-V3's 256 experts."""
    for num_experts, bins in ((8, 16), (32, 64), (256, 512)):
        shape = {"EXPERTS": num_experts, "EP": bins, "BT": kernels.BT}
        compile_kernel(kernels.count_kernel, **shape)
        compile_kernel(kernels.sort_kernel, **shape, BS=max(1, 4096 // bins))
    for hidden, choices in ((512, 2), (768, 4)):
        shape = {"HIDDEN": hidden, "CHOICES": choices, "BM": 8, "BH": 256}
        compile_kernel(kernels.spread_kernel, **shape)
        compile_kernel(kernels.sum_kernel, **shape)
        compile_kernel(kernels.sum_kernel, **shape, more=None)
    for width, features in ((1024, 512), (1192, 512), (48, 64)):
        shape = {"EXPERTS": 8, "WIDTH": width, "BM": 4}
        compile_kernel(kernels.swiglu_kernel, **shape, BI=features)
        compile_kernel(kernels.swiglu_backward_kernel, **shape, BI=min(256, features))


if __name__ == "__main__":
    main()
