"""A kernel that is found again is the one that Triton would take; seen without a GPU, by a driver that runs nothing."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.attention.cases import CASES
from tests.attention.machine import allow_hopper, tiers_for_every_width
from tests.attention.problem import LEAVES, Case
from tests.attention.varlen import VARLEN, VarlenCase
from tests.conftest import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("kernels are interpreted here, not launched: TRITON_INTERPRET=1 is set", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from flashbias.attention import triton as portable
from flashbias.attention.triton import launcher

ROOMS = [importlib.import_module(f"flashbias.attention.{name}") for name in ("triton", "hopper")]
PROCESSORS = 132
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Made(CompiledKernel):
    """Stands for what would be compiled for a key of Triton's."""

    def __init__(self, name: str, launches: list[Launch]) -> None:
        self.name, self.launches = name, launches
        self.function = self.packed_metadata = None
        self.module = self  # so nothing is loaded

    def launch_metadata(self, grid: Any, stream: int, *values: Any) -> None:
        return None

    @property
    def run(self) -> Any:
        def record(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            self.launches.append(Launch(self, (x, y, z), list(rest[5:])))

        return record


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, and the values of all its parameters."""

    made: Made
    grid: tuple[int, int, int]
    values: list[Any]


@dataclass
class Machine:
    """A GPU on which nothing runs: what is launched, and how often a kernel was found again."""

    launches: list[Launch] = field(default_factory=list)
    found: int = 0

    def start(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, kind: Any = None, **named: Any) -> None:
        """As `launcher.start`, compared with what Triton does."""
        known = len(launcher._compiled)
        launcher.start(kernel, grid, *arguments, kind=kind, **named)
        self.found += len(launcher._compiled) == known
        launched = self.launches[-1]
        kernel[grid](*arguments, **named)
        wanted = self.launches[-1]
        assert launched.made is wanted.made, kernel.fn.__name__
        assert launched.grid == wanted.grid
        assert all(x is y for x, y in zip(launched.values, wanted.values, strict=True))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A Hopper GPU, as far as the host can tell."""
    machine = Machine()

    def compile_nothing(self: JITFunction, key: str, *_: Any) -> Made:
        return self.device_caches[0][0].setdefault(key, Made(self.fn.__name__, machine.launches))

    fake = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(launcher, "_compiled", {})
    for module in modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(value, "device_caches", defaultdict(value.create_binder))
            elif name == "multiprocessors":
                monkeypatch.setattr(module, name, lambda device: PROCESSORS)
            elif name == "start":
                monkeypatch.setattr(module, name, machine.start)
    return machine


def modules() -> Iterator[ModuleType]:
    """All modules with kernels in them."""
    for room in ROOMS:
        for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
            if module.name != launcher.__name__:
                yield importlib.import_module(module.name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["triton", "hopper"])
def test_every_launch_is_what_triton_would_launch(
    impl: str, dtype: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice each case of the grid, so that all kernels of the second time are found; cases follow each other."""
    if impl == "hopper" and dtype == "float32":
        pytest.skip("half precision only")
    # Everything but that tensors lie on the CPU.
    monkeypatch.setattr(portable, "unavailable", lambda *_: None)
    monkeypatch.setattr(portable, "_on_kernel_device", lambda kind: True)
    allow_hopper(monkeypatch)
    done = 0
    for case in CASES:
        problem = case.build(DTYPES[dtype])
        leaves = problem.leaves()
        for turn in range(2):
            before = machine.found, len(machine.launches)
            try:
                out = problem.attend(impl, leaves)
            except NotImplementedError:
                break
            out = out[0] if isinstance(out, tuple) else out
            out.backward(problem.dout)
            done += turn
            if turn:
                assert machine.found - before[0] == (len(machine.launches) - before[1]) // 2, case.name
    assert done == len(CASES) if impl == "triton" else done > len(CASES) // 2


LEARNED = [LEAVES, LEAVES[:3], (*LEAVES[:3], "phi_q"), (*LEAVES[:3], "phi_k"), ("query",), ("table", "value")]
"""Which leaves get gradients, one after the other."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_passes_that_differ_in_what_learns_and_in_order(
    dtype: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of the same shapes follow each other; the fused kernel does the backward pass wherever it can."""
    from flashbias.attention.hopper import backward

    allow_hopper(monkeypatch)
    monkeypatch.setattr(backward, "is_slower", lambda *_: False)
    own = {"phi_q": (2, 2), "phi_k": (2, 2)}
    wide = [
        Case("wide", n=150, head_dim=width, mask=mask, **own) for width in (64, 80, 128) for mask in (None, "padding")
    ]
    wide += [
        Case("table", n=150, head_dim=32, table=33, codes=codes, mask=mask, rank=rank)
        for codes, mask, rank in ((None, None, 0), ("window", None, 5), (None, "padding", 5))
    ]
    packed = [*VARLEN, *(replace(case, head_dim=80) for case in VARLEN)]
    launched = set()
    for case in (*CASES, *wide, *packed):
        problem = case.build(DTYPES[dtype])
        for wanted, deterministic in itertools.product(LEARNED, (False, True)):
            leaves = problem.leaves(wanted)
            longest = {}
            if isinstance(case, VarlenCase):
                longest = {"max_seqlen_q": max(case.lengths_q), "max_seqlen_k": max(case.lengths_k)}
            try:
                out = problem.attend("hopper", leaves, deterministic=deterministic, **longest)
            except NotImplementedError:
                break
            out = out[0] if isinstance(out, tuple) else out
            before = len(machine.launches)
            if out.requires_grad:
                out.backward(problem.dout)
            kernels = {launch.made.name for launch in machine.launches[before:]}
            launched |= {(name, isinstance(case, VarlenCase), deterministic) for name in kernels}
    fused = {(name, is_packed, False) for name in ("_bwd_kernel", "_bwd_wide_kernel") for is_packed in (False, True)}
    ordered = {(name, False, True) for name in ("_bwd_kernel", "_bwd_wide_kernel", "_dtable_kernel")}
    assert fused | ordered | {("_dtable_kernel", False, False)} <= launched


WIDE = {"n": 150, "rank": 80, "same_dtype": True}
SMALL = {"head_dim": 32, "phi_q": (4,), "phi_k": (4,)}
RANKED = [
    Case("irregular", heads=6, head_dim=64, ranks=(4, 80, 0, 20, 80, 3), phi_q=(6,), phi_k=(6,), **WIDE),
    Case("steps", heads=4, head_dim=64, ranks=(4, 80) * 2, phi_q=(2, 4), phi_k=(4,), layout="transposed", **WIDE),
    Case("groups", heads=6, kv_heads=3, ranks=(4, 0, 80, 20, 0, 0), phi_q=(6,), phi_k=(6,), mask="heads", **WIDE),
    Case("tables", n=150, heads=4, rank=8, ranks=(8, 1, 0, 2), table=9, **SMALL),
    Case("windows", batch=(2, 3), n=150, heads=4, rank=40, ranks=(0, 40, 3, 4), **SMALL | {"phi_q": (1, 3, 4)}),
    VarlenCase("packed", (130, 0, 64), (97, 40, 64), 4, rank=8, ranks=(8, 1, 0, 2), phi_q_heads=4, phi_k_heads=4),
]
"""Heads of different rank, which are launched in tiers."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", RANKED, ids=lambda case: case.name)
def test_tiers(case: Any, dtype: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a call of its own, whose kernels are found again."""
    from flashbias.attention.hopper import backward, tiers

    allow_hopper(monkeypatch)
    tiers_for_every_width(monkeypatch)
    monkeypatch.setattr(backward, "is_slower", lambda *_: False)
    counts: list[int] = []
    decide = tiers.tiers_of
    monkeypatch.setattr(tiers, "tiers_of", lambda given: counts.append(len(found := decide(given))) or found)
    problem = case.build(DTYPES[dtype])
    longest = {"max_seqlen_q": 130, "max_seqlen_k": 97} if isinstance(case, VarlenCase) else {}
    for wanted, deterministic in itertools.product(LEARNED, (False, True)):
        launched = []
        for _ in range(2):
            leaves, start, known = problem.leaves(wanted), len(machine.launches), machine.found
            out = problem.attend("hopper", leaves, deterministic=deterministic, **longest)
            if out.requires_grad:
                out.backward(problem.dout)
            launched.append([launch.made.name for launch in machine.launches[start:]])
        assert launched[0] == launched[1]
        assert machine.found - known == len(launched[1]) // 2  # each is launched by Triton too, for comparison
        assert launched[1].count("_fwd_kernel") == 2 * counts[-1] > 2
    assert len(set(counts)) == 1, "a backward pass has other tiers than its forward pass"


@triton.jit
def _toy_kernel(x_ptr, y_ptr, size, step, factor, flag, COUNT: tl.constexpr, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


@triton.jit(do_not_specialize=["size", "step"])
def _plain_kernel(x_ptr, y_ptr, size, step, factor, flag, COUNT: tl.constexpr, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


DATA = {dtype: torch.zeros(40, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int32)}
POINTERS = st.one_of(
    st.none(), st.builds(lambda dtype, start: DATA[dtype][start:], st.sampled_from(list(DATA)), st.integers(0, 17))
)
SIZES = st.one_of(
    st.sampled_from([0, 1, 2, 8, 16, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32]), st.integers(-40, 40)
)
NUMBERS = st.one_of(SIZES, st.sampled_from([0.0, 1.0, 0.5]), st.booleans(), st.none())
ARGUMENTS = st.tuples(POINTERS, POINTERS, SIZES, SIZES, NUMBERS, NUMBERS)
CONSTANTS = st.fixed_dictionaries({"COUNT": st.integers(1, 3), "NAME": st.sampled_from(["a", None])})
OPTIONS = st.fixed_dictionaries(
    {}, optional={"num_warps": st.sampled_from([4, 8]), "maxnreg": st.sampled_from([None, 64])}
)


@pytest.mark.parametrize("kernel", [_toy_kernel, _plain_kernel], ids=["specialised", "not specialised"])
def test_keys_tell_apart_what_triton_does(kernel: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))

    @given(ARGUMENTS, CONSTANTS, OPTIONS)
    def compare(arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]) -> None:
        machine.start(kernel, (3, 2), *arguments, **constants, **options)

    compare()
    assert machine.found > 0


def test_a_kind_stands_for_the_constants(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_toy_kernel, "device_caches", defaultdict(_toy_kernel.create_binder))
    arguments = (DATA[torch.float32], None, 3, 4, 0.5, None)
    for count in (1, 2, 1):
        machine.start(_toy_kernel, (1,), *arguments, kind=("count", count), COUNT=count, NAME="a")
    assert machine.found == 1
    with pytest.raises(AssertionError, match="_toy_kernel"):  # what happens where the kind says too little
        machine.start(_toy_kernel, (1,), *arguments, kind=("count", 1), COUNT=3, NAME="a")


def test_keys_do_not_fill_the_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_toy_kernel, "device_caches", defaultdict(_toy_kernel.create_binder))
    monkeypatch.setattr(launcher, "MOST_KEYS", 5)
    for length in [*range(12), 11]:
        machine.start(_toy_kernel, (1,), None, None, length, 4, 0.5, None, kind=length, COUNT=1, NAME="a")
    assert 0 < len(launcher._compiled) <= 5 and machine.found == 1


def test_what_is_no_kernel_of_triton_is_called() -> None:
    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **named: called.append((grid, arguments, named))

    called: list[Any] = []
    launcher.start(Interpreted(), (2, 3), 1, kind="any", size=4)
    assert called == [((2, 3), (1,), {"size": 4})]
