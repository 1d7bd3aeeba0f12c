"""Tiles of the portable kernels fit into the shared memory of GPUs that have little; compiled without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import INTERPRETED

import flashbias as fb
from flashbias.attention import registration
from flashbias.attention.call import Call

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("nothing is compiled: TRITON_INTERPRET=1 is set", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from flashbias.attention.triton import configs, operands, table
from flashbias.attention.triton.operands import Operands, strides_of

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that a program may have, by compute capability."""


class NoDevice:
    """Stands for a driver of Triton's, with a GPU that nothing is launched on."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@pytest.fixture(params=SHARED_MEMORY)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Kernels that would be launched, compiled for a GPU of each kind."""
    found: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            found.append(run(self, *arguments, grid=grid, warmup=True, **options))
        finally:
            self.device_caches.pop(-1, None)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", NoDevice(request.param))
    monkeypatch.setattr(configs, "_shared_memory", lambda device: SHARED_MEMORY[request.param])
    monkeypatch.setattr(configs, "_stages_stay", lambda device: request.param == 90)
    monkeypatch.setattr(configs, "_chosen", configs._chosen.__wrapped__)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for module in (operands, table):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 108)
    return found


def call(head_dim: int, rank: int, entries: int, n: int = 512, heads: int = 4) -> Call:
    """Tensors without storage, in bfloat16."""
    query, phi = (torch.empty(heads, n, width, dtype=torch.bfloat16, device="meta") for width in (head_dim, rank))
    bias = fb.FactoredBias(phi, phi, torch.empty(heads, entries, device="meta"))
    return Call(
        query, query, query, bias, None, None, None, bottom_right=False, scale=head_dim**-0.5, dropout_p=0.0,
        deterministic=False, return_lse=False, varlen=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "rank"), [(32, 0), (64, 16), (64, 64), (128, 64), (128, 128), (256, 64), (256, 128)]
)
def test_the_gradient_of_a_table_fits(head_dim: int, rank: int, compiled: list[Any]) -> None:
    """Beside factors as wide as a kernel holds: queries, keys, values and factors of the next members lie there too."""
    ops = Operands.of(*registration.operands(call(head_dim, rank, entries=99)))
    rows = torch.empty(ops.q.shape[:3], device="meta")
    arguments = {"dout_ptr": ops.q, "lse_ptr": rows, "delta_ptr": rows} | strides_of("do", ops.q)
    table.launch(ops, torch.empty(4, 99, device="meta"), ops.q, None, arguments)
    assert len(compiled) == 3
    (kernel,) = (kernel for kernel in compiled if kernel.metadata.name == "_bwd_dtable_kernel")
    limit = SHARED_MEMORY[kernel.metadata.target.arch]
    assert 0 < kernel.metadata.shared <= limit
