"""Compile every Triton kernel of MoBA for an H100/H200 without one: run by test_moba_triton.py in its own process.

Arguments: cases such as bf16:128. Prints one line per kernel: name, dtype, head_dim, bytes of shared memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evals.bench.tune import KEY_TILES
from neomoba_dist.model.attention.kernels.library import rows as library_rows
from neomoba_dist.model.attention.kernels.triton import backward as triton_backward
from neomoba_dist.model.attention.kernels.triton import forward as triton_forward
from neomoba_dist.model.attention.kernels.triton import index as triton_index
from neomoba_dist.model.attention.kernels.triton import key_gradient
from neomoba_dist.model.attention.kernels.triton import layout as triton_layout
from neomoba_dist.model.attention.kernels.triton import select as triton_gate
from neomoba_dist.model.attention.kernels.triton.common import (
    SIZES,
    Tiles,
    choose_gate_tiles,
    choose_key_tiles,
    choose_tiles,
    padded,
)

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # of one SM that a program may use
MOST_STACK = 640  # bytes of a thread's spilt registers, in the kernels of dk and dv: triton 3.6 needs 632, 3.9 216
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT64 = ("spans_pointer", "offset_pointer")
FLOAT32 = (
    "lse_pointer", "part_lse_pointer", "own_lse_pointer", "lse_rows_pointer", "delta_pointer", "grad_lse_pointer",
    "dq_sums_pointer", "dk_sums_pointer", "dv_sums_pointer",
)  # fmt: skip
TENSORS = ("q", "k", "v", "grad", "out", "dq", "dk", "dv", "means", "part")

ONLY_BACKWARD = (
    "grad_pointer", "out_pointer", "lse_pointer", "grad_rows_pointer", "out_rows_pointer", "lse_rows_pointer"
)  # fmt: skip


def argument_type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    """Triton's type of a kernel argument, which its name tells, beside these constants."""
    if name == "scale":
        return "fp32"
    if name in SIZES or "stride" in name:
        return "i32"
    if name in ("k_tiles", "v_tiles"):
        return f"tensordesc<{dtype}[{constants['BN']}, 1, {constants['DIM']}]>"
    if name in FLOAT32:
        return "*fp32"
    if name in INT64:
        return "*i64"
    return f"*{dtype}" if name.removesuffix("_pointer").removesuffix("_rows") in TENSORS else "*i32"


def compile_kernel(kernel: Any, dtype: str, warps: int = 4, stages: int = 3, **constants: Any) -> Any:
    """Down to machine code, with the alignment of pointers and strides that real calls have. Returns what was made."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else argument_type(n, dtype, constants) for n in names}
    aligned = [i for i, n in enumerate(names) if n not in constants and ("pointer" in n or "stride" in n)]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})
    assert "cubin" in compiled.asm
    assert compiled.metadata.shared <= SHARED_MEMORY, (kernel.__name__, dtype, compiled.metadata.shared)
    print(kernel.__name__, dtype, constants.get("DIM", ""), compiled.metadata.shared, flush=True)
    return compiled.asm


def attention_constants(tiles: Tiles, dim: int, dtype: str) -> dict[str, Any]:
    shape = {"DIM": dim, "BM": tiles.rows, "BN": tiles.keys, "BD": padded(dim)}
    return {**shape, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}


def compile_key_gradients(tiles: Tiles, dim: int, dtype: str) -> None:
    """Kernels of dk and dv, with dq by atomics where the tiles have them."""
    constants = {**attention_constants(tiles, dim, dtype), "BT": key_gradient.BT}
    options = constants if tiles.atomics else {"dq_sums_pointer": None, **constants}
    launch = (dtype, tiles.warps, tiles.stages)
    made = [compile_kernel(key_gradient.long_list_kernel, *launch, **options)]
    for given in ({}, {"dk_sums_pointer": None, "dv_sums_pointer": None}):
        made.append(compile_kernel(key_gradient.key_gradient_kernel, *launch, **given, **options, CAUSAL=True))
    for kernel in made:
        assert bool(re.search(r"(red|atom)\.global\S*\.add\S*\.f32", kernel["ptx"])) == tiles.atomics
        if dtype != "fp32":
            assert "wgmma.mma_async" in kernel["ptx"]
            assert "mma.sync" not in kernel["ptx"]
        if dtype != "fp32" and dim <= 128:  # others spill more, and are not what trains
            assert stack_bytes(kernel["cubin"]) <= MOST_STACK, (tiles, dim, dtype, stack_bytes(kernel["cubin"]))


def stack_bytes(machine_code: bytes) -> int:
    """What a thread has of local memory: registers that were spilt."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[0])


