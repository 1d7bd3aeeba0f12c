"""Evidence for `flashbias.decompose`; see `__main__.py`."""
