"""The Hopper kernels for calls whose gradients must be repeatable to the bit.

The forward pass is; the fused backward pass is not, so that of the portable kernels takes its place.
"""
