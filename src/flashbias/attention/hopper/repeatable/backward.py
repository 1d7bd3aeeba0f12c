"""The backward pass for Hopper, its additions in one order."""

import functools

from flashbias.attention.hopper import backward

__all__ = ["launch"]

launch = functools.partial(backward.launch, repeatable=True)
