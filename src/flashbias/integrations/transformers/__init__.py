"""Models of Hugging Face's `transformers`, one family per file.

What the families share: `masks.py` keeps masks at one entry per key, `attend.py` holds the two forms that a bias takes
in language models and the call under such a mask, `windows.py` the layers that shift windows, `base.py` what has to
change in a model besides its attentions. What they share with other libraries' models lies one folder up.
"""

from __future__ import annotations

import transformers

OLDEST = (5, 23)
"""Before, masks were asked for with other arguments."""


def check_version(version: str) -> None:
    """Raise an ImportError if this version of transformers is too old."""
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"flashbias patches models of transformers {oldest} or newer, found {version}; upgrade transformers"
        )


check_version(transformers.__version__)
