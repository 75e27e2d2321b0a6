from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from mvm.core import addressing as net
from mvm.core import limits
from mvm.core.errors import Conflict, InvalidInput, NotFound, ResourceExhausted
from mvm.core.ids import InstanceId, TenantId

from . import strategies as some

places = st.tuples(some.indices, some.slots)


@pytest.mark.req("N1")
@given(places, places)
def test_no_two_places_share_an_address_a_tap_or_a_uid(one: tuple[int, int], other: tuple[int, int]) -> None:
    for name in (net.instance_ip, net.tap_name, net.instance_uid):
        assert (name(*one) == name(*other)) == (one == other)


@pytest.mark.req("N1")
def test_no_two_of_all_places_share_anything() -> None:
    places = [(i, s) for i in (1, 2, 11, 12, 110, 111, 4095) for s in range(limits.SLOTS_PER_TENANT)]
    for name in (net.instance_ip, net.tap_name, net.instance_uid):
        assert len({name(*place) for place in places}) == len(places)
    bridges = {net.bridge_name(i) for i in range(1, limits.SUBNETS)}
    assert len(bridges) == limits.SUBNETS - 1
    assert bridges.isdisjoint({net.tap_name(*place) for place in places})


@pytest.mark.req("N1")
@given(places)
def test_an_address_is_found_back_and_is_nobody_elses(place: tuple[int, int]) -> None:
    index, slot = place
    ip = net.instance_ip(index, slot)
    assert net.locate(ip) == place
    assert ip not in (net.gateway(index), net.broadcast(index))
    assert net.check_fixed_ip(ip, index) == slot
    assert len(net.tap_name(index, slot)) <= 15
    assert len(net.bridge_name(index)) <= 15
    assert net.format_ipv4(net.parse_ipv4(ip)) == ip


@pytest.mark.req("N1")
@given(some.instances)
def test_a_mac_is_stable_unicast_and_locally_administered(instance: InstanceId) -> None:
    mac = net.instance_mac(instance)
    assert net.parse_mac(mac) == mac == net.instance_mac(InstanceId.parse(str(instance)))


@pytest.mark.req("N1")
def test_ten_thousand_instances_have_ten_thousand_macs() -> None:
    macs = {net.instance_mac(InstanceId(f"t{t}", "default", n)) for t in range(50) for n in range(200)}
    assert len(macs) == 10_000


@pytest.mark.req("N1")
def test_the_first_tenant_and_the_last_address() -> None:
    assert net.subnet(1) == "10.240.1.0/24"
    assert net.gateway(1) == "10.240.1.1"
    assert net.instance_ip(1, 0) == "10.240.1.2"
    assert net.instance_ip(4095, 252) == "10.255.255.254"
    assert net.tap_name(4095, 252) == "mvm-t4095s252"


@pytest.mark.parametrize(("index", "slot"), [(0, 0), (-1, 0), (4096, 0), (1, -1), (1, 253)])
def test_a_place_that_does_not_exist(index: int, slot: int) -> None:
    for name in (net.instance_ip, net.tap_name, net.instance_uid):
        with pytest.raises(InvalidInput):
            name(index, slot)


@given(st.text(max_size=20))
def test_any_text_is_an_address_in_its_only_form_or_invalid_input(text: str) -> None:
    for parse in (lambda: net.format_ipv4(net.parse_ipv4(text)), lambda: net.parse_mac(text)):
        found = some.attempt(parse)
        if isinstance(found, InvalidInput):
            assert found.resolution
        else:
            assert found == text.lower()


@pytest.mark.parametrize(
    "text", ["10.240.1.02", "10.240.1", "10.240.1.256", "10.240.1.2\n", "٣.1.1.1", " 1.1.1.1"]
)
def test_what_is_not_an_address(text: str) -> None:
    with pytest.raises(InvalidInput):
        net.parse_ipv4(text)


class AllocationsNeverReuse(RuleBasedStateMachine):
    """Whatever is allocated and released in whatever order, with or without fixed addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.now = net.Allocations()
        self.ever: dict[int, str] = {}
        self.live: dict[TenantId, int] = {}

    @rule(tenant=some.tenants, place=st.none() | st.tuples(st.integers(1, 12), some.slots))
    def allocate(self, tenant: TenantId, place: tuple[int, int] | None) -> None:
        fixed = net.instance_ip(*place) if place else None
        try:
            after, index = net.allocate(self.now, tenant, fixed_ip=fixed)
        except Conflict:
            assert place is not None
            assert place[0] in self.ever
            assert tenant not in self.live
            return
        except InvalidInput:
            assert place is not None
            assert self.live[tenant] != place[0]
            return
        if tenant in self.live:
            assert (index, after) == (self.live[tenant], self.now), "stable"
        else:
            assert index not in self.ever, "never reused"
            assert place is None or index == place[0]
            self.ever[index] = tenant
        self.live[tenant], self.now = index, after

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.live:
            tenant = data.draw(st.sampled_from(sorted(self.live)))
            self.now = net.release(self.now, tenant)
            del self.live[tenant]
            assert net.release(self.now, tenant) == self.now, "idempotent"
            with pytest.raises(NotFound):
                self.now.index_of(tenant)

    @invariant()
    def leases_are_what_is_live(self) -> None:
        assert {lease.tenant: lease.index for lease in self.now.leases} == self.live
        assert {*self.now.retired, *self.live.values()} == set(self.ever)

    @invariant()
    def survives_its_bytes(self) -> None:
        assert net.decode_allocations(net.encode_allocations(self.now)) == self.now


@pytest.mark.req("N1")
def test_no_order_of_allocations_and_releases_gives_an_index_twice() -> None:
    run_state_machine_as_test(AllocationsNeverReuse)


@pytest.mark.req("N1")
def test_when_every_subnet_was_given_out_the_next_is_refused() -> None:
    full = net.Allocations(next_index=limits.SUBNETS, retired=tuple(range(1, limits.SUBNETS)))
    with pytest.raises(ResourceExhausted):
        net.allocate(full, TenantId("acme"))


def test_an_allocation_file_that_contradicts_itself_is_refused() -> None:
    twice = (net.Lease(TenantId("a"), 1), net.Lease(TenantId("b"), 1))
    with pytest.raises(InvalidInput, match="contradicts"):
        net.decode_allocations(net.encode_allocations(net.Allocations(leases=twice)))
    with pytest.raises(InvalidInput, match="contradicts"):
        net.decode_allocations(net.encode_allocations(net.Allocations(leases=twice[:1], retired=(1,))))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_as_allocations(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        net.decode_allocations(data)


@given(st.sets(some.slots, max_size=limits.SLOTS_PER_TENANT - 1), some.slots)
def test_a_free_slot_is_free_and_the_lowest(taken: set[int], reserved: int) -> None:
    if len(taken | {reserved}) == limits.SLOTS_PER_TENANT:
        return
    slot = net.free_slot(taken, reserved=(reserved,))
    assert slot not in taken
    assert slot != reserved
    assert all(lower in taken or lower == reserved for lower in range(slot))


def test_a_full_subnet_has_no_slot() -> None:
    with pytest.raises(ResourceExhausted):
        net.free_slot(range(limits.SLOTS_PER_TENANT))
