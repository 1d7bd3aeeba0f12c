"""One message to a neighbour and one from the other, in flight while this rank computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from flashbias.distributed.errors import RankError
from flashbias.distributed.topology import Circle, finish
from flashbias.distributed.traffic import record

__all__ = ["Hop", "naming"]


@contextmanager
def naming(circle: Circle, peers: tuple[int, ...], step: str) -> Iterator[None]:
    """Turn what a backend raises into an error that names ranks and step.

    Args:
        circle: the ranks that communicate.
        peers: which of them are waited for.
        step: what is being done.

    Raises:
        RankError: in place of the backend's own error, which it keeps as its cause.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # of this rank; no other has to do with it
    except RuntimeError as error:
        who = " and ".join(f"rank {peer}" for peer in peers)
        raise RankError(
            f"rank {circle.rank} of {circle.size} got no answer from {who} in {step}: it has failed, is missing, or "
            f"took longer than the process group's timeout ({error})",
            cp_rank=circle.rank,
            peers=peers,
            step=step,
        ) from error


class Hop:
    """A message to the next rank of a circle and one from the rank before, both on their way.

    Args:
        circle: the ranks.
        message: bytes to send; not to be written to before `wait`.
        buffer: where to receive.
        purpose: what `count_traffic` counts the bytes for.
        step: what is being done, for an error.
    """

    def __init__(self, circle: Circle, message: Tensor, buffer: Tensor, purpose: str, step: str) -> None:
        self.circle, self.message, self.buffer, self.step = circle, message, buffer, step
        self.to, self.source = (circle.rank + 1) % circle.size, (circle.rank - 1) % circle.size
        record(purpose, message.numel())
        self.works = self._sent_one_by_one() if dist.get_backend(circle.group) == "gloo" else self._sent_together()

    @property
    def _neighbours(self) -> tuple[int, ...]:
        """Both, which are one where two ranks make the circle."""
        return tuple(dict.fromkeys((self.to, self.source)))

    def _sent_one_by_one(self) -> list[dist.Work | None]:
        """Where messages need not be grouped: an error at once says whose message it is about."""
        with naming(self.circle, (self.to,), self.step):
            sent = dist.isend(self.message, group=self.circle.group, group_dst=self.to)
        with naming(self.circle, (self.source,), self.step):
            received = dist.irecv(self.buffer, group=self.circle.group, group_src=self.source)
        return [sent, received]

    def _sent_together(self) -> list[dist.Work]:
        """NCCL pairs the messages of a group; one after the other they would wait for each other for ever."""
        sending = dist.P2POp(dist.isend, self.message, group=self.circle.group, group_peer=self.to)
        receiving = dist.P2POp(dist.irecv, self.buffer, group=self.circle.group, group_peer=self.source)
        with naming(self.circle, self._neighbours, self.step):
            return dist.batch_isend_irecv([sending, receiving])

    def wait(self) -> Tensor:
        """Finish (on a GPU: make the current stream wait for) both messages.

        Returns:
            The buffer, filled.

        Raises:
            RankError: naming the neighbour that did not answer.
        """
        # Some backends answer with one handle for both messages, others with one for each.
        is_for_each = len(self.works) == 2
        peers = [(self.to,), (self.source,)] if is_for_each else [self._neighbours] * len(self.works)
        for work, peer in reversed(list(zip(self.works, peers, strict=True))):
            with naming(self.circle, peer, self.step):
                finish(work)
        return self.buffer
