"""What every patched vision model owes, beyond the suite of all models: the same class, given images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from tests.integrations.suite import ModelSuite, relative
from torch import Tensor, nn

from flashbias.factored import FactoredBias
from flashbias.integrations import call, patch


class ImageTests(ModelSuite):
    """Tests of one family of vision models. "Padded" inputs are images of a size that the model is not made for."""

    form = "exact table"
    rank = 0
    size: ClassVar[tuple[int, int]]
    other_size: ClassVar[tuple[int, int]]
    parts: ClassVar[tuple[str, ...]] = ("bias", "mask")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "without" in metafunc.fixturenames:
            metafunc.parametrize("without", self.parts)

    def inputs(self, padded: bool, padding_side: str | None = None) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(2, 3, *(self.other_size if padded else self.size), generator=generator)}

    def test_tests_would_see_it(self, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A table or a mask that is lost is far outside of the tolerance of the other tests."""
        model, given, original = self.make(), self.inputs(padded=True), call.attention

        def crippled(query: Tensor, key: Tensor, value: Tensor, bias: FactoredBias, **options: Any) -> Any:
            assert bias.table is not None
            if without == "bias":
                return original(query, key, value, replace(bias, table=torch.zeros_like(bias.table)), **options)
            options = {name: option for name, option in options.items() if name != "attn_mask"}
            return original(query, key, value, replace(bias, phi_q=torch.zeros_like(bias.phi_q)), **options)

        with torch.no_grad():
            expected = self.result(model, given)
            patch(model)
            monkeypatch.setattr(call, "attention", crippled)
            assert relative(self.result(model, given), expected) > 1e-3


def compiles_to_one_graph(model: nn.Module, **given: Any) -> None:
    """Check that `torch.compile` leaves nothing out, for images of one size."""
    with torch.no_grad():
        expected = model(**given)[0]
        patch(model)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
        assert relative(compiled(**given)[0], expected) < 1e-5


def draw_tables(model: nn.Module) -> None:
    """Fill the tables, which are zero in a new model."""
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter, std=2.0)
