"""What must be there, from specifications and records alone."""

from __future__ import annotations

from typing import NamedTuple

from mvm.core.firewall import Policy
from mvm.core.ids import InstanceId
from mvm.core.lifecycle import State
from mvm.core.record import NetworkIdentity
from mvm.hostd import net_policy
from mvm.hostd.resources import forwarding
from mvm.hostd.store import Store

_PORTS = {"firecracker": "veth"}
"""Driver -> kind of the link on the bridge, where it is not the tap itself (`mvm.hostd.resources.private_tap`)."""


class Instance(NamedTuple):
    """`settled`: no step is under way. Only a settled running instance must have a tap. `port`: the kind of link that
    has to have the tap's name, as its VMM needs it: `tun`, or `veth` where the tap is in the VMM's own namespace."""

    id: InstanceId
    network: NetworkIdentity
    state: State
    settled: bool
    generation: int
    port: str = "tun"

    @property
    def has_tap(self) -> bool:
        return self.settled and self.state is State.RUNNING


class Expected(NamedTuple):
    """`names`: subnet index -> tenant. `unreadable`: tenants and instances whose documents cannot be read."""

    policy: Policy
    instances: tuple[Instance, ...]
    names: dict[int, str]
    unreadable: tuple[str, ...]

    def who(self, bridge: str) -> str:
        """The tenant of a bridge, for people."""
        index = bridge.removeprefix("mvm-b")
        return self.names.get(int(index), "no tenant") if index.isdigit() else "no tenant"

    def with_tap(self, tap: str) -> str:
        """The instance of a tap, for people."""
        return next((str(i.id) for i in self.instances if i.network.tap == tap), "no instance")


def read_expected(store: Store) -> Expected:
    instances: list[Instance] = []
    unreadable: list[str] = []
    names = {lease.index: str(lease.tenant) for lease in store.load_allocations().leases}
    for tenant in store.tenants():
        spec, records = net_policy.readable(store, tenant)
        if spec is None:
            unreadable.append(str(tenant))
        found = {record.id for record in records}
        unreadable += [str(i) for i in store.instances(tenant) if spec is not None and i not in found]
        for record in records:
            names.setdefault(record.network.index, str(tenant))
            port = _PORTS.get(record.vmm.driver, "tun") if record.vmm is not None else "tun"
            settled = record.pending is None
            instances.append(
                Instance(record.id, record.network, record.state, settled, record.generation, port)
            )
    policy = net_policy.wanted(store, forwarding.host_network())
    return Expected(policy, tuple(instances), names, tuple(unreadable))
