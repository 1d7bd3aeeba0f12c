"""What every patched vision model of transformers owes."""

from __future__ import annotations

from typing import Any

from tests.integrations.transformers.suite import PatchedModelSuite
from tests.integrations.vision import ImageTests
from torch import Tensor


class VisionSuite(ImageTests, PatchedModelSuite):
    """Tests of one family of vision models."""

    hidden_rows_differ = False

    def result(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        pixels = inputs["pixel_values"].to(next(model.parameters()).dtype)
        return model(**{**inputs, "pixel_values": pixels})[0].flatten(0, 1)
