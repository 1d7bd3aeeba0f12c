"""The portable backward pass, which adds in one order."""

from flashbias.attention.triton.backward import launch

__all__ = ["launch"]
