"""Bridges and taps, in a network namespace of the test's own: the host's is never touched."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import Conflict, InvalidInput
from mvm.hostd.resources import network
from mvm.linux import netlink, process

_CLONE_NEWNET = 0x40000000
SPEC = network.BridgeSpec("mvmt1", "10.240.1.1", 24)


@pytest.fixture
def namespace() -> Iterator[None]:
    """This thread moves to a fresh namespace, which the kernel removes with its last user."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if libc.unshare(_CLONE_NEWNET) != 0:
        os.close(home)
        pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        assert libc.setns(home, _CLONE_NEWNET) == 0
        os.close(home)


def _ipv6_disabled(name: str) -> bool:
    path = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    return not path.exists() or path.read_text().strip() == "1"


@pytest.mark.root
@pytest.mark.req("N1")
def test_a_bridge_is_made_as_specified(namespace: None) -> None:
    network.ensure_bridge(SPEC)
    found = network.inspect()["mvmt1"]
    assert (found.kind, found.up, found.stp, found.forward_delay_s) == ("bridge", True, False, 0)
    assert found.mac == network.gateway_mac("10.240.1.1") == "0a:6d:0a:f0:01:01"
    assert found.addresses == ("10.240.1.1/24",), "and no IPv6 link-local address"
    assert _ipv6_disabled("mvmt1")


@pytest.mark.root
@pytest.mark.req("N1")
def test_ensuring_again_changes_nothing_and_repairs(namespace: None) -> None:
    network.ensure_bridge(SPEC)
    before = network.inspect()
    network.ensure_bridge(SPEC)
    assert network.inspect() == before
    for change in (
        ["addr", "flush", "dev", "mvmt1"],
        ["addr", "add", "192.0.2.1/24", "dev", "mvmt1"],
        ["link", "set", "mvmt1", "address", "02:00:00:00:00:01"],
        ["link", "set", "mvmt1", "down"],
    ):
        process.run(["ip", *change], timeout=10)
        network.ensure_bridge(SPEC)
        assert network.inspect() == before, change


@pytest.mark.root
@pytest.mark.req("N1", "N2")
def test_a_tap_is_an_isolated_port_that_is_up(namespace: None) -> None:
    network.ensure_bridge(SPEC)
    fd = network.open_tap("mvmt1-0", 4242, "mvmt1")
    try:
        found = network.inspect()["mvmt1-0"]
        assert (found.kind, found.master, found.up, found.isolated) == ("tun", "mvmt1", True, True)
        assert found.addresses == ()
        assert _ipv6_disabled("mvmt1-0")
        assert not os.get_inheritable(fd)
        flags = struct.unpack("16sH22x", fcntl.ioctl(fd, 0x800454D2, bytes(40)))[1]  # TUNGETIFF
        assert flags & 0x4000, "virtio-net header"
        assert not flags & 0x0800, "not persistent"
        owner = process.run(["ip", "-d", "link", "show", "mvmt1-0"], timeout=10).stdout
        assert b"user 4242" in owner
    finally:
        os.close(fd)


@pytest.mark.root
@pytest.mark.req("N1", "L7")
def test_a_tap_dies_with_its_process(namespace: None) -> None:
    network.ensure_bridge(SPEC)
    fd = network.open_tap("mvmt1-0", 0, "mvmt1")
    child = process.start(["sleep", "300"], pass_fds=[fd])
    os.close(fd)
    with child:
        assert "mvmt1-0" in network.inspect(), "the child alone holds it"
        with pytest.raises(Conflict):
            network.open_tap("mvmt1-0", 0, "mvmt1")
        assert not network.remove_bridge_if_unused("mvmt1")
        child.stop(grace=0)
    assert set(network.inspect()) == {"lo", "mvmt1"}
    assert network.remove_bridge_if_unused("mvmt1")
    assert network.remove_bridge_if_unused("mvmt1")
    assert set(network.inspect()) == {"lo"}


def _frames(tap: int, wait: float) -> list[bytes]:
    """What comes out of a tap until it is silent, without the virtio-net header."""
    frames = []
    while process.wait_readable(tap, wait):
        frames.append(os.read(tap, 4096)[10:])
        wait = 0.1
    return frames


