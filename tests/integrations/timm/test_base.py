"""Which versions of timm are known."""

from __future__ import annotations

import pytest
import timm
from timm.models.swin_transformer import SwinTransformer

from flashbias.integrations import patch, supports


@pytest.mark.parametrize(
    ("found", "known"), [("1.0.30", False), ("0.9.16", False), ("1.0.31", True), ("1.1.0.dev0", True)]
)
def test_version(found: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SwinTransformer(img_size=16, embed_dim=8, depths=(2,), num_heads=(2,), window_size=2)
    monkeypatch.setattr(timm, "__version__", found)
    assert bool(supports(model).unsupported) != known
    if not known:
        with pytest.raises(NotImplementedError, match=rf"timm 1.0.31 or newer is needed, found {found}; upgrade timm"):
            patch(model)
