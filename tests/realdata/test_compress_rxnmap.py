"""chytorch-rxnmap 1.4, a Graphormer for molecules: a bias by distance along bonds, which is not low rank.

The negative case: it must be refused, with a report from which one can see why.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashbias as fb
from flashbias.decompose import NotLowRankError, Report, compress

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(1200)]

# Amino acids as SMILES, and human vasoactive intestinal peptide, C147H238N44O42S, an amide at its end.
RESIDUES = {
    "A": "NC(C)C(=O)",
    "D": "NC(CC(=O)O)C(=O)",
    "F": "NC(CC1=CC=CC=C1)C(=O)",
    "H": "NC(CC1=CN=CN1)C(=O)",
    "I": "NC(C(C)CC)C(=O)",
    "K": "NC(CCCCN)C(=O)",
    "L": "NC(CC(C)C)C(=O)",
    "M": "NC(CCSC)C(=O)",
    "N": "NC(CC(=O)N)C(=O)",
    "Q": "NC(CCC(=O)N)C(=O)",
    "R": "NC(CCCNC(=N)N)C(=O)",
    "S": "NC(CO)C(=O)",
    "T": "NC(C(C)O)C(=O)",
    "V": "NC(C(C)C)C(=O)",
    "Y": "NC(CC1=CC=C(O)C=C1)C(=O)",
}
PEPTIDE = "HSDAVFTDNYTRLRKQMAVKKYLNSILN"
NUM_ATOMS = 147 + 44 + 42 + 1  # without hydrogen
MAX_DISTANCE = 10


def bonds(smiles: str) -> list[tuple[int, int]]:
    """Pairs of bonded atoms, numbered in the order of their letters; one letter each, rings of one digit."""
    found, branches, rings = [], [], {}
    last, count = None, 0
    for sign in smiles:
        if sign.isalpha():
            if last is not None:
                found.append((last, count))
            last, count = count, count + 1
        elif sign == "(":
            branches.append(last)
        elif sign == ")":
            last = branches.pop()
        elif sign.isdigit() and sign in rings:
            found.append((rings.pop(sign), last))
        elif sign.isdigit():
            rings[sign] = last
    return found


def distances(pairs: list[tuple[int, int]], count: int) -> Tensor:
    """`[count, count]`: the smallest number of bonds between two atoms."""
    reached = torch.eye(count, dtype=torch.float64)
    bonded = torch.eye(count, dtype=torch.float64)
    for i, j in pairs:
        bonded[i, j] = bonded[j, i] = 1
    steps = torch.zeros(count, count, dtype=torch.long)
    while not bool((reached > 0).all()):
        steps += reached == 0
        reached = (reached @ bonded).clamp(max=1)
    return steps


@pytest.fixture(scope="module")
def bias(rxnmap_folder: Path) -> Tensor:
    """`[16, 235, 235]`: the peptide behind the token that stands for the molecule, as the model reads its table.

    Entry 1 of the table is for that token, entry 2 for an atom and itself, 2 + d for atoms d bonds apart.
    """
    weights = torch.load(rxnmap_folder / "chytorch/zoo/rxnmap/weights.pt", map_location="cpu", weights_only=True)
    table = weights["molecule_encoder.spatial_encoder.weight"]
    assert table.shape == (MAX_DISTANCE + 3, 16)
    pairs = bonds("".join(RESIDUES[letter] for letter in PEPTIDE) + "N")
    codes = torch.ones(NUM_ATOMS + 1, NUM_ATOMS + 1, dtype=torch.long)
    codes[1:, 1:] = distances(pairs, NUM_ATOMS).clamp(max=MAX_DISTANCE) + 2
    return table[codes].permute(2, 0, 1).contiguous()


def test_distances_are_those_of_the_molecule():
    ring = distances(bonds("CC1=CC=CC=C1"), 7)
    assert ring[0].tolist() == [0, 1, 2, 3, 4, 3, 2] and ring[2].tolist() == [2, 1, 0, 1, 2, 3, 2]
    peptide = distances(bonds("".join(RESIDUES[letter] for letter in PEPTIDE) + "N"), NUM_ATOMS)
    assert torch.equal(peptide, peptide.mT) and int(peptide[0, -1]) == 3 * len(PEPTIDE)


def test_most_of_the_energy_needs_most_of_the_ranks(bias: Tensor):
    centred = bias.double() - bias.double().mean(-1, keepdim=True)
    energy = torch.linalg.svdvals(centred).square().cumsum(-1)
    needed = (energy < 0.99 * energy[:, -1:]).sum(-1) + 1
    assert int(needed.min()) > 110 and int(needed.max()) < 210


@pytest.mark.parametrize("tol", [1e-3, 0.02, 0.1])
def test_is_refused_and_told_why(bias: Tensor, tol: float):
    with pytest.raises(NotLowRankError) as caught:
        compress(bias, tol)
    message = str(caught.value)
    assert "factors reach 0." in message and "in 16 of 16 heads" in message and "no table fits" in message
    assert "cost of the dense bias" in message and "allow_dense=True" in message
    report: Report = caught.value.report
    assert report.shape == (16, 235, 235) and report.break_even_rank < 235
    for head in report.heads:
        # The largest rank that pays keeps 9 tenths of the energy, and a certificate far above any use.
        assert head.form == "dense" and head.rank == report.break_even_rank
        assert head.energy > 0.85 and head.certificate > 0.2
        assert len(head.certificates) >= 3 and head.certificate == min(head.certificates.values())
    assert len(str(report).splitlines()) == 3 + 16


def test_can_be_kept_dense(bias: Tensor):
    kept = compress(bias, 1e-3, allow_dense=True)
    assert isinstance(kept, fb.MixedBias) and kept.heads == (tuple(range(16)),)
    q, k, v = torch.randn(3, 1, 16, 235, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(fb.attention(q, k, v, kept), expected)
