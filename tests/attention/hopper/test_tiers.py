"""Heads of different rank: which are launched together, and that parts make the whole; seen without a GPU.

In place of a launch stands attention by torch, in float64, from the very arguments that a launch would get.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.attention.cases import BOTTOM_RIGHT, CAUSAL
from tests.attention.machine import allow_hopper, tiers_for_every_width
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import LEAVES, Case, Problem
from tests.attention.varlen import VarlenCase
from tests.conftest import INTERPRETED
from torch import Tensor

import flashbias as fb
from flashbias.attention import packing, registration
from flashbias.attention.hopper import tiers
from flashbias.attention.hopper.configs import ready_columns
from flashbias.attention.hopper.tiers import Arguments, Form, Heads, Size
from flashbias.attention.packing import Handed
from flashbias.factored import relative_lookup

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from flashbias.attention.hopper import backward, forward
from flashbias.attention.hopper.operands import HopperOperands

# -------------------------------------------------------------------- what stands in place of a launch


def by_head(x: Tensor, full: Sequence[int]) -> Tensor:
    """`[*own, N, R]` as `[B, H, N, R]`."""
    return x.expand(*full, *x.shape[-2:]).reshape(-1, full[-1], *x.shape[-2:])


def attended(given: Arguments, leaves: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of centred scores, `[B, H, N, …]`, from float64 tensors."""
    q, k, v, phi_q, phi_k, table = (leaves[name] for name in LEAVES)
    assert q is not None and k is not None and v is not None
    full = q.shape[:-2]
    group = full[-1] // k.shape[-3]
    k, v = (x.repeat_interleave(group, -3) for x in (k, v))
    q, k, v = (by_head(x, full) for x in (q, k, v))
    scores = given.scale * q @ k.mT
    constant = torch.zeros((), dtype=torch.float64)
    if phi_q is not None and phi_k is not None:
        bias = fb.FactoredBias(phi_q, phi_k, ranks=given.ranks or None).without_ranks()
        scores = scores + by_head(bias.phi_q, full) @ by_head(bias.phi_k, full).mT
        assert given.phi_q is not None and given.phi_k is not None
        if given.cu_seqlens_q is None and packing.is_packed(given.phi_q, given.phi_k, given.query.dtype):
            tiled = packing.is_tile_centred(k.shape[-2], given.query.dtype)
            rows = packing.row_constant(bias, tiled=tiled)
            constant = rows.expand(*full, rows.shape[-1]).reshape(-1, full[-1], rows.shape[-1])
    if given.attn_mask is not None:
        scores = scores.masked_fill(~by_head(given.attn_mask, full), -torch.inf)
    if given.cu_seqlens_q is None or given.cu_seqlens_k is None:
        bounds = [(0, q.shape[-2], 0, k.shape[-2])]
    else:
        cu_q, cu_k = given.cu_seqlens_q.tolist(), given.cu_seqlens_k.tolist()
        bounds = [(*a, *b) for a, b in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True)]
    out, lse = q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_full(q.shape[:-1], -torch.inf)
    for q0, q1, k0, k1 in bounds:
        own = scores[..., q0:q1, k0:k1]
        if table is not None:
            code_q = torch.arange(q1 - q0) if given.code_q is None else given.code_q[q0:q1]
            code_k = torch.arange(k1 - k0) if given.code_k is None else given.code_k[k0:k1]
            own = own + relative_lookup(table, code_q, code_k)
        shift = (k1 - k0) - (q1 - q0) if given.bottom_right else 0
        gap = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - shift
        hidden = torch.zeros_like(gap, dtype=torch.bool)
        hidden |= (gap < -given.window_left) if given.window_left >= 0 else False
        hidden |= (gap > given.window_right) if given.window_right >= 0 else False
        own = own.masked_fill(hidden, -torch.inf)
        seen = own.isfinite().any(-1, keepdim=True)
        weights = torch.where(seen, own, 0.0).softmax(-1) * seen
        sums = torch.where(seen, own, 0.0).logsumexp(-1).masked_fill(~seen[..., 0], -torch.inf)
        out = torch.cat([out[..., :q0, :], weights @ v[..., k0:k1, :], out[..., q1:, :]], -2)
        lse = torch.cat([lse[..., :q0], sums, lse[..., q1:]], -1)
    return out, lse - constant


