"""The same problems through NCCL, on two GPUs: every strategy, the kernels, whole models, and ranks that fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.distributed.problem import Case, assert_equal, solve_all
from tests.distributed.ranks import Ranks
from tests.distributed.test_api import CASES, EXACT
from tests.distributed.test_context import alone, assert_sum, compiled, plain, wrapped
from tests.distributed.test_failure import attend, failures, meet

pytestmark = pytest.mark.gpu

RING = {"strategy": "ring"}
ULYSSES = {"strategy": "ulysses"}
CAUSAL = {"order": "zigzag", "is_causal": True}
WAYS: dict[str, tuple[tuple[int, int] | None, dict[str, Any]]] = {
    "ring": (None, RING),
    "ring, causal": (None, RING | {"is_causal": True}),
    "ring, zigzag": (None, RING | CAUSAL),
    "all-to-all": (None, ULYSSES),
    "all-to-all, zigzag": (None, ULYSSES | CAUSAL),
    "2 by 1, zigzag": ((2, 1), CAUSAL),
    "1 by 2": ((1, 2), {"is_causal": True}),
}
TIMEOUT = 5.0
"""Of groups that are to fail, in seconds; GPUs take longer to start than CPUs."""


def check(
    gpus: Ranks, cases: list[Case], grid: tuple[int, int] | None = None, tolerance: float = EXACT, size: int = 2
) -> None:
    answers = gpus.results(solve_all, cases, grid, size=size)
    for n, case in enumerate(cases):
        assert_equal(case, [results[n] for results in answers], tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_bias(gpus: Ranks, way: str) -> None:
    """In float64: what is sent, to whom and in which order, to the last digits."""
    grid, options = WAYS[way]
    check(gpus, [case.but(options=options) for case in CASES], grid)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_windows_and_shards_of_any_size(gpus: Ranks, strategy: str) -> None:
    options = {"strategy": strategy}
    uneven = Case("uneven", n=17, table=(12, 9), options=options | {"is_causal": True})
    plain_case = Case("plain")
    check(
        gpus,
        [
            *(uneven.but(sizes=sizes) for sizes in ((5, 12), (0, 17), (17, 0))),
            *(plain_case.but(options=options | {"window": window}) for window in ((3, 0), (5, 2), (None, 4))),
            plain_case.but(n=25, options=options | {"order": "zigzag", "window": (9, 1)}),
            plain_case.but(options=options | {"check": False, "seqlen": 26}),
        ],
    )


KERNELS = Case("kernels", n=1101, batch=(1,), heads=4, kv_heads=2, head_dim=64, head_dim_v=64, rank=2, phi_q=(4,),
               dtype=torch.bfloat16)  # fmt: skip


@pytest.mark.parametrize("impl", ["hopper", "triton", "auto"])
def test_kernels(gpus: Ranks, impl: str) -> None:
    """Blocks through the kernels, uneven shards, grouped heads; the tolerance is that of blocks rounded to bfloat16."""
    if impl == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are for Hopper")
    learned = KERNELS.but(name="learned factors", with_dlse=True)
    frozen = KERNELS.but(name="frozen factors", kv_heads=4, head_dim=128, head_dim_v=128, frozen=("phi_q", "phi_k"))
    table = KERNELS.but(name="table", rank=0, table=(4, 129))
    cases = [learned.but(options=way | more | {"impl": impl}) for way in (RING, ULYSSES) for more in ({}, CAUSAL)]
    cases += [case.but(options=RING | CAUSAL | {"impl": impl}) for case in (frozen, table)]
    if impl == "auto":
        documents = KERNELS.but(name="documents", batch=(), documents=(0, 300, 300, 777, 1101))
        repeatable = RING | CAUSAL | {"deterministic": True}
        cases = [documents.but(options=RING | {"is_causal": True}), learned.but(options=repeatable)]
    check(gpus, cases, tolerance=2e-2)


def test_float32_kernels(gpus: Ranks) -> None:
    case = KERNELS.but(name="float32", n=301, dtype=torch.float32, options=RING | CAUSAL | {"impl": "triton"})
    check(gpus, [case], tolerance=1e-5)


# -------------------------------------------------------------------- whole models


@pytest.mark.parametrize("options", [RING | {"order": "zigzag"}, ULYSSES], ids=["ring", "all-to-all"])
def test_model_with_checkpoints(gpus: Ranks, options: dict[str, Any]) -> None:
    assert_sum(gpus.results(plain, True, options, size=2))


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrappers_average_gradients(gpus: Ranks, wrapper: str) -> None:
    for part in (parts := gpus.results(wrapped, wrapper, size=2)):
        for name, right in alone().items():
            if name != "loss":
                torch.testing.assert_close(2 * part[name], right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sum(part["loss"] for part in parts), alone()["loss"])


def test_compiled_model(gpus: Ranks) -> None:
    for parts in zip(*gpus.results(compiled, "inductor", size=2), strict=True):
        assert_sum(list(parts), depth=1)


# -------------------------------------------------------------------- ranks that fail


@pytest.fixture
def compiled_kernels(two_gpus: None, breakable_ranks: Callable[..., Ranks]) -> None:
    """What ranks would compile lies on the disk: a neighbour that compiles for too long looks like one that failed."""
    one = breakable_ranks(1, 60.0, backend="nccl")
    assert one.call(attend, 1, "nothing", True, size=1) == [None]


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("what", ["stays away", "skips the backward pass"])
def test_a_failing_rank_is_named(breakable_ranks: Callable[..., Ranks], what: str) -> None:
    """Where waiting blocks, the error is that of the library, and comes in time."""
    errors = failures(
        breakable_ranks, what, culprit=1, size=2, timeout=TIMEOUT, backend="nccl",
        variables={"TORCH_NCCL_BLOCKING_WAIT": "1"},
    )  # fmt: skip
    assert errors[0].peers == (1,)
    assert ("agreement" if what == "stays away" else "of 1, backward") in errors[0].step


@pytest.mark.usefixtures("compiled_kernels")
def test_a_rank_that_dies_ends_the_others(breakable_ranks: Callable[..., Ranks]) -> None:
    """Where waiting does not block, torch's watchdog ends the process; its dump for debugging is left out."""
    ranks = breakable_ranks(2, TIMEOUT, backend="nccl", variables={"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    ranks.results(meet, size=2)
    start = time.monotonic()
    assert ranks.call(attend, 1, "dies", False, size=2)[1] is None
    ranks.processes[0].join(timeout=10 * TIMEOUT)
    assert ranks.processes[0].exitcode not in (None, 0) and time.monotonic() - start < 10 * TIMEOUT
