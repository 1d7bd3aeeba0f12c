"""Time and memory of solvers and of attention alone, on meshes as large as those of real cars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from benchmarks.fields.mesh.bodies import motorbike_vertices
from benchmarks.fields.mesh.evidence import Evidence
from benchmarks.fields.mesh.solver import NARROWEST, WAYS, Solver, dense_attention, flex_attention
from benchmarks.fields.record import failure
from benchmarks.record import Row
from torch import Tensor

import flashbias as fb
from flashbias.bench.measure import let_go, measure

__all__ = ["Sizes", "speed"]

WIDTH, HEADS = 128, 8
CHECKED_QUERIES = 256
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """Points of the meshes (None: all); layers of the solver, and fewer where matrices for all are too much."""

    car: int
    motorbike: int | None
    learned: int
    layers: int
    fewer: int


FULL = Sizes(car=32_186, motorbike=None, learned=4096, layers=8, fewer=2)
SMALL = Sizes(car=192, motorbike=320, learned=64, layers=2, fewer=1)


def speed(evidence: Evidence) -> None:
    """All parts; each is written when it is done."""
    sizes = SMALL if evidence.arguments.small else FULL
    car, motorbike, few = (Mesh(count, evidence.device) for count in (sizes.car, sizes.motorbike, sizes.learned))
    ways, both = ("factors", "no bias", "matrix", "flex"), ("inference", "training")
    timer = SolverTimer(evidence, "solver-32k", car, sizes.layers)
    timer.rows(ways, both, sizes.layers)
    timer.rows(ways, ("training",), sizes.fewer)
    timer = SolverTimer(evidence, "solver-131k", motorbike, sizes.layers, repetitions=3)
    timer.rows(("factors", "no bias"), ("inference",), sizes.layers)
    timer.rows(("factors",), ("training",), sizes.layers)
    timer.matrix_row(sizes.layers)
    attentions(evidence, car)
    timer = SolverTimer(evidence, "solver-4k", few, sizes.layers)
    timer.rows(("factors", "matrix", "matrix, learned", "flex", "flex, learned"), ("training",), sizes.layers)
    _summarise(evidence)
    evidence.write()
    timer = SolverTimer(evidence, "solver-32k-learned", car, sizes.fewer)
    timer.rows(("matrix, learned",), ("training",), sizes.fewer)


class Mesh:
    """Vertices of the motorbike, some drawn at random or all, with a potential and a density to be learned.

    Args:
        count: points; None for all.
        device: where they are.
    """

    def __init__(self, count: int | None, device: torch.device) -> None:
        vertices = motorbike_vertices()
        order = torch.randperm(len(vertices), generator=torch.Generator().manual_seed(0))[:count]
        self.points = vertices[order][None].to(device)
        self.potential, self.density = self.points[..., 0], self.points[..., 1].sin()
        self.count = len(order)


# -------------------------------------------------------------------- solvers


class SolverTimer:
    """Times solvers on one mesh; each has the same parameters.

    Args:
        evidence: where rows go.
        part: their name.
        mesh: what is solved on.
        checked_layers: layers of the solver whose outputs are compared with those in float32.
        repetitions: of each call, at least.
    """

    def __init__(self, evidence: Evidence, part: str, mesh: Mesh, checked_layers: int, repetitions: int = 5) -> None:
        self.evidence, self.part, self.mesh, self.repetitions = evidence, part, mesh, repetitions
        self.checked_layers = checked_layers
        self._reference: Tensor | None = None

    def rows(self, ways: Sequence[str], passes: Sequence[str], layers: int) -> None:
        """A row for every way and pass, and the file."""
        for who in ways:
            for name in passes:
                about = {"part": self.part, "who": who, "pass": name, "points": self.mesh.count, "layers": layers}
                _record(self.evidence, about, lambda who=who, name=name: self._row(who, name, layers))
        self.evidence.write()

    def matrix_row(self, layers: int) -> None:
        """What the matrix of one layer alone would need, in bfloat16: computed, not measured."""
        need = HEADS * self.mesh.count**2 * 2 / MIB
        about = {"part": self.part, "who": "matrix", "points": self.mesh.count, "layers": layers}
        self.evidence.add(**about, peak_mib=need, status="computed: the matrix of one layer alone")
        self.evidence.write()

    def _row(self, who: str, name: str, layers: int) -> dict[str, object]:
        solver = self._solver(who, layers)
        call = self._training(solver) if name == "training" else lambda: self._infer(solver)
        found: dict[str, object] = {}
        if name == "inference" and layers == self.checked_layers and self.mesh.count <= FULL.car and who != "no bias":
            reference = self._exact()
            found["difference"] = float((call() - reference).norm() / reference.norm())
        call()
        return found | _timed(call, self.evidence.device, self.repetitions)

    def _exact(self) -> Tensor:
        """The output in float32, with factors; computed once."""
        if self._reference is None:
            self._reference = self._infer(self._solver("factors", self.checked_layers), half=False)
        return self._reference

    def _solver(self, who: str, layers: int) -> Solver:
        torch.manual_seed(0)
        return Solver(WAYS[who], WIDTH, HEADS, layers).to(self.evidence.device)

    def _infer(self, solver: Solver, half: bool = True) -> Tensor:
        with torch.no_grad(), torch.autocast(self.evidence.device.type, torch.bfloat16, enabled=half):
            return solver(self.mesh.points, self.mesh.potential).float()

    def _training(self, solver: Solver) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW(solver.parameters(), lr=1e-4)

        def step() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(self.evidence.device.type, torch.bfloat16):
                found = solver(self.mesh.points, self.mesh.potential)
            loss = (found.float() - self.mesh.density).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step


# -------------------------------------------------------------------- attention alone


class Attention:
    """Queries, keys and values of one layer on a mesh, and its bias in each form, made before the clock starts.

    Args:
        mesh: with the points.
        device: where everything is.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        random = {"generator": generator, "device": device}
        shape = 1, HEADS, mesh.count, WIDTH // HEADS
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.q, self.k, self.v, self.dout = (torch.randn(shape, **random).to(dtype) for _ in range(4))
        spread = torch.logspace(0, torch.tensor(NARROWEST).log10().item(), HEADS, device=device)
        self.weight = spread[:, None] * (0.5 + torch.rand(1, HEADS, mesh.count, **random))
        self.points = mesh.points

    def prepared(self, who: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The function, what takes a gradient, and what else it reads."""
        leaves = self.q, self.k, self.v
        if who == "factors":
            bias = fb.SquaredDistance(HEADS)(self.points[:, None], weight=self.weight)
            return _with_factors, (*leaves, bias.phi_q, bias.phi_k), ()
        if who == "no bias":
            return _with_factors, leaves, ()
        if who == "matrix":
            return dense_attention, leaves, (self._matrix(),)
        return flex_attention, leaves, (self.weight, self.points)

    def error(self, out: Tensor) -> float:
        """Relative error of some rows, against softmax in float64."""
        rows = torch.arange(0, out.shape[-2], max(1, out.shape[-2] // CHECKED_QUERIES), device=out.device)
        q, k, v = (x.double() for x in (self.q[..., rows, :], self.k, self.v))
        square = (self.points[:, rows, None] - self.points[:, None]).double().square().sum(-1)
        scores = q @ k.mT / q.shape[-1] ** 0.5 - self.weight[..., rows, None].double() * square[:, None]
        true = scores.softmax(-1) @ v
        return float((out[..., rows, :].double() - true).norm() / true.norm())

    def _matrix(self) -> Tensor:
        """`[1, H, N, N]`, some rows at a time: nothing as large in float32."""
        count = self.points.shape[1]
        matrix = self.q.new_empty(1, HEADS, count, count)
        parts = zip(matrix.split(512, 2), self.points.split(512, 1), self.weight.split(512, 2), strict=True)
        for rows, points, weight in parts:
            square = (points[:, :, None] - self.points[:, None]).square().sum(-1)
            rows.copy_(-weight[..., None] * square[:, None])
        return matrix


def attentions(evidence: Evidence, mesh: Mesh) -> None:
    """Attention alone, forward and with gradients."""
    inputs = Attention(mesh, evidence.device)
    for who in ("factors", "no bias", "matrix", "flex"):
        for name in ("forward", "forward and backward"):
            about = {"part": "attention-32k", "who": who, "pass": name, "points": mesh.count}
            _record(evidence, about, lambda who=who, name=name: _attention_row(inputs, who, name))
    evidence.write()


def _attention_row(inputs: Attention, who: str, name: str) -> dict[str, object]:
    function, learned, rest = inputs.prepared(who)
    leaves = tuple(x.detach().requires_grad_() for x in learned)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*(x.detach() for x in leaves), *rest)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves, *rest), leaves, inputs.dout)

    call = forward if name == "forward" else both
    found: dict[str, object] = {} if who == "no bias" else {"difference": inputs.error(forward())}
    call()
    return found | _timed(call, inputs.q.device, repetitions=10)


def _with_factors(q: Tensor, k: Tensor, v: Tensor, *factors: Tensor) -> Tensor:
    out = fb.attention(q, k, v, fb.FactoredBias(factors[0], factors[1]) if factors else None)
    assert isinstance(out, Tensor)  # no lse was asked for
    return out


# -------------------------------------------------------------------- rows


def _timed(call: Callable[[], object], device: torch.device, repetitions: int) -> dict[str, object]:
    found = asdict(measure(call, device, budget_s=0.4, min_repetitions=repetitions))
    return {name: "" if value is None else value for name, value in found.items()}


def _record(evidence: Evidence, about: dict[str, Any], row: Callable[[], dict[str, object]]) -> None:
    """Add the row; what goes wrong is its status, and the others go on."""
    try:
        found: dict[str, Any] = row()
    except Exception as error:  # of peers, of any type
        found = {"status": failure(error)}
    evidence.add(**about, **found)
    if evidence.device.type == "cuda":
        let_go()
        torch.cuda.empty_cache()


def _summarise(evidence: Evidence) -> None:
    """How many times less time and memory than the others that carry the bias."""
    measured = [row for row in evidence.rows if row["part"] in ("solver-32k", "attention-32k") and row["median_ms"]]
    ours = {_setting(row): row for row in measured if row["who"] == "factors"}
    for row in measured:
        if row["who"] not in ("matrix", "flex") or _setting(row) not in ours:
            continue
        for column in ("median_ms", "peak_mib"):
            if row[column]:
                ratio = float(str(row[column])) / float(str(ours[_setting(row)][column]))
                evidence.summary[f"{_setting(row)}, {row['who']} over factors, {column}"] = round(ratio, 2)


def _setting(row: Row) -> str:
    layers = f", {row['layers']} layers" if row["layers"] else ""
    return f"{row['part']} {row['pass']}{layers}"
