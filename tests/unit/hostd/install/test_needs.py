"""Which rows of the checklist baseline mode demands."""

from __future__ import annotations

import msgspec
import pytest
from tests.unit.hostd.inspect.test_doctor import FIT, TOOLS, facts

from mvm.hostd.inspect.doctor import Check, Facts, Result, diagnose
from mvm.hostd.inspect.host import Kvm
from mvm.hostd.inspect.tools import NftFacts, Tool
from mvm.hostd.install import needs

ROWS = {check.id: check for check in diagnose(facts())}


@pytest.mark.req("O3")
def test_a_fit_host_lacks_nothing() -> None:
    assert needs.lacking(ROWS.values()) == []
    assert not needs.emulated(ROWS.values())


def test_every_row_that_is_demanded_exists() -> None:
    """A row that is renamed would otherwise never be missed, or always."""
    assert set(needs.REQUIRED) | set(needs.VMMS) | {"kvm-boots"} <= ROWS.keys()


@pytest.mark.req("O3")
@pytest.mark.parametrize("name", needs.REQUIRED)
@pytest.mark.parametrize("result", [Result.FAIL, Result.WARNING, Result.NOT_APPLICABLE])
def test_each_is_missed_with_its_fix_and_what_is_lost(name: str, result: Result) -> None:
    bad = msgspec.structs.replace(ROWS[name], result=result, fix="do this")
    (lack,) = needs.lacking({**ROWS, name: bad}.values())
    assert (lack.check, lack.lost) == (bad, needs.REQUIRED[name])


@pytest.mark.req("O3")
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("kvm", facts(msgspec.structs.replace(FIT, kvm=Kvm(False, problem="there is no /dev/kvm")))),
        ("cgroup", facts(msgspec.structs.replace(FIT, cgroup="hybrid", controllers=()))),
        ("dm-crypt", facts(msgspec.structs.replace(FIT, dm_crypt="absent"))),
        ("nftables", facts(nft=NftFacts(False, "no such thing"))),
    ],
)
def test_a_host_without_it_is_found_out(name: str, found: Facts) -> None:
    lacks = needs.lacking(diagnose(found))
    assert name in [lack.check.id for lack in lacks]
    assert all(lack.check.fix for lack in lacks)


def test_a_row_that_nobody_looked_at_is_missing() -> None:
    assert [lack.check.id for lack in needs.lacking(c for n, c in ROWS.items() if n != "kvm")] == ["kvm"]


def test_one_vmm_is_enough() -> None:
    none = Tool("", "", "")
    no_qemu = {**TOOLS, "qemu-system-x86_64": none}
    assert needs.lacking(diagnose(facts(tools=no_qemu))) == []
    no_vmm = {**no_qemu, "firecracker": none, "jailer": none}
    assert [lack.check.id for lack in needs.lacking(diagnose(facts(tools=no_vmm)))] == [needs.VMMS[0]]


def test_kvm_that_boots_nothing_is_no_kvm() -> None:
    bad = Check("kvm-boots", "", Result.FAIL, "it hangs", "another host")
    rows = {**ROWS, "kvm-boots": bad}
    assert [lack.check for lack in needs.lacking(rows.values())] == [bad]
    assert needs.emulated(rows.values())
    not_tried = {**ROWS, "kvm-boots": msgspec.structs.replace(bad, result=Result.WARNING)}
    assert needs.lacking(not_tried.values()) == []
