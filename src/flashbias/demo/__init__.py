"""The first experiment: attention over a real protein, with its bias as a matrix and as factors."""

from flashbias.demo.experiment import Settings, run
from flashbias.demo.measure import Measurement
from flashbias.demo.report import conclusion, markdown, write

__all__ = ["Measurement", "Settings", "conclusion", "markdown", "run", "write"]
