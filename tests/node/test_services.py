"""mvm as it is installed: mvm-hostd a service of systemd, its VMs beside it, root and a member of its group as callers.

What is asserted is read from the node's kernel and its systemd, not from what mvm says of itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from tests.node.conftest import Rig
from tests.node.guests import RUN_S, Guests, state, vmms

from mvm.core import addressing
from mvm.hostd import confine
from mvm.hostd.install import units
from mvm.linux import capabilities

pytestmark = pytest.mark.node
SLICE = "/sys/fs/cgroup/mvm.slice"
MEMBER = "member"


@pytest.fixture(scope="module")
def tenant(guests: Guests) -> str:
    return guests.create("serviced")


@pytest.fixture(scope="module")
def running(rig: Rig, tenant: str) -> Iterator[str]:
    """`tenant`, running, for as long as this module's tests need it."""
    rig.sh(f"mvm tenant run {tenant}", timeout=RUN_S)
    yield tenant
    rig.sh(f"mvm tenant stop {tenant}")


@pytest.fixture(scope="module")
def member(rig: Rig) -> str:
    """A user without any right but membership of the group."""
    rig.sh(
        f"printf 'u {MEMBER} - \"A member\" /tmp /bin/sh\\nm {MEMBER} mvm\\n' >/etc/sysusers.d/test-{MEMBER}.conf;"
        f"systemd-sysusers /etc/sysusers.d/test-{MEMBER}.conf"
    )
    assert "mvm" in rig.sh("id -nG", user=MEMBER).split()
    return MEMBER


def daemon(rig: Rig) -> int:
    return int(rig.sh(f"systemctl show --property=MainPID --value {units.SERVICE}"))


def status(rig: Rig, pid: int) -> capabilities.Status:
    return capabilities.parse_status(rig.sh(f"cat /proc/{pid}/status"))


def the_vmm(rig: Rig) -> int:
    (pid,) = vmms(rig)
    return pid


@pytest.mark.req("H7", "O4")
def test_bootstrap_installed_and_started_the_service(rig: Rig) -> None:
    shows = rig.sh(
        f"systemctl is-active {units.SERVICE} {units.SOCKET}; systemctl is-enabled {units.SERVICE}"
    )
    assert shows.split() == ["active", "active", "enabled"]
    assert rig.sh("stat -c '%U %G %a' /run/mvm/hostd.sock").strip() == "root mvm 660"
    assert 'mode = "baseline"' in rig.sh("cat /etc/mvm/hostd.toml")
    for path, data in units.load().items():
        if path not in units.CONDITIONAL:
            assert rig.sh(f"cat {path}").encode() == data, path


@pytest.mark.req("H7")
def test_bootstrap_changes_nothing_the_second_time(rig: Rig) -> None:
    pid = daemon(rig)
    told = [json.loads(line) for line in rig.sh("mvm bootstrap --output json").splitlines()]
    assert [line for line in told if "step" in line] == []
    assert {line["id"] for line in told if line.get("result") == "ok"} >= {
        "daemon", "daemon-capabilities", "daemon-filter", "socket", "slice", "mode",
    }  # fmt: skip
    assert daemon(rig) == pid


@pytest.mark.req("H7", "L5")
def test_bootstrap_puts_back_what_was_changed_and_says_so_first(rig: Rig) -> None:
    rig.sh(f"rm {units.TMPFILES}; echo '# more' >>/etc/systemd/system/{units.SERVICE}")
    before = daemon(rig)
    said = rig.sh("mvm bootstrap --dry-run")
    assert "would    write /etc/tmpfiles.d/mvm.conf" in said
    assert daemon(rig) == before
    rig.sh(f"! test -e {units.TMPFILES}; mvm bootstrap")
    assert daemon(rig) != before
    assert rig.sh(f"cat {units.TMPFILES}").encode() == units.load()[units.TMPFILES]


@pytest.mark.req("O3")
def test_bootstrap_refuses_without_nftables_and_changes_nothing(rig: Rig) -> None:
    """Taken away for one command: the program, by a mount over it in a namespace of that command's own."""
    without = "unshare --mount sh -c 'mount --bind /dev/null /usr/sbin/nft; exec mvm bootstrap'"
    done = rig.mvm("shell", "--", "sh", "-c", f"rm {units.TMPFILES}; {without}", code=15)
    assert b"nft" in done.stderr
    assert b"fix: apt-get install" in done.stderr
    rig.sh(f"! test -e {units.TMPFILES}; mvm bootstrap")


@pytest.mark.req("O3")
def test_bootstrap_refuses_without_kvm_and_goes_on_for_development(rig: Rig) -> None:
    without = "unshare --mount sh -c 'mount --bind /dev/null /dev/kvm; exec mvm bootstrap --dry-run {}'"
    done = rig.mvm("shell", "--", "sh", "-c", without.format(""), code=15)
    assert b"/dev/kvm" in done.stderr
    assert b"fix:" in done.stderr
    loud = rig.mvm("shell", "--", "sh", "-c", without.format("--development"))
    assert b"NOT PROTECTED: guests are emulated in software" in loud.stderr
    assert b"10-emulation.conf" in loud.stdout
    assert b"would    write /etc/mvm/hostd.toml: mode development" in loud.stdout


