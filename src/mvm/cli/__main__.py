"""`mvm` and `python -m mvm.cli`."""

from __future__ import annotations

import signal
from types import FrameType


def main() -> None:
    from mvm.cli.root import root

    # By default these end the process at once, and no block gets to clean up after itself.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)
    root.main(prog_name="mvm")


def _end(number: int, _frame: FrameType | None) -> None:
    from mvm.cli.failures import Terminated

    raise Terminated(number)


if __name__ == "__main__":
    main()