@dataclass
class Launches:
    """Takes the place of both launches, and keeps what they were given."""

    forward: list[Arguments] = field(default_factory=list)
    backward: list[Arguments] = field(default_factory=list)

    @staticmethod
    def wide(given: Arguments) -> dict[str, Tensor | None]:
        tensors = {name: getattr(given, name) for name in LEAVES}
        return {name: None if x is None else x.detach().double().requires_grad_() for name, x in tensors.items()}

    @staticmethod
    def check(given: Arguments) -> HopperOperands:
        """That what kernels rely on holds."""
        heads, ops = given.query.shape[-3], HopperOperands.of(*given)
        for phi in (given.phi_q, given.phi_k):
            assert phi is None or (phi.shape[-1] == ops.rank > 0 and phi.shape[-3] in (1, heads))
        assert len(given.ranks) in (0, 1, heads)
        assert given.table is None or given.table.shape[0] in (1, heads)
        assert heads == given.key.shape[-3] * ops.group and given.key.shape[-3] == given.value.shape[-3]
        return ops

    def fill(self, out: Tensor, lse: Tensor, *arguments: Any) -> None:
        """As `forward.launch_together`."""
        given = Arguments(*arguments)
        ops = self.check(given)
        self.forward.append(given)
        assert lse.is_contiguous() and lse.shape == given.query.shape[:-1]
        with torch.no_grad():
            found, sums = attended(given, self.wide(given))
        ops.flat(out).copy_(found)
        lse.view(-1).copy_(sums.reshape(-1))

    def fill_gradients(
        self, grads: list[Tensor], dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: tuple[bool, ...],
        *arguments: Any, repeatable: bool = False,
    ) -> None:  # fmt: skip
        """As `backward.launch_together`."""
        given = Arguments(*arguments)
        ops = self.check(given)
        self.backward.append(given)
        assert any(needs) and lse.is_contiguous()
        # In a thread of its own: here the dispatcher has left autograd behind.
        with ThreadPoolExecutor(1) as thread:
            made = iter(thread.submit(self.gradients, given, ops, dout, dlse, out, lse, needs).result())
        for name, grad, need in zip(LEAVES, grads, needs, strict=True):
            if not need:
                assert grad.numel() == 0
                continue
            own = next(made)
            assert grad.shape == own.shape, name
            if name in ("query", "key", "value"):
                ops.flat(grad).copy_(own.view_as(ops.flat(grad)))
            elif name == "table":
                grad.copy_(own)
            else:
                grad.view(1, -1, *grad.shape[-2:]).copy_(own.reshape(1, -1, *own.shape[-2:]))

    def gradients(
        self, given: Arguments, ops: HopperOperands, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Those that are needed; output and log-sum-exp must be those of these heads."""
        leaves = self.wide(given)
        found, sums = attended(given, leaves)
        torch.testing.assert_close(lse.view(sums.shape).double(), sums.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ops.flat(out).double(), found.detach(), rtol=2e-2, atol=2e-2)
        loss = (found * ops.flat(dout).double()).sum()
        if dlse is not None:
            finite = torch.where(sums.isfinite(), sums, 0.0)
            loss = loss + (finite * dlse.reshape(sums.shape).double()).sum()
        wanted = [x for name, need in zip(LEAVES, needs, strict=True) if need and (x := leaves[name]) is not None]
        return torch.autograd.grad(loss, wanted, materialize_grads=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, nan_filled_buffers: None) -> Launches:
    """Both passes by torch, every width of packed columns a tier, NaN in what nobody has written."""
    launches = Launches()
    allow_hopper(monkeypatch)
    tiers_for_every_width(monkeypatch)
    monkeypatch.setattr(forward, "launch_together", launches.fill)
    monkeypatch.setattr(backward, "launch_together", launches.fill_gradients)
    return launches


def check(problem: Problem, wanted: tuple[str, ...] = LEAVES) -> None:
    """Compare output, log-sum-exp and gradients with the oracle; the gradient of padding is zero."""
    leaves = problem.leaves(wanted)
    out, lse = problem.attend("hopper", leaves, return_lse=True)
    results = differentiate(problem, leaves, out, lse, with_dlse=True)
    assert_close_to_oracle(problem, results, with_dlse=True)
    padding = torch.arange(problem.case.rank) >= torch.tensor(problem.case.ranks)[:, None, None]
    for name in set(results.names()) & {"dphi_q", "dphi_k"}:
        assert (torch.where(padding, results[name], 0.0) == 0).all(), name


IRREGULAR = (3, 40, 0, 20, 37, 2)
"""Widths of 16, 64, 0, 32, 64 and 16 columns in bfloat16."""

OWN = {"phi_q": (1, 6), "phi_k": (1, 6)}
HALF = Case("half", heads=6, n=29, m=37, rank=40, ranks=IRREGULAR, same_dtype=True, **OWN)


class TestWhole:
    """Tiers together are the call."""

    @pytest.mark.parametrize(
        ("ranks", "count"),
        [
            (IRREGULAR, 4),
            ((0, 0, 3, 3, 20, 40), 4),
            ((40, 20, 20, 3, 3, 3), 3),
            ((4, 40, 4, 40, 4, 40), 2),
            ((0, 0, 0, 0, 40, 0), 2),
            ((0, 1, 2, 16, 17, 40), 4),
            ((3, 3, 3, 3, 3, 3), 1),
            ((0, 0, 0, 0, 0, 0), 1),
        ],
        ids=str,
    )
    def test_ranks(self, ranks: tuple[int, ...], count: int, launches: Launches) -> None:
        check(replace(HALF, ranks=ranks).build(torch.bfloat16))
        assert len(launches.forward) == len(launches.backward) == count

    @pytest.mark.parametrize(
        "changes",
        [
            {"batch": (), "phi_q": (6,), "phi_k": (6,)},
            {"batch": (1,)},
            {"batch": (2, 3)},
            {"batch": (2, 3), "phi_q": (2, 1, 6), "phi_k": (1, 3, 6)},
            {"phi_q": (2, 6), "phi_k": (6,)},
            {"layout": "transposed"},
            {"layout": "columns"},
            {"layout": "expanded"},
            {"head_dim_v": 24},
            {"m": 29, "options": CAUSAL},
            {"options": BOTTOM_RIGHT},
            {"options": {"window": (9, 3), "causal_alignment": "top_left"}},
            {"table": 9},
            {"table": 9, "table_heads": 1},
            {"table": 9, "table_heads": 1, "codes": "window"},
            {"table": "toeplitz", "codes": "window", "mask": "padding"},
            {"mask": "padding"},
            {"mask": "heads"},
            {"heads": 6, "kv_heads": 3},
            {"heads": 6, "kv_heads": 2, "ranks": (1, 0, 3, 40, 2, 20), "mask": "heads", "table": 9},
            {"heads": 8, "kv_heads": 4, "ranks": (3, 0, 0, 0, 40, 0, 1, 2), "phi_q": (8,), "phi_k": (8,)},
            {"heads": 6, "kv_heads": 1},
        ],
        ids=str,
    )  # fmt: skip
    def test_shapes(self, changes: dict[str, Any], launches: Launches) -> None:
        case = replace(HALF, **changes)
        check(case.build(torch.bfloat16))
        assert len(launches.forward) == len(launches.backward)
        assert (len(launches.forward) > 1) == (case.kv_heads != 1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("same_dtype", [False, True])
    def test_dtypes(self, dtype: torch.dtype, same_dtype: bool, launches: Launches) -> None:
        """float32 factors are centred, and so is what the log-sum-exp is of."""
        case = Case("dtypes", heads=6, n=29, m=37, rank=20, ranks=(2, 20, 0, 7, 20, 1), same_dtype=same_dtype, **OWN)
        check(case.build(dtype))
        assert len(launches.forward) == (3 if same_dtype and dtype == torch.bfloat16 else 4)

    def test_centres_by_tile(self, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
        """The bias as a whole decides how the log-sum-exp is corrected, each tier for itself how it is centred."""
        monkeypatch.setattr(packing, "TILE_CENTRE_FROM", 128)
        for options in ({}, CAUSAL):
            case = Case("tiles", n=200, heads=4, rank=7, ranks=(0, 7, 2, 1), phi_q=(4,), phi_k=(4,), options=options)
            check(case.build(torch.bfloat16))
        assert len(launches.forward) == 6

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_what_is_not_needed_is_not_made(self, count: int, launches: Launches) -> None:
        """Any few leaves; a tier without factors is left out where only factors learn."""
        for wanted in itertools.combinations(LEAVES, count):
            launches.backward.clear()
            check(replace(HALF, table=9).build(torch.bfloat16), wanted)
            assert len(launches.backward) == (3 if set(wanted) <= {"phi_q", "phi_k"} else 4)

    def test_twice_the_same_bits(self, launches: Launches) -> None:
        problem = HALF.build(torch.bfloat16)

        def once() -> list[Tensor]:
            leaves = problem.leaves()
            out = problem.attend("hopper", leaves, deterministic=True)
            wanted = [x for x in leaves.values() if x.numel()]
            return [out, *torch.autograd.grad(out, wanted, problem.dout)]

        assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))

    @pytest.mark.parametrize("options", [{}, BOTTOM_RIGHT, {"window": (5, 3)}], ids=str)
    @pytest.mark.parametrize("changes", [{}, {"kv_heads": 3}, {"table": 9}], ids=str)
    def test_packed_batches(self, changes: dict[str, Any], options: dict[str, Any], launches: Launches) -> None:
        case = VarlenCase(
            "packed", (17, 5, 0, 33), (13, 9, 4, 30), heads=6, rank=20, ranks=(2, 20, 0, 7, 20, 1), phi_q_heads=6,
            phi_k_heads=6, with_lse=True, options=options, **changes,
        )  # fmt: skip
        packed = case.build(torch.bfloat16)
        leaves = packed.leaves()
        longest = {"max_seqlen_q": 33, "max_seqlen_k": 30}
        packed.assert_close_to_oracle(leaves, *packed.attend("hopper", leaves, return_lse=True, **longest))
        assert len(launches.forward) == len(launches.backward) > 1

    def test_padding_is_never_read(self, launches: Launches) -> None:
        """NaN in columns that a head lacks reaches nothing."""
        problem = HALF.build(torch.bfloat16)
        padding = torch.arange(40) >= torch.tensor(IRREGULAR)[:, None, None]
        for name in ("phi_q", "phi_k"):
            problem.tensors[name].masked_fill_(padding, torch.nan)
        leaves = problem.leaves()
        out = problem.attend("hopper", leaves)
        grads = torch.autograd.grad(out, [x for x in leaves.values() if x.numel()], problem.dout)
        assert all(x.isfinite().all() for x in (out, *grads))


# -------------------------------------------------------------------- what launches are given


def arguments_of(problem: Problem, **changes: Any) -> Arguments:
    """Those that operators share, of a problem of one batch dimension."""
    t, case = problem.tensors, problem.case
    given = Arguments(
        t["query"], t["key"], t["value"], t["phi_q"], t["phi_k"], t.get("table"), problem.code_q, problem.code_k,
        problem.attn_mask, None, None, None, case.n, case.seqlen_k, list(case.ranks or ()), problem.scale, -1, -1,
        False, 0.0,
    )  # fmt: skip
    return given._replace(**changes)


class TestLaunches:
    def test_names_are_those_of_the_operators(self) -> None:
        schema = torch.ops.flashbias.attention_forward.default._schema.arguments
        assert Arguments._fields[:-1] == tuple(argument.name for argument in schema)[: registration.ARGUMENTS - 1]
        assert Arguments._fields[registration.RANKS] == "ranks"

    @pytest.mark.parametrize("ranks", [[], [40] * 6, [33, 40, 40, 64, 34, 40], [40]], ids=str)
    def test_one_width_is_one_launch_as_it_was(self, ranks: list[int]) -> None:
        """With the very arguments, what is handed from pass to pass included."""
        problem = HALF.build(torch.bfloat16)
        handed = Handed(torch.empty(3), is_filled=True)
        arguments = arguments_of(problem, ranks=ranks, handed=handed)
        out, lse, seen = torch.empty(0), torch.empty(0), []
        tiers.forward(lambda *given: seen.append(given), out, lse, *arguments)
        tiers.backward(lambda *given: seen.append(given[5:]), [out] * 6, out, None, out, lse, (True,) * 6, *arguments)
        for found, first in zip(seen, ((out, lse), ((True,) * 6,)), strict=True):
            assert len(found) == len(first) + len(arguments)
            assert all(x is y or x == y for x, y in zip(found, (*first, *arguments), strict=True))
            assert found[-1] is handed

    def test_a_block_of_keys_has_no_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Gradients are then measured from that of the log-sum-exp alone, in each tier as in the whole."""
        tiers_for_every_width(monkeypatch)
        problem = HALF.build(torch.bfloat16)
        query, seen = problem.tensors["query"], []
        grads = [torch.empty_like(query), *(torch.empty(0),) * 5]
        lse, needs = torch.randn(query.shape[:-1]), (True, *(False,) * 5)
        tiers.backward(
            lambda *given: seen.append(given[:6]), grads, problem.dout, problem.dlse, None, lse, needs,
            *arguments_of(problem),
        )  # fmt: skip
        assert len(seen) == 4
        for (_, dout, dlse, out, own, also), heads in zip(seen, ([2], [0, 5], [3], [1, 4]), strict=True):
            assert out is None and also == needs
            for found, whole in ((dout, problem.dout), (dlse, problem.dlse), (own, lse)):
                assert torch.equal(found, whole[:, heads])

    def test_nothing_is_handed_to_a_tier(self, launches: Launches) -> None:
        """Neither to be filled nor, where it was not, to be read."""
        problem = Case("handed", heads=4, n=150, head_dim=64, rank=7, ranks=(0, 7, 2, 1), phi_q=(4,), phi_k=(4,)).build(
            torch.bfloat16
        )
        leaves = problem.leaves()
        query, phi_q, phi_k = leaves["query"], leaves["phi_q"], leaves["phi_k"]
        assert registration._hands_over(query, phi_q, phi_k), "nothing would be handed over anyway"
        problem.attend("hopper", leaves).sum().backward()
        assert len(launches.forward) == len(launches.backward) == 3
        assert all(given.handed is None for given in (*launches.forward, *launches.backward))

    def test_factors_are_as_narrow_as_can_be(self, launches: Launches) -> None:
        HALF.build(torch.bfloat16).attend("hopper", HALF.build(torch.bfloat16).leaves(()))
        widths = [None if given.phi_q is None else given.phi_q.shape[-1] for given in launches.forward]
        assert widths == [None, 3, 20, 40]
        assert [tuple(given.ranks) for given in launches.forward] == [(), (3, 2), (), (40, 37)]

    def test_heads_at_equal_distances_are_views(self, launches: Launches) -> None:
        """Also of results, in any memory order."""
        for layout in ("contiguous", "transposed"):
            launches.forward.clear()
            problem = replace(HALF, ranks=(4, 40, 4, 40, 4, 40), layout=layout).build(torch.bfloat16)
            query = problem.tensors["query"]
            problem.attend("hopper", problem.leaves(()))
            for first, launch in enumerate(launches.forward):
                assert launch.query.data_ptr() == query[:, first].data_ptr()
                assert launch.query.stride(1) == 2 * query.stride(1)

    def test_factors_for_all_heads_are_one_launch(self, launches: Launches) -> None:
        """One rank for heads that share the factors."""
        case = replace(HALF, ranks=(3,), phi_q=(1, 1), phi_k=(1, 1))
        check(case.build(torch.bfloat16))
        assert len(launches.forward) == 1 and list(launches.forward[0].ranks) == [3]


# -------------------------------------------------------------------- which heads stand together

PLAIN = Form(torch.bfloat16, torch.bfloat16, 0.125, torch.bfloat16)
FORMS = st.builds(
    Form, st.just(torch.float32), st.just(torch.float32), st.sampled_from([0.125, 0.3]), st.just(torch.bfloat16)
) | st.sampled_from([PLAIN, PLAIN._replace(scale=0.3)])
LARGE = Size(4 * 4096 * 4096, 4 * 4096, 4 * 4096, 64, 64, 2)
LENGTHS, WIDTHS = st.integers(1, 10**6), st.integers(8, 256)
SIZES = st.builds(Size, st.floats(1.0, 1e11), LENGTHS, LENGTHS, WIDTHS, WIDTHS, st.just(2))


class TestDivision:
    @given(st.data())
    def test_tiers_divide_the_heads(self, data: st.DataObject) -> None:
        """Each head is in one tier, groups are whole, factors fit, and no other division has a smaller estimate."""
        group, kv_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
        ranks = tuple(data.draw(st.lists(st.integers(0, 40), min_size=group * kv_heads, max_size=group * kv_heads)))
        form, size = data.draw(FORMS), data.draw(SIZES)
        possible = tiers.divisions(ranks, group, form)
        found = tiers.decided(ranks, group, 40, form, size)
        assert not found or found in possible
        estimates = [tiers.estimated_ms(one, form, size) for one in possible]
        if found:
            assert tiers.estimated_ms(found, form, size) == min(estimates)
        else:
            assert estimates[0] == min(estimates) and form.columns(max(ranks)) == form.columns(40)
        for division in possible:
            heads = [head for tier in division for head in tier.heads.indices]
            assert sorted(heads) == list(range(len(ranks))) and len(possible[0]) == 1
            for tier in division:
                own = [ranks[head] for head in tier.heads.indices]
                assert {head // group for head in tier.heads.indices} == set(tier.kv_heads.indices)
                assert len(own) == group * len(tier.kv_heads.indices) and list(tier.heads.indices) == sorted(
                    tier.heads.indices
                )
                assert tier.rank == max(own) and list(tier.ranks or [tier.rank] * len(own)) == own
            widths = [form.columns(tier.rank) for tier in division]
            assert widths == sorted(set(widths)), "a wider tier before a narrower one, or two of one width"

    def test_every_width_that_fits_has_a_cost(self) -> None:
        """Wider factors take longer."""
        widths = {PLAIN.columns(rank) for rank in range(257)}
        assert widths == set(tiers.SLOWDOWN) == {0, *(ready_columns(rank, *PLAIN) for rank in (1, 17, 33, 65, 129))}
        assert sorted(tiers.SLOWDOWN.values()) == list(tiers.SLOWDOWN.values())

    @pytest.mark.parametrize(
        ("ranks", "size", "expected"),
        [
            ((4, 100) * 8, LARGE, [8, 8]),
            ((4, 100) * 8, LARGE._replace(pairs=4096.0 * 64), []),  # over before another launch has begun
            ((60, 64) * 8, LARGE, []),
            ((4, 40) * 8, LARGE, [8, 8]),
            ((100,) * 15 + (0,), LARGE, []),
            ((100,) * 12 + (0,) * 4, LARGE, [4, 12]),
            (tuple(range(0, 128, 8)), LARGE, [9, 7]),  # up to 64, and the rest
        ],
        ids=str,
    )
    def test_what_pays(self, ranks: tuple[int, ...], size: Size, expected: list[int]) -> None:
        found = tiers.decided(ranks, 1, max(ranks), PLAIN, size)
        assert [len(tier.heads.indices) for tier in found] == expected

    def test_columns_that_no_head_has(self) -> None:
        """One tier of all heads, narrower than the factors as given."""
        (only,) = tiers.decided((4, 3), 1, 100, PLAIN, LARGE)
        assert only.rank == 4 and only.heads.run == slice(0, 2, 1)

    def test_bands_and_packed_batches_have_fewer_pairs(self) -> None:
        arguments = arguments_of(HALF.build(torch.bfloat16))
        full = tiers._size(arguments)
        assert full.pairs == 2 * 29 * 37 and (full.rows_q, full.rows_k) == (2 * 29, 2 * 37)
        assert tiers._size(arguments._replace(window_right=0)).pairs == full.pairs / 2
        assert tiers._size(arguments._replace(window_left=3, window_right=0)).pairs == 2 * 29 * 4
        assert tiers._size(arguments._replace(window_left=10**6, window_right=0)).pairs == full.pairs
        cu = torch.tensor([0, 7, 20, 29, 29])
        assert tiers._size(arguments._replace(cu_seqlens_q=cu, cu_seqlens_k=cu)).pairs == full.pairs / 4

    def test_copies_cost(self) -> None:
        """Of heads that do not lie at equal distances, queries and keys each for themselves."""
        size = Size(1.0, 1000, 2000, 32, 64, 2)
        single = tiers._tier([0, 3, 5], (1,) * 6, 1)
        grouped = tiers._tier([0, 2], (1,) * 8, 2)
        rows = {single: 3 * 1000 + 3 * 2000, grouped: 4 * 1000, tiers._tier([0, 2, 4], (1,) * 6, 1): 0}
        for tier, count in rows.items():
            assert size.copies_ms(tier) == pytest.approx(2 * count * 96 * 2 / tiers.COPIED_PER_MS)

    @given(st.sets(st.integers(0, 12), min_size=1))
    def test_heads(self, chosen: set[int]) -> None:
        """What is taken is put back, and nothing else is touched."""
        heads = Heads(tuple(sorted(chosen)))
        x = torch.arange(2.0 * 13 * 5).view(2, 13, 5)
        for dim, y in ((-2, x), (-3, x[..., None]), (-1, x.mT)):
            expected = y.index_select(dim, torch.tensor(heads.indices))
            assert torch.equal(heads.of(y, dim), expected)
            for is_dense in (False, True):
                made, whole = heads.room(z := y.clone(), dim, is_dense=is_dense), y.clone()
                assert made.shape == expected.shape and (made.is_contiguous() or not is_dense)
                made.copy_(-expected)
                heads.put(z, made, dim)
                whole.index_copy_(dim, torch.tensor(heads.indices), -expected)
                assert torch.equal(z, whole)