@pytest.mark.req("H7")
def test_bootstrap_leaves_alone_what_somebody_else_wrote(rig: Rig) -> None:
    done = rig.mvm("shell", "--", "sh", "-c", f"echo mine >{units.TMPFILES}; mvm bootstrap", code=11)
    assert str(units.TMPFILES).encode() in done.stderr
    assert rig.sh(f"cat {units.TMPFILES}; rm {units.TMPFILES}; mvm bootstrap >/dev/null") == "mine\n"


@pytest.mark.req("H3")
def test_the_daemon_may_what_is_documented_and_no_more(rig: Rig) -> None:
    held, documented = status(rig, daemon(rig)), frozenset(confine.CAPABILITIES)
    assert (held.effective, held.permitted, held.bounding) == (documented, documented, documented)
    assert held.inheritable == held.ambient == frozenset()
    assert (held.no_new_privs, held.seccomp) == (True, 2)


@pytest.mark.req("H7")
def test_exposure(rig: Rig) -> None:
    """By the systemd that runs it, for the unit as loaded."""
    analysis = rig.sh(f"systemd-analyze security --no-pager {units.SERVICE}")
    found = re.search(r"exposure level for mvm-hostd.service: ([\d.]+)", analysis)
    assert found is not None
    assert float(found[1]) <= 3.0


@pytest.mark.req("H7")
def test_it_is_in_its_slice_whose_controllers_stay_on_without_it(rig: Rig) -> None:
    assert rig.sh(f"cat /proc/{daemon(rig)}/cgroup").strip() == "0::/mvm.slice/mvm-hostd.service"
    enabled = f"cat {SLICE}/cgroup.subtree_control"
    assert {"cpu", "memory", "pids"} <= set(rig.sh(enabled).split())
    rig.sh("systemctl daemon-reload")
    assert {"cpu", "memory", "pids"} <= set(rig.sh(enabled).split())


@pytest.mark.req("H7")
def test_the_host_is_read_only_to_it_but_for_its_own(rig: Rig) -> None:
    inside = f"nsenter --target {daemon(rig)} --mount sh -c"
    for place in ("/etc", "/usr", "/opt", "/sys/fs/cgroup", "/sys/fs/cgroup/system.slice"):
        probe = f"{inside} 'mkdir {place}/mvm-probe' 2>&1 || true"
        assert "Read-only file system" in rig.sh(probe), place
    for place in ("/var/lib/mvm", "/run/mvm", SLICE):
        rig.sh(f"{inside} 'mkdir {place}/mvm-probe && rmdir {place}/mvm-probe'")


@pytest.mark.req("H2", "H7")
def test_the_socket_starts_the_daemon(rig: Rig) -> None:
    """systemd listens; the first to connect has the daemon started, and is answered by it."""
    rig.sh(f"systemctl stop {units.SERVICE}")
    assert daemon(rig) == 0
    assert rig.sh(f"systemctl is-active {units.SOCKET}").strip() == "active"
    rig.sh("MVM_HOSTD=/run/mvm/hostd.sock mvm instance list")
    ask = (
        "from mvm.hostd.install.verify import SOCKET; from mvm.linux.stream import UnixStream;"
        "from mvm.wire.hostd_client import HostdClient; print(HostdClient(lambda: UnixStream.dial(SOCKET)).ping().pid)"
    )
    answered = int(rig.sh(f"/opt/mvm/bin/python -c '{ask}'"))
    assert answered == daemon(rig) > 0
    # It was handed over, not made anew: systemd holds the same socket.
    inode = rig.sh(f"readlink /proc/{answered}/fd/3").strip()
    assert inode in rig.sh("find /proc/1/fd -lname 'socket:*' -printf '%l\\n'").split()


