"""The executor as the daemon offers it: `Host`, with the verbs that only make sense over a socket."""

from __future__ import annotations

import os
import socket

from mvm.core.errors import Busy, Conflict, GuestError, VmmError
from mvm.core.ids import InstanceId
from mvm.core.lifecycle import Action, State, command_for
from mvm.core.plan import InstancePlan, check_plan
from mvm.core.record import InstanceRecord
from mvm.hostd import jailed_run, net_policy
from mvm.hostd.assembly import load_revision, verify_artifacts
from mvm.hostd.guest_channel import PortLease, acquire_session_port
from mvm.hostd.guest_channel.vsock import ask_vsock
from mvm.hostd.host import Host
from mvm.hostd.resources import network, volume
from mvm.linux import netlink as nl
from mvm.linux import pidfd
from mvm.linux.files import sweep_temporaries
from mvm.linux.sockets import connect_unix
from mvm.wire.executor import Progress, no_progress
from mvm.wire.framing import VSOCK_PORT


class DaemonHost(Host):
    def inspect_instance(self, instance: InstanceId) -> InstanceRecord:
        """Also what the start-up does with every instance, so it removes what `attach_drives` may have left."""
        with self._instance(instance, no_progress) as context:
            if context.paths.volumes.is_dir():
                sweep_temporaries(context.paths.volumes)
                volume.settle(context.paths.data_disk)
            return context.record

    def attach_drives(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        """Have the data volume exist and open with the tenant's key, and the revision be what was built.

        Nothing stays open or unlocked. An instance that runs or sleeps has its drives; nothing is done then.
        """
        check_plan(plan)
        with self._instance(plan.instance, progress, plan) as context:
            if context.record.state in (State.RUNNING, State.SLEEPING):
                return context.record
            revision = load_revision(self._store, plan)
            context.watch.phase("verify artifacts")
            verify_artifacts(self._store, revision)
            context.watch.phase("data volume")
            # A killed one leaves half a volume, and no intent in the record that would have it swept.
            sweep_temporaries(context.paths.volumes)
            volume.settle(context.paths.data_disk)
            if not context.paths.data_disk.exists():
                volume.create(context.paths.data_disk, plan.data_disk_mib << 20, self._keys, plan.instance)
            os.close(volume.open_key(context.paths.data_disk, self._keys, plan.instance))
            return context.record

    def setup_network(self, plan: InstancePlan, progress: Progress = no_progress) -> InstanceRecord:
        """Put a running instance's bridge, addresses, rules and port back as its plan says, whatever was done to them.

        Conflict unless it runs: nothing on the host belongs to an instance that does not.
        """
        check_plan(plan)
        net = plan.network
        with self._instance(plan.instance, progress, plan) as context:
            if context.record.state is not State.RUNNING:
                raise _not_running(context.record)
            context.watch.phase("network")
            with self._store.network_lock(plan.instance.tenant), nl.Netlink() as route:
                network.ensure_bridge(network.BridgeSpec(net.bridge, net.gateway, net.prefix))
                net_policy.ensure(self._store, plan)
                bridge, tap = route.find_link(net.bridge), route.find_link(net.tap)
                if tap is None or bridge is None:
                    raise VmmError(
                        f"{plan.instance} has lost its tap",
                        details=f"There is no link {net.tap}; its VMM has no network any more.",
                        resolution=f"Restart it: {command_for(Action.STOP, plan.instance)}",
                    )
                network.disable_ipv6(net.tap)
                route.execute(network.render_port(tap.ifindex, bridge.ifindex, net.tap))
            return context.record

    def lease_channel(self, instance: InstanceId) -> tuple[PortLease, socket.socket, bool]:
        """A session port of a running guest, a socket connected to it, and whether the VMM's answer to that is still to
        be read (vsock). Never waits: the daemon's loop calls it.

        Conflict if it does not run, Busy if all ports are taken, GuestError if nobody listens.
        """
        record = self._store.load_record(instance)
        if record.state is not State.RUNNING or record.process is None or not pidfd.is_alive(record.process):
            raise _not_running(record)
        lease = acquire_session_port(self._store.instance_paths(instance).runtime)
        vsock = jailed_run.find(lease.socket.parent)
        try:
            sock = connect_unix(lease.socket, 0) if vsock is None else ask_vsock(vsock, VSOCK_PORT, 0)
            sock.setblocking(True)
        except BaseException as error:
            lease.release(clean=lease.was_clean)  # not a byte was sent
            if isinstance(error, BlockingIOError):
                raise Busy(
                    "the guest's channel takes no more connections",
                    details=str(instance),
                    resolution="Try again; if it stays so, its VMM hangs: stop the instance.",
                ) from None
            if isinstance(error, OSError):
                raise GuestError(
                    "the guest's control channel cannot be reached",
                    details=f"{lease.socket.name}: {error}",
                    resolution="see whether the instance runs (mvm instance list)",
                ) from None
            raise
        return lease, sock, vsock is not None


def _not_running(record: InstanceRecord) -> Conflict:
    verb = Action.WAKE if record.state is State.SLEEPING else Action.RUN
    return Conflict(
        f"{record.id} is {record.state}"
        if record.state is not State.RUNNING
        else f"the VM of {record.id} is gone",
        details="Only a running guest can be talked to.",
        resolution=f"{verb.value.capitalize()} it first: {command_for(verb, record.id)}",
    )
