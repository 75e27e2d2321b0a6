"""`mvm net verify`: what the kernel says about the network, against what the records ask for.

    expect   records and specifications -> what must be there      (`read_expected`)
    live     links by `ip`, rules by `nft`, settings of /proc/sys  (`read_live`)
    compare  the two, pure -> differences in words, with fixes     (`compare`)
    probe    packets from running guests that must pass or must not (`active`)

Runs as root. Changes nothing: what checks shares no code with what writes but the model of what is wanted, and never
what was noted down when rules were applied."""

from __future__ import annotations

from mvm.hostd.net_verify.compare import Difference, compare
from mvm.hostd.net_verify.live import Live, read_live
from mvm.hostd.net_verify.wanted import Expected, Instance, read_expected
from mvm.hostd.store import Store

__all__ = ["Difference", "Expected", "Instance", "Live", "compare", "read_expected", "read_live", "verify"]


def verify(store: Store) -> tuple[Expected, list[Difference]]:
    """Every difference there is now, and what was compared.

    An instance that changes meanwhile is judged again, up to three times, so that a wake that happens at the same
    moment is not reported as a fault; records are read before the kernel is and must be the same after.
    """
    for last in (False, False, True):
        expected = read_expected(store)
        live = read_live(expected)
        if last or read_expected(store) == expected:
            return expected, compare(expected, live)
    raise AssertionError("unreachable")
