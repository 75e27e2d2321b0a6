"""The checklist's judges, over facts of a host that is fit, with one thing wrong at a time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mvm.hostd.inspect.doctor import (
    Acceleration,
    Check,
    Facts,
    Leftovers,
    Result,
    diagnose,
    open_to_others,
)
from mvm.hostd.inspect.host import HostFacts, Kvm, PathFacts, SwapFacts
from mvm.hostd.inspect.tools import OPTIONAL, PROGRAMS, NftFacts, Tool

ROOT = "/var/lib/mvm"
FIT = HostFacts(
    root=True, environment="bare", hypervisor=False, os="Debian", kernel="6.1", machine="x86_64", cpu="a CPU",
    cpus=8, load_1m=0.0, mem_total=64 << 30, mem_available=60 << 30, kvm=Kvm(True, 12), smt="off", ksm="0", swaps=(),
    vulnerabilities={"meltdown": "Not affected", "spectre_v2": "Mitigation: Retpolines; STIBP: disabled"},
    cgroup="v2", controllers=("cpuset", "cpu", "io", "memory", "pids"),
    devices={"/dev/net/tun": True, "/dev/fuse": True, "/dev/userfaultfd": True, "/dev/vhost-vsock": True},
    dm_crypt="ready", nr_uarts=0, clock_synchronised=True,
    state=(PathFacts(ROOT, "directory", 0, 0o700), PathFacts("/var", "directory", 0, 0o755)),
    disk_total=1 << 40, disk_free=1 << 39,
)  # fmt: skip
TOOLS = {name: Tool(name, f"/usr/bin/{name}", "1.16.1") for name in (*PROGRAMS, *OPTIONAL)}


def facts(host: HostFacts = FIT, **changes: Any) -> Facts:
    accel = Acceleration("kvm", "a stock kernel boots with it (0.3 s)")
    return msgspec.structs.replace(Facts(ROOT, host, TOOLS, NftFacts(True), accel), **changes)


def by_id(seen: Facts) -> dict[str, Check]:
    checks = diagnose(seen)
    assert len({check.id for check in checks}) == len(checks)
    return {check.id: check for check in checks}


@pytest.mark.req("O1")
def test_a_fit_host_passes_everything() -> None:
    assert {check.result for check in diagnose(facts())} == {Result.OK}


@pytest.mark.req("O1", "L3")
def test_what_is_left_over_comes_with_what_to_do() -> None:
    assert "leftovers" not in by_id(facts())
    assert by_id(facts(leftovers=Leftovers()))["leftovers"].result is Result.OK
    found = by_id(facts(leftovers=Leftovers(undo=("tap mvm-t1s0: nobody's",), lacks=("a lacks b",))))[
        "leftovers"
    ]
    assert found.result is Result.WARNING
    assert found.seen == "tap mvm-t1s0: nobody's; a lacks b"
    assert found.fix.startswith("mvm doctor --repair; ")
    assert "--repair" not in by_id(facts(leftovers=Leftovers(left=("x",), unseen=("y",))))["leftovers"].fix
    blind = facts(host=msgspec.structs.replace(FIT, root=False), leftovers=Leftovers(unseen=("y",)))
    assert by_id(blind)["leftovers"].fix == "sudo mvm doctor"


WRONG: list[tuple[str, Result, dict[str, Any]]] = [
    ("kvm", Result.FAIL, {"kvm": Kvm(False, problem="there is no /dev/kvm")}),
    ("kvm", Result.FAIL, {"kvm": Kvm(True, 11)}),
    ("kvm", Result.WARNING, {"kvm": Kvm(True, problem="Permission denied"), "root": False}),
    ("smt", Result.FAIL, {"smt": "on"}),
    ("smt", Result.WARNING, {"smt": None}),
    ("ksm", Result.FAIL, {"ksm": "1"}),
    ("ksm", Result.NOT_APPLICABLE, {"ksm": None}),
    (
        "cpu",
        Result.FAIL,
        {"vulnerabilities": {"mds": "Vulnerable: Clear CPU buffers attempted, no microcode"}},
    ),
    ("cpu", Result.FAIL, {"vulnerabilities": {"itlb_multihit": "KVM: Vulnerable"}}),
    ("cpu", Result.FAIL, {"vulnerabilities": {"spectre_v2": "Mitigation: Retpolines; BHI: Vulnerable"}}),
    ("cpu", Result.OK, {"vulnerabilities": {"mds": "Mitigation: Clear CPU buffers; SMT vulnerable"}}),
    ("cpu", Result.WARNING, {"vulnerabilities": {}}),
    ("swap", Result.FAIL, {"swaps": (SwapFacts("/dev/sda2", False),)}),
    ("swap", Result.WARNING, {"swaps": (SwapFacts("/dev/sda2", None),)}),
    ("swap", Result.WARNING, {"swaps": None}),
    ("cgroup", Result.FAIL, {"cgroup": "hybrid", "controllers": ()}),
    ("cgroup", Result.FAIL, {"controllers": ("cpu", "memory", "pids", "io")}),
    ("paging", Result.FAIL, {"devices": {"/dev/net/tun": True}}),
    ("tun", Result.FAIL, {"devices": {"/dev/fuse": True}}),
    ("vsock", Result.NOT_APPLICABLE, {"devices": {"/dev/fuse": True}}),
    ("dm-crypt", Result.FAIL, {"dm_crypt": "absent"}),
    ("uarts", Result.WARNING, {"nr_uarts": 32}),
    ("disk", Result.FAIL, {"disk_free": 1 << 30}),
    ("disk", Result.WARNING, {"disk_free": 5 << 30}),
    ("memory", Result.WARNING, {"mem_available": 1 << 20}),
    ("state", Result.FAIL, {"state": (PathFacts(ROOT, "directory", 0, 0o755),)}),
    ("state", Result.NOT_APPLICABLE, {"state": (PathFacts("/var", "directory", 0, 0o755),)}),
    ("clock", Result.WARNING, {"clock_synchronised": False}),
    ("clock", Result.WARNING, {"clock_synchronised": None}),
]


@pytest.mark.req("O1")
@pytest.mark.parametrize(("name", "result", "changes"), WRONG)
def test_what_is_wrong_is_found_and_comes_with_a_fix(
    name: str, result: Result, changes: dict[str, Any]
) -> None:
    check = by_id(facts(msgspec.structs.replace(FIT, **changes)))[name]
    assert check.result is result
    assert check.seen
    assert bool(check.fix) == (result in (Result.FAIL, Result.WARNING))


@pytest.mark.req("O1")
def test_programs_firewall_and_the_boot_probe() -> None:
    without = {**TOOLS, "nft": Tool("nft", "", ""), "jailer": Tool("jailer", "/usr/bin/jailer", "1.15.0")}
    seen = by_id(facts(tools=without, nft=NftFacts(False, "not found"), accel=Acceleration("tcg", "tried")))
    assert seen["program:nft"].result is Result.FAIL
    assert "nftables" in seen["program:nft"].fix
    assert seen["nftables"].result is Result.FAIL
    assert seen["firecracker"].result is Result.WARNING
    assert seen["kvm-boots"].result is Result.FAIL
    unknown = by_id(
        facts(nft=NftFacts(None, "only root can try it"), accel=Acceleration("", "not probed yet"))
    )
    assert unknown["nftables"].result is Result.WARNING
    assert unknown["kvm-boots"].result is Result.WARNING


@pytest.mark.parametrize(
    ("fire", "jail", "result", "says"),
    [
        (("/f", "1.16.1"), ("/j", "1.16.1"), Result.OK, "1.16.1"),
        (("", ""), ("", ""), Result.NOT_APPLICABLE, "not installed"),
        (("/f", "1.16.1"), ("", ""), Result.WARNING, "jailer is not installed"),
        (("/f", "1.16.1"), ("/j", "1.15.0"), Result.WARNING, "jailer 1.15.0"),
        (("/f", ""), ("/j", ""), Result.WARNING, "does not say its version"),
        (("/f", "", "others can change /f"), ("/j", "1.16.1"), Result.WARNING, "others can change /f"),
    ],
)
def test_firecracker_is_fit_where_both_programs_say_one_version(
    fire: tuple[str, ...], jail: tuple[str, ...], result: Result, says: str
) -> None:
    tools = {**TOOLS, "firecracker": Tool("firecracker", *fire), "jailer": Tool("jailer", *jail)}
    check = by_id(facts(tools=tools))["firecracker"]
    assert check.result is result
    assert says in check.seen
    assert bool(check.fix) == (result is Result.WARNING)


@pytest.mark.req("L4")
@pytest.mark.parametrize(
    ("path", "bad"),
    [
        (PathFacts(ROOT, "directory", 0, 0o700), False),
        (PathFacts(ROOT, "directory", 0, 0o750), True),
        (PathFacts(ROOT, "link", 0, 0o777), True),
        (PathFacts("/var", "directory", 0, 0o755), False),
        (PathFacts("/var", "directory", 0, 0o775), True),
        (PathFacts("/var", "directory", 1000, 0o755), True),
        (PathFacts("/tmp", "directory", 0, 0o1777), False),
    ],
)
def test_who_else_could_change_the_state(path: PathFacts, bad: bool) -> None:
    assert bool(list(open_to_others((path,), ROOT))) is bad
