"""Verifying the network: what hostd compares, and sessions with guests for the packets that they are to send."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mvm.core.errors import GuestError
from mvm.hostd import net_verify
from mvm.hostd.net_verify import Difference, active
from mvm.hostd.resources import forwarding, network

if TYPE_CHECKING:
    from mvm.hostd.net_verify import Instance
    from mvm.standalone.facade import Standalone
    from mvm.wire.executor import Progress


class Report(NamedTuple):
    """`tenants`: with rules. `results`: of packets, empty if none were to be sent. `left_out`: differences beyond those
    listed."""

    tenants: int
    running: int
    differences: list[Difference]
    results: list[active.Result]
    left_out: int = 0


def verify(node: Standalone, *, active: bool, progress: Progress) -> Report:
    expected, differences = net_verify.verify(node.store)
    results = _probe(node, expected, progress) if active else []
    running = sum(instance.has_tap for instance in expected.instances)
    return Report(len(expected.policy.tenants), running, differences, results)


def _probe(node: Standalone, expected: net_verify.Expected, progress: Progress) -> list[active.Result]:
    def send(instance: Instance, frames: list[bytes]) -> None:
        progress(f"{instance.id}: sending {len(frames)} packets")
        errors = bytearray()
        with node.session(instance.id, "exec", ("mvm", "net", "verify", "--active")) as channel:
            status = channel.exec(
                ["python3", "-c", active.SCRIPT],
                stdin="".join(f"{frame.hex()}\n" for frame in frames).encode(),
                stderr=lambda data: errors.extend(data[: 2000 - len(errors)]),
                timeout=active.SEND_S,
            )
        if status.shell_code != 0:
            raise GuestError(
                "the guest could not send",
                details=errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
                or f"its program ended with {status.shell_code}",
                resolution=f"See: mvm instance logs {instance.id}",
            )

    return active.run(expected, network.inspect().values(), send, uplink=forwarding.has_default_route())
