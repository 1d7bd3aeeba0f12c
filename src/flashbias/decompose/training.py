"""The training that `distill` does: what shapes it, which samples it reads, its steps, evaluations and checkpoints."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flashbias.decompose.bound import certificate
from flashbias.decompose.pairs import Pairs, RowErrors, visible_error
from flashbias.files import whole_file

__all__ = ["Dataset", "Evaluation", "Run", "Settings", "Split", "check_count", "own_generators"]

QUANTILES = (0.5, 0.9, 0.99, 1.0)
MOST_HELD_OUT = 32
FORMAT = "flashbias.distill/1"


class Dataset(Protocol):
    """Samples of any kind, by index: a list, or a map-style dataset of torch."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a sample; the same one whenever it is asked for."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """How far the student is from the teacher on the pairs that are held out.

    Args:
        step: steps of training done.
        train_loss: mean of the loss since the evaluation before, None for the first.
        relative_error: root of `sum error^2 / sum teacher^2`; with `gauge`, of both without their row means.
        rmse: root of the mean of `error^2`, likewise.
        certificates: quantile over rows and heads → `tanh(spread / 4)`, a bound on the change of the output relative
            to the spread of the values. 1.0 is the worst row.
        exact_rows: whether the rows were read at all keys. If not, each certificate is a lower bound of what all keys
            would give: more keys can only widen a spread.
    """

    step: int
    train_loss: float | None
    relative_error: float
    rmse: float
    certificates: dict[float, float]
    exact_rows: bool


