"""Short windows that share their bias: which calls take the walk, how it is cut, and gradients of large biases."""

from __future__ import annotations

import pytest
import torch
from tests.attention.oracle import assert_close_to_oracle, differentiate
from tests.attention.problem import Case

pytest.importorskip("triton")

import flashbias as fb
from flashbias.attention import registration
from flashbias.attention.call import Call
from flashbias.attention.layout import Sharing, cdiv
from flashbias.attention.triton import backward, configs, forward, operands, short, short_backward, window

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
    Case("mask-for-all", **WINDOWS, mask="matrix"),
    Case("band", **WINDOWS, options={"window": (5, 2)}),
]

KERNELS = {
    "walk": (short, "_fwd_short_kernel"),
    "one by one": (forward, "_fwd_kernel"),
    "walk back": (short_backward, "_bwd_short_kernel"),
    "window back": (window, "_bwd_window_kernel"),
    "tiles back": (backward, "_bwd_dq_kernel"),
}

CHOICES = [
    (Case("windows", **WINDOWS), ("walk", "walk back")),
    (Case("mask-for-all", **WINDOWS, mask="matrix"), ("walk", "walk back")),
    (Case("mask-by-window-too", **WINDOWS, mask="padding"), ("one by one", "window back")),
    (Case("mask-of-keys", batch=(3,), n=17, rank=0, mask="padding"), ("one by one", "window back")),
    (Case("band", **WINDOWS, options={"window": (5, 2)}), ("walk", "walk back")),
    (Case("dropout", **WINDOWS, options={"dropout_p": 0.5}), ("walk", "walk back")),
    (Case("ranks", batch=(3,), n=17, ranks=(5, 2)), ("walk", "walk back")),
    (Case("ranks-by-window-too", **WINDOWS, ranks=(5, 2)), ("one by one", "window back")),
    (Case("grouped-heads", n=17, heads=4, kv_heads=2), ("walk", "tiles back")),
    (Case("wide-factors", n=17, rank=80, same_dtype=True), ("walk", "tiles back")),
    (Case("wide-packed-factors", n=17, rank=43), ("walk", "tiles back")),
    (Case("wide-head", n=17, head_dim=80), ("one by one", "tiles back")),
    (Case("long", n=65), ("one by one", "tiles back")),
    (Case("own-bias", n=17, phi_q=(2, 2), phi_k=(2, 2)), ("one by one", "window back")),
    (Case("single", n=17, batch=(1,)), ("one by one", "window back")),
]


SWIN = {"batch": (5, 3), "heads": 2, "n": 49, "head_dim": 32, "phi_q": (1, 3, 2), "phi_k": (1, 3, 2), "rank": 16}

