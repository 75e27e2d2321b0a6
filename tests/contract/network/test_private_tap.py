"""A tap in a network namespace of its own: what is in there, who may have it, and that nothing is left of it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import frames
from tests.support.network_lab import Port, inside, network_lab, take_tap
from tests.support.world import network_namespace

from mvm.core.errors import Conflict
from mvm.hostd import keeper
from mvm.hostd.jail import Jail
from mvm.hostd.resources import network
from mvm.hostd.resources.private_tap import open_private_tap
from mvm.linux import process
from mvm.linux.pidfd import is_alive

pytestmark = pytest.mark.root
UID = 1_900_123_457
BRIDGE, TAP = "mvm-b1", "mvm-t1s0"


@pytest.fixture
def bridge() -> Iterator[str]:
    with network_namespace():
        network.ensure_bridge(network.BridgeSpec(BRIDGE, "10.240.1.1", 24))
        yield BRIDGE


def gone(name: str) -> bool:
    """The kernel removes a namespace in its own time."""
    until = time.monotonic() + 20
    while name in network.inspect() and time.monotonic() < until:
        time.sleep(0.02)
    return name not in network.inspect()


@pytest.mark.req("N1", "N2", "H4")
def test_the_host_has_the_same_port_as_of_any_tap(bridge: str) -> None:
    namespace = open_private_tap(TAP, UID, bridge)
    try:
        assert not os.get_inheritable(namespace)
        private = network.inspect()[TAP]
        assert (private.kind, private.master, private.up, private.isolated) == ("veth", bridge, True, True)
        assert private.addresses == (), "and no IPv6 link-local address"
        setting = Path(f"/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6")
        assert not setting.exists() or setting.read_text().strip() == "1"
        plain = network.open_tap("mvm-t1s1", UID, bridge)
        try:
            other = network.inspect()["mvm-t1s1"]
            assert (other.master, other.up, other.isolated) == (private.master, private.up, private.isolated)
            assert (other.mtu, other.addresses) == (private.mtu, private.addresses)
        finally:
            os.close(plain)
    finally:
        os.close(namespace)


@pytest.mark.req("N1", "H4")
def test_inside_is_the_way_out_and_nothing_that_speaks(bridge: str) -> None:
    namespace = open_private_tap(TAP, UID, bridge)
    try:
        with inside(namespace):
            links = network.inspect()
            details = process.run(["ip", "-d", "link", "show", TAP], timeout=10).stdout
            ports = json.loads(process.run(["bridge", "-d", "-json", "link"], timeout=10).stdout)
            generated = process.run(["ip", "-d", "link", "show"], timeout=10).stdout.decode()
    finally:
        os.close(namespace)
    # Some kernels put their fallback tunnels into every namespace, down.
    mine = {name: link for name, link in links.items() if link.up}
    assert {name: link.kind for name, link in mine.items()} == {
        TAP: "tun", "mvm-in": "bridge", "mvm-out": "veth",
    }  # fmt: skip
    assert (mine[TAP].master, mine["mvm-out"].master) == ("mvm-in", "mvm-in")
    assert (mine["mvm-in"].stp, mine["mvm-in"].forward_delay_s) == (False, 0)
    assert all(link.addresses == () for link in links.values())
    assert len(re.findall(r"addrgenmode none", generated)) >= 3 or not os.path.isdir("/proc/sys/net/ipv6")
    assert f"user {UID}".encode() in details
    assert {port["ifname"]: port["learning"] for port in ports} == {TAP: False, "mvm-out": False}


@pytest.mark.req("N1", "H4")
@pytest.mark.parametrize(("uid", "expected"), [(UID, 0), (UID + 1, errno.EPERM)])
def test_only_its_owner_opens_it(bridge: str, uid: int, expected: int) -> None:
    namespace = open_private_tap(TAP, UID, bridge)
    try:
        with inside(namespace):
            pid = os.fork()
            if pid == 0:
                code = 255
                try:
                    fd = os.open("/dev/net/tun", os.O_RDWR)  # some hosts let only root
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", TAP.encode(), 0x2 | 0x1000 | 0x4000))
                    code = 0
                except OSError as error:
                    code = error.errno or 255
                finally:
                    os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == expected
    finally:
        os.close(namespace)


@pytest.mark.req("L7")
def test_all_of_it_goes_with_its_descriptor(bridge: str) -> None:
    os.close(open_private_tap(TAP, UID, bridge))
    assert gone(TAP)
    assert set(network.inspect()) == {"lo", bridge}
    assert network.remove_bridge_if_unused(bridge)


@pytest.mark.req("L7")
def test_a_port_that_is_on_its_way_out_is_waited_for(bridge: str) -> None:
    """A VMM has ended a moment ago, and the kernel has not come to its namespace yet."""
    earlier = open_private_tap(TAP, UID, bridge)
    later = threading.Timer(0.2, os.close, [earlier])
    later.start()
    try:
        os.close(open_private_tap(TAP, UID, bridge))
    finally:
        later.join()


@pytest.mark.req("L7")
def test_a_name_that_is_taken_and_a_bridge_that_is_not_there_leave_nothing(bridge: str) -> None:
    namespace = open_private_tap(TAP, UID, bridge)
    try:
        before = network.inspect()
        with pytest.raises(Conflict):
            open_private_tap(TAP, UID, bridge)
        assert network.inspect() == before, "what had the name has it still"
    finally:
        os.close(namespace)
    with pytest.raises(Conflict):
        open_private_tap("mvm-t2s0", UID, "mvm-b2")
    assert "mvm-t2s0" not in network.inspect()


@pytest.mark.req("L7")
def test_a_port_is_removed_at_once_where_nobody_has_it(bridge: str) -> None:
    network.remove_port(TAP)
    namespace = open_private_tap(TAP, UID, bridge)
    os.close(namespace)
    network.remove_port(TAP)
    assert network.remove_bridge_if_unused(bridge), "no waiting for the kernel"
    network.ensure_bridge(network.BridgeSpec(BRIDGE, "10.240.1.1", 24))
    os.close(open_private_tap(TAP, UID, bridge))
    network.remove_port(TAP)
    os.close(open_private_tap(TAP, UID, bridge))
    network.remove_port(TAP)
    # What an earlier version made stays without a process.
    held = network.open_tap(TAP, UID, bridge)
    with pytest.raises(Conflict, match="cannot be removed"):
        network.remove_port(TAP)
    fcntl.ioctl(held, 0x400454CB, 1)
    os.close(held)
    assert TAP in network.inspect()
    network.remove_port(TAP)
    assert TAP not in network.inspect()
    with pytest.raises(Conflict, match="cannot be removed"):
        network.remove_port(bridge)


@pytest.mark.req("N2", "L7")
def test_a_guest_that_makes_up_macs_fills_no_table() -> None:
    with network_lab(private=True) as lab:
        (guest,) = lab.tenant(1)
        for number in range(200):
            mac = f"02:aa:00:00:00:{number:02x}"
            guest.send(
                frames.ethernet(
                    mac, guest.gateway_mac, frames.ARP, frames.arp(1, mac, "1.2.3.4", guest.gateway)
                )
            )
        assert guest.pings(guest.gateway)
        with inside(guest.namespace):
            known = process.run(["bridge", "fdb", "show"], timeout=10).stdout.decode()
        assert "mvm-out" in known
        assert "02:aa:00" not in known
        outside = process.run(["bridge", "fdb", "show"], timeout=10).stdout.decode()
        assert "02:aa:00" not in outside


# As Firecracker's jailer and Firecracker: another user, and the tap by its name.
VMM = f"""
import fcntl, os, struct, sys, time
os.closerange(3, 4096)
fd = os.open("/dev/net/tun", os.O_RDWR)
os.setresgid({UID}, {UID}, {UID})
os.setresuid({UID}, {UID}, {UID})
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x2 | 0x1000 | 0x4000))
print("there", flush=True)
for _ in range(1000):  # the kernel takes up to a second to let a bridge speak that has just got its first port
    os.write(fd, bytes(10) + bytes.fromhex(sys.argv[2]))
    time.sleep(0.1)
