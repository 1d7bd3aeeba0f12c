"""Processes joined by gloo, or by NCCL with a GPU each: a test hands them a function and gets what each rank returns.

They are started once for all tests of a module, from a server that has loaded torch already.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZES = (1, 2, 3, 4)
PATIENCE = 60.0
"""Seconds after which a call is given up: far longer than any takes."""


@dataclass
class Place:
    """Where a function runs: its group, its rank among `size`, and its device."""

    group: dist.ProcessGroup
    rank: int
    size: int
    device: torch.device


@dataclass
class Failure:
    """What a rank raised."""

    error: BaseException
    text: str


class Ranks:
    """Some processes that wait for calls.

    Args:
        count: how many.
        timeout: of their process groups, in seconds.
        backend: "gloo", or "nccl" with as many GPUs.
        variables: of their environment.
    """

    def __init__(
        self, count: int = 4, timeout: float = 30.0, backend: str = "gloo", variables: dict[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "flashbias.distributed"])
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, store, rank, count, timeout, backend, variables or {}), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any, size: int = 4) -> list[Any]:
        """Run `function(place, *args)` on the first `size` ranks.

        Returns:
            What each returned; a `Failure` where it raised, None where its process ended.
        """
        for pipe in self.pipes[:size]:
            pipe.send((function, args, size))
        answers = []
        for rank, pipe in enumerate(self.pipes[:size]):
            assert pipe.poll(PATIENCE), f"rank {rank} has not answered within {PATIENCE} s"
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append(None)
        return answers

    def results(self, function: Callable[..., Any], *args: Any, size: int = 4) -> list[Any]:
        """`call`, for functions that must not fail."""
        answers = self.call(function, *args, size=size)
        for rank, answer in enumerate(answers):
            assert answer is not None, f"the process of rank {rank} has ended"
            assert not isinstance(answer, Failure), f"rank {rank}: {answer.text}"
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()


def _serve(
    pipe: Connection, store: str, rank: int, count: int, timeout: float, backend: str, variables: dict[str, str]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"} | variables
    device, patience = torch.device("cpu"), timedelta(seconds=timeout)
    if backend == "nccl":
        torch.cuda.set_device(device := torch.device("cuda", rank))
    dist.init_process_group(
        backend, store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=patience,
        device_id=device if backend == "nccl" else None,
    )  # fmt: skip
    groups = {size: dist.new_group(list(range(size)), timeout=patience) for size in SIZES if size <= count}
    while True:
        try:
            function, args, size = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = function(Place(groups[size], rank, size, device), *args)
        except Exception as error:
            answer = Failure(error, traceback.format_exc())
        pipe.send(answer)
