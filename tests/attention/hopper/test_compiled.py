"""Every tile shape that ships makes sound machine code for sm_90a; compiled through the launchers, without a GPU."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import INTERPRETED

import flashbias as fb
from flashbias.attention import registration
from flashbias.attention.call import Call, VarlenLayout

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon", reason="this release of triton has no Gluon")
if INTERPRETED:
    pytest.skip("Gluon has no interpreter: TRITON_INTERPRET=1 is set", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from flashbias.attention.hopper import backward, forward, table
from flashbias.attention.hopper.chunks import half_columns, sums_of
from flashbias.attention.hopper.configs import (
    BARRIERS,
    ROWS,
    SHARED_MEMORY,
    SLAB,
    TABLE_KEYS,
    BackwardConfig,
    Config,
    backward_bytes,
    columns_of,
    forward_bytes,
    forward_config,
    tail_of,
    width_of,
)
from flashbias.attention.hopper.operands import HopperOperands
from flashbias.attention.hopper.repeatable import backward as ordered_backward
from flashbias.attention.layout import cdiv
from flashbias.attention.triton import assembler, fixed_point

H200 = GPUTarget("cuda", 90, 32)
PROCESSORS = 132

STEP = 16
"""Columns, or keys, of one instruction of the matrix unit."""


# -------------------------------------------------------------------- what is compiled


@dataclass(frozen=True)
class Shape:
    """A call, and what ptxas spills in its two passes."""

    name: str
    head_dim: int
    head_dim_v: int | None = None
    rank: int = 16
    n: int = 512
    dtype: torch.dtype = torch.bfloat16
    window: tuple[int | None, int | None] = (None, None)
    frozen: bool = False  # factors without gradients
    table: int = 0  # entries
    codes: bool = False
    mask: tuple[int, ...] = ()
    factor_dtype: torch.dtype | None = None  # that of the queries
    sequences: int = 0  # of a packed batch

    def __str__(self) -> str:
        return self.name

    def call(self) -> Call:
        """Tensors without storage."""

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        dv = self.head_dim_v or self.head_dim
        query, key, value = (empty(1, 4, self.n, width) for width in (self.head_dim, self.head_dim, dv))
        varlen = None
        if self.sequences:
            query, key, value = (empty(self.n, 4, x.shape[-1]).transpose(0, 1) for x in (query, key, value))
            cu = torch.empty(self.sequences + 1, dtype=torch.int32, device="meta")
            varlen = VarlenLayout(cu, cu, self.n, self.n)
        phi_q, phi_k = (empty(4, self.n, self.rank, dtype=self.factor_dtype or self.dtype) for _ in range(2))
        table = torch.empty(4, self.table, device="meta") if self.table else None
        codes = [torch.empty(self.n, dtype=torch.int32, device="meta")] * 2 if self.codes else [None, None]
        bias = fb.FactoredBias(phi_q, phi_k, table, *codes) if self.rank or self.table else None
        mask = torch.empty(self.mask, dtype=torch.bool, device="meta") if self.mask else None
        return Call(
            query, key, value, bias, mask, *self.window, bottom_right=False, scale=self.head_dim**-0.5,
            dropout_p=0.0, deterministic=False, return_lse=False, varlen=varlen,
        )  # fmt: skip


SHAPES = [
    Shape("16", head_dim=16, rank=5),
    Shape("16-plain-window", head_dim=16, rank=0, window=(100, 0)),
    Shape("32-tail", head_dim=32, n=576, rank=9),
    Shape("32-rank-32", head_dim=32, rank=32),
    Shape("64-causal", head_dim=64, window=(None, 0)),
    Shape("40-plain-float16", head_dim=40, rank=0, dtype=torch.float16),
    Shape("80", head_dim=80),
    Shape("96-v-80-plain", head_dim=96, head_dim_v=80, rank=0),
    Shape("128", head_dim=128),
    Shape("128-v-64-causal-frozen", head_dim=128, head_dim_v=64, rank=2, window=(None, 0), frozen=True),
    Shape("16-packed", head_dim=16, rank=5, n=3000, sequences=7, factor_dtype=torch.float32),
    Shape("32-packed-window", head_dim=32, n=3000, sequences=7, window=(100, 20)),
    Shape("64-packed-causal", head_dim=64, n=3000, sequences=7, window=(None, 0)),
    Shape("64-packed-window-plain", head_dim=64, rank=0, n=3000, sequences=7, window=(100, 20)),
    Shape("80-packed-causal-frozen", head_dim=80, rank=2, n=3000, sequences=7, window=(None, 0), frozen=True),
    Shape("128-packed-causal", head_dim=128, n=3000, sequences=7, window=(None, 0)),
    Shape("128-packed-v-64", head_dim=128, head_dim_v=64, n=3000, sequences=7),
    Shape("16-mask-of-keys", head_dim=16, rank=5, n=500, mask=(1, 4, 1, 500)),
    Shape("32-mask-of-keys", head_dim=32, rank=9, mask=(1, 1, 1, 512)),
    Shape("64-mask-of-keys", head_dim=64, n=512, mask=(1, 1, 1, 512)),
    Shape("64-mask-of-keys-causal", head_dim=64, rank=0, n=500, mask=(1, 1, 1, 500), window=(None, 0)),
    Shape(
        "128-mask-of-keys-causal-frozen",
        head_dim=128,
        rank=2,
        n=500,
        mask=(1, 4, 1, 500),
        window=(None, 0),
        frozen=True,
    ),
    Shape("32-table-codes-tail", head_dim=32, rank=0, n=576, table=2209, codes=True),
    Shape("64-table-causal", head_dim=64, rank=0, n=1024, table=257, window=(None, 0)),
    Shape("64-table-codes-factors", head_dim=64, n=500, table=99, codes=True),
    Shape("64-mask-of-keys-table-causal", head_dim=64, rank=0, n=500, table=99, mask=(1, 4, 1, 500), window=(None, 0)),
    Shape("16-centres", head_dim=16, rank=5, n=40_000, factor_dtype=torch.float32),
    Shape("32-centres", head_dim=32, rank=5, n=40_000, factor_dtype=torch.float32),
    Shape("64-centres-causal", head_dim=64, rank=1, n=131_072, factor_dtype=torch.float32, window=(None, 0)),
    Shape("64-centres", head_dim=64, rank=7, n=132_871, factor_dtype=torch.float32),
    Shape("128-centres-causal", head_dim=128, rank=2, n=131_072, factor_dtype=torch.float32, window=(None, 0)),
    Shape(
        "128-centres-float16",
        head_dim=128,
        rank=8,
        n=40_000,
        factor_dtype=torch.float32,
        dtype=torch.float16,
        frozen=True,
    ),
]

FORWARD_ONLY = [
    Shape("112", head_dim=112),
    Shape("128-table-codes-factors", head_dim=128, rank=4, n=500, table=99, codes=True),
    Shape("256-causal", head_dim=256, n=1024, window=(None, 0)),
    Shape("256-plain", head_dim=256, n=1000, rank=0),
    Shape("64-v-80", head_dim=64, head_dim_v=80, n=1000),
    Shape("160-tail", head_dim=160, n=160),
    Shape("192-causal", head_dim=192, n=1024, window=(None, 0)),
    Shape("192-v-128", head_dim=192, head_dim_v=128, n=1000, rank=64),
    Shape("64-v-256-causal", head_dim=64, head_dim_v=256, n=1000, window=(None, 0)),
    Shape("256-table-mask", head_dim=256, n=1000, table=99, rank=2, mask=(1, 1, 1, 1000)),
    Shape("256-wide-factors-tail", head_dim=256, n=200, rank=128),
    Shape("256-widest-factors", head_dim=256, n=1024, rank=256),
    Shape("256-centres", head_dim=256, n=40_000, rank=8, factor_dtype=torch.float32),
    Shape("32-packed-table-codes", head_dim=32, rank=0, n=3000, sequences=7, table=99, codes=True),
    Shape("256-packed-causal", head_dim=256, n=3000, sequences=7, window=(None, 0)),
]
"""Calls whose gradients come from the portable kernels, and one of 112 columns, whose gradients are those of 128."""

NAMED = {shape.name: shape for shape in SHAPES}

ORDERED = [
    "16",
    "16-plain-window",
    "32-tail",
    "32-rank-32",
    "64-causal",
    "40-plain-float16",
    "64-mask-of-keys",
    "64-mask-of-keys-table-causal",
    "64-table-codes-factors",
    "16-centres",
    "64-centres",
    "96-v-80-plain",
    "128-v-64-causal-frozen",
    "128-mask-of-keys-causal-frozen",
    "128-centres-causal",
    "128-centres-float16",
]
"""Names of those that are compiled with additions in one order too.

