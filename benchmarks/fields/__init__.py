"""Whole models of the five fields: trained, and timed at full size; see `__main__.py`."""
