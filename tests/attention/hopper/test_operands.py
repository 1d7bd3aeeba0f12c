"""Tensors in any memory order reach the copy engine in a form that it can address; checked without a GPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import INTERPRETED

import flashbias as fb
from flashbias.attention import packing, registration
from flashbias.attention.call import Call

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flashbias.attention.hopper import backward, forward
from flashbias.attention.hopper.gluon import TensorDescriptor
from flashbias.attention.hopper.operands import HopperOperands, Summable, descriptor, layout_of
from flashbias.attention.registration import RANKS

BATCH, HEADS, N, D = 2, 3, 96, 32


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


def transposed(x: torch.Tensor) -> torch.Tensor:
    """`[B, N, H, D]`, as projections leave it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fused(x: torch.Tensor) -> torch.Tensor:
    """A third of a wider row, as one projection for all three leaves it."""
    return x.repeat(1, 1, 1, 3)[..., D : 2 * D]


def odd_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows at a distance of an odd number of elements."""
    return torch.cat([x, x[..., :3]], -1)[..., :D]


def odd_start(x: torch.Tensor) -> torch.Tensor:
    """Rows that begin 2 bytes past an aligned address."""
    return torch.cat([x[..., :1], x, x[..., :7]], -1)[..., 1 : 1 + D]


def columns(x: torch.Tensor) -> torch.Tensor:
    """The last dimension is the slow one."""
    return x.mT.contiguous().mT


def expanded(x: torch.Tensor) -> torch.Tensor:
    """One batch element for all."""
    return x[:1].expand(x.shape)


def odd_step_of_one(x: torch.Tensor) -> torch.Tensor:
    """One batch element, at an odd distance from one that is not there."""
    x = x[:1]
    return x.as_strided(x.shape, (7, *x.stride()[1:]))


LAYOUTS = [contiguous, transposed, fused, odd_rows, odd_start, columns, expanded, odd_step_of_one]


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Descriptors of every Gluon kernel that would be launched."""
    found: list[Any] = []

    def record(self: JITFunction, *arguments: Any, **options: Any) -> None:
        if self.is_gluon():
            found.extend(x for x in arguments if isinstance(x, TensorDescriptor))

    monkeypatch.setattr(JITFunction, "run", record)
    # A device of its own: a kernel that was compiled for a GPU is not found.
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_device=lambda: -1))
    monkeypatch.setattr(backward, "is_slower", lambda *_: False, raising=False)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_is_addressable(layout: Any, descriptors: list[Any]) -> None:
    query, key, value, dout = (layout(torch.randn(BATCH, HEADS, N, D).bfloat16()) for _ in range(4))
    bias = fb.FactoredBias(torch.randn(HEADS, N, 4), torch.randn(1, N, 4))
    call = Call(
        query, key, value, bias, None, None, None, bottom_right=False, scale=0.5, dropout_p=0.0, deterministic=False,
        return_lse=False,
    )  # fmt: skip
    arguments = registration.operands(call)
    out, lse = registration._output_like(query, value), registration._lse_like(query)
    forward.launch(out, lse, *arguments)
    for x, right in zip(descriptors, (query, key, value), strict=False):
        assert torch.equal(x.base, right), "another tensor"
    assert len(descriptors) == 6
    needs = (True, True, True, True, True, False)
    grads = registration._gradients_like((query, key, value, bias.phi_q, bias.phi_k, None), needs)
    backward.launch(grads, dout, None, out, lse, needs, *arguments)
    assert len(descriptors) > 6
    for x in descriptors:
        steps = [step * x.base.element_size() for step in x.strides[:-1]]
        assert x.strides[-1] == 1
        assert x.base.data_ptr() % 16 == 0
        assert all(step > 0 and step % 16 == 0 for step in steps)


def test_tensors_that_are_alike_have_descriptors_of_their_own() -> None:
    a, b = torch.zeros(2, 1, 3, 64, 32, dtype=torch.bfloat16)
    first, second, other = descriptor(a, 16, 32), descriptor(b, 16, 32), descriptor(a, 32, 32)
    assert first.base is a and second.base is b
    checked = TensorDescriptor(
        a, list(a.shape), [16, *a.stride()[1:]], [1, 1, 16, 32], layout_of((1, 1, 16, 32), a.dtype)
    )
    assert {**vars(first), "base": None} == {**vars(checked), "base": None}
    assert first.block_shape == second.block_shape == [1, 1, 16, 32]
    assert other.block_shape == [1, 1, 32, 32]


