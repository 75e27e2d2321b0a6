"""Lines for the console, the only log a guest without a disk has."""

from __future__ import annotations

import os


def line(text: str) -> None:
    """Write one line to standard error; a console that is gone is no reason to fail."""
    try:
        os.write(2, b"mvm-guest: " + text.encode("utf-8", "replace") + b"\n")
    except OSError:
        pass


def failure(what: str, error: BaseException) -> None:
    """One line for an unexpected exception: its type, text and where it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    line(f"{what}: {type(error).__name__}: {error}{where}")
