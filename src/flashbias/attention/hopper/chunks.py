"""Columns that a head has: products over no more of them, and sums no wider.

Boxes of the copy engine and tensors are powers of two wide, heads are not. Past the columns of a head a box holds zeros
that nobody read, and nobody needs to multiply. So operands are cut: 80 columns are chunks of 64 and 16, each one more
product into the same sum; and a sum of 80 columns is two tensors of 64 and 16.

In what follows a head's columns are a tuple, of operands (`chunks_of`) or of sums (`sums_of`), the widest first.
"""

# Gluon is untyped: jitted functions take and return what annotations cannot say.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# It knows no unpacking inside of a tuple.
# ruff: noqa: RUF005

from flashbias.attention.hopper.gluon import constexpr_function, gl, jit, warpgroup_mma, warpgroup_mma_wait
from flashbias.attention.hopper.tiles import ROWS


@constexpr_function
def chunks_of(width):
    """Cut the columns that a product sums over into powers of two.

    Returns:
        Where each chunk begins, and its columns, the widest first: `(0, 64), (64, 32), (96, 16)` for 112.
    """
    sizes = [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
    return tuple((sum(sizes[:n]), size) for n, size in enumerate(sizes))


@constexpr_function
def sums_of(width):
    """Cut the columns of a sum into tensors of a power of two.

    Two at most: half of the columns as held, in whole panels of 64, which the copy engine swizzles together, and the
    rest as held. Where that is as wide, or a panel would be cut, one tensor holds all columns.

    Returns:
        Where each tensor begins, and its columns: `(0, 64), (64, 16)` for 80, `(0, 128)` for 112, `(0, 64)` for 48.
    """
    half = (1 << (width - 1).bit_length()) // 2
    rest = 1 << (width - half - 1).bit_length()
    return ((0, half), (half, rest)) if half % 64 == 0 and rest < half else ((0, 2 * half),)


@constexpr_function
def chunk_count(width):
    """Chunks that `width` columns are cut into."""
    return len(chunks_of(width))


@constexpr_function
def sum_count(width):
    """Tensors that a sum of `width` columns is held in."""
    return len(sums_of(width))


@constexpr_function
def _chunk(width, n, which):
    """Where chunk n begins (0), and its columns (1): one number at a time, since a tuple would become tensors."""
    return chunks_of(width)[n][which]


@constexpr_function
def _sum(width, n, which):
    """As `_chunk`, of sums."""
    return sums_of(width)[n][which]


@constexpr_function
def half_columns(width, held, n):
    """How many columns the n-th warpgroup of two has: a tensor of the sum each, or half of what is held."""
    return sums_of(width)[n][1] if len(sums_of(width)) == 2 else held // 2


@constexpr_function
def sum_layout(columns):
    """Registers of a sum of 64 rows."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@constexpr_function
def weights_layout(width):
    """Registers of what is multiplied into a sum of `width` columns."""
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, sums_of(width)[0][1], 16]), 2)


@jit
def of(x, WIDTH: gl.constexpr):
    """The first WIDTH columns of a matrix in shared memory."""
    cut = ()
    for n in gl.static_range(chunk_count(WIDTH)):
        cut = cut + (x.slice(_chunk(WIDTH, n, 0), _chunk(WIDTH, n, 1), 1),)
    return cut


@jit
def issue(a, b, s, USE_ACC: gl.constexpr):
    """`s + a b^T`, or `a b^T`, in flight; one product for each chunk."""
    for n in gl.static_range(len(a)):
        s = warpgroup_mma(a[n], b[n].permute((1, 0)), s, use_acc=USE_ACC or n > 0, is_async=True)
    return s


@jit
def zeros(WIDTH: gl.constexpr):
    """An empty sum of 64 rows."""
    sums = ()
    for n in gl.static_range(sum_count(WIDTH)):
        sums = sums + (gl.zeros([ROWS, _sum(WIDTH, n, 1)], gl.float32, sum_layout(_sum(WIDTH, n, 1))),)
    return sums


@jit
def add(sums, p, x, WIDTH: gl.constexpr):
    """`sums + p x`, in flight, x in shared memory; one product for each tensor."""
    new = ()
    for n in gl.static_range(sum_count(WIDTH)):
        own = gl.convert_layout(p, gl.DotOperandLayout(0, sum_layout(_sum(WIDTH, n, 1)), 2))
        part = x.slice(_sum(WIDTH, n, 0), _sum(WIDTH, n, 1), 1)
        new = new + (warpgroup_mma(own, part, sums[n], is_async=True),)
    return new


@jit
def settled(sums, PENDING: gl.constexpr):
    """Sums whose products are done, when no more than the last PENDING products are in flight."""
    if len(sums) == 1:
        return (warpgroup_mma_wait(PENDING, deps=sums),)
    else:
        return warpgroup_mma_wait(PENDING, deps=sums)


@jit
def scaled(sums, factors, WIDTH: gl.constexpr):
    """Each row times its factor."""
    new = ()
    for n in gl.static_range(sum_count(WIDTH)):
        own = gl.convert_layout(factors, gl.SliceLayout(1, sum_layout(_sum(WIDTH, n, 1))))
        new = new + (sums[n] * own[:, None],)
    return new


@jit
def times(sums, factor):
    """All rows times one number."""
    new = ()
    for n in gl.static_range(len(sums)):
        new = new + (sums[n] * factor,)
    return new


@jit
def write(sums, smem, WIDTH: gl.constexpr):
    """Write sums to a matrix in shared memory, in its type; what is wider keeps what it held."""
    for n in gl.static_range(sum_count(WIDTH)):
        smem.slice(_sum(WIDTH, n, 0), _sum(WIDTH, n, 1), 1).store(sums[n].to(smem.dtype))


@jit
def write_rows(sums, ptr, first, WIDTH: gl.constexpr, STRIDE: gl.constexpr):
    """Write sums to 64 rows, from row `first`, of STRIDE numbers each."""
    for n in gl.static_range(sum_count(WIDTH)):
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, sum_layout(_sum(WIDTH, n, 1))))
        column = _sum(WIDTH, n, 0) + gl.arange(0, _sum(WIDTH, n, 1), gl.SliceLayout(0, sum_layout(_sum(WIDTH, n, 1))))
        gl.store(ptr + row[:, None] * STRIDE + column[None, :], sums[n])
