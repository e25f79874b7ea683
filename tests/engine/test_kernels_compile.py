"""The Triton kernels compile for Hopper on any machine, and stay inside its registers and shared memory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled then")
triton = pytest.importorskip("triton")

SHARED_MEMORY_LIMIT = 227 * 1024  # bytes a thread block may use on compute capability 9.0


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """``kernel`` for sm_90a; pointers and strides are 16-byte aligned, as torch's are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert not (set(kernel.arg_names) - set(types) - set(constants)), "an argument has neither type nor value"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in types and (types[name].startswith("*") or name.endswith("_stride"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resource_usage(compiled: Any, folder: Path) -> dict[str, int]:
    """What the assembler allotted: REG, STACK (spills), SHARED, LOCAL."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton does not bring cuobjdump")
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def attention(dtype: str, *, head_dim: int, group: int, max_query: int, sms: int = 132) -> Any:
    from engine.kernels import triton_attention
    from engine.kernels.work import ITEM

    plan = triton_attention.plan_attention(
        max_query=max_query, n_heads=8 * group, n_kv_heads=8, head_dim=head_dim,
        element_bytes=4 if dtype == "fp32" else 2, sm_count=sms,
    )  # fmt: skip
    pointer = f"*{dtype}"
    types = {
        "query_ptr": pointer, "key_ptr": pointer, "value_ptr": pointer, "table_ptr": "*i32", "items_ptr": "*i32",
        "out_ptr": pointer, "partial_ptr": "*fp32", "lse_ptr": "*fp32", "scale": "fp32",
        "query_token_stride": "i32", "query_head_stride": "i32", "block_stride": "i32", "slot_stride": "i32",
        "head_stride": "i32", "n_heads": "i32",
    }  # fmt: skip
    constants = {
        "ITEM": ITEM, "TOKENS": plan.tiling.tokens, "GROUP": group, "PAGE": 16, "D": head_dim, "D_PAD": head_dim,
        "BLOCK_M": plan.block_m, "BLOCK_N": plan.tiling.keys, "STAGES": triton_attention._STAGES,
    }  # fmt: skip
    return compile_kernel(triton_attention.attention_kernel, types, constants, num_warps=plan.num_warps)


def copies_in_flight(compiled: Any) -> list[int]:
    """For each wait for asynchronous copies: how many groups of them may still be under way behind it."""
    return [int(n, 0) for n in re.findall(r"cp\.async\.wait_group\s+(\w+)", compiled.asm["ptx"])]


@pytest.mark.parametrize(
    ("head_dim", "group", "max_query", "dtype"),
    [
        (128, 4, 1, "bf16"),
        (64, 3, 1, "bf16"),
        (128, 8, 1, "bf16"),
        (128, 4, 2048, "bf16"),
        (64, 3, 512, "bf16"),
        (128, 4, 8, "bf16"),
        (128, 8, 2048, "fp16"),
    ],
    ids=["decode-8b", "decode-small", "decode-70b", "prefill-8b", "prefill-small", "chunk-8b", "prefill-70b-fp16"],
)
def test_attention_fits_hopper(head_dim: int, group: int, max_query: int, dtype: str, tmp_path: Path) -> None:
    compiled = attention(dtype, head_dim=head_dim, group=group, max_query=max_query)
    usage = resource_usage(compiled, tmp_path)
    assert usage["STACK"] == 0, f"registers spill: {usage}"
    assert usage["LOCAL"] == 0, f"registers spill: {usage}"
    assert compiled.metadata.shared < SHARED_MEMORY_LIMIT
    # Keys and values of the next tile at least stay under way while a tile is computed; zero would be no prefetch.
    assert sorted(copies_in_flight(compiled))[-2:] == [3, 3], "tiles are not prefetched"
    if max_query > 32:
        assert "wgmma" in compiled.asm["ptx"], "prefill does not use Hopper's matrix instructions"


def test_fp32_attention_fits_hopper(tmp_path: Path) -> None:
    compiled = attention("fp32", head_dim=128, group=4, max_query=512)
    assert compiled.metadata.shared < SHARED_MEMORY_LIMIT
    assert resource_usage(compiled, tmp_path)["LOCAL"] == 0


def test_row_kernels_fit_hopper(tmp_path: Path) -> None:
    """At the shapes of an 8B Llama (width 4096, FFN 14336, 32 heads of 128 over 8)."""
    from engine.kernels import triton_attention, triton_rows

    bf16, i32 = "*bf16", "i32"
    cases: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
        (
            triton_rows.norm_kernel,
            {"x_ptr": bf16, "residual_ptr": bf16, "weight_ptr": bf16, "out_ptr": bf16, "total_ptr": bf16,
             "token_stride": i32, "head_stride": i32, "n_inner": i32, "eps": "fp32"},
            {"WIDTH": 4096, "WIDTH_PAD": 4096, "ADD": True}, 8,
        ),
        (
            triton_rows.rope_write_kernel,
            {"query_ptr": bf16, "key_ptr": bf16, "value_ptr": bf16, "cos_ptr": "*fp32", "sin_ptr": "*fp32",
             "key_cache_ptr": bf16, "value_cache_ptr": bf16, "slots_ptr": "*i64",
             "query_token_stride": i32, "query_head_stride": i32, "key_token_stride": i32, "key_head_stride": i32,
             "value_token_stride": i32, "slot_stride": i32, "n_heads": i32, "n_kv_heads": i32},
            {"HEADS_PAD": 32, "KV_HEADS_PAD": 8, "HALF": 64, "HALF_PAD": 64, "WIDTH": 1024, "WIDTH_PAD": 1024}, 4,
        ),
        (
            triton_rows.silu_kernel,
            {"gate_up_ptr": bf16, "out_ptr": bf16, "token_stride": i32},
            {"WIDTH": 14336, "BLOCK": 1024}, 4,
        ),
        (
            triton_attention.merge_kernel,
            {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": bf16, "merges_ptr": "*i32", "n_heads": i32,
             "tokens": i32},
            {"MERGE": 4, "PARTS": 32, "D": 128, "D_PAD": 128}, 4,
        ),
    ]  # fmt: skip
    for kernel, types, constants, warps in cases:
        compiled = compile_kernel(kernel, types, constants, num_warps=warps)
        usage = resource_usage(compiled, tmp_path)
        assert compiled.metadata.shared < SHARED_MEMORY_LIMIT
        assert usage["STACK"] == 0, f"{kernel.fn.__name__} spills: {usage}"
        assert usage["REG"] <= 128, f"{kernel.fn.__name__}: {usage}"


def test_the_kernel_that_says_where_it_runs_compiles() -> None:
    """Its assembly has no interpreter, so a dry run of the GPU check leaves it out."""
    from eval.gpu_check.smoke import smid_kernel

    compiled = compile_kernel(smid_kernel, {"out_ptr": "*i32"}, {"SPIN": 100}, num_warps=4)
    assert "%smid" in compiled.asm["ptx"]
