"""Points on the surfaces of real bodies, packed once into a file of 3 MiB."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from benchmarks.debian import cache_folder, fetched
from benchmarks.decomposition.mesh import motorbike, vertices
from benchmarks.record import say
from numpy.typing import NDArray
from torch import Tensor

from flashbias.files import whole_file

__all__ = [
    "HELD_OUT",
    "TRAINED",
    "fetch",
    "motorbike_vertices",
    "read_triangles",
    "spread",
    "surfaces",
]

PACKAGE = "openfoam-examples"
POINTS = 8192
"""Points on each body."""

TRAINED = {
    "wigley.stl.gz": "6a81cbdabce2f0cf9dc17c3e9a9f353122af302d7ccb96f35796cd23814c0bac",
    "bullet.stl.gz": "1b3f0890d1ed5fabb8d099a1bc402b50e4d5b26919611738a16b3c4ad85ec4c7",
    "propellerTip.obj.gz": "699f913089a998d1a3f4a29a455a5951a2cbb6b3043d9795afec9098f3f7b936",
    "flange.stl.gz": "0718a8d9348d0b62a3db9d17c8a4651d47609987c631b4ee112b882c15234f04",
    "blob.stl.gz": "a14596335ee1bd22cbf1fa71eff07e1ef8869478c46eba05e9983fb6f68704c6",
    "cyclone.stl.gz": "7d2373f6173be1a9d9e9cad063e4dd2d7b1eba907d294c65fa498cf5806af63b",
    "fan.stl.gz": "7a48bcf3d1a29bacdb0a4a23c710a377915bd2097d5608b25b1d7ad8635ee87a",
    "rotating_unscaled.stl.gz": "539ba11e8a1df9fdd5c57490f3b87f0936c2c8baa1a10152ab37bc40af509cb4",
    "buildings.obj.gz": "c9c55dc97c9a72e92ceceb625b385f7cf30c7c2e618003e9e9b117781d9fd95c",
    "building_wtc2.obj.gz": "747f58dd92bb9c9c9a4ea6c4d1a70418b92194058aec98ae32bb8f4d545cb7f1",
    "shaft.obj.gz": "d688e3966dc08c249a868a66466b93bb56c06774da999fb807c078570b0372c8",
    "statorBlades.obj.gz": "5d1c518d87f52984707880d4859ca8500f32d806e18b7b370a385c6004e74748",
    "opencfd_text.stl.gz": "31460ddecd6fbdbf66d59b98d10f80bf5f1e2878df185a8d3660ca6d707af2b0",
    "sloshingCylinder.obj.gz": "bfd25cf10fae0a2fec076e4c78ff5011b690e3ca4f3692b8357c8246280f05dc",
    "membrane-boundaries.stl.gz": "eb288b7caf630d7be0ac3b6acea1fe6f9f05d98f25562f48448912af6fffc615",
}
HELD_OUT = {
    "motorBike.obj.gz": "d06307675434ac6f1aecd458ae08efeeaae908516dce1d6b4a74db679cebc0a7",
    "DTC-scaled.stl.gz": "fe4359ce8b9594537e8314a7cbbaaaaf4992b7b6e19928a4cc36bf80bc5b6317",
    "simpleCar.stl.gz": "efac4162e84dfc10badbb305471821d93e5e032ea31f863c6abe2cc68b7bdccf",
}
"""Bodies of the package and their sha256. The hull, the car and the motorbike are seen in no training."""

VERTICES = "motorBike, all vertices"

Triangles = NDArray[np.float64]  # [triangles, 3 corners, 3]


def packed_file() -> Path:
    """Where the points are kept."""
    return cache_folder() / "mesh.npz"


def fetch() -> None:
    """Pack the points of all bodies and the vertices of the motorbike, if that is not done yet."""
    if packed_file().exists():
        return
    points = {body: spread(read_triangles(fetched(PACKAGE, body, sha256))) for body, sha256 in bodies().items()}
    points[VERTICES] = vertices(motorbike()).numpy()
    with whole_file(packed_file()) as part, part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **points)
    say(f"packed: {packed_file().name}, {packed_file().stat().st_size / 2**20:.1f} MiB")


def bodies() -> dict[str, str]:
    """All of them."""
    return TRAINED | HELD_OUT


def surfaces(names: list[str]) -> Tensor:
    """`[bodies, 8192, 3]`, float32: points spread evenly over each body's surface, on unit scale."""
    with np.load(packed_file()) as packed:
        return torch.stack([on_unit_scale(torch.from_numpy(packed[name])) for name in names])


def motorbike_vertices() -> Tensor:
    """`[132871, 3]`, float32, on unit scale."""
    with np.load(packed_file()) as packed:
        return on_unit_scale(torch.from_numpy(packed[VERTICES]))


def on_unit_scale(points: Tensor) -> Tensor:
    """Points about their centre, at a distance of 1 from it in the root mean square."""
    centred = points - points.mean(-2, keepdim=True)
    return centred / centred.square().sum(-1).mean(-1).sqrt()


def spread(triangles: Triangles, count: int = POINTS) -> NDArray[np.float32]:
    """`[count, 3]`: points drawn evenly from the area of the triangles, the same ones at every call."""
    generator = np.random.default_rng(0)
    corner, edges = triangles[:, 0], triangles[:, 1:] - triangles[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1)
    chosen = generator.choice(len(triangles), count, p=area / area.sum())
    along = generator.random((count, 2))
    outside = along.sum(-1) > 1
    along[outside] = 1 - along[outside]
    return (corner[chosen] + (along[..., None] * edges[chosen]).sum(1)).astype(np.float32)


def read_triangles(path: Path) -> Triangles:
    """Read a gzipped Wavefront (`.obj.gz`) or STL file, text or binary."""
    content = gzip.decompress(path.read_bytes())
    if path.name.endswith(".obj.gz"):
        return _wavefront(content.decode())
    count = int.from_bytes(content[80:84], "little")
    return _binary_stl(content) if len(content) == 84 + 50 * count else _text_stl(content.decode())


def _wavefront(text: str) -> Triangles:
    """Polygons are cut into triangles about their first corner."""
    words = [line.split() for line in text.splitlines() if line.startswith(("v ", "f "))]
    places = np.array([[float(number) for number in line[1:4]] for line in words if line[0] == "v"])
    polygons = [[int(corner.split("/")[0]) - 1 for corner in line[1:]] for line in words if line[0] == "f"]
    fans = [(first, a, b) for first, *rest in polygons for a, b in pairwise(rest)]
    return places[np.array(fans)]


def _binary_stl(content: bytes) -> Triangles:
    """80 bytes of header, a count, and records of a normal, three corners and two bytes more."""
    records = np.frombuffer(content[84:], np.dtype([("vectors", "<f4", (4, 3)), ("attribute", "<u2")]))
    return records["vectors"][:, 1:].astype(np.float64)


def _text_stl(text: str) -> Triangles:
    lines = (line.split() for line in text.splitlines())
    corners = [[float(number) for number in words[1:4]] for words in lines if words[:1] == ["vertex"]]
    return np.array(corners).reshape(-1, 3, 3)