class TestCentring:
    """Scores of centred factors, with the offsets that the kernel adds and what a row lost, are the bias."""

    @pytest.mark.parametrize(("n", "m"), [(300, 700), (700, 300), (64, 129)], ids=str)
    @pytest.mark.parametrize("lead", [(HEADS,), (1,), (BATCH, 1)], ids=str)
    def test_offsets(
        self, lead: tuple[int, ...], n: int, m: int, descriptors: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(packing, "TILE_CENTRE_FROM", 128)
        query, key = torch.zeros(BATCH, HEADS, n, D).bfloat16(), torch.zeros(BATCH, HEADS, m, D).bfloat16()
        # Of a factor that is the same for all queries one row is stored.
        phi_q = torch.randn(*lead, 1, 3).expand(*lead, n, 3) if n == 64 else torch.randn(*lead, 3, n).mT
        # Centres are read row by row, in whatever order phi_k lies in memory.
        phi_k = 100 * (torch.randn(3, HEADS, m).permute(1, 2, 0) if n == 300 else torch.randn(HEADS, m, 3))
        bias = fb.FactoredBias(phi_q, phi_k)
        call = Call(
            query, key, key, bias, None, None, None, bottom_right=False, scale=0.5, dropout_p=0.0, deterministic=False,
            return_lse=True,
        )  # fmt: skip
        ops = HopperOperands.of(*registration.operands(call))
        assert ops.shape.centred_rank == 3
        assert not ops.has_portable_gradients
        stride_f, stride_n, stride_r, stride_c, references = ops.centring.sizes
        assert ops.centring.phi_q is not None
        assert ops.centring.centres is not None
        flat_q, flat_c = (x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0) for x in
                          (ops.centring.phi_q, ops.centring.centres))  # fmt: skip
        tile = packing.CENTRE_TILE
        for bh, (start_m, start_n) in itertools.product(
            range(BATCH * HEADS), itertools.product(range(0, n, 64), range(0, m, 32))
        ):
            f_q, f_k = (own_index(bh, *sharing.sizes) for sharing in (ops.sharing_q, ops.sharing_k))
            rows, keys = torch.arange(64).clamp(max=n - 1 - start_m), torch.arange(start_n, min(start_n + 32, m))
            r = torch.arange(3)
            own_q = flat_q[f_q * stride_f + start_m * stride_n + rows[:, None] * stride_n + r * stride_r].double()
            own_c = flat_c[f_k * stride_c + start_n // tile * 3 + r].double()
            reference = flat_c[f_k * stride_c + (references + min(start_m, n - 1) // tile) * 3 + r].double()
            dense = bias.dense().double().expand(BATCH, HEADS, n, m).flatten(0, 1)[bh]
            lost = packing.row_constant(bias, tiled=True).double().expand(BATCH, HEADS, n).flatten(0, 1)[bh]
            phi_k = bias.phi_k.expand(BATCH, HEADS, m, 3).flatten(0, 1)[bh]
            made = own_q @ (phi_k[keys].double() - own_c).mT + own_q @ (own_c - reference)[:, None]
            i = start_m + rows
            torch.testing.assert_close(made + lost[i, None], dense[i[:, None], keys], atol=1e-3, rtol=1e-5)


class TestSummable:
    """The columns, summed, and what is put back give dphi_q measured from the centres opposite to the queries."""

    @pytest.mark.parametrize(("rank", "accuracy"), [(2, 2.0**-24), (5, 2.0**-24), (6, 2.0**-17), (7, 2.0**-17)])
    def test_gradient(self, rank: int, accuracy: float) -> None:
        m = 1_000
        phi_k, references = 1e5 * torch.rand(2, m, rank), 1e5 * torch.rand(2, 70, rank)
        found = Summable.of(phi_k, torch.bfloat16)
        assert found.columns.shape == (2, m, 16)
        ds = torch.randn(2, 70, m).double()
        exact = ds @ phi_k.double() - ds.sum(-1, keepdim=True) * references.double()
        made = found.gradient(ds @ found.columns.double(), references.double())
        # Of a number, and of the difference from the centre, which is rounded to float32.
        bound = (accuracy + 2.0**-24) * 1e5 * ds.abs().sum(-1, keepdim=True)
        assert ((made - exact).abs() <= bound).all()


class TestChosen:
    """Which backward passes the fused kernel does."""

    @pytest.mark.parametrize(
        ("head_dim", "needs", "is_fused"),
        [
            (64, (True, True, True, False, False, True), True),
            (64, (False, False, True, False, False, True), True),
            (64, (False, False, False, False, False, True), False),  # which makes nothing of a table's own gradient
            (80, (True, True, True, False, False, True), False),  # no registers for addresses
        ],
    )
    def test_beside_a_table(self, head_dim: int, needs: tuple[bool, ...], is_fused: bool) -> None:
        q, k, v = torch.zeros(3, 10, HEADS, 256, head_dim, dtype=torch.bfloat16)
        table = torch.zeros(HEADS, 9)
        ops = HopperOperands.of(q, k, v, None, None, table, *[None] * 6, 256, 256, [], 0.25, -1, -1, False, 0.0)
        assert (backward.chosen(ops, needs) is not None) == is_fused

    @pytest.mark.parametrize(
        ("rank", "own_k", "needs", "is_fused"),
        [
            (7, 1, (True, True), True),
            (7, HEADS, (True, True), True),
            (8, HEADS, (True, True), False),  # no room for two parts
            (8, HEADS, (False, True), True),
            (8, HEADS, (False, False), True),
            (40, HEADS, (False, True), False),  # its own kernel for wide factors has no offsets
        ],
    )
    def test_centred(
        self, rank: int, own_k: int, needs: tuple[bool, bool], is_fused: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(packing, "TILE_CENTRE_FROM", 128)
        q, k, v = torch.zeros(3, 10, HEADS, 256, D, dtype=torch.bfloat16)
        phi_q, phi_k = torch.zeros(HEADS, 256, rank), torch.zeros(own_k, 256, rank)
        ops = HopperOperands.of(q, k, v, phi_q, phi_k, *[None] * 7, 256, 256, [], 0.25, -1, -1, False, 0.0)
        assert ops.is_tile_centred
        assert (backward.chosen(ops, (True, True, True, *needs, False)) is not None) == is_fused

    @pytest.mark.parametrize(
        ("changes", "is_fused"),
        [
            ({"mask": torch.ones(2, 1, 1, 256, dtype=torch.bool)}, True),
            ({"mask": torch.ones(HEADS, 1, 256, dtype=torch.bool)}, True),
            ({"table": torch.zeros(HEADS, 9)}, True),
            ({"mask": torch.ones(1, 256, dtype=torch.bool), "table": torch.zeros(HEADS, 9)}, True),
            ({"table": torch.zeros(HEADS, 9), "head_dim": 80}, False),
            ({"mask": torch.ones(1, 256, dtype=torch.bool), "head_dim": 80}, True),
        ],
        ids=["mask", "mask of heads", "table", "table and mask", "table beside wide heads", "mask beside wide heads"],
    )
    def test_tables_and_masks(self, changes: dict[str, Any], is_fused: bool) -> None:
        q, k, v = torch.zeros(3, 2, HEADS, 256, changes.get("head_dim", D), dtype=torch.bfloat16)
        phi = torch.zeros(HEADS, 256, 4)
        table, mask = changes.get("table"), changes.get("mask")
        ops = HopperOperands.of(
            q, k, v, phi, phi, table, None, None, mask, *[None] * 3, 256, 256, [], 0.25, -1, -1, False, 0.0
        )
        assert (backward.chosen(ops, (True, True, True, True, True, False)) is not None) == is_fused

    @pytest.mark.parametrize(
        ("head_dim", "is_fused"), [(16, False), (32, False), (64, True), (80, True), (128, True), (136, False)]
    )
    def test_packed(self, head_dim: int, is_fused: bool) -> None:
        """Wide heads, as in the forward pass; narrow ones were not measured, and additions have no order there."""
        q, k, v = torch.zeros(3, HEADS, 500, head_dim, dtype=torch.bfloat16)
        phi, cu = torch.zeros(HEADS, 500, 4), torch.tensor([0, 200, 500], dtype=torch.int32)
        ops = HopperOperands.of(q, k, v, phi, phi, *[None] * 4, cu, cu, None, 300, 300, [], 0.25, -1, -1, False, 0.0)
        assert (backward.chosen(ops, (True, True, True, True, True, False)) is not None) == is_fused

    @pytest.mark.parametrize("head_dim", [32, 80])
    def test_packed_tables(self, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Codes begin elsewhere in each sequence."""
        monkeypatch.setattr(backward, "is_slower", lambda *_: False)
        q, k, v = torch.zeros(3, HEADS, 500, head_dim, dtype=torch.bfloat16)
        cu, needs = torch.tensor([0, 200, 500], dtype=torch.int32), (True, True, True, False, False, True)
        for table, is_fused in ((None, True), (torch.zeros(HEADS, 9), False)):
            ops = HopperOperands.of(
                q, k, v, None, None, table, *[None] * 3, cu, cu, None, 300, 300, [], 0.25, -1, -1, False, 0.0
            )
            assert (backward.chosen(ops, needs) is not None) == is_fused
            assert backward.chosen(ops, needs, repeatable=True) is None

    def test_wide_shared_factors_beside_a_mask(self) -> None:
        """The kernel that sums dS over all who share a factor knows no mask: then each pair makes its own products."""
        q, k, v = torch.zeros(3, 10, HEADS, 256, D, dtype=torch.bfloat16)
        phi, mask = torch.zeros(HEADS, 256, 40), torch.ones(10, 1, 1, 256, dtype=torch.bool)
        for own, is_apart in ((None, True), (mask, False)):
            ops = HopperOperands.of(
                q, k, v, phi, phi, *[None] * 3, own, *[None] * 3, 256, 256, [], 0.25, -1, -1, False, 0.0
            )
            assert backward.are_summed_apart(ops) == is_apart


class TestTerms:
    """0 where a key is shown, -inf where it is hidden, or past the end; of each tile the largest."""

    @pytest.mark.parametrize("own", [(2, HEADS), (1, 1), (2, 1)], ids=str)
    @pytest.mark.parametrize("keys", [128, 192])
    def test_terms(self, keys: int, own: tuple[int, ...]) -> None:
        m = 300
        mask = torch.rand(*own, 1, m) < 0.5
        mask[..., :keys] &= torch.tensor(own[0] == 2).expand(own[0], *(1,) * 3)
        q, k, v = (torch.zeros(2, HEADS, n, D, dtype=torch.bfloat16) for n in (70, m, m))
        ops = HopperOperands.of(q, k, v, *[None] * 5, mask, *[None] * 3, 70, m, [], 0.25, -1, -1, False, 0.0)
        terms, most = ops.tile_terms(keys)
        assert terms is not None and most is not None
        shown = torch.nn.functional.pad(mask.flatten(0, 2), (0, terms.shape[-1] - m))
        assert terms.shape[-1] % keys == 0
        assert torch.equal(terms, torch.where(shown, 0.0, -torch.inf))
        assert torch.equal(most == 0, shown.unflatten(-1, (-1, keys)).any(-1))


def own_index(bh: int, s1: int, v2: int, s2: int) -> int:
    """By the arithmetic of the kernel."""
    return bh // (s1 * v2 * s2) * v2 + bh // s2 % v2


class TestRanks:
    def test_place_in_the_schema(self) -> None:
        names = [argument.name for argument in torch.ops.flashbias.attention_forward.default._schema.arguments]
        assert names[3:5] == ["phi_q", "phi_k"]
        assert names[RANKS] == "ranks"

    def test_columns_that_a_head_lacks_become_zeros(self) -> None:
        q, k, v = torch.randn(3, 2, 3, 20, 16, dtype=torch.bfloat16)
        phi_q, phi_k = torch.randn(2, 3, 20, 4)
        bias = fb.FactoredBias(phi_q, phi_k, ranks=(4, 0, 2))
        ops = HopperOperands.of(q, k, v, phi_q, phi_k, *[None] * 7, 20, 20, [4, 0, 2], 0.25, -1, -1, False, 0.0)
        assert ops.ranks_per_head is None and ops.phi_q is not None and ops.phi_k is not None
        clean = bias.without_ranks()
        assert torch.equal(ops.phi_q, clean.phi_q)
        assert torch.equal(ops.phi_k, clean.phi_k)
        assert ops.rank == 4

    def test_ranks_without_columns(self) -> None:
        """A bias that is a table, with the rank 0 in every head."""
        q, k, v = torch.randn(3, 2, 2, 20, 16, dtype=torch.bfloat16)
        ops = HopperOperands.of(
            q, k, v, None, None, torch.zeros(2, 9), *[None] * 6, 20, 20, [0, 0], 0.25, -1, -1, False, 0.0
        )
        assert ops.rank == ops.columns == 0
