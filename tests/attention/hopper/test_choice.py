"""What the Hopper kernels refuse, and that nothing takes them where they cannot run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.attention.hopper.marks import IS_HOPPER
from torch._subclasses.fake_tensor import FakeTensorMode

import flashbias as fb
from flashbias.attention import hopper, packing, sdpa, triton
from flashbias.attention.call import Call, VarlenLayout
from flashbias.attention.hopper.configs import SHARED_MEMORY, forward_bytes, forward_config

WIDTHS = (16, 32, 64, 128, 256)
"""Columns in which heads are held."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    """A tensor on a device that need not be there."""
    with FakeTensorMode():
        return torch.empty(*shape, dtype=dtype, device=device)


def factors(rank: int, n: int = 64, m: int = 64, dtype: torch.dtype = torch.bfloat16, **rest: Any) -> fb.FactoredBias:
    return fb.FactoredBias(empty(2, n, rank, dtype=dtype), empty(2, m, rank, dtype=dtype), **rest)


def call(
    n: int = 64, m: int = 64, head_dim: int = 64, head_dim_v: int | None = None, dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda", bias: fb.FactoredBias | None = None, scale: float = 0.125, **changes: Any,
) -> Call:  # fmt: skip
    """A call that the kernels can do, unless the arguments say otherwise."""
    widths = ((n, head_dim), (m, head_dim), (m, head_dim_v or head_dim))
    query, key, value = (empty(1, 2, *size, dtype=dtype, device=device) for size in widths)
    plain = Call(
        query, key, value, bias, None, None, None, bottom_right=False, scale=scale, dropout_p=0.0, deterministic=False,
        return_lse=False,
    )  # fmt: skip
    return replace(plain, **changes)


def packed(sequences: int) -> VarlenLayout:
    """Lengths that the host does not know."""
    cu = empty(sequences + 1, dtype=torch.int32)
    return VarlenLayout(cu, cu, 64, 64)


class TestUnsupported:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"dtype": torch.float16},
            {"head_dim": 8},
            {"head_dim": 128, "head_dim_v": 40},
            {"head_dim": 256},
            {"head_dim": 136, "head_dim_v": 8},
            {"head_dim": 64, "head_dim_v": 200},
            {"n": 17, "m": 1},
            {"m": 100_000},
            {"window_left": 3, "window_right": 0, "bottom_right": True},
            {"return_lse": True},
        ],
        ids=str,
    )
    def test_what_they_can_do(self, changes: dict[str, Any]) -> None:
        assert hopper.unsupported(call(**changes)) is None

    @pytest.mark.parametrize(("rank", "dtype"), [(1, torch.float32), (256, torch.bfloat16), (85, torch.float32)])
    def test_ranks_that_fit(self, rank: int, dtype: torch.dtype) -> None:
        assert hopper.unsupported(call(bias=factors(rank, dtype=dtype))) is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dtype": torch.float32}, "dtype torch.float32"),
            ({"dtype": torch.float64}, "dtype torch.float64"),
            ({"device": "cpu"}, "tensors are on cpu"),
            ({"head_dim": 264}, "head_dim 264"),
            ({"head_dim": 20}, "head_dim 20"),
            ({"head_dim": 132}, "head_dim 132"),
            ({"head_dim_v": 264}, "head_dim_v 264"),
            ({"head_dim_v": 12}, "head_dim_v 12"),
            ({"attn_mask": True}, "attn_mask that differs between queries"),
            ({"dropout_p": 0.25}, "dropout_p 0.25"),
            ({"n": 16}, "16 queries, fewer than 17"),
        ],
        ids=str,
    )
    def test_what_they_cannot_is_named(self, changes: dict[str, Any], message: str) -> None:
        if "attn_mask" in changes:
            changes = {"attn_mask": empty(64, 64, dtype=torch.bool)}
        assert message in str(hopper.unsupported(call(**changes)))

    def test_packed_batches(self) -> None:
        """Nothing is centred in them, so that wide float32 factors are taken beside any number of keys."""
        many = packing.TILE_CENTRE_FROM + 1
        assert hopper.unsupported(call(varlen=packed(2))) is None
        assert (
            hopper.unsupported(call(n=many, m=many, bias=factors(20, many, many, torch.float32), varlen=packed(2)))
            is None
        )

    def test_tables_and_masks_of_keys(self) -> None:
        bias = fb.FactoredBias(empty(2, 64, 0), empty(2, 64, 0), empty(2, 9))
        assert hopper.unsupported(call(bias=bias, attn_mask=empty(1, 64, dtype=torch.bool))) is None

    def test_ranks_of_heads_that_share_a_factor(self) -> None:
        shared = fb.FactoredBias(empty(1, 64, 7), empty(2, 64, 7), ranks=[7, 2])
        assert "share" in str(hopper.unsupported(call(bias=shared)))

    def test_ranks_that_differ_between_heads(self) -> None:
        assert hopper.unsupported(call(bias=factors(7, ranks=[7, 2]))) is None

    @pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("rank", [hopper.WIDEST_CENTRED, hopper.WIDEST_CENTRED + 1])
    def test_more_keys_than_one_centre_serves(self, rank: int, factor_dtype: torch.dtype) -> None:
        """float32 factors alone are centred, and wide ones beside many keys are left to the portable kernels."""
        for m, is_long in ((packing.TILE_CENTRE_FROM, False), (packing.TILE_CENTRE_FROM + 1, True)):
            reason = hopper.unsupported(call(m=m, bias=factors(rank, m=m, dtype=factor_dtype)))
            if is_long and factor_dtype == torch.float32 and rank > hopper.WIDEST_CENTRED:
                assert f"rank {rank}, more than {hopper.WIDEST_CENTRED}, beside {m} keys" in str(reason)
            else:
                assert reason is None

    @pytest.mark.parametrize(
        ("rank", "dtype", "scale"),
        [(257, torch.bfloat16, 0.125), (129, torch.bfloat16, 0.3), (86, torch.float32, 0.125)],
    )
    def test_more_columns_than_fit(self, rank: int, dtype: torch.dtype, scale: float) -> None:
        """A scale that is no power of two doubles those of bfloat16 factors, float32 ones take three."""
        reason = str(hopper.unsupported(call(bias=factors(rank, dtype=dtype), scale=scale)))
        assert f"rank {rank}" in reason
        assert "512 columns, more than 256" in reason

    @pytest.mark.parametrize("has_table", [False, True])
    def test_every_width_that_is_taken_fits(self, has_table: bool) -> None:
        """Into shared memory; what is refused does not."""
        table = empty(2, 9) if has_table else None
        for head_dim, head_dim_v, rank in itertools.product(WIDTHS, WIDTHS, (16, 32, 64, 128, 256)):
            bias = fb.FactoredBias(empty(2, 64, rank), empty(2, 64, rank), table)
            refusal = hopper.unsupported(call(head_dim=head_dim, head_dim_v=head_dim_v, bias=bias))
            sizes = head_dim, head_dim_v, rank, has_table
            if refusal is None:
                config = forward_config(*sizes)
                assert forward_bytes(config, *sizes[:3]) <= SHARED_MEMORY
            else:
                assert f"rank {rank}" in refusal
                with pytest.raises(ValueError, match="do not fit"):
                    forward_config(*sizes)


class TestChoice:
    def tensors(self, device: str = "cpu", n: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if device == "cpu":
            query, key, value = torch.randn(3, 1, 2, n, 64).bfloat16()
        else:
            query, key, value = (empty(1, 2, n, 64, device=device) for _ in range(3))
        return query, key, value

    def test_is_listed_first(self) -> None:
        found = fb.implementations()
        assert next(iter(found)) == "hopper"
        assert (found["hopper"] is None) == IS_HOPPER

    def test_explanations_speak_of_it(self) -> None:
        explanation = fb.explain(*self.tensors())
        assert explanation.reasons["hopper"] is not None
        assert f"hopper: {explanation.reasons['hopper']}" in str(explanation)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_machine_without_a_gpu_says_so(self) -> None:
        with pytest.raises(NotImplementedError, match=r"impl='hopper'.*no CUDA device.*would take 'sdpa'"):
            fb.attention(*self.tensors(), impl="hopper")
        with pytest.raises(NotImplementedError, match=r"impl='hopper'.*no CUDA device"):
            fb.explain(*self.tensors(), impl="hopper")

    def test_auto_on_the_cpu_is_what_it_was(self) -> None:
        assert fb.explain(*self.tensors()).impl == "sdpa"

    @pytest.mark.parametrize("is_slower", [False, True])
    def test_auto_takes_it_where_it_can_and_is_fastest(self, is_slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        for kernels in (hopper, triton):
            monkeypatch.setattr(kernels, "unavailable", lambda *_: None)
        monkeypatch.setattr(hopper, "is_slower", lambda call: is_slower)
        explanation = fb.explain(*self.tensors("cuda"))
        assert explanation.reasons["hopper"] is None
        assert explanation.impl == ("triton" if is_slower else "hopper")
        assert fb.explain(*self.tensors("cuda"), impl="hopper").impl == "hopper"
        few = fb.explain(*self.tensors("cuda", n=16))
        assert few.impl == "triton"
        assert "16 queries" in str(few.reasons["hopper"])

    @pytest.mark.parametrize(("impl", "n"), [("auto", 64), ("auto", 16), ("hopper", 64), ("triton", 64)])
    @pytest.mark.parametrize("is_slower", [False, True])
    def test_a_call_runs_what_is_explained(
        self, impl: str, n: int, is_slower: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A call asks no more implementations than it needs; the answer is that of asking all."""
        taken = []
        for name, kernels in (("hopper", hopper), ("triton", triton)):
            monkeypatch.setattr(kernels, "unavailable", lambda *_: None)
            monkeypatch.setattr(kernels, "run", lambda call, name=name: (taken.append(name) or call.query, None))
        monkeypatch.setattr(hopper, "is_slower", lambda call: is_slower)
        query, key, value = self.tensors("cuda", n=n)
        explained = fb.explain(query, key, value, impl=impl)
        monkeypatch.setattr(sdpa, "unsupported", lambda call: pytest.fail("sdpa was asked"))
        fb.attention(query, key, value, impl=impl)
        assert taken == [explained.impl]

    def test_a_named_one_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hopper, "unavailable", lambda *_: None)
        with pytest.raises(NotImplementedError, match=r"impl='hopper'.*16 queries.*would take"):
            fb.attention(*self.tensors("cuda", n=16), impl="hopper")

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"n": 512, "m": 512}, False),
            ({"n": 128, "m": 512}, True),
            ({"n": 512, "m": 512, "bias": factors(16, 512, 512)}, False),
            ({"n": 512, "m": 512, "bias": factors(100, 512, 512), "scale": 0.1}, False),
            ({"n": 512, "m": 512, "head_dim": 32, "bias": factors(32, 512, 512), "scale": 0.1}, False),
            ({"n": 512, "m": 512, "head_dim": 32, "bias": factors(128, 512, 512), "scale": 0.1}, False),
            ({"n": 516, "m": 512, "head_dim": 128, "varlen": packed(4)}, False),
            ({"n": 512, "m": 512, "head_dim": 128, "varlen": packed(4)}, True),
            ({"n": 516, "m": 512, "head_dim": 64, "varlen": packed(4)}, False),
            ({"n": 516, "m": 512, "head_dim": 32, "varlen": packed(4)}, True),
        ],
        ids=str,
    )
    def test_where_it_is_slower(self, changes: dict[str, Any], expected: bool) -> None:
        assert hopper.is_slower(call(**changes)) == expected

    @pytest.mark.parametrize("ranks", [(16, 16), (16, 1), (16, 0), (8, 7)], ids=str)
    def test_heads_of_small_rank_beside_a_large_one(self, ranks: tuple[int, int]) -> None:
        """Each head pays for its own rank (`tiers.py`), however uneven they are."""
        assert not hopper.is_slower(call(n=256, m=256, bias=factors(16, 256, 256, ranks=ranks)))