The order adds tickets to a walk, and walks differ in these: two or three warpgroups, or wide heads; none, one or two
edges of a band; sums of factors, none, or wider ones; a mask, a table, both; centres by tile.
"""

SPILLS = {
    "16": {"12.9": (0, 200), "13.1": (0, 320)},
    "16-plain-window": {"12.9": (0, 56), "13.1": (0, 104)},
    "32-tail": {"12.9": (0, 8), "13.1": (0, 32)},
    "64-causal": {"12.9": (116, 68), "13.1": (572, 224)},
    "128": {"12.9": (0, 400), "13.1": (0, 760)},
    "16-mask-of-keys": {"12.9": (0, 152), "13.1": (12, 332)},
    "32-mask-of-keys": {"12.9": (0, 36), "13.1": (176, 72)},
    "64-mask-of-keys": {"12.9": (28, 84), "13.1": (428, 152)},
    "64-mask-of-keys-causal": {"12.9": (708, 8), "13.1": (1420, 80)},
    "128-mask-of-keys-causal-frozen": {"12.9": (104, 344), "13.1": (268, 804)},
    "32-rank-32": {"12.9": (0, 16), "13.1": (0, 32)},
    "128-v-64-causal-frozen": {"12.9": (28, 64), "13.1": (28, 300)},
    "64-table-codes-factors": {"13.1": (0, 112)},
    "16-centres": {"12.9": (28, 252), "13.1": (188, 496)},
    "32-centres": {"12.9": (56, 108), "13.1": (292, 236)},
    "64-centres-causal": {"12.9": (268, 60), "13.1": (864, 384)},
    "64-centres": {"12.9": (364, 132), "13.1": (892, 228)},
    "128-centres-causal": {"12.9": (100, 648), "13.1": (132, 1252)},
    "128-centres-float16": {"12.9": (48, 284), "13.1": (172, 512)},
    "16-packed": {"12.9": (0, 108), "13.1": (0, 312)},
    "32-packed-window": {"12.9": (20, 12), "13.1": (48, 32)},
    "64-packed-causal": {"12.9": (124, 76), "13.1": (528, 252)},
    "64-packed-window-plain": {"12.9": (192, 0), "13.1": (996, 24)},
    "80-packed-causal-frozen": {"13.1": (40, 176)},
    "128-packed-causal": {"12.9": (12, 592), "13.1": (40, 1152)},
    "128-packed-v-64": {"12.9": (0, 284), "13.1": (24, 576)},
    "256-packed-causal": {"12.9": (4, 0), "13.1": (132, 0)},
    "80": {"12.9": (0, 0), "13.1": (0, 80)},
    "96-v-80-plain": {"12.9": (0, 0), "13.1": (0, 20)},
    "160-tail": {"12.9": (0, 0), "13.1": (12, 0)},
    "192-causal": {"12.9": (0, 0), "13.1": (12, 0)},
    "256-causal": {"12.9": (0, 0), "13.1": (100, 0)},
    "256-table-mask": {"12.9": (28, 0), "13.1": (144, 0)},
    "256-widest-factors": {"12.9": (0, 0), "13.1": (8, 0)},
    "256-centres": {"12.9": (16, 0), "13.1": (248, 0)},
    "64-table-causal": {"13.1": (0, 120)},
    "64-mask-of-keys-table-causal": {"13.1": (172, 256)},
}
"""Bytes of all instructions that spill, (forward, backward), by the release of ptxas; the rest spills nothing.

