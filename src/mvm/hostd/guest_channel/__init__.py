"""The host's end of the guest control channel.

Runs as: whoever may open the instance's port sockets (root in hostd; the embedded command line).
Talks to: the agent in one guest, through `mvm.wire.guest_session`. May never: believe a byte from the guest,
wait without a limit, write outside the destination of a copy.
"""

from mvm.hostd.guest_channel.channel import GuestChannel, connect, take_over
from mvm.hostd.guest_channel.exec_operation import ExecOperation
from mvm.hostd.guest_channel.extract import CopyLimits
from mvm.hostd.guest_channel.ports import (
    PortLease,
    acquire_session_port,
    distrust_ports,
    lock_path,
    socket_path,
    take_port,
)
from mvm.wire.guest_api import CopyReport, ExitStatus, GuestRefusal, GuestStatus, SleepReport, WakeReport

__all__ = [
    "CopyLimits",
    "CopyReport",
    "ExecOperation",
    "ExitStatus",
    "GuestChannel",
    "GuestRefusal",
    "GuestStatus",
    "PortLease",
    "SleepReport",
    "WakeReport",
    "acquire_session_port",
    "connect",
    "distrust_ports",
    "lock_path",
    "socket_path",
    "take_over",
    "take_port",
]
