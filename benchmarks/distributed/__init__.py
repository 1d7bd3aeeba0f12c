"""Attention over a sequence that is spread over GPUs: time, memory and bytes; see `__main__.py`."""
