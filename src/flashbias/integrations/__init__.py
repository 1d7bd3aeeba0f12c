"""Whole models: `patch` makes their biased attention factored, `unpatch` takes that back, `supports` says beforehand.

One folder for each library that models come from, one file in it for each family of models.
"""

from __future__ import annotations

from flashbias.integrations.base import Family
from flashbias.integrations.convert import unpatched_state_dict
from flashbias.integrations.patching import patch, supports, unpatch
from flashbias.integrations.report import AttentionEntry, PatchReport, UnpatchReport, WrittenTable

__all__ = [
    "AttentionEntry",
    "Family",
    "PatchReport",
    "UnpatchReport",
    "WrittenTable",
    "patch",
    "supports",
    "unpatch",
    "unpatched_state_dict",
]
