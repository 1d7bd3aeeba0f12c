"""Models of `timm`, one family per file.

What the families share: `base.py` the version that is needed and how attentions project, `windows.py` the blocks that
shift windows. What they share with other libraries' models lies one folder up. Nothing here imports timm: a model that
is patched has brought it along.
"""

from __future__ import annotations