def main(cases: list[str]) -> None:
    """Each case is a dtype and a head_dim, such as "bf16:128"."""
    for dtype, dim in ((case.split(":")[0], int(case.split(":")[1])) for case in cases):
        sizes = (dim, DTYPES[dtype], 512, 32768)
        tiles, key_tiles = choose_tiles(*sizes), choose_key_tiles(*sizes)
        constants = attention_constants(tiles, dim, dtype)
        launch = (tiles.warps, tiles.stages)
        for given in ({"k_tiles": None, "v_tiles": None}, *([{}] * (dim == padded(dim)))):
            made = compile_kernel(triton_forward.selected_forward_kernel, dtype, *launch, **given, **constants)
            assert ("cp.async.bulk.tensor" in made["ptx"]) == (not given)
        compile_kernel(triton_forward.current_forward_kernel, dtype, *launch, **constants, CAUSAL=True)
        launch = (tiles.warps, max(1, tiles.stages - 1))
        compile_kernel(triton_backward.selected_query_gradient_kernel, dtype, *launch, **constants)
        compile_kernel(triton_backward.current_query_gradient_kernel, dtype, *launch, **constants, CAUSAL=True)
        compile_key_gradients(key_tiles, dim, dtype)
        fast = [Tiles(*chosen) for chosen in KEY_TILES if Tiles(*chosen).atomics]
        for chosen in fast if dtype != "fp32" and dim <= 128 else (key_tiles._replace(atomics=True),):
            compile_key_gradients(chosen, dim, dtype)
        delta = {"HAS_GRAD_LSE": True, "DIM": dim, "BM": tiles.rows, "BD": padded(dim)}
        compile_kernel(triton_backward.delta_kernel, dtype, **delta)
        rows = {"DIM": dim, "BM": library_rows.BM, "BD": padded(dim)}
        for given in ({}, dict.fromkeys(ONLY_BACKWARD)):
            compile_kernel(library_rows.gather_rows_kernel, dtype, **given, **rows, TAIL=library_rows.TAIL)
        compile_kernel(library_rows.merge_rows_kernel, dtype, **rows)
        compile_kernel(library_rows.scatter_rows_kernel, dtype, **rows)
        for minmax, exact in ((False, dtype == "fp32"), (True, dtype == "fp32"), (False, True)):  # last: "kv_group"
            chosen = choose_gate_tiles(dim, exact)
            width = dim * (1 + minmax)
            gate = {"CAUSAL": True, "IS_MINMAX": minmax, "EXACT": exact, "DIM": dim, "WIDTH": width}
            compile_kernel(
                triton_gate.gate_kernel,
                dtype,
                chosen.warps,
                chosen.stages,
                **gate,
                SLOTS=2,
                BM=chosen.rows,
                BN=chosen.keys,
                BD=padded(dim),
            )
        for pooling in range(4):
            pool = {"POOLING": pooling, "DIM": dim, "WIDTH": dim * (1 + (pooling == 2)), "BN": 64, "BD": padded(dim)}
            compile_kernel(triton_gate.pool_kernel, dtype, **pool)
    for given in ({}, {"cu_q_pointer": None, "cu_k_pointer": None, "offset_pointer": None}):
        compile_kernel(triton_layout.document_kernel, "bf16", **given, BT=1024)
    for spans in ({}, {"spans_pointer": None}):
        compile_kernel(triton_layout.current_blocks_kernel, "bf16", **spans, BM=128, BT=128)
    compile_kernel(triton_index.count_kernel, "bf16", warps=8, BT=512)
    compile_kernel(triton_index.scatter_kernel, "bf16", warps=8, BM=128, BN=64, PARTS=64, BT=512, BC=32)


if __name__ == "__main__":
    main(sys.argv[1:])
