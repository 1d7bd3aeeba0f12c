"""Small odd shapes for compute-sanitizer: every kernel once, forward and backward.

Run it once without the sanitizer (it compiles), then

    compute-sanitizer --tool memcheck  python3 benchmarks/sanitizer_shapes.py
    compute-sanitizer --tool racecheck python3 benchmarks/sanitizer_shapes.py

Names of shapes, such as `table`, leave out all others. The logs of the last runs are in benchmarks/results/<gpu>/.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

import flashbias as fb
from flashbias.attention.hopper import backward


def check(
    name: str,
    dtype: torch.dtype,
    n: int,
    m: int,
    rank: int,
    *,
    impl: str = "triton",
    widths: tuple[int, int] = (24, 40),
    factor_dtype: torch.dtype | None = None,
    has_table: bool = False,
    fixed_factors: bool = False,
    deterministic: bool | None = None,
    **options: Any,
) -> None:
    """Forward and backward of two batch elements and heads; factors shared over the batch.

    Unless told, the portable kernels add in one order, those for Hopper do not.
    """
    if not is_wanted(name):
        return
    deterministic = impl == "triton" if deterministic is None else deterministic
    kv_heads = 1 if options.get("enable_gqa") else 2
    d, dv = widths
    shapes = [(2, 2, n, d), (2, kv_heads, m, d), (2, kv_heads, m, dv), (1, 2, n, rank), (1, 1, m, rank), (2, 7)]
    dtypes = [dtype] * 3 + [factor_dtype or dtype] * 2 + [torch.float32]
    leaves = [torch.randn(shape, device="cuda").to(t).requires_grad_() for shape, t in zip(shapes, dtypes, strict=True)]
    for factor in leaves[3:5]:
        factor.requires_grad_(not fixed_factors)
    bias = fb.FactoredBias(leaves[3], leaves[4], leaves[5] if has_table else None)
    query, key, value = leaves[:3]
    out: Any = fb.attention(query, key, value, bias, impl=impl, deterministic=deterministic, **options)
    out.float().square().sum().backward()
    torch.cuda.synchronize()
    print(f"{impl} {name}: {n}x{m} rank {rank} {dtype}", flush=True)


def check_packed(name: str, lengths_q: list[int], lengths_k: list[int], width: int, rank: int, **options: Any) -> None:
    """Forward and backward of sequences one after the other, two heads, in bfloat16."""
    if not is_wanted(name):
        return
    n, m = sum(lengths_q), sum(lengths_k)
    shapes = [(n, 2, width), (m, 2, width), (m, 2, width), (2, n, rank), (2, m, rank)]
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    ends = [
        torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32) for lengths in (lengths_q, lengths_k)
    ]
    bias = fb.FactoredBias(leaves[3], leaves[4])
    out: Any = fb.varlen_attention(*leaves[:3], *ends, bias, impl="hopper", **options)
    out.float().square().sum().backward()
    torch.cuda.synchronize()
    print(f"hopper {name}: {lengths_q} x {lengths_k} rank {rank}", flush=True)


def is_wanted(name: str) -> bool:
    """Whether a shape is among those that were asked for, all if none was."""
    return len(sys.argv) < 2 or name in sys.argv[1:]


def portable() -> None:
    """Shapes of the portable kernels."""
    mask = torch.rand(2, 1, 67, 71, device="cuda") > 0.5
    check("plain", torch.bfloat16, 67, 71, 7)
    check("packed", torch.bfloat16, 67, 71, 5, factor_dtype=torch.float32)
    check("window", torch.float16, 49, 49, 3, factor_dtype=torch.float32)
    check("chunked", torch.float16, 67, 71, 133)
    check("causal", torch.bfloat16, 67, 71, 33, is_causal=True, causal_alignment="bottom_right", enable_gqa=True)
    check("table", torch.float16, 67, 71, 2, has_table=True, attn_mask=mask, dropout_p=0.1)
    check("float32", torch.float32, 67, 151, 5)
    check("decode", torch.bfloat16, 1, 1031, 1)


def hopper() -> None:
    """Shapes of the kernels for Hopper, all with the fused backward pass, also where another is faster."""
    backward.is_slower = lambda *_: False
    fixed = functools.partial(check, impl="hopper", fixed_factors=True)
    check("narrow", torch.bfloat16, 201, 203, 7, impl="hopper", widths=(24, 32))
    check("tail", torch.float16, 67, 150, 1, impl="hopper", widths=(16, 16), factor_dtype=torch.float32)
    fixed("cut", torch.bfloat16, 67, 1031, 16, widths=(64, 64))
    fixed("causal", torch.bfloat16, 201, 303, 33, widths=(64, 40), is_causal=True, causal_alignment="bottom_right")
    fixed("window", torch.float16, 303, 201, 4, widths=(40, 64), window=(70, 9), causal_alignment="top_left")
    fixed("wide", torch.bfloat16, 150, 303, 8, widths=(128, 128), enable_gqa=True)
    check("between", torch.bfloat16, 150, 203, 8, impl="hopper", widths=(80, 96))
    shown = torch.rand(2, 2, 1, 203, device="cuda") > 0.3
    check("table", torch.bfloat16, 150, 203, 3, impl="hopper", widths=(32, 32), has_table=True, attn_mask=shown)
    fixed("long table", torch.bfloat16, 403, 201, 4, widths=(64, 40), has_table=True, window=(90, 0),
          causal_alignment="bottom_right")  # fmt: skip
    fixed("in order", torch.bfloat16, 201, 303, 4, widths=(64, 64), deterministic=True)
    fixed("in order, wide", torch.bfloat16, 201, 303, 4, widths=(128, 128), deterministic=True)
    check_packed("packed", [130, 0, 67, 1], [97, 40, 64, 150], 64, 5)
    check_packed("packed, wide", [130, 70], [97, 190], 128, 5, is_causal=True, causal_alignment="bottom_right")


def main() -> None:
    """Walk over the shapes of every implementation that runs here."""
    torch.manual_seed(0)
    portable()
    if torch.cuda.get_device_capability() == (9, 0):
        hopper()


if __name__ == "__main__":
    main()
