"""The forward kernel on the host: right outputs in any order of the warpgroups, and nobody gets stuck."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import INTERPRETED
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from tests.attention.hopper.exact import attended
from tests.attention.hopper.on_host import Box, Device, Launched, PackedBox, on_host

from flashbias.attention.hopper import chunks, forward, online, scores, tiles
from flashbias.attention.hopper.configs import Config, columns_of, forward_config
from flashbias.attention.hopper.operands import Centring, Shape
from flashbias.attention.layout import Sharing

COLUMNS = 16


@dataclass(frozen=True)
class Problem:
    """A call, and the tile shape that does it; lengths of its sequences where it is packed."""

    name: str
    config: Config
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    is_packed: bool = False
    width: int = 16
    width_v: int = 16
    heads: int = 2
    kv_heads: int = 2
    rank: int = 3
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    programs: int = 2

    def __str__(self) -> str:
        return self.name


JAGGED = (130, 0, 64, 1, 300, 200), (97, 40, 64, 260, 0, 128)

PROBLEMS = [
    Problem("plain", forward_config(16, 16, 16), (400,), (300,), programs=6),
    Problem("in turns", forward_config(32, 32, 16), (200,), (385,), width=32, width_v=32, programs=4),
    Problem("short last tile", forward_config(16, 16, 16), (100,), (320,), programs=2),
    Problem("causal", forward_config(16, 16, 16), (500,), (500,), right=0),
    Problem(
        "window, grouped heads", forward_config(16, 16, 16), (450,), (400,), heads=4, kv_heads=2, left=90, right=30
    ),
    Problem("one buffer of queries", Config(2, 64, 2, q_stages=1), (300,), (190,), heads=1, kv_heads=1, programs=3),
    Problem("wide values", forward_config(16, 64, 16), (200,), (200,), width_v=64, right=5, programs=1),
    Problem("two chunks of 64", forward_config(64, 64, 16), (200,), (200,), width=48, width_v=40, right=0),
    Problem("two chunks and two sums", forward_config(128, 128, 16), (200,), (330,), width=80, width_v=72),
    Problem("short last tile of two sums", forward_config(128, 128, 16), (70,), (320,), width=88, width_v=96),
    Problem("three chunks", forward_config(128, 128, 16), (150,), (200,), width=112, width_v=112, right=0, left=50),
    Problem("values wider than a panel", forward_config(64, 128, 16), (130,), (200,), width=64, width_v=80),
    Problem("wide, one buffer of queries", forward_config(256, 256, 16), (150,), (200,), width=136, width_v=192),
    Problem("packed, two sums", forward_config(128, 128, 16), *JAGGED, is_packed=True, width=96, width_v=80, right=0),
    Problem("packed", forward_config(16, 16, 16), *JAGGED, is_packed=True),
    Problem("packed, causal", forward_config(16, 16, 16), *JAGGED, is_packed=True, right=0, programs=3),
    Problem(
        "packed, one program",
        Config(2, 64, 2, q_stages=1),
        *JAGGED,
        is_packed=True,
        right=0,
        bottom_right=True,
        programs=1,
    ),
    Problem(
        "packed, window",
        forward_config(32, 32, 16),
        *JAGGED,
        is_packed=True,
        left=40,
        right=9,
        heads=4,
        kv_heads=1,
        programs=5,
    ),
    Problem("packed, nothing", forward_config(16, 16, 16), (0, 0), (5, 0), is_packed=True),
]


def expected(problem: Problem, x: dict[str, Tensor], scale: float, shift: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one sequence, in float64."""
    group = problem.heads // problem.kv_heads
    k, v, phi_k = (x[name].repeat_interleave(group, 0) for name in ("k", "v", "phi_k"))
    s = scale * x["q"] @ k.mT + x["phi_q"] @ phi_k.mT
    weights, lse = attended(s, shift, problem.left, problem.right)
    return weights @ v, lse


