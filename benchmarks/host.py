"""How long the host works for one attention, forward and backward: what shows where kernels are short.

    python3 -m benchmarks.host

A loop enqueues calls without waiting for them; the time until its end is the host's, the time until the GPU's end is
what a user waits for. Beside it the same as a CUDA graph, which leaves the host nothing to do but to start it, and
torch's `scaled_dot_product_attention` without a bias.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from benchmarks.graph import captured
from torch.nn.functional import scaled_dot_product_attention

import flashbias as fb

CALLS = 50


def host_and_total(step: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds for each call until all are enqueued, and until all are done."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    enqueued = time.perf_counter()
    torch.cuda.synchronize()
    return 1000 * (enqueued - start) / CALLS, 1000 * (time.perf_counter() - start) / CALLS


def main() -> None:
    """Time ALiBi over 1,024 tokens, whose kernels take less than a millisecond."""
    shape = (32, 8, 1024, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bias = fb.Alibi(8).cuda()(seqlen_q=1024, seqlen_k=1024)
    grad = torch.ones_like(q)

    def factored() -> None:
        out = fb.attention(q, k, v, bias, is_causal=True)
        assert isinstance(out, torch.Tensor)
        torch.autograd.grad(out, (q, k, v), grad)

    def bias_free() -> None:
        torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad)

    steps = {
        "flashbias, ALiBi": factored,
        "flashbias, ALiBi, as a CUDA graph": captured(factored)[0],
        "torch, no bias": bias_free,
    }
    for name, step in steps.items():
        host, total = host_and_total(step)
        print(f"{name}: host {host:.2f} ms, until done {total:.2f} ms")


if __name__ == "__main__":
    main()
