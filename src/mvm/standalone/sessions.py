"""Control channels to running guests, for exec, shells and copies: checked, audited, then handed over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mvm.core.errors import Conflict, GuestError
from mvm.core.lifecycle import Action, State, command_for

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
        if record.state is not State.RUNNING or record.pending is not None:
            raise not_running(instance, record.state)
        try:
            channel = node.host.channel(instance)
        except GuestError:
            _explain(node, instance)
            raise
        with channel as opened:
            yield opened


def _explain(node: Standalone, instance: InstanceId) -> None:
    """Nobody answers: if that is because the VM is gone by now, say that instead."""
    state = node.inspect(instance).state
    if state is not State.RUNNING:
        raise not_running(instance, state)


def not_running(instance: InstanceId, state: State) -> Conflict:
    action = Action.WAKE if state is State.SLEEPING else Action.RUN
    return Conflict(
        f"{instance} is not running",
        details=f"It is {state}.",
        resolution=f"{'Wake' if action is Action.WAKE else 'Start'} it with: {command_for(action, instance)}",
    )
