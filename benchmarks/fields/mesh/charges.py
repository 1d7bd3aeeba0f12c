"""The field to be learned: charges that point charges beside a coated conductor draw onto its surface.

The conductor's surface carries a density sigma. At each of its points the potential of the outer charges, that of the
surface itself and the drop through a coat of thickness `COAT` add up to one constant, and the whole charge is zero:

    phi_i + 1/N sum_j sigma_j / sqrt(|x_i - x_j|^2 + SOFTENING^2) + COAT sigma_i = c,        sum_j sigma_j = 0.

That is a boundary integral equation, solved here in float64 with all pairs of points. sigma at a point depends on phi
everywhere and on the shape of the whole body. It needs no normals and no closed surface, so any mesh will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Clouds", "Sample", "induced", "rotations"]

SOFTENING = 0.05
COAT = 0.05
OUTER_CHARGES = 8
OUTER_DISTANCE = 0.2
"""About how far the outer charges are from the surface; bodies have a radius of 1 in the root mean square."""


@dataclass(frozen=True)
class Sample:
    """Points `[B, N, 3]`, outer potential `[B, N]` of mean 0 and deviation 1, and density `[B, N]`."""

    points: Tensor
    potential: Tensor
    density: Tensor


class Clouds:
    """Clouds of points on bodies, and the solution operator of each.

    Args:
        surfaces: `[bodies, M, 3]`, points on each.
        each: clouds drawn from each body.
        count: N, points of a cloud.
        generator: of the draws, on the device of the surfaces.
    """

    def __init__(self, surfaces: Tensor, each: int, count: int, generator: torch.Generator) -> None:
        clouds = surfaces.repeat_interleave(each, 0)
        order = torch.rand(clouds.shape[:2], generator=generator, device=clouds.device).argsort(-1)[:, :count]
        self.points = clouds.gather(1, order[..., None].expand(-1, -1, 3))
        self.operators = torch.stack([_operator(points) for points in self.points])

    def draw(self, batch: int, generator: torch.Generator) -> Sample:
        """Random clouds, each turned at random, beside random charges."""
        device = self.points.device
        return self.sample(torch.randint(len(self.points), (batch,), generator=generator, device=device), generator)

    def sample(self, which: Tensor, generator: torch.Generator) -> Sample:
        """Given clouds `[B]`, each turned at random, beside random charges."""
        points = self.points[which]
        potential = outer_potential(points, generator)
        density = induced(self.operators[which], potential)
        return Sample(points @ rotations(len(which), generator), potential, density)


def outer_potential(points: Tensor, generator: torch.Generator) -> Tensor:
    """`[B, N]`: that of charges near random points of the surface, shifted and scaled to mean 0 and deviation 1."""
    batch, count, _ = points.shape
    random = {"generator": generator, "device": points.device}
    near = torch.randint(count, (batch, OUTER_CHARGES), **random)
    places = points.gather(1, near[..., None].expand(-1, -1, 3))
    places = places + OUTER_DISTANCE * torch.randn(places.shape, **random)
    charges = torch.randn(batch, OUTER_CHARGES, 1, **random)
    potential = (_inverse_distances(points, places, 2 * SOFTENING) @ charges)[..., 0]
    potential = potential - potential.mean(-1, keepdim=True)
    return potential / potential.std(-1, keepdim=True)


def induced(operator: Tensor, potential: Tensor) -> Tensor:
    """The density `[B, N]`, from the inverse `[B, N, N]` of the surface's own potential: `A^-1 (c - phi)`."""
    of_one, of_potential = (operator @ torch.stack([torch.ones_like(potential), potential], -1)).unbind(-1)
    constant = of_potential.sum(-1, keepdim=True) / of_one.sum(-1, keepdim=True)
    return constant * of_one - of_potential


def rotations(batch: int, generator: torch.Generator) -> Tensor:
    """`[B, 3, 3]`, all turns and reflections being equally likely."""
    orthogonal, triangular = torch.linalg.qr(torch.randn(batch, 3, 3, generator=generator, device=generator.device))
    return orthogonal * triangular.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def _operator(points: Tensor) -> Tensor:
    """Inverse of what turns a density on the points into their potential, the coat's included."""
    points = points.double()
    own = _inverse_distances(points, points, SOFTENING) / len(points)
    own.diagonal().add_(COAT)
    return torch.linalg.inv(own).float()


def _inverse_distances(a: Tensor, b: Tensor, softening: float) -> Tensor:
    return ((a[..., :, None, :] - b[..., None, :, :]).square().sum(-1) + softening**2).rsqrt()