@pytest.mark.root
@pytest.mark.req("N2")
def test_two_ports_cannot_reach_each_other_but_the_gateway_hears_both(namespace: None) -> None:
    """Frames are written into one tap as a guest would send them, and looked for at the other."""
    network.ensure_bridge(SPEC)
    one, two = (network.open_tap(f"mvmt1-{i}", 0, "mvmt1") for i in (0, 1))
    try:
        # ARP: who has 10.240.1.1, to everybody. The neighbour must not see it; the gateway must answer.
        mac = bytes.fromhex("0a0000000001")
        frame = b"\xff" * 6 + mac + b"\x08\x06" + bytes.fromhex("0001080006040001") + mac
        frame += bytes([10, 240, 1, 2]) + bytes(6) + bytes([10, 240, 1, 1])
        os.write(one, bytes(10) + frame.ljust(60, b"\0"))
        answers = [frame for frame in _frames(one, 5) if frame[12:14] == b"\x08\x06"]
        assert answers[0][6:12] == bytes.fromhex("0a6d0af00101"), "the gateway's MAC"
        # The answer came back through the same bridge, so the flood to the neighbour is over by now.
        assert not [frame for frame in _frames(two, 0.1) if mac in frame]
    finally:
        os.close(one)
        os.close(two)


@pytest.mark.root
@pytest.mark.req("N1")
def test_names_taken_by_others_are_left_alone(namespace: None) -> None:
    process.run(["ip", "tuntap", "add", "mvmt1", "mode", "tap"], timeout=10)
    with pytest.raises(Conflict):
        network.ensure_bridge(SPEC)
    with pytest.raises(Conflict):
        network.remove_bridge_if_unused("mvmt1")
    with pytest.raises(Conflict):
        network.open_tap("mvmt1-0", 0, "mvmt1")
    with pytest.raises(Conflict):
        network.open_tap("mvmt1-0", 0, "absent")
    assert set(network.inspect()) == {"lo", "mvmt1"}, "no tap is left by a failure"
    assert network.inspect()["mvmt1"].kind == "tun"


@pytest.mark.root
def test_what_is_there_needs_no_request(namespace: None) -> None:
    network.ensure_bridge(SPEC)
    with netlink.Netlink() as route:
        found = route.find_link("mvmt1")
        assert found is not None
        assert network.render_bridge_state(SPEC, found, route.addresses()) == []
        assert route.find_link("absent") is None
        with pytest.raises(OSError, match="remove nothing"):
            gone = netlink.link(999_999)
            route.execute([netlink.Request(netlink.RTM_DELLINK, 0, gone, "remove nothing")])
        assert [link.name for link in route.links()] == ["lo", "mvmt1"], (
            "the socket is in step after a refusal"
        )


@pytest.mark.req("N1")
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_gateway_macs_are_local_unicast_and_distinct(one: int, two: int) -> None:
    macs = [network.gateway_mac(".".join(map(str, n.to_bytes(4, "big")))) for n in (one, two)]
    assert (macs[0] == macs[1]) == (one == two)
    assert int(macs[0][:2], 16) & 0b11 == 0b10


@pytest.mark.parametrize(
    "bad", ["", "1.2.3", "1.2.3.256", "01.2.3.4", "1.2.3.4 ", "a.b.c.d", "1.2.3.4.5", "٣.1.1.1"]
)
def test_bad_addresses(bad: str) -> None:
    with pytest.raises(InvalidInput):
        network.packed_ipv4(bad)


@pytest.mark.parametrize("bad", ["", "x" * 16, "a/b", "..", "all", "default", "A", "a b", "a\n"])
def test_bad_link_names(bad: str) -> None:
    with pytest.raises(InvalidInput):
        network.check_link_name(bad)


@pytest.mark.parametrize("prefix", [7, 31, 32, -1])
def test_a_subnet_needs_room(prefix: int) -> None:
    with pytest.raises(InvalidInput):
        network.ensure_bridge(network.BridgeSpec("mvmt1", "10.240.1.1", prefix))


@given(st.binary(max_size=300))
def test_the_list_of_links_may_be_anything(data: bytes) -> None:
    try:
        network.parse_links(data)
    except InvalidInput:
        pass


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.dictionaries(
                st.sampled_from(
                    ["ifname", "linkinfo", "info_kind", "info_data", "addr_info", "stp_state", "flags"]
                ),
                inner,
            )
            | st.lists(inner, max_size=2)
        ),
        max_leaves=8,
    )
)
def test_the_list_of_links_may_be_any_json(value: object) -> None:
    import json

    try:
        network.parse_links(json.dumps([value]).encode())
    except InvalidInput:
        pass