def computed(problem: Problem, x: dict[str, Tensor], scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """The same of all sequences by `launch_as`, its kernel on the host."""
    x = {name: tensor.float() for name, tensor in x.items()}
    h, hk = problem.heads, problem.kv_heads
    group = h // hk
    pad = (0, COLUMNS - problem.rank)
    phi_q, phi_k = (torch.nn.functional.pad(phi, pad) for phi in (x["phi_q"] / scale, x["phi_k"]))
    n, m = x["q"].shape[1], x["k"].shape[1]
    sequences = len(problem.lengths_q) if problem.is_packed else 0
    starts = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        for lengths in (problem.lengths_q, problem.lengths_k)
    ]
    block_d, block_dv = columns_of(problem.width), columns_of(problem.width_v)
    shape = Shape(
        h, h, group, n, m, problem.width, problem.width_v, block_d, block_dv, COLUMNS, problem.left,
        problem.right, int(problem.bottom_right) if sequences else 0, sequences=sequences,
    )  # fmt: skip
    ops: Any = SimpleNamespace(
        shape=shape, q=x["q"][None], k=x["k"][None], v=x["v"][None], block_d=block_d, block_dv=block_dv,
        columns=COLUMNS, factors=SimpleNamespace(phi_q=phi_q, phi_k=phi_k), is_varlen=bool(sequences), scale=scale,
        key_terms=lambda keys: None, flat=lambda t: t, table_over_scale=None, code_q=None, code_k=None,
        centring=Centring(None, None), cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], table_sizes=(0, 0),
        sharing_q=Sharing(1, 1, h, 1), sharing_k=Sharing(1, 1, hk, group), sharing_mask=Sharing(1, 1, 1, 1), seqlen_q=n,
    )  # fmt: skip
    out, lse = torch.full((1, h, n, problem.width_v), math.nan), torch.full((h, n), math.nan)
    device = Device(seed)
    tickets = itertools.count()
    with on_host(device, (online, chunks, tiles, scores)) as patch:
        patch.setattr(tiles, "ticket", lambda _: next(tickets))
        patch.setattr(forward, "multiprocessors", lambda _: problem.programs)
        patch.setattr(forward, "descriptor", lambda t, r, c: Box(t, r, c))
        patch.setattr(forward, "packed", lambda t, r, c: PackedBox(t, r, c))
        patch.setattr(forward, "matrix", lambda _: None)
        patch.setattr(forward, "_fwd_kernel", Launched(online._fwd_kernel, device))
        assert not forward.schedule_of(problem.config, shape, problem.programs).is_split
        forward.launch_as(problem.config, ops, out, lse)
    return out[0], lse


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_outputs_in_any_order(problem: Problem, seed: int) -> None:
    """Sequences beside one that is NaN are right: nothing of it is seen."""
    torch.manual_seed(0)
    scale, n, m = 0.25, sum(problem.lengths_q), sum(problem.lengths_k)
    widths = {
        "q": (problem.heads, n, problem.width), "k": (problem.kv_heads, m, problem.width),
        "v": (problem.kv_heads, m, problem.width_v), "phi_q": (problem.heads, n, problem.rank),
        "phi_k": (problem.kv_heads, m, problem.rank),
    }  # fmt: skip
    x = {name: torch.randn(size).double() for name, size in widths.items()}
    ends = [list(itertools.accumulate((0, *lengths))) for lengths in (problem.lengths_q, problem.lengths_k)]
    own = [(slice(*ends[0][s : s + 2]), slice(*ends[1][s : s + 2])) for s in range(len(problem.lengths_q))]
    poisoned = seed if problem.is_packed else -1
    for name, tensor in x.items():
        for s, (rows, keys) in enumerate(own):
            if s == poisoned:
                tensor[:, rows if name in ("q", "phi_q") else keys] = math.nan
    out, lse = computed(problem, x, scale, seed)
    for s, (rows, keys) in enumerate(own):
        if s == poisoned:
            continue
        part = {name: tensor[:, rows if name in ("q", "phi_q") else keys] for name, tensor in x.items()}
        shift = problem.lengths_k[s] - problem.lengths_q[s] if problem.bottom_right else 0
        exact_out, exact_lse = expected(problem, part, scale, shift)
        torch.testing.assert_close(out[:, rows].double(), exact_out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse[:, rows].double(), exact_lse, rtol=1e-4, atol=1e-4)
