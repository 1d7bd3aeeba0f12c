"""Benchmarks: frozen cases, this library and its peers, an agreement check before every number.

```python
import flashbias.bench as bench

csv = bench.run(["swin-49"], ["fwd", "fwdbwd"], ["ours", "bias-free", "dense"], out_dir="results")
print(bench.render(csv))
```

or `python -m flashbias.bench --help`.
"""

from flashbias.bench.cases import CASES, Case, Inputs, case_names
from flashbias.bench.peers import Unsupported
from flashbias.bench.providers import Prepared, Provider, provider_names
from flashbias.bench.report import Row, read_rows, render, write_tables
from flashbias.bench.runner import run
from flashbias.bench.suites import SUITES, Suite

__all__ = [
    "CASES",
    "SUITES",
    "Case",
    "Inputs",
    "Prepared",
    "Provider",
    "Row",
    "Suite",
    "Unsupported",
    "case_names",
    "provider_names",
    "read_rows",
    "render",
    "run",
    "write_tables",
]
