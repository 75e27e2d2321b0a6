from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.linux import capabilities

STATUS = """Name:\tx
CapInh:\t0000000000000000
CapPrm:\t00000000000010a0
CapEff:\t0000000000001020
CapBnd:\t000001ffffffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
"""


@pytest.mark.req("H3")
def test_what_the_kernel_says() -> None:
    found = capabilities.parse_status(STATUS)
    assert found.permitted == {"KILL", "SETUID", "NET_ADMIN"}
    assert found.effective == {"KILL", "NET_ADMIN"}
    assert found.bounding == set(capabilities.NAMES)
    assert found.no_new_privs
    assert found.seccomp == 2


@pytest.mark.req("H3")
@pytest.mark.parametrize("line", ["CapEff", "CapBnd", "NoNewPrivs", "Seccomp"])
def test_a_kernel_that_does_not_say_is_not_believed(line: str) -> None:
    with pytest.raises(KeyError):
        capabilities.parse_status("\n".join(x for x in STATUS.splitlines() if not x.startswith(line + ":")))


@pytest.mark.req("H3")
def test_a_name_cannot_forge_a_field() -> None:
    lesser = STATUS.replace("Seccomp:\t2", "Seccomp:\t0")
    assert capabilities.parse_status("Name:\t\x1cSeccomp:\t2\n" + lesser).seccomp == 0
    assert capabilities.parse_status(lesser + "Seccomp:\t2\n").seccomp == 0


@given(st.sets(st.sampled_from(capabilities.NAMES)))
def test_masks_and_names_are_one_thing(wanted: set[str]) -> None:
    assert capabilities.names(capabilities.mask(wanted)) == wanted


def test_a_newer_capability_is_not_lost() -> None:
    assert capabilities.names(1 << 50) == {"50"}
    assert capabilities.mask_of(capabilities.names(1 << 50 | 1)) == 1 << 50 | 1
