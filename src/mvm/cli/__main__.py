"""`mvm` and `python -m mvm.cli`: the process around the command line."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

# Starting up makes tens of thousands of objects, none of them garbage; the default looks for some after every 700.
_GC_THRESHOLD = 100_000


def main() -> NoReturn:
    gc.set_threshold(_GC_THRESHOLD)
    from mvm.cli.root import root

    # By default these end the process at once, and no block gets to clean up after itself.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)
    try:
        root.main(prog_name="mvm")
    except SystemExit as ended:
        _exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    _exit(0)


def _exit(code: int) -> NoReturn:
    """Without taking the interpreter apart object by object, which the end of a process makes pointless and which
    takes a fifth of the time of a short command. Every block that had something to clean up has done so by now."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        pass
    os._exit(code)


def _end(number: int, _frame: FrameType | None) -> None:
    from mvm.cli.failures import Terminated

    raise Terminated(number)


if __name__ == "__main__":
    main()
