"""`distill`: teach factors what a module computes for pairs of tokens, a block of pairs at a time.

One step takes one sample, draws some queries and some keys, asks the teacher for the bias between these alone, and
moves the student towards it. Softmax does not see what a row's entries have in common, so by default each row's mean
over the keys drawn is taken from the error first.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flashbias.decompose.bound import certificate
from flashbias.decompose.pairs import Pairs, RowErrors, Teacher, visible_error
from flashbias.files import check_target, whole_file

__all__ = ["Dataset", "DistillReport", "Evaluation", "Teacher", "distill"]

QUANTILES = (0.5, 0.9, 0.99, 1.0)
MOST_HELD_OUT = 32
FORMAT = "flashbias.distill/1"

Progress = Callable[[int, int, str], None]


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
class DistillReport:
    """What a distillation has reached.

    Args:
        best: the evaluation with the smallest relative error; the student holds these parameters.
        history: all evaluations; the first is of the student as it was given.
        steps: steps done, of this call and of those it resumed.
        stopped_early: whether `patience` ended the run.
        held_out: `"samples"` if the evaluation reads samples that training does not; `"pairs"` if it reads other pairs,
            drawn anew, of samples that training reads too.
    """

    best: Evaluation
    history: tuple[Evaluation, ...]
    steps: int
    stopped_early: bool
    held_out: str

    def __str__(self) -> str:
        """A few lines for people."""
        first, best = self.history[0], self.best
        ending = ", stopped early" if self.stopped_early else ""
        kind = "certificates" if best.exact_rows else "certificates (lower bounds: a sample of keys)"
        bounds = ", ".join(f"{q:.0%} of rows <= {value:.2g}" for q, value in best.certificates.items())
        return (
            f"held-out {self.held_out}: relative error {first.relative_error:.3g} before, {best.relative_error:.3g} "
            f"after {best.step} of {self.steps} steps{ending}; rmse {best.rmse:.3g}\n{kind}: {bounds}"
        )


def distill(
    student: nn.Module,
    teacher: Teacher,
    data: Dataset,
    *,
    held_out: Dataset | None = None,
    inputs: Callable[[Any], Any] | None = None,
    steps: int = 10_000,
    lr: float = 1e-3,
    decay: float = 0.95,
    decay_every: int = 50,
    block_q: int = 256,
    block_k: int = 256,
    gauge: bool = True,
    mixed_precision: bool | None = None,
    eval_every: int = 500,
    eval_rows: int = 64,
    eval_keys: int | None = 1024,
    patience: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> DistillReport:
    """Train a student to give the bias of a teacher, without the teacher's N×M matrix.

    Loss: the mean over a block of pairs of `(error[i, j] - mean(error[i, :]))^2`, where `error` is the student's bias
    minus the teacher's, and the mean over the keys of the block is what softmax does not see.

    Use it for a bias that a network computes from pairs of tokens, or for any function of a pair, with `NeuralBias` as
    the student; or with `LowRankBias` for one that is fixed. Memory: the student's own, and `block_q * block_k` pairs;
    the teacher is never asked for more at once.

    The optimiser is Adam. The schedule is the paper's: after 5,000 steps the rate has fallen to 0.6 % of `lr` and the
    student hardly moves; a larger `decay_every` lets it learn for longer.

    With a checkpoint, Ctrl-C waits for the step to end; the file is written and `KeyboardInterrupt` raised. A second
    Ctrl-C stops at once and leaves the file as it was. torch's global generators are left as they were: what is
    random in student, teacher or data (dropout) draws from a state of its own, which the checkpoint holds too.

    Args:
        student: a module whose call on a sample's inputs returns a `FactoredBias`. If it has the methods
            `lengths(*inputs) -> (N, M)` and `block(queries, keys, *inputs) -> FactoredBias`, as `NeuralBias` does, it
            is asked for the tokens of a block only. At the end it holds the best parameters found.
        teacher: see `Teacher`.
        data: the samples to train on; one is drawn per step. A list of one is a single, fixed set of tokens.
        held_out: samples to evaluate on, all of them each time. Default the last tenth of `data`, 1 to 32 samples,
            which training then leaves out; if `data` has one sample only, pairs of it that are drawn anew.
        inputs: what the student is called with, from a sample: a tensor, a tuple of arguments, or a mapping of named
            ones; tensors are moved to the student's device. Default the sample itself.
        steps: of training, in all; a resumed run may ask for more.
        lr: learning rate at the start.
        decay: what the rate is multiplied by, in (0, 1].
        decay_every: after how many steps.
        block_q: queries in a block.
        block_k: keys in a block.
        gauge: whether row constants are ignored in loss and report. False learns the values themselves.
        mixed_precision: call the student under bfloat16 autocast while training; on a GPU only, and there by
            default. Products, loss and evaluation are always in the student's own dtype, float32 at least.
        eval_every: steps between evaluations.
        eval_rows: queries to evaluate, of each sample held out; always the same ones.
        eval_keys: keys to evaluate them at, None for all. The certificates are exact for these rows if all keys are
            read, and lower bounds otherwise.
        patience: stop after this many evaluations without a new best; default never.
        seed: of all that is drawn.
        checkpoint: file that is written after each evaluation and on Ctrl-C, under a temporary name and then renamed.
            It loads with `weights_only=True`.
        resume: continue from `checkpoint` if the file exists: the result has the same bits as that of a run that was
            never interrupted, if student, teacher and data are the same and repeatable.
        progress: called after each step with the steps done, the steps in all, and a text.

    Returns:
        Errors and certificates on what was held out, from before the first step to the end.

    Raises:
        TypeError: the student returns no FactoredBias, or the teacher no floating point tensor; data without a
            length; inputs of another kind.
        ValueError: a number out of range, no data, nothing to train, mixed precision on a CPU; an answer of the
            teacher of the wrong shape or not finite; a loss that is not finite; a checkpoint that exists and is not
            to be resumed, cannot be read or written, or belongs to another run.

    Example:
        >>> import torch
        >>> from flashbias.decompose.learned import LowRankBias
        >>> x = torch.linspace(0.0, 1.0, 24)
        >>> def teacher(sample, queries, keys):
        ...     return torch.cos(sample[queries, None] - sample[None, keys])[None]
        >>> student = LowRankBias(num_heads=1, seqlen_q=24, seqlen_k=24, rank=2)
        >>> report = distill(student, teacher, [x], inputs=lambda x: (), steps=150, lr=0.05, decay_every=5)
        >>> report.history[0].relative_error > 0.9, report.best.relative_error < 0.1
        (True, True)

    Reference:
        Wu et al., https://arxiv.org/abs/2505.12044, section 3.2 and table 12.
    """
    _check_count("steps", steps)
    _check_count("patience", patience, optional=True)
    settings = _Settings(lr, decay, decay_every, block_q, block_k, gauge, eval_every, eval_rows, eval_keys, seed)
    pairs = Pairs(student, teacher, inputs, mixed_precision)
    run = _Run(pairs, _Split.of(data, held_out), settings)
    file = None if checkpoint is None else Path(checkpoint)
    if resume and file is None:
        raise ValueError("resume=True needs a checkpoint to resume from, got checkpoint=None")
    if file is not None:
        check_target(file)
        if file.exists() and not resume:
            raise ValueError(f"checkpoint {file} exists: pass resume=True to continue from it, or remove it")
    modes = {module: module.training for module in student.modules()}
    try:
        with _own_generators(pairs.device, seed), _interrupts_held_back(file is not None) as check_interrupt:
            if file is not None and file.exists():
                run.load(file)
            else:
                run.evaluate()
                run.save(file)
            while run.step < steps and not run.is_stale(patience):
                loss = run.train_one_step()
                if run.step % eval_every == 0 or run.step == steps:
                    run.evaluate()
                    run.save(file)
                try:
                    if progress is not None:
                        progress(run.step, steps, f"loss {loss:.3g}, held-out error {run.best.relative_error:.3g}")
                    check_interrupt()
                except KeyboardInterrupt:
                    run.save(file)
                    raise
    finally:
        run.optimizer.zero_grad()
        for module, is_training in modes.items():
            module.training = is_training
    student.load_state_dict(run.best_student)
    held_out_kind = "samples" if run.split.apart else "pairs"
    return DistillReport(run.best, tuple(run.history), run.step, run.step < steps, held_out_kind)


# ---------------------------------------------------------------- settings and data


@dataclass(frozen=True)
class _Settings:
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
            _check_count(name, getattr(self, name))
        _check_count("eval_keys", self.eval_keys, optional=True)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be positive and finite, got {self.lr!r}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay!r}")

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        return self.lr * self.decay ** (step // self.decay_every)


def _check_count(name: str, value: int | None, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer{' or None' if optional else ''}, got {value!r}")


@dataclass(frozen=True)
class _Split:
    """Which samples are trained on, and which are held out."""

    data: Dataset
    train: range
    held_data: Dataset
    held: range
    apart: bool

    @classmethod
    def of(cls, data: Dataset, held_out: Dataset | None) -> _Split:
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


def _draw(length: int, count: int | None, generator: torch.Generator) -> Tensor:
    """Draw `count` of the indices `0 … length - 1`, none twice; all of them, in order, if there are no more."""
    if count is None or count >= length:
        return torch.arange(length)
    return torch.randperm(length, generator=generator)[:count]


def _quantile(values: Tensor, q: float) -> float:
    """The smallest of sorted values that at least the share `q` of them does not exceed."""
    return float(values[max(math.ceil(q * len(values)) - 1, 0)])


# ---------------------------------------------------------------- the run


class _Run:
    """Student, optimiser, generators and history: all that a checkpoint holds."""

    def __init__(self, pairs: Pairs, split: _Split, settings: _Settings) -> None:
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


# ---------------------------------------------------------------- generators and interruptions


@contextmanager
def _own_generators(device: torch.device, seed: int) -> Iterator[None]:
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


@contextmanager
def _interrupts_held_back(wanted: bool) -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the function that is yielded is called; a second one acts at once.

    Only Python's own handling is replaced: a program that has another one knows what it wants.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (wanted and in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield lambda: None
        return
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ask)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
