"""The forward pass for Hopper, which is repeatable."""

from flashbias.attention.hopper.forward import launch

__all__ = ["launch"]
