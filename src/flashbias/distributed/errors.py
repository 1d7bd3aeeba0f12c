"""What goes wrong between ranks: one has failed, or they do not agree."""

from __future__ import annotations

__all__ = ["DisagreementError", "RankError"]


class RankError(RuntimeError):
    """A message did not arrive: another rank has failed, is missing, or took longer than the group's timeout.

    Args:
        message: what happened.
        cp_rank: the rank that raises.
        peers: the ranks that it waited for.
        step: what it was doing, such as "keys and values, step 2 of 3, forward".

    Attributes:
        cp_rank: as given.
        peers: as given.
        step: as given.
    """

    def __init__(self, message: str, cp_rank: int, peers: tuple[int, ...], step: str) -> None:
        super().__init__(message)
        self.cp_rank, self.peers, self.step = cp_rank, peers, step

    def __reduce__(self) -> tuple[type[RankError], tuple[str, int, tuple[int, ...], str]]:
        """Launchers carry errors from one process to another."""
        return type(self), (str(self), self.cp_rank, self.peers, self.step)


class DisagreementError(ValueError):
    """Ranks were called with arguments that do not fit together; every rank raises it, before anything is sent.

    Args:
        message: which ranks, and what differs.
        ranks: the ranks that differ from rank 0, or that refused their own arguments.

    Attributes:
        ranks: as given.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[type[DisagreementError], tuple[str, tuple[int, ...]]]:
        """Launchers carry errors from one process to another."""
        return type(self), (str(self), self.ranks)
