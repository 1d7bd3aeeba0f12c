"""Products on the matrix unit, in every precision."""

# Triton's language is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """`acc + a @ b` on the matrix unit; acc None starts from zero."""
    if INTERPRETED:
        # The interpreter multiplies bfloat16 operands as if they were integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        return tl.dot(a, b) if acc is None else tl.dot(a, b, acc)
    elif PRECISION == "tf32x3" and a.dtype == tl.float32:
        # a b = a0 b0 + (a0 b1 + a1 b0) + a1 b1, the last of which is lost in rounding. Triton's own tf32x3 cuts the
        # small parts off where this rounds them: every score came out smaller by a few units of its last place.
        a0, a1 = two_parts(a)
        b0, b1 = two_parts(b)
        s = tl.dot(a1, b0, input_precision="tf32")
        s = tl.dot(a0, b1, s, input_precision="tf32")
        s = tl.dot(a0, b0, s, input_precision="tf32")
        return s if acc is None else acc + s
    elif acc is None:
        return tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def two_parts(x):
    """float32 as a sum of two TF32 numbers, to 2^-23; infinities are all in the first."""
    x0 = nearest_tf32(x)
    return x0, nearest_tf32(tl.where(x == x0, 0.0, x - x0))


@triton.jit
def nearest_tf32(x):
    """A float32 rounded to the 10 explicit bits of TF32, ties away from zero; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    # A GPU's own NaN has all bits set: the addition makes zero of it.
    return tl.where(x == x, rounded, x)
