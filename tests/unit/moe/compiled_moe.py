"""Compile the Triton kernels of experts for an H100/H200 without one: run by test_moe_triton.py in its own process.

Prints one line per kernel: name and bytes of shared memory.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.compiler import ASTSource

from neomoba_dist.model.moe import kernels, router_kernels
from tests.unit.attention.compiled_triton import SHARED_MEMORY, TARGET

BFLOAT16 = ("x", "more", "gate", "up", "grad_gate", "grad_up")
FLOAT32 = ("logits", "bias", "weight", "partial", "sums", "grad_weight", "grad_sums", "loss")
TYPES = {"expert": "*i64", "valid": "*u8", "record": "*fp64", "balance_scale": "fp32", "z_scale": "fp32"}
SIZES = ("pairs", "section", "sections", "tokens", "tokens_per_row", "blocks", "blocks_per_row")


def compile_kernel(kernel: Any, warps: int = 4, *, types: dict[str, str] | None = None, **constants: Any) -> None:
    """Down to machine code, with pointers aligned as torch's are. types: of arguments whose names do not tell."""
    names = kernel.arg_names
    known = {**TYPES, **(types or {}), **dict.fromkeys(BFLOAT16, "*bf16"), **dict.fromkeys(FLOAT32, "*fp32")}
    known |= {**dict.fromkeys(SIZES, "i32"), **(types or {}), **dict.fromkeys(constants, "constexpr")}
    signature = {name: known.get(name, "*i32") for name in names}
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


def compile_experts() -> None:
    """The sizes of `evals bench moe`, and of DeepSeek-V3's 256 experts."""
    for num_experts, bins in ((8, 16), (32, 64), (256, 512)):
        shape = {"EXPERTS": num_experts, "EP": bins, "BT": kernels.BT}
        compile_kernel(kernels.count_kernel, **shape)
        compile_kernel(kernels.sort_kernel, **shape, BS=max(1, 4096 // bins))
    half = {"rows": "*bf16", "out": "*bf16", "grad": "*bf16"}
    for hidden, choices in ((512, 2), (768, 4)):
        shape = {"HIDDEN": hidden, "CHOICES": choices, "BM": 8, "BH": 256}
        compile_kernel(kernels.spread_kernel, types=half, **shape)
        compile_kernel(kernels.sum_kernel, types=half, **shape, weight=None)
        compile_kernel(kernels.sum_kernel, types=half, **shape, more=None)
    for width, features in ((1024, 512), (1192, 512), (48, 64)):
        shape = {"EXPERTS": 8, "WIDTH": width, "BM": 4}
        compile_kernel(kernels.swiglu_kernel, types=half, **shape, BI=features)
        compile_kernel(kernels.swiglu_backward_kernel, types=half, **shape, BI=min(256, features))


def compile_routers() -> None:
    """One to eight choices, both kinds of scores."""
    single = {"out": "*fp32", "grad": "*fp32", "rows": "i32"}
    for num_experts, choices, sigmoid in ((8, 1, False), (8, 2, False), (32, 4, False), (60, 6, True), (256, 8, True)):
        padded, block = router_kernels.experts_padded(num_experts), router_kernels.block_of(4096, 1, num_experts)
        sizes = {"EXPERTS": num_experts, "EP": padded}
        shape = {**sizes, "CHOICES": choices, "SIGMOID": sigmoid, "NORM": True, "SCALE": 2.5, "BM": block}
        compile_kernel(router_kernels.route_kernel, **shape, KP=triton.next_power_of_2(choices))
        compile_kernel(router_kernels.finish_kernel, **sizes, CHOICES=choices, BB=max(1, min(64, 2048 // padded)))
        compile_kernel(router_kernels.route_backward_kernel, types=single, **shape)
        compile_kernel(router_kernels.route_backward_kernel, types=single, **shape, grad_sums=None)
        compile_kernel(router_kernels.balance_kernel, types=single, **sizes)
        compile_kernel(router_kernels.balance_backward_kernel, types=single, **sizes)
        halves = {"x": "*fp32", "out": "*bf16"}
        compile_kernel(router_kernels.split_kernel, types=halves, **sizes, BM=max(1, 2048 // padded))


if __name__ == "__main__":
    compile_experts()
    compile_routers()