Heads of 128 fill the registers with sums by design. Where a band or the factors' gradients add to the walk's own
numbers, some of those are spilled too, more by ptxas 13.1. Beside centres by tile the backward's loading warp spills
most: it has few registers, but is ahead of the others and waits for them.
"""


ORDERED_SPILLS = {
    "16": {"12.9": 196, "13.1": 348},
    "16-plain-window": {"12.9": 60, "13.1": 100},
    "32-tail": {"12.9": 4, "13.1": 16},
    "32-rank-32": {"12.9": 4, "13.1": 40},
    "64-causal": {"12.9": 96, "13.1": 272},
    "40-plain-float16": {"12.9": 8, "13.1": 24},
    "128-v-64-causal-frozen": {"12.9": 88, "13.1": 392},
    "16-centres": {"12.9": 312, "13.1": 472},
    "64-centres": {"12.9": 84, "13.1": 212},
    "128-centres-causal": {"12.9": 928, "13.1": 1496},
    "128-centres-float16": {"12.9": 368, "13.1": 532},
    "96-v-80-plain": {"13.1": 20},
    "64-mask-of-keys": {"13.1": 120},
    "128-mask-of-keys-causal-frozen": {"13.1": 908},
    "64-table-codes-factors": {"13.1": 112},
    "64-mask-of-keys-table-causal": {"13.1": 160},
}
"""The same of backward passes whose additions have an order."""


TABLE_SPILLS = {
    "64-table-causal": {"12.9": 156, "13.1": 388},
    "64-table-codes-factors": {"12.9": 0, "13.1": 80},
    "64-mask-of-keys-table-causal": {"12.9": 344, "13.1": 568},
}
"""Of the kernel that sums a table's gradient: before and behind its walks, and four numbers in them beside a mask."""