FULL_SIZE = [
    Case("windows", **SWIN),
    Case("same-dtype", **SWIN, same_dtype=True),
    Case("64", **SWIN | {"n": 64}, same_dtype=True),
    Case("17x60", **SWIN | {"n": 17, "m": 60, "rank": 5}),
    Case("over-heads", **SWIN | {"phi_q": (1, 3, 1), "phi_k": (1, 3, 1)}),
    Case("by-everyone", **SWIN | {"phi_q": (1, 1, 1), "phi_k": (1, 1, 1)}, same_dtype=True),
    Case("one-side-by-everyone", **SWIN | {"phi_q": (1, 1, 1)}),
    Case("wide", **SWIN | {"head_dim": 64, "rank": 40}),
    Case("wide-factors", **SWIN | {"rank": 60}),
    Case("wide-64", **SWIN | {"head_dim": 64, "n": 64}, same_dtype=True),
    Case("odd-widths", **SWIN | {"head_dim": 24, "head_dim_v": 40}, same_dtype=True),
    Case("without-bias", batch=(5,), heads=2, n=49, head_dim=32, rank=0),
    Case("grouped", batch=(5,), heads=4, kv_heads=2, n=49, head_dim=32, phi_q=(1, 4), phi_k=(1, 4)),
    Case("causal", **SWIN | {"m": 57}, options={"is_causal": True, "causal_alignment": "bottom_right"}),
    Case("band", **SWIN, options={"window": (9, 4)}),
    Case("mask", **SWIN, mask="matrix"),
    Case("table", batch=(40,), heads=2, n=49, head_dim=32, rank=0, table=169, codes="window"),
    Case("table-and-factors", batch=(40,), heads=2, n=49, head_dim=32, phi_q=(1, 1), phi_k=(1, 2), table=9),
    Case("large-bias", **SWIN, bias_size=100.0),
    Case("many", **SWIN | {"batch": (300, 3)}, same_dtype=True),
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

    @pytest.mark.parametrize("n", [17, 65], ids=["walk", "one by one"])
    def test_a_row_may_see_masked_keys_alone(self, n: int) -> None:
        """Where a column of the factors pushes all keys of a row far down, it has no output and no gradient."""
        query, key, value = torch.randn(3, 3, 2, n, 16).to(self.device, torch.bfloat16).unbind()
        hidden = torch.arange(n, device=self.device) >= 11
        phi_q = torch.stack([torch.randn(n, device=self.device), hidden.float()], dim=-1)
        phi_k = torch.stack([torch.randn(n, device=self.device), torch.full((n,), -1e9, device=self.device)], dim=-1)
        bias = fb.FactoredBias(phi_q[None], phi_k[None])
        dout = torch.randn_like(value)
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out, lse = fb.attention(*leaves, bias, impl="triton", return_lse=True)
        out.backward(dout)
        assert (lse[..., hidden] == -torch.inf).all()
        assert (out[..., hidden, :] == 0).all()
        assert (leaves[0].grad[..., hidden, :] == 0).all()
        others = [x.clone().requires_grad_() for x in (query, key, value)]
        shown = fb.FactoredBias(phi_q[None, ~hidden], phi_k[None])
        fb.attention(others[0][..., ~hidden, :], *others[1:], shown, impl="triton").backward(dout[..., ~hidden, :])
        for x, y in zip(leaves, others, strict=True):
            torch.testing.assert_close(x.grad, y.grad, atol=2e-2, rtol=2e-2)

    def kernels_of(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the kernels above, as they will be launched."""
        seen: list[str] = []

        class Spy:
            def __init__(self, name: str, kernel: object) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: object) -> object:
                seen.append(self.name)
                return self.kernel[grid]  # type: ignore[index]

        for name, (module, kernel) in KERNELS.items():
            monkeypatch.setattr(module, kernel, Spy(name, getattr(module, kernel)))
        return seen

    @pytest.mark.parametrize(("case", "kernels"), CHOICES, ids=lambda x: str(x) if isinstance(x, Case) else "")
    def test_choice(self, case: Case, kernels: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        seen = self.kernels_of(monkeypatch)
        problem = case.build(torch.bfloat16, self.device)
        problem.attend("triton", problem.leaves()).float().sum().backward()
        assert tuple(dict.fromkeys(seen)) == kernels  # wide factors' gradients take more than one launch

    def test_float32_is_left_to_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = self.kernels_of(monkeypatch)
        problem = Case("windows", **WINDOWS).build(torch.float32, self.device)
        problem.attend("triton", problem.leaves()).sum().backward()
        assert seen == ["one by one", "window back"]

    def test_packed_batches_are_left_to_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = self.kernels_of(monkeypatch)
        tokens = torch.randn(34, 2, 16, device=self.device, dtype=torch.bfloat16, requires_grad=True)
        starts = torch.tensor([0, 17, 34], dtype=torch.int32, device=self.device)
        fb.varlen_attention(tokens, tokens, tokens, starts, starts, impl="triton").float().sum().backward()
        assert seen == ["one by one", "tiles back"]

    def test_what_lies_behind_a_window_does_not_matter(self) -> None:
        """Rows past a window's end belong to the next one, which may hold NaN."""
        problem = Case("windows", **WINDOWS | {"phi_q": (1, 1, 2), "phi_k": (1, 1, 2)}).build(
            torch.bfloat16, self.device
        )
        wanted = ("query", "key", "value")

        def gradients() -> list[torch.Tensor]:
            leaves = problem.leaves(wanted)
            out = problem.attend("triton", leaves)
            return [out.detach(), *torch.autograd.grad(out, [leaves[name] for name in wanted], problem.dout)]

        clean = gradients()
        for name in wanted:
            problem.tensors[name][:, 1] = torch.nan
        for x, y in zip(gradients(), clean, strict=True):
            assert torch.equal(x[:, 0], y[:, 0])
            assert x[:, 1].isnan().all()

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

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", FULL_SIZE, ids=str)
    def test_in_full_size(self, case: Case, dtype: torch.dtype) -> None:
        problem = case.build(dtype, self.device)
        leaves = problem.leaves()
        out, lse = problem.attend("triton", leaves, return_lse=True)
        assert_close_to_oracle(problem, differentiate(problem, leaves, out, lse, True), True)


@pytest.mark.parametrize(("groups", "members"), [(4, 4096), (256, 64), (12544, 1), (3, 2), (1, 65536)])
def test_walks_are_cut_so_that_programs_end_together(groups: int, members: int) -> None:
    splits = short.splits_of(Sharing(1, members, groups, 1), 528)
    assert 1 <= splits <= members
    steps = cdiv(groups * splits, 528) * (cdiv(members, splits) + short.BEFORE)
    whole = cdiv(groups, 528) * (members + short.BEFORE)
    assert steps <= whole
    if members >= 64:  # long enough that no program waits for long
        assert steps <= 1.35 * groups * members / 528


@pytest.mark.parametrize("kibibytes", [48, 64, 99, 163, 227])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_walks_fit_into_shared_memory(
    name: str, head_dim: int, kibibytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(limit: int) -> configs.WalkConfig:
        monkeypatch.setattr(configs, "_shared_memory", lambda device: limit * 1024)
        x = torch.empty(4, 2, 64, head_dim, dtype=torch.bfloat16, device="meta")
        call = Call(
            x, x, x, None, None, None, None, bottom_right=False, scale=1.0, dropout_p=0.0, deterministic=False,
            return_lse=False,
        )  # fmt: skip
        return configs.walk_config(name, operands.Operands.of(*registration.operands(call)))

    found, most = config(kibibytes), config(1024)
    held = found.num_stages * (3 if name == "forward" else 4) * 64 * head_dim * 2 + 64 * 64 * 2
    assert found.resident * held <= kibibytes * 1024
    assert 1 <= found.num_stages <= most.num_stages
    assert 1 <= found.resident <= most.resident
    assert (found.block_m, found.block_n) == (64, 64)
