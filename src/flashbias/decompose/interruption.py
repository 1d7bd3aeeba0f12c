"""Ctrl-C at a time when nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupts_held_back"]


@contextmanager
def interrupts_held_back(wanted: bool) -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the function that is yielded is called; a second one acts at once.

    Only Python's own handling is replaced: a program that has another one knows what it wants.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (wanted and in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield lambda: None
        return
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ask)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