def allowed_spills(shape: Shape, release: str) -> tuple[int, int]:
    """Bytes, with a quarter more for small changes; those of the worst release for one that is not listed."""
    listed = SPILLS.get(shape.name, {release: (0, 0)})
    passes = [listed[release]] if release in listed else list(listed.values())
    forward, backward = (max(passes) * 5 // 4 for passes in zip(*passes, strict=True))
    return forward, backward


def allowed_spills_of(table: dict[str, dict[str, int]], shape: Shape, release: str) -> int:
    """Likewise, of a kernel that has a table of its own."""
    listed = table.get(shape.name, {release: 0})
    return listed.get(release, max(listed.values())) * 5 // 4


# -------------------------------------------------------------------- compiling


@dataclass
class Compiled:
    """Artefacts of one kernel: its PTX, what ptxas said, and bytes of shared memory."""

    kernel: Any
    log: str

    def number(self, pattern: str) -> int:
        """Find the one number that the log gives for a quantity."""
        found = re.findall(pattern, self.log)
        assert len(found) == 1, self.log
        return int(found[0])

    @property
    def registers(self) -> int:
        return self.number(r"Used (\d+) registers")

    @property
    def spilled(self) -> int:
        return self.number(r"(\d+) bytes spill stores")

    @property
    def products(self) -> int:
        return self.kernel.asm["ptx"].count("wgmma.mma_async.")

    def check(self, registers: int, shared: int, spills: int) -> None:
        """Assert what holds for every kernel."""
        assert ".target sm_90a" in self.kernel.asm["ptx"]
        assert self.registers <= registers
        assert self.spilled <= spills, f"{self.spilled} bytes are spilled, not {spills}"
        assert "serialized" not in self.log
        assert not re.search(r"C75\d\d", self.log)
        assert self.kernel.metadata.shared <= shared <= SHARED_MEMORY


class NoDevice:
    """Stands for a driver of Triton's, with a GPU that nothing is launched on."""

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return H200


@dataclass
class Compiler:
    """Compiles each Gluon kernel where it would be launched, and leaves out the plain Triton ones.

    `release` is that of ptxas.
    """

    release: str
    kernels: list[Compiled] = field(default_factory=list)

    def only(self) -> Compiled:
        """The one kernel that was launched."""
        (compiled,) = self.kernels
        self.kernels.clear()
        return compiled


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    # As on a GPU of this kind, where `assembler.py` chooses.
    nvidia = assembler.knobs.nvidia
    is_faulty = assembler._release(nvidia.ptxas) < assembler.SOUND
    tool = nvidia.ptxas_blackwell if is_faulty else nvidia.ptxas
    monkeypatch.setattr(assembler, "is_faulty", lambda: is_faulty)
    monkeypatch.setattr(assembler, "replacement", lambda: tool.path)

    found = Compiler(tool.version)
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if not self.is_gluon():
            return
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        finally:
            self.device_caches.pop(-1, None)
        found.kernels.append(Compiled(kernel, log.getvalue()))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", NoDevice())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    # The tile shapes stand whether or not the portable kernels are faster at one of them.
    monkeypatch.setattr(backward, "is_slower", lambda *_: False, raising=False)
    for module in (forward, backward, table, fixed_point):
        monkeypatch.setattr(module, "multiprocessors", lambda device: PROCESSORS)
    return found


# -------------------------------------------------------------------- what is expected


def forward_products(ops: HopperOperands, config: Config) -> int:
    """Instructions of the matrix unit, of all warpgroups.

    Scores and P V stand at two places each, with a tail at three: the first tile of keys stands before the loop, the
    last P V behind it. Scores sum over the columns that there are; P V is one instruction for each tensor of its sum.
    """
    scores = (width_of(ops.head_dim) + ops.columns) // STEP
    is_whole = ops.shape.is_banded or ops.is_tile_centred or ops.is_varlen
    tail = 0 if is_whole else tail_of(config, ops.seqlen_k)
    weighted = 2 * config.block_n + tail
    weighted *= len(sums_of(width_of(ops.head_dim_v)))
    return config.consumers * ((3 if tail else 2) * scores + weighted // STEP)


def backward_products(ops: HopperOperands, config: BackwardConfig, needs_phi: bool) -> int:
    """Instructions of the matrix unit: one walk in full tiles, and one for each edge of a band.

    dq and dphi_q are made over the keys of all: of narrow heads by a warpgroup that has one walk, of wide ones by each
    warpgroup for its columns, and dphi_q by the first.
    """
    walks = 1 + (ops.window_left >= 0) + (ops.window_right >= 0)
    width, width_v = backward.multiplied(ops.head_dim), backward.multiplied(ops.head_dim_v)
    scores = (width + ops.columns + width_v) // STEP
    over_queries = (len(sums_of(width_v)) + len(sums_of(width)) + needs_phi) * SLAB // STEP  # dv, dk, dphi_k
    of_all_keys = config.consumers * ROWS // STEP
    over_keys = of_all_keys * ((config.consumers if config.is_wide else 1) + needs_phi)  # dq, dphi_q
    return config.consumers * walks * (scores + over_queries) + (walks if config.is_wide else 1) * over_keys


@pytest.mark.parametrize("shape", SHAPES + FORWARD_ONLY, ids=str)
def test_both_passes_compile(shape: Shape, compiler: Compiler) -> None:
    arguments = registration.operands(shape.call())
    spills = allowed_spills(shape, compiler.release)
    ops = HopperOperands.of(*arguments)
    out, lse, _ = registration.attention_forward(*arguments, "hopper")

    forward.launch(out, lse, *arguments)
    config = forward_config(ops.block_d, ops.block_dv, ops.columns, bool(shape.table))
    compiled = compiler.only()
    compiled.check(config.maxnreg, forward_bytes(config, ops.block_d, ops.block_dv, ops.columns), spills[0])
    assert compiled.products == forward_products(ops, config)
    if shape in FORWARD_ONLY:
        return

    check_backward(shape, compiler, spills[1], repeatable=False)


@pytest.mark.parametrize("shape", [NAMED[name] for name in ORDERED], ids=str)
def test_ordered_backward_compiles(shape: Shape, compiler: Compiler) -> None:
    """With no sum that is added without waiting, and none that is handed over before it is complete."""
    spills = allowed_spills_of(ORDERED_SPILLS, shape, compiler.release)
    compiled, config = check_backward(shape, compiler, spills, repeatable=True)
    ptx = compiled.kernel.asm["ptx"]
    waits, hands, sums = (ptx.count(x) for x in ("ld.acquire.gpu", "st.release.gpu", "cp.reduce.async.bulk"))
    assert waits > 0
    walks = 1 + (shape.window[0] is not None) + (shape.window[1] is not None)
    places = 2 * walks if config.is_wide else 1
    # One more at the end of each unit.
    assert (waits, hands) == (places, places + (2 if config.is_wide else 1))
    width = backward.multiplied(shape.head_dim)
    columns = [half_columns(width, columns_of(width), w) for w in range(2)]
    # Sums of dq in boxes of the fewest columns that a warpgroup has; dphi_q of one warpgroup, and dphi_k of each.
    boxes = walks * sum(own // min(columns) for own in columns) if config.is_wide else 1
    of_factors = (walks if config.is_wide else 1) + config.consumers if shape.rank and not shape.frozen else 0
    assert sums == boxes + of_factors
    assert re.findall(r"cp\.async\.bulk\.wait_group 0;\s+bar\.warp\.sync", ptx)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.table], ids=str)
def test_gradient_of_a_table_compiles(shape: Shape, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FEWEST_PAIRS", 1)
    ops = HopperOperands.of(*registration.operands(shape.call()))
    config = table.fits(ops)
    assert config is not None and ops.table is not None
    rows = torch.empty(1, ops.num_heads, cdiv(ops.seqlen_q, SLAB) * SLAB, device="meta")
    launch = assembler.soundly_assembled(table.launch)
    launch(config, ops, torch.empty_like(ops.table), torch.empty_like(ops.q), None, rows, rows)
    compiled = compiler.only()
    width = ops.block_d + ops.block_dv + ops.columns
    shared = 2 * config.stages * (config.block_m + TABLE_KEYS) * width + BARRIERS
    compiled.check(config.maxnreg, shared, allowed_spills_of(TABLE_SPILLS, shape, compiler.release))
    assert compiled.products == config.consumers * width // STEP


def check_backward(shape: Shape, compiler: Compiler, spills: int, repeatable: bool) -> tuple[Compiled, BackwardConfig]:
    """Compile the backward pass and assert what holds for each."""
    arguments = registration.operands(shape.call())
    ops = HopperOperands.of(*arguments)
    out, lse, _ = registration.attention_forward(*arguments, "hopper")
    needs_phi = bool(shape.rank) and not shape.frozen
    needs = (True, True, True, needs_phi, needs_phi, False)
    grads = registration.attention_backward(torch.empty_like(out), None, out, lse, needs, *arguments, "hopper")
    compiler.kernels.clear()
    launch = ordered_backward.launch if repeatable else backward.launch
    launch(grads, torch.empty_like(out), None, out, lse, needs, *arguments)
    config = backward.chosen(ops, needs, repeatable)
    assert config is not None
    block_g = columns_of(shape.rank) if needs_phi else 0
    compiled = compiler.only()
    shared = backward_bytes(config, ops.block_d, ops.block_dv, ops.columns, block_g)
    compiled.check(config.maxnreg, shared, spills)
    assert compiled.products == backward_products(ops, config, needs_phi)
    return compiled, config