@dataclass(frozen=True)
class Settings:
    """What shapes the result of a run; a checkpoint fits only a run with the same."""

    lr: float
    decay: float
    decay_every: int
    block_q: int
    block_k: int
    gauge: bool
    eval_every: int
    eval_rows: int
    eval_keys: int | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("decay_every", "block_q", "block_k", "eval_every", "eval_rows"):
            check_count(name, getattr(self, name))
        check_count("eval_keys", self.eval_keys, optional=True)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or abs(self.seed) >= 1 << 62:
            raise ValueError(f"seed must be an integer below 2^62 in size, got {self.seed!r}")
        # Numbers of other libraries become Python's: a checkpoint that is read without running code may hold no other.
        for name, kind in (("lr", float), ("decay", float), ("gauge", bool)):
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except (TypeError, ValueError):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}") from None
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr!r}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay!r}")

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        return self.lr * self.decay ** (step // self.decay_every)


def check_count(name: str, value: int | None, optional: bool = False) -> None:
    """Refuse what is no positive integer, or None where that is allowed."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer{' or None' if optional else ''}, got {value!r}")


@dataclass(frozen=True)
class Split:
    """Which samples are trained on, and which are held out."""

    data: Dataset
    train: range
    held_data: Dataset
    held: range
    apart: bool

    @classmethod
    def of(cls, data: Dataset, held_out: Dataset | None) -> Split:
        """Split as `distill` says: samples of their own, the last tenth, or other pairs of the only one."""
        for name, samples in (("data", data), ("held_out", held_out)):
            if samples is None:
                continue
            if isinstance(samples, Mapping) or not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
                raise TypeError(f"{name} must have a length and samples by index, got {type(samples).__name__}")
            if len(samples) == 0:
                raise ValueError(f"{name} must hold at least one sample, got none")
        count = len(data)
        if held_out is not None:
            return cls(data, range(count), held_out, range(len(held_out)), held_out is not data)
        if count == 1:
            return cls(data, range(1), data, range(1), False)
        kept = count - min(max(count // 10, 1), MOST_HELD_OUT)
        return cls(data, range(kept), data, range(kept, count), True)


class Run:
    """Student, optimiser, generators and history: all that a checkpoint holds."""

    def __init__(self, pairs: Pairs, split: Split, settings: Settings) -> None:
        self.pairs, self.split, self.settings, self.student = pairs, split, settings, pairs.student
        self.optimizer = torch.optim.Adam((p for p in self.student.parameters() if p.requires_grad), settings.lr)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step, self.loss_sum, self.loss_count = 0, 0.0, 0
        self.history: list[Evaluation] = []
        self.best_student: dict[str, Any] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that takes it up."""
        facts = {"mixed_precision": self.pairs.mixed_precision, "samples": len(self.split.train)}
        return asdict(self.settings) | facts

    @property
    def best(self) -> Evaluation:
        """The evaluation with the smallest error, the first one of equals."""
        return min(self.history, key=lambda evaluation: evaluation.relative_error)

    def is_stale(self, patience: int | None) -> bool:
        """Whether as many evaluations as `patience` have brought nothing better."""
        return patience is not None and len(self.history) - 1 - self.history.index(self.best) >= patience

    def train_one_step(self) -> float:
        """Draw a block, move the student, return the loss before the move."""
        s, train = self.settings, self.split.train
        self.student.train()
        index = train[int(torch.randint(len(train), (), generator=self.generator))]
        opened = self.pairs.open(self.split.data[index])
        queries = _draw(opened.seqlen_q, s.block_q, self.generator)
        keys = _draw(opened.seqlen_k, s.block_k, self.generator)
        error, _, read = opened.compare(queries, keys)
        loss = visible_error(error, read, s.gauge).square().sum() / read.sum().clamp(min=1)
        value = loss.item()
        rate = s.rate(self.step)
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {self.step} with a learning rate of {rate:.3g}: lower lr")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step, self.loss_sum, self.loss_count = self.step + 1, self.loss_sum + value, self.loss_count + 1
        return value

    @torch.no_grad()
    def evaluate(self) -> None:
        """Compare on what is held out, always on the same pairs; keep the student if it is the best so far."""
        s, split = self.settings, self.split
        self.student.eval()
        generator = torch.Generator().manual_seed(s.seed + 1)
        squares, spreads, exact_rows = torch.zeros(3, dtype=torch.float64, device=self.pairs.device), [], True
        for index in split.held:
            opened = self.pairs.open(split.held_data[index])
            queries = _draw(opened.seqlen_q, s.eval_rows, generator)
            keys = _draw(opened.seqlen_k, s.eval_keys, generator)
            exact_rows = exact_rows and len(keys) == opened.seqlen_k
            for some_queries in queries.split(s.block_q):
                rows = RowErrors()
                for some_keys in keys.split(s.block_k):
                    rows.add(*opened.compare(some_queries, some_keys))
                squares += rows.squares(s.gauge)
                spreads.append(rows.spread())
        error2, target2, count = squares.tolist()
        if not count:
            raise ValueError("held_out must hold pairs to evaluate, got none: no tokens, or all pairs masked")
        if not math.isfinite(error2):
            raise ValueError(f"the student's bias is not finite after {self.step} steps with lr={s.lr}")
        relative_error = math.sqrt(error2 / target2) if target2 else (math.inf if error2 else 0.0)
        bounds = certificate(torch.cat(spreads)).sort().values
        certificates = {q: _quantile(bounds, q) for q in QUANTILES}
        train_loss = self.loss_sum / self.loss_count if self.loss_count else None
        rmse = math.sqrt(error2 / count)
        self.history.append(Evaluation(self.step, train_loss, relative_error, rmse, certificates, exact_rows))
        self.loss_sum, self.loss_count = 0.0, 0
        if self.best is self.history[-1]:
            self.best_student = copy.deepcopy(self.student.state_dict())

    def save(self, file: Path | None) -> None:
        """Write everything."""
        if file is None:
            return
        state = {
            "format": FORMAT,
            "settings": self.identity,
            "step": self.step,
            "losses": (self.loss_sum, self.loss_count),
            "history": [asdict(evaluation) for evaluation in self.history],
            "student": self.student.state_dict(),
            "best_student": self.best_student,
            "optimizer": self.optimizer.state_dict(),
            "generators": [self.generator.get_state(), *_generator_states(self.pairs.device)],
        }
        with whole_file(file) as part:
            torch.save(state, part)

    def load(self, file: Path) -> None:
        """Take over everything, if it belongs to the same run."""
        content = io.BytesIO(file.read_bytes())
        try:
            state = torch.load(content, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise ValueError(f"checkpoint {file} cannot be read: it is damaged, or none that distill wrote") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"checkpoint {file} is none that this version of distill wrote")
        differences = [
            f"{name} was {state['settings'].get(name)!r} and is {value!r}"
            for name, value in self.identity.items()
            if state["settings"].get(name) != value
        ]
        if differences:
            raise ValueError(f"checkpoint {file} belongs to another run: {', '.join(differences)}")
        try:
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"checkpoint {file} belongs to another student: {error}") from error
        self.step, self.best_student = state["step"], state["best_student"]
        self.loss_sum, self.loss_count = state["losses"]
        self.history = [Evaluation(**evaluation) for evaluation in state["history"]]
        pairs, *others = state["generators"]
        self.generator.set_state(pairs)
        _set_generator_states(self.pairs.device, others)


def _draw(length: int, count: int | None, generator: torch.Generator) -> Tensor:
    """Draw `count` of the indices `0 … length - 1`, none twice; all of them, in order, if there are no more."""
    if count is None or count >= length:
        return torch.arange(length)
    return torch.randperm(length, generator=generator)[:count]


def _quantile(values: Tensor, q: float) -> float:
    """The smallest of sorted values that at least the share `q` of them does not exceed."""
    return float(values[max(math.ceil(q * len(values)) - 1, 0)])


@contextmanager
def own_generators(device: torch.device, seed: int) -> Iterator[None]:
    """Let what is random inside student and teacher draw from `seed`, and give torch's generators back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _generator_states(device: torch.device) -> list[Tensor]:
    """States of torch's generators: the CPU's, and that of the GPU in use."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_generator_states(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
