"""The part of Gluon that the kernels use, under one set of names for Triton 3.6 and 3.7.

Gluon is experimental: its names move between releases. Kernels import them from here only.
"""

# Gluon is untyped: what its functions take and return annotations cannot say.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false, reportOptionalMemberAccess=false

from triton._C.libtriton import ir
from triton.experimental.gluon import constexpr_function, jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "constexpr_function",
    "fence_async_shared",
    "gl",
    "jit",
    "load",
    "mbarrier",
    "reduce_add",
    "store",
    "store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

load = tma.async_copy_global_to_shared
store = tma.async_copy_shared_to_global
store_wait = tma.store_wait


@builtin
def reduce_add(descriptor, coord, src, _semantic=None):
    """Add a float32 box in shared memory to global memory; like `store`, waited for by `store_wait`.

    Gluon binds the instruction and has no function for it yet.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coord, src.handle)
