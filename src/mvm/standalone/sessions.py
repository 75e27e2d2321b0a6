"""Control channels to running guests, for exec, shells and copies: checked, audited, then handed over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mvm.core.errors import Conflict
from mvm.core.lifecycle import Action, State, command_for
from mvm.wire.hostd_api import Purpose

if TYPE_CHECKING:
    from mvm.core.ids import InstanceId
    from mvm.hostd.guest_channel import GuestChannel
    from mvm.standalone.facade import Standalone


@contextmanager
def session(
    node: Standalone, instance: InstanceId, action: str, command: tuple[str, ...]
) -> Iterator[GuestChannel]:
    """`action`: `exec`, `shell`, `copy-in`, `copy-out`. `command`: what the audit log gets to see of it."""
    node.store.load_spec(instance.tenant)
    with node.journal.entry(f"instance.{action}", instance.tenant, instance, command=command):
        record = node.store.load_record(instance)
        # As recorded; whether it still runs is what the host looks at when it opens the channel.
        if record.state is not State.RUNNING:
            raise _not_running(node, instance, record.state)
        shown = " ".join(command[command.index("--") + 1 :] if "--" in command else command[2:])
        with node.host.channel(instance, Purpose(action), shown) as channel:
            yield channel


def _not_running(node: Standalone, instance: InstanceId, state: State) -> Conflict:
    action = Action.WAKE if state is State.SLEEPING else Action.RUN
    alone = len(node.store.instances(instance.tenant)) == 1
    command = command_for(action, instance.tenant if alone else instance)
    return Conflict(
        f"{instance} is not running",
        details=f"It is {state}.",
        resolution=f"{'Wake' if action is Action.WAKE else 'Start'} it with: {command}",
    )
