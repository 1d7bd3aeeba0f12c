"""Providers from a module that a child process can import too."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashbias.bench import isolation
from flashbias.bench.providers import Provider

MODULE = "providers_of_a_test"

PROVIDERS = """
import os, signal, time
from flashbias.bench.providers import registry

def crash(inputs, grads):
    os.kill(os.getpid(), signal.SIGKILL)

def slow(inputs, grads):
    time.sleep(60)

def hang(inputs, grads):  # as within a kernel: no signal handler of the interpreter gets its turn
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)

def log(inputs, grads):
    with open(os.path.join(os.path.dirname(__file__), "log"), "a") as file:
        file.write(f"{inputs.case.name} {grads} {os.getpid()}\\n")
    return registry()["ours/sdpa"].prepare(inputs, grads)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Provider]]:
    """One that crashes, one that is slow, one that hangs, and one that is right and notes who called it, by name."""
    (tmp_path / f"{MODULE}.py").write_text(PROVIDERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(MODULE)
    yield {name: Provider(f"mine/{name}", getattr(module, name)) for name in ("crash", "slow", "hang", "log")}
    sys.modules.pop(MODULE)


@pytest.fixture
def logged(tmp_path: Path) -> Callable[[], list[list[str]]]:
    """What `mine["log"]` has noted so far: case, whether gradients were asked for, and process of every call."""
    return lambda: [line.split() for line in (tmp_path / "log").read_text().splitlines()]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children come from a fork server that has torch loaded, which a GPU forbids: seconds less for each.

    For tests of what becomes of children, not of how they start; some that start them as they are shipped stay.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flashbias.bench.isolation"])
    first = context.Process(target=int)  # the server has loaded all before a test's own clock runs
    first.start()
    first.join()
    monkeypatch.setattr(isolation, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
