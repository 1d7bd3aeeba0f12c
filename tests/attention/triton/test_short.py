"""Short windows that share their bias: which calls take the walk, how it is cut, and gradients of large biases."""

from __future__ import annotations

import pytest
import torch
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import Case

pytest.importorskip("triton")

from flashbias.attention.layout import Sharing, cdiv
from flashbias.attention.triton import operands, short, short_backward

WINDOWS = {"batch": (3, 2), "heads": 2, "n": 17, "phi_q": (1, 2, 2), "phi_k": (1, 2, 2)}

SHARED = [
    Case("windows", **WINDOWS),
    Case("over-heads", batch=(3, 2), heads=2, n=17, phi_q=(1, 2, 1), phi_k=(1, 2, 1), rank=7),
    Case("by-head", batch=(3,), heads=2, n=19, phi_q=(1, 2), phi_k=(1, 2), rank=16, same_dtype=True),
    Case("by-everyone", batch=(3,), heads=2, n=19, phi_q=(1, 1), phi_k=(1, 1)),
    Case("key-side-by-head", batch=(3,), heads=2, n=19, phi_q=(1, 1), phi_k=(1, 2)),
    Case("without-bias", batch=(3,), heads=2, n=19, rank=0),
    Case("causal", **WINDOWS, m=23, options={"is_causal": True, "causal_alignment": "bottom_right"}),
    Case("table", batch=(3,), heads=2, n=19, phi_q=(1, 1), phi_k=(1, 1), table=9),
]


class ShortSuite:
    device = "cpu"

    @pytest.fixture(autouse=True)
    def _buffers(self, nan_filled_buffers: None) -> None:
        """NaN in every buffer, that of partial sums included."""

    @pytest.mark.parametrize("processors", [1, 2, 64], ids=["one-part", "few-parts", "many-parts"])
    @pytest.mark.parametrize("case", SHARED, ids=str)
    def test_walk(self, case: Case, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Outputs and gradients, however the windows are dealt to programs."""
        launched = []
        for module in (short, short_backward):
            monkeypatch.setattr(module, "multiprocessors", lambda device: processors)
            original = module.launch
            monkeypatch.setattr(
                module, "launch", lambda *a, of=original, m=module, **k: (launched.append(m), of(*a, **k))
            )
        problem = case.build(torch.bfloat16, self.device)
        leaves = problem.leaves()
        out, lse = problem.attend("triton", leaves, return_lse=True)
        assert_close_to_oracle(problem, differentiate(problem, leaves, out, lse, True), True)
        assert launched == [short, short_backward]

    def test_rows_of_ds_sum_to_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a bias of thousands a log-sum-exp is too coarse to normalise P by; gradients must not show it."""
        monkeypatch.setattr(operands.Operands, "is_half", property(lambda self: True))
        problem = Case("large", **WINDOWS).build(torch.float32, self.device)
        with torch.no_grad():
            problem.tensors["phi_q"].mul_(1000.0)
        leaves = problem.leaves()
        out = problem.attend("triton", leaves)
        assert_close_to_oracle(problem, differentiate(problem, leaves, out, None, False), False)

    def test_what_is_not_shared_is_left_to_others(self) -> None:
        def walk(case: Case) -> Sharing | None:
            seen = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(short, "fits", lambda ops: seen.append(short.walk_of(ops)) or False)
                problem = case.build(torch.bfloat16, self.device)
                problem.attend("triton", problem.tensors)
            return seen[0]

        assert walk(Case("mixed", batch=(3,), heads=2, n=9, phi_q=(1, 2), phi_k=(3, 1))) is None
        own = walk(Case("own", batch=(3,), heads=2, n=9, phi_q=(3, 2), phi_k=(3, 2)))
        assert own is not None
        assert own.members == 1


@pytest.mark.interpreter
class TestShortInterpreted(ShortSuite):
    pass


@pytest.mark.gpu
class TestShortOnGpu(ShortSuite):
    device = "cuda"


@pytest.mark.parametrize(("groups", "members"), [(4, 4096), (256, 64), (12544, 1), (3, 2), (1, 65536)])
def test_walks_are_cut_so_that_programs_end_together(groups: int, members: int) -> None:
    splits = short.splits_of(Sharing(1, members, groups, 1), 528)
    assert 1 <= splits <= members
    steps = cdiv(groups * splits, 528) * (cdiv(members, splits) + short.BEFORE)
    whole = cdiv(groups, 528) * (members + short.BEFORE)
    assert steps <= whole
    if members >= 64:  # long enough that no program waits for long
        assert steps <= 1.35 * groups * members / 528
