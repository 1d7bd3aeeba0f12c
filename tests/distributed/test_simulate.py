"""The alpha-beta model: its arithmetic, its limits, the table of the documentation, and measuring a link."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.distributed.ranks import Failure, Place, Ranks

import flashbias.distributed.simulate as simulation
from flashbias.distributed.simulate import (
    BACKWARD_WORK,
    Link,
    Machine,
    Workload,
    fitted_link,
    measure_link,
    predict,
    simulate,
    simulation_table,
)

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
MACHINE = Machine(4e14, 3e14, near=Link(1e-5, 4e11), far=Link(2e-5, 4e10), block_overhead=0.0)
WORK = Workload(seqlen=2**18, num_heads=32, num_kv_heads=8, head_dim=128, rank=2)
FREE = Link(0.0, 1e30)


def seconds_alone(work: Workload) -> float:
    return work.forward_work / MACHINE.forward_flops + BACKWARD_WORK * work.forward_work / MACHINE.backward_flops


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "ring+ulysses"])
def test_free_links_make_perfect_efficiency(strategy: str) -> None:
    found = predict(WORK, replace(MACHINE, near=FREE, far=FREE), 8, strategy)
    assert found.efficiency == pytest.approx(1.0) and found.exposed == pytest.approx(0.0, abs=1e-9)
    assert found.seconds == pytest.approx(seconds_alone(WORK) / 8)


def test_a_slow_link_sets_the_pace_of_a_ring() -> None:
    slow = replace(MACHINE, near=Link(0.0, 1e6))
    ring = WORK.ring_bytes(4)
    found = predict(WORK, slow, 4, "ring")
    messages = 3 * (ring.keys + ring.factors) * 2 + 4 * ring.gradients
    assert found.sent == messages == ring.forward + ring.backward
    # The last block of each pass is computed with nothing left to wait for.
    assert found.seconds == pytest.approx(messages / 1e6 + seconds_alone(WORK) / 16)


def test_a_ring_over_nodes_is_as_slow_as_its_slowest_link() -> None:
    work = replace(WORK, seqlen=2**15)
    inside, across = (predict(work, MACHINE, size, "ring") for size in (8, 16))
    assert across.seconds > inside.seconds
    assert predict(work, replace(MACHINE, node=16), 16, "ring").seconds < across.seconds


def test_an_all_to_all_sends_less_than_a_ring() -> None:
    ring, ulysses = (predict(WORK, MACHINE, 8, strategy) for strategy in ("ring", "ulysses"))
    bringing, taking = WORK.traded_bytes(8)
    assert ulysses.sent == pytest.approx(2 * (bringing + taking) * 7 / 8)
    assert ulysses.sent < ring.sent


def test_what_heads_do_not_allow_is_left_out() -> None:
    sizes = [p.cp_size for p in simulate(WORK, MACHINE) if p.strategy == "ulysses"]
    assert sizes == [8]
    with pytest.raises(ValueError, match=r"cannot share 32 heads .8 of keys. among 64 ranks"):
        predict(WORK, MACHINE, 64, "ulysses")
    with pytest.raises(ValueError, match="strategy must be one of"):
        predict(WORK, MACHINE, 64, "star")
    assert "n/a" in simulation_table(simulate(WORK, MACHINE))


def test_the_documentation_shows_what_the_code_says() -> None:
    block, table = re.findall(
        r"```python\n([^`]*simulation_table[^`]*)```\n+<!-- simulation:begin -->\n(.*?)\n<!-- simulation:end -->",
        PAGE.read_text(),
        re.DOTALL,
    )[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, str(PAGE), "exec"), {})
    assert printed.getvalue().strip() == table.strip()


def test_a_link_is_fitted_to_times() -> None:
    sizes = [1000, 20_000, 300_000]
    link = fitted_link(sizes, [Link(1e-5, 1e8).seconds(size) for size in sizes])
    assert (link.alpha, link.beta) == (pytest.approx(1e-5), pytest.approx(1e8))
    assert fitted_link([1000, 2000], [1.0, 2.5]).alpha == 0.0
    with pytest.raises(RuntimeError, match=r"times do not grow with sizes .1,000 bytes 2 s, 2,000 bytes 1 s."):
        fitted_link([1000, 2000], [2.0, 1.0])


def measured(place: Place) -> Link:
    return measure_link(place.group, sizes=(1 << 10, 1 << 20, 1 << 24), repeats=2)


def test_a_link_is_measured_alike_on_all_ranks(ranks: Ranks) -> None:
    links = ranks.results(measured, size=3)
    assert links[0] == links[1] == links[2]
    assert links[0].alpha >= 0.0 and 1e5 < links[0].beta < 1e13
    (answer,) = ranks.call(alone, size=1)
    assert isinstance(answer, Failure) and isinstance(answer.error, ValueError)
    assert "needs two ranks and two sizes at least, got 1 ranks" in str(answer.error)


def measured_on_a_busy_machine(place: Place, rate: float) -> Link:
    """Every hop waits 4 ms for a turn of the processor; no message is sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "_hop_seconds", lambda circle, size, repeats, device: 4e-3 + size * rate)
        return measure_link(place.group, sizes=(1 << 10, 1 << 20))


def test_a_link_hidden_by_latency_is_measured_with_larger_messages(ranks: Ranks) -> None:
    for link in ranks.results(measured_on_a_busy_machine, 1e-9, size=2):
        assert (link.alpha, link.beta) == (pytest.approx(4e-3), pytest.approx(1e9))
    for answer in ranks.call(measured_on_a_busy_machine, 0.0, size=2):
        assert isinstance(answer, Failure) and isinstance(answer.error, RuntimeError)
        assert "times do not grow with sizes" in str(answer.error) and f"{1 << 28:,} bytes" in str(answer.error)


def alone(place: Place) -> Link:
    return measure_link(place.group)


def test_bytes_per_token_of_the_abstract() -> None:
    """R / (2 head_dim) where factors are as wide as keys: checked against what is sent in test_api.py."""
    work = Workload(seqlen=4096, num_heads=8, num_kv_heads=8, head_dim=64, rank=16, factor_heads=8)
    assert replace(work.ring_bytes(4), factor_element=2).overhead == 16 / (2 * 64)
    assert torch.tensor(work.ring_bytes(4).overhead).item() == 2 * 16 / (2 * 64)
