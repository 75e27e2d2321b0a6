"""The guest cannot import the host's definitions, so both sides spell them out; here they must agree."""

from __future__ import annotations

from struct import Struct

import pytest

from mvm.guest import proto
from mvm.wire import framing, guest_api


def _constants(*modules: object) -> dict[str, object]:
    found: dict[str, object] = {}
    for module in modules:
        for name, value in vars(module).items():
            if name.isupper() and not name.startswith("_"):
                shown = value.format if isinstance(value, Struct) else value
                assert found.get(name, shown) == shown, f"{name} differs between the host's own modules"
                found[name] = shown
    return found


@pytest.mark.req("L6")
def test_every_constant_of_the_guest_agrees_with_the_hosts() -> None:
    guest = _constants(proto)
    host = _constants(framing, guest_api)
    renamed = {
        "TREE_FAILED",
        "ENTROPY_SIZE",
        "MAX_MESSAGE",
        "NONCE_SIZE",
    }  # literals or local names in the guest
    assert guest.keys() - host.keys() == set()
    assert host.keys() - guest.keys() == renamed
    assert {name: host[name] for name in guest} == guest
