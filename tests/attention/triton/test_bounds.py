"""No kernel reads or writes an address that is not its own: every access of the interpreter is checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.attention.triton.test_shared import OPEN, relative_errors

import flashbias as fb

pytestmark = pytest.mark.interpreter


@pytest.fixture
def strays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Accesses outside the storages of a launch's tensors, as they are found."""
    from triton.runtime import interpreter

    owned: list[tuple[int, int]] = []
    found: list[str] = []
    prepare = interpreter.GridExecutor._init_args_hst

    def recorded(self: Any, args: Any, kwargs: Any) -> Any:
        result = prepare(self, args, kwargs)
        storages = [x.untyped_storage() for x in (*result[0], *result[1].values()) if hasattr(x, "data_ptr")]
        owned[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return result

    def checked(name: str, pointer: int, mask: int) -> None:
        access = getattr(interpreter.InterpreterBuilder, name)

        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            addresses = args[pointer].data
            live = np.broadcast_to(args[mask].data, addresses.shape).astype(bool)
            first = addresses[live].astype(np.int64)
            last = first + max(1, args[pointer].get_element_ty().primitive_bitwidth // 8)
            inside = np.zeros(first.shape, dtype=bool)
            for start, end in owned:
                inside |= (first >= start) & (last <= end)
            if not inside.all():
                found.append(f"{name}: {(~inside).sum()} of {inside.size}")
            return access(self, *args, **kwargs)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, run)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", recorded)
    checked("create_masked_load", 0, 1)
    checked("create_masked_store", 0, 2)
    checked("create_atomic_rmw", 1, 3)
    return found


def attend(dtype: torch.dtype, n: int, m: int, d: int, dv: int, rank: int, table: int, **options: Any) -> None:
    """Forward and backward, all gradients; the key-side factor is shared by the heads."""
    shapes = [(1, 2, n, d), (1, 2, m, d), (1, 2, m, dv), (1, 2, n, rank), (1, 1, m, rank)]
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    entries = torch.randn(2, table, requires_grad=True) if table else None
    bias = fb.FactoredBias(leaves[3].float(), leaves[4].float(), entries)
    fb.attention(*leaves[:3], bias, impl="triton", **options).float().square().sum().backward()  # type: ignore[union-attr]


def test_a_stray_access_is_seen(strays: list[str]) -> None:
    """The check can fail."""
    from tests.attention.triton.stray import read_one_past

    data, out = torch.zeros(8), torch.zeros(8)
    read_one_past[(1,)](data[4:], out, 4, BLOCK=8)
    assert strays == ["create_masked_load: 1 of 5"]


@pytest.mark.parametrize(
    ("dtype", "n", "m", "d", "dv", "rank", "table", "options"),
    [
        pytest.param(torch.float32, 70, 165, 40, 24, 5, 0, {}, id="tiles-of-centres"),
        pytest.param(torch.bfloat16, 67, 71, 24, 40, 33, 0, {"is_causal": True}, id="three-chunks-causal"),
        pytest.param(torch.bfloat16, 17, 300, 16, 16, 3, 0, {}, id="few-queries"),
        pytest.param(torch.float16, 49, 49, 32, 32, 5, 0, {}, id="window"),
        pytest.param(torch.float32, 37, 71, 8, 11, 2, 9, {"window": (40, 20), "dropout_p": 0.1}, id="table-window"),
    ],
)
def test_kernels_stay_within_their_tensors(
    strays: list[str],
    dtype: torch.dtype,
    n: int,
    m: int,
    d: int,
    dv: int,
    rank: int,
    table: int,
    options: dict[str, Any],
) -> None:
    attend(dtype, n, m, d, dv, rank, table, causal_alignment="bottom_right", **options)
    assert strays == []


class TestPartsOfAWalk:
    """A part loads the rows of its first member before it walks: one without members would read past the last."""

    @pytest.mark.parametrize("batch", [9, 10, 11, 12])
    def test_of_a_table(self, strays: list[str], batch: int) -> None:
        """One tile, which would like to be eight parts: nine members are five parts of two, not eight."""
        leaves = [torch.randn(batch, 1, 16, 16, requires_grad=True) for _ in range(3)]
        bias = fb.FactoredBias.from_table(torch.randn(1, 9, requires_grad=True), 16, 16)
        fb.attention(*leaves, bias, impl="triton").square().sum().backward()  # type: ignore[union-attr]
        assert strays == []

    @pytest.mark.parametrize("batch", [24, 25, 26])
    def test_of_wide_factors(self, strays: list[str], batch: int) -> None:
        """Six parts are wanted: twenty-five members are five of five."""
        sizes: dict[str, Any] = {"n": 16, "m": 16, "lead": batch, "heads": 1, "kv_heads": 1, "own": (1, 1)}
        assert max(relative_errors("cpu", torch.float32, OPEN, **sizes)) < 3e-6
        assert strays == []
