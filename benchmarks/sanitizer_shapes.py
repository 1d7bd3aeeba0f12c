"""Small odd shapes for compute-sanitizer: every kernel once, forward and backward.

Run it once without the sanitizer (it compiles), then

    compute-sanitizer --tool memcheck  python3 benchmarks/sanitizer_shapes.py
    compute-sanitizer --tool racecheck python3 benchmarks/sanitizer_shapes.py

The logs of the last runs are in benchmarks/results/<gpu>/.
"""

from __future__ import annotations

import torch

import flashbias as fb


def check(name: str, dtype: torch.dtype, n: int, m: int, rank: int, **options: object) -> None:
    """Forward and backward of two batch elements and heads; factors shared over the batch."""
    kv_heads = 1 if options.get("enable_gqa") else 2
    shapes = [(2, 2, n, 24), (2, kv_heads, m, 24), (2, kv_heads, m, 40), (1, 2, n, rank), (1, 1, m, rank), (2, 7)]
    factor_dtype = options.pop("factor_dtype", dtype)
    dtypes = [dtype] * 3 + [factor_dtype] * 2 + [torch.float32]
    leaves = [torch.randn(shape, device="cuda").to(t).requires_grad_() for shape, t in zip(shapes, dtypes, strict=True)]
    table = leaves[5] if options.pop("table", False) else None
    bias = fb.FactoredBias(leaves[3], leaves[4], table)
    out = fb.attention(*leaves[:3], bias, impl="triton", deterministic=True, **options)
    out.float().square().sum().backward()
    torch.cuda.synchronize()
    print(f"{name}: {n}x{m} rank {rank} {dtype}", flush=True)


def main() -> None:
    """Walk over the shapes."""
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 67, 71, device="cuda") > 0.5
    check("plain", torch.bfloat16, 67, 71, 7)
    check("packed", torch.bfloat16, 67, 71, 5, factor_dtype=torch.float32)
    check("window", torch.float16, 49, 49, 3, factor_dtype=torch.float32)
    check("chunked", torch.float16, 67, 71, 133)
    check("causal", torch.bfloat16, 67, 71, 33, is_causal=True, causal_alignment="bottom_right", enable_gqa=True)
    check("table", torch.float16, 67, 71, 2, table=True, attn_mask=mask, dropout_p=0.1)
    check("float32", torch.float32, 67, 151, 5)
    check("decode", torch.bfloat16, 1, 1031, 1)


if __name__ == "__main__":
    main()