class TestGradientOfATable:
    """Which kernel sums it."""

    @staticmethod
    def fits(**changes: Any) -> bool:
        pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
        from flashbias.attention.hopper import table
        from flashbias.attention.hopper.operands import HopperOperands
        from flashbias.attention.registration import operands

        n, batch, rank = (changes.pop(name, default) for name, default in (("n", 300), ("batch", 1), ("rank", 0)))
        query = torch.empty(batch, 2, n, 64, dtype=torch.bfloat16, device="meta")
        phi = torch.empty(2, n, rank, dtype=torch.bfloat16, device="meta")
        bias = fb.FactoredBias(phi, phi, torch.empty(2, 9, device="meta"))
        plain = call()
        asked = replace(plain, query=query, key=query, value=query, bias=bias, **changes)
        return table.fits(HopperOperands.of(*operands(asked))) is not None

    def test_what_the_own_kernel_does(self) -> None:
        assert self.fits() and self.fits(rank=30) and self.fits(n=129)

    def test_what_is_left_to_the_portable_one(self) -> None:
        """Short windows, factors that leave room for one pair in flight, few pairs beside a band."""
        assert not self.fits(n=128)
        assert not self.fits(rank=129)
        assert not self.fits(window_right=0) and not self.fits(window_right=0, batch=15)
        assert self.fits(window_right=0, batch=16)
