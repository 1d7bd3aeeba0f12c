"""From a tensor or a function to factors: certified, learned, or distilled."""

from flashbias.decompose.compress import compress
from flashbias.decompose.report import HeadReport, NotLowRankError, Report

__all__ = ["HeadReport", "NotLowRankError", "Report", "compress"]