@pytest.mark.req("H5", "H4", "H6", "K1")
def test_what_a_vmm_is_to_the_kernel(rig: Rig, running: str) -> None:
    pid = the_vmm(rig)
    uid = str(addressing.UID_BASE)
    lines = rig.sh(f"cat /proc/{pid}/task/*/status").splitlines()
    assert {line.split()[1] for line in lines if line.startswith("Seccomp:")} == {"2"}
    assert {line.split()[1] for line in lines if line.startswith("NoNewPrivs:")} == {"1"}
    assert {int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")} == {0}
    uids = {tuple(line.split()[1:]) for line in lines if line.startswith("Uid:")}
    assert len(uids) == 1
    assert {*uids.pop()} == {rig.sh(f"stat -c %u /proc/{pid}").strip()}
    assert int(rig.sh(f"stat -c %u /proc/{pid}")) >= int(uid)
    assert "anon_inode:kvm-vm" in rig.sh(f"find /proc/{pid}/fd -lname 'anon_inode:*' -printf '%l\\n'")


@pytest.mark.req("H4")
def test_a_vmm_is_in_a_jail_of_its_own(rig: Rig, running: str) -> None:
    pid = the_vmm(rig)
    own = rig.sh(f"for n in mnt pid net; do readlink /proc/{pid}/ns/$n /proc/1/ns/$n; done").split()
    for theirs, hosts in zip(own[::2], own[1::2], strict=True):
        assert theirs != hosts
    inside = set(rig.sh(f"ls -A /proc/{pid}/root/").split())
    assert inside.isdisjoint({"root", "home", "var", "boot", "opt", "sys", "run", "srv", "state", "mnt"})
    assert rig.sh(f"touch /proc/{pid}/root/probe 2>&1 || true").strip().endswith("Read-only file system")
    # A jail is no mount of the host: nothing can be left of it.
    assert "mvm-jail" not in rig.sh("cat /proc/1/mountinfo")


@pytest.mark.req("H5")
def test_a_vmm_is_limited_by_a_control_group_of_its_own(rig: Rig, running: str) -> None:
    pid = the_vmm(rig)
    group = rig.sh(f"cat /proc/{pid}/cgroup").strip().removeprefix("0::")
    assert group.startswith("/mvm.slice/mvm-instances/")
    limits = rig.sh(
        f"cd /sys/fs/cgroup{group}; cat memory.max memory.swap.max pids.max memory.oom.group cpu.max"
    )
    memory, swap, pids, together, quota, period = limits.split()
    assert 192 << 20 < int(memory) < 1 << 30
    assert (swap, together) == ("0", "1")
    assert 0 < int(pids) < 4096
    assert int(quota) >= int(period)


@pytest.mark.req("K1")
def test_the_data_disk_is_open_by_the_kernel_while_it_runs(rig: Rig, running: str) -> None:
    names = rig.sh("dmsetup ls --target crypt").split()
    assert [name for name in names if name.startswith("mvm-")] != []


@pytest.mark.req("H2", "L3")
def test_a_restart_of_the_daemon_leaves_the_vm_running(rig: Rig, running: str) -> None:
    rig.sh(f"mvm tenant exec {running} -- sh -c 'echo still here >/run/mark'")
    pid, before = the_vmm(rig), daemon(rig)
    rig.sh(f"systemctl restart {units.SERVICE}")
    assert daemon(rig) not in (0, before)
    assert the_vmm(rig) == pid
    assert state(rig, running) == "running"
    assert rig.sh(f"mvm tenant exec {running} -- cat /run/mark") == "still here\n"
    rig.sh(f"mvm tenant sleep {running}; mvm tenant wake {running}", timeout=RUN_S)
    assert rig.sh(f"mvm tenant exec {running} -- cat /run/mark") == "still here\n"


@pytest.mark.req("H2", "S1", "S2", "L7")
def test_a_member_of_the_group_lives_a_guests_life(rig: Rig, running: str, member: str) -> None:
    """Through the socket and nothing else: it can read no file of mvm's."""
    rig.mvm("shell", "--user", member, "--", "ls", "/var/lib/mvm", code=2)

    def mvm(command: str) -> str:
        return rig.sh(f"mvm {command}", user=member, timeout=RUN_S)

    mvm(f"tenant exec {running} -- sh -c 'echo by a member >/run/member'")
    mvm(f"tenant sleep {running}")
    assert vmms(rig) == []
    assert state(rig, running) == "sleeping"
    assert [n for n in rig.sh("dmsetup ls --target crypt").split() if n.startswith("mvm-")] == []
    mvm(f"tenant wake {running}")
    assert mvm(f"tenant exec {running} -- cat /run/member") == "by a member\n"
    mvm(f"tenant stop {running}")
    assert vmms(rig) == []
    mvm(f"tenant run {running}")
    assert mvm(f"tenant exec {running} -- cat /proc/uptime")
    assert "uid=" in rig.sh(f"cat /var/lib/mvm/tenants/{running}/audit.log")
    assert running in mvm("tenant list")


@pytest.mark.req("H2")
def test_nobody_else_is_heard(rig: Rig) -> None:
    done = rig.mvm("shell", "--user", "nobody", "--", "mvm", "tenant", "list", code=None)
    assert done.returncode not in (0, 125)


@pytest.mark.req("L7")
def test_after_destroy_nothing_is_left(rig: Rig, guests: Guests) -> None:
    tenant = guests.create("short")
    rig.sh(f"mvm tenant run {tenant}", timeout=RUN_S)
    before = set(vmms(rig))
    rig.sh(f"mvm tenant destroy {tenant} --wipe-volumes --yes")
    assert len(before - set(vmms(rig))) == 1
    places = (f"{SLICE}/mvm-instances/*{tenant}*", f"/dev/mapper/*{tenant}*")
    assert rig.sh(f"ls -d {' '.join(places)} 2>/dev/null || true") == ""
    # The audit log outlives its tenant, with the locks that it was written under, and nothing else does.
    kept = rig.sh(f"cd /var/lib/mvm/tenants/{tenant} && find . -type f").split()
    assert [name for name in kept if not name.startswith("./audit.") and not name.endswith("lock")] == []
