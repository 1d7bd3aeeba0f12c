"""`distill`: teach factors what a module computes for pairs of tokens, a block of pairs at a time.

One step takes one sample, draws some queries and some keys, asks the teacher for the bias between these alone, and
moves the student towards it. Softmax does not see what a row's entries have in common, so by default each row's mean
over the keys drawn is taken from the error first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from flashbias.decompose.interruption import interrupts_held_back
from flashbias.decompose.pairs import Pairs, Teacher
from flashbias.decompose.training import Dataset, Evaluation, Run, Settings, Split, check_count, own_generators
from flashbias.files import check_target

__all__ = ["DistillReport", "distill"]

Progress = Callable[[int, int, str], None]


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
            length; inputs of another kind; parameters in float16, which Adam's steps do not fit; `lr` or `decay` that
            is no number.
        ValueError: a number out of range, no data, nothing to train, mixed precision on a CPU; an answer of the
            teacher of the wrong shape or not finite; a loss that is not finite; a checkpoint that exists and is not
            to be resumed, cannot be read or written, or belongs to another run.

    Examples:
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
    check_count("steps", steps)
    check_count("patience", patience, optional=True)
    settings = Settings(lr, decay, decay_every, block_q, block_k, gauge, eval_every, eval_rows, eval_keys, seed)
    pairs = Pairs(student, teacher, inputs, mixed_precision)
    run = Run(pairs, Split.of(data, held_out), settings)
    file = None if checkpoint is None else Path(checkpoint)
    if resume and file is None:
        raise ValueError("resume=True needs a checkpoint to resume from, got checkpoint=None")
    if file is not None:
        check_target(file)
        if file.exists() and not resume:
            raise ValueError(f"checkpoint {file} exists: pass resume=True to continue from it, or remove it")
    modes = {module: module.training for module in student.modules()}
    try:
        with own_generators(pairs.device, seed), interrupts_held_back(file is not None) as check_interrupt:
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
