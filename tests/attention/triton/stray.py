"""A kernel that reads past its tensor, to show that the check of `test_bounds.py` sees it."""

import triton
import triton.language as tl


@triton.jit
def read_one_past(data_ptr, out_ptr, length, BLOCK: tl.constexpr):
    """Copy with a mask that is off by one."""
    offs = tl.arange(0, BLOCK)
    values = tl.load(data_ptr + offs, mask=offs < length + 1, other=0.0)
    tl.store(out_ptr + offs, values)
