"""The example of the documentation, as its reader runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def assert_losses_agree(variables: dict[str, str]) -> None:
    """Two ranks by torchrun have the losses of one process, and they fall."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    answer = subprocess.run(
        [*command, str(ROOT / "examples" / "context_parallel.py"), "--steps", "2"],
        capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    losses = re.findall(r"step \d: loss ([\d.]+) and ([\d.]+)", answer.stdout)
    assert len(losses) == 2
    for spread, alone in losses:
        assert abs(float(spread) - float(alone)) < 1e-4
    assert float(losses[1][0]) < float(losses[0][0])


def test_a_training_step_over_two_ranks_has_the_loss_of_one_process() -> None:
    assert_losses_agree({"CUDA_VISIBLE_DEVICES": ""})


def test_without_torchrun_it_says_so() -> None:
    answer = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "context_parallel.py")],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RANK"},
    )  # fmt: skip
    assert answer.returncode == 2 and "there are no ranks: start it with torchrun" in answer.stderr


@pytest.mark.gpu
def test_two_gpus_have_the_loss_of_one(two_gpus: None) -> None:
    assert_losses_agree({})