"""


@pytest.mark.req("H4", "L7", "N2")
@pytest.mark.parametrize("victim", ["vmm", "keeper"])
def test_killed_it_takes_its_network_along(tmp_path: Path, victim: str) -> None:
    runtime = tmp_path / "runtime"
    (runtime / "logs").mkdir(parents=True)
    (tmp_path / "jail").mkdir()
    with network_lab() as lab:
        lab.tenant(1)
        port = Port(1, 0, -1)
        os.close(lab.disown(lab.ports[port.tap].fd))
        namespace = open_private_tap(port.tap, UID, BRIDGE)
        question = frames.ethernet(port.mac, frames.BROADCAST, frames.ARP,
                                   frames.arp(1, port.mac, port.ip, port.gateway))  # fmt: skip
        jail = Jail(
            root=tmp_path / "jail",
            namespaces=frozenset({"mount", "net", "ipc"}),
            network=namespace,
            pivot=False,
        )
        ours, theirs = socket.socketpair()
        try:
            with ours, theirs:
                program = keeper.Program(
                    [sys.executable, "-c", VMM, port.tap, question.hex()],
                    {1: theirs.fileno()}, 0, 0, (), jail=jail, owner=(UID, UID), tied=True, lock_fd=0,
                )  # fmt: skip
                vmm, kept = keeper.launch(
                    program, runtime=runtime, console=ours, errors=runtime / "logs/vmm.log"
                )
        finally:
            os.close(namespace)
        try:
            console, until = runtime / "logs/console.log", time.monotonic() + 10
            while not (console.exists() and b"there" in console.read_bytes()):
                assert is_alive(vmm), (runtime / "logs/vmm.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.01)
            mine = {kind: os.readlink(f"/proc/thread-self/ns/{kind}") for kind in ("net", "ipc", "mnt")}
            assert all(os.readlink(f"/proc/{vmm.pid}/ns/{kind}") != found for kind, found in mine.items())
            assert os.readlink(f"/proc/{kept.pid}/ns/net") == mine["net"], "the keeper holds nothing of it"
            assert _known(port), "its frame came out of its port"
            assert network.inspect()[port.tap].master == BRIDGE, "held by the VMM alone"
            os.kill(vmm.pid if victim == "vmm" else kept.pid, signal.SIGKILL)
            assert gone(port.tap)
            assert network.remove_bridge_if_unused(BRIDGE)
        finally:
            keeper.end_leftovers(runtime)


def _known(port: Port) -> bool:
    """Whether the host has this guest's MAC by what it sent."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        table = process.run(["bridge", "fdb", "show", "br", BRIDGE], timeout=10).stdout.decode()
        if re.search(rf"^{port.mac} dev {port.tap}\b", table, re.MULTILINE):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.req("N1", "H4")
def test_a_tap_is_found_in_its_namespace_only(bridge: str) -> None:
    namespace = open_private_tap(TAP, UID, bridge)
    try:
        os.close(take_tap(namespace, TAP))
        with pytest.raises(OSError, match=r"busy|Invalid|exist"):
            take_tap(None, TAP)  # here the name is that of the veth, which nobody can attach to
    finally:
        os.close(namespace)
