"""What mvm-hostd may be asked: one table, and the types of every request and answer.

Rules:
- A verb states an intent. None takes a path, a command, an address or a device: those are computed from the instance.
- Bytes from a client are `untrusted_` until they are a value of the verb's request type; `decode_request` is the only
  way to one, strict (unknown fields, wrong types, other versions are refused) and bounded by MAX_REQUEST.
- Where a request names two things that could disagree (a plan), the privileged side computes again and compares.

docs/formats/hostd-protocol.md draws the bytes. The table there is this table; a test compares the two.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from mvm.core import addressing, limits
from mvm.core.history import History
from mvm.core.ids import InstanceId, NodeId, TenantId
from mvm.core.plan import InstancePlan
from mvm.core.record import InstanceRecord
from mvm.core.snapshot import Name
from mvm.core.spec import PoolSpec, TenantSpec

VERSION: Final = 1
MAX_REQUEST: Final = 64 * 1024
"""Bytes of one request, header excluded. Nothing longer is read from a client."""
MAX_ANSWER: Final = 1024 * 1024
"""Bytes of one answer, which comes from root, and may hold a tenant's whole specification."""
LIST_ROWS: Final = 256
TENANT_ROWS: Final = 64
CONSOLE_CHUNK: Final = 64 * 1024
"""Bytes of a console log in one answer: what a client that does not read can have the daemon hold."""
FINDINGS: Final = 256
"""Differences in one answer about the network; the rest is counted."""

Text = Annotated[str, Meta(max_length=limits.MESSAGE_MAX)]


class Purpose(StrEnum):
    """What a channel to a guest is for; goes into the tenant's audit log."""

    EXEC = "exec"
    SHELL = "shell"
    COPY_IN = "copy-in"
    COPY_OUT = "copy-out"
    SECRETS = "secrets"


class PlanRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    plan: InstancePlan


class InstanceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    instance: InstanceId


class DestroyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    instance: InstanceId
    wipe_volumes: bool


class ListRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows come in the order of tenant, pool, number; `after` is the last one already seen."""

    tenant: TenantId | None = None
    after: InstanceId | None = None


class TenantRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: TenantId


class TenantsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows come in the order of names; `after` is the last one already seen."""

    after: TenantId | None = None


class ConsolePlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where reading a console log goes on. `file`: inode of the file that `offset` (bytes) is in, 0 before any."""

    file: Annotated[int, Meta(ge=0, le=limits.INT63_MAX)]
    offset: Annotated[int, Meta(ge=0, le=limits.INT63_MAX)]


class ConsoleRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Begin `lines` lines before the end (None: with all that is kept), or go on at `place`."""

    instance: InstanceId
    lines: Annotated[int, Meta(ge=0, le=limits.INT63_MAX)] | None = None
    place: ConsolePlace | None = None


class ChannelRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`program`: what will be run or copied, as the audit log may show it; no secrets."""

    instance: InstanceId
    purpose: Purpose
    program: Annotated[str, Meta(max_length=1024)] = ""


class CloseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`clean`: the guest has read all that was sent and nothing is open. If that is wrong, the next user of the port
    gets no answer and the one after it resynchronises."""

    clean: bool


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments, or no answer beyond "done"."""


class RecordAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    record: InstanceRecord


class InstanceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As recorded, not looked at. `changed_ns`: of its state, nanoseconds since 1970."""

    instance: InstanceId
    state: Name
    ip: Name
    changed_ns: int
    pending: str = ""
    revision: str = ""


class ListAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rows: Annotated[tuple[InstanceLine, ...], Meta(max_length=LIST_ROWS)]
    more: bool = False


class TenantAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`index`: of its subnet."""

    spec: TenantSpec
    history: History
    index: addressing.SubnetIndex


class TenantLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of its specification; one that cannot be read has `readable` false and nothing else. `index`: of its subnet, 0 if
    it has none."""

    tenant: TenantId
    index: Annotated[int, Meta(ge=0, lt=limits.SUBNETS)] = 0
    profile: Name = "-"
    vcpus: int = 0
    mem_mib: int = 0
    data_disk_mib: int = 0
    flake_ref: str = ""
    pools: tuple[PoolSpec, ...] = ()
    readable: bool = True


class TenantsAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rows: Annotated[tuple[TenantLine, ...], Meta(max_length=TENANT_ROWS)]
    more: bool = False


class ConsoleAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`data`: as the guest wrote it. `place`: after it. `more`: there is more already."""

    data: Annotated[bytes, Meta(max_length=CONSOLE_CHUNK)]
    place: ConsolePlace
    more: bool = False


class NetworkFinding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that is not as it must be, and the command or step that puts it right."""

    where: Text
    what: Text
    fix: Text


class NetworkAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tenants`: with rules. `running`: instances. `left_out`: findings beyond those listed."""

    tenants: int
    running: int
    findings: Annotated[tuple[NetworkFinding, ...], Meta(max_length=FINDINGS)]
    left_out: int = 0


class NodeAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`operations`, `channels`: in progress. `recovering`: instances that the start-up has yet to look at."""

    version: str
    pid: int
    node: NodeId
    driver: Name
    operations: int
    channels: int
    recovering: int


class ChannelAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Comes with one descriptor: a socket connected to the guest's `port`. `was_clean`: how its last user left it.

    `vsock`: the VMM connects each client anew, and says `OK <number>` and a line feed before the guest says anything.
    """

    port: Annotated[int, Meta(ge=1, le=7)]
    was_clean: bool
    vsock: bool = False


class Where(StrEnum):
    """`loop`: answered at once by the daemon itself. `child`: by a process of its own, under the instance's lock."""

    LOOP = "loop"
    CHILD = "child"


class Verb(NamedTuple):
    """`timeout_s`: after which the operation is ended and undone or finished by recovery; of a client's patience too.
    `changes`: whether it is meant to change anything (`inspect_instance` only finishes what was interrupted)."""

    name: str
    request: type[Any]
    answer: type[Any]
    timeout_s: float
    changes: bool
    where: Where
    purpose: str


# A cold start may wait for the lock (120 s), read all artifacts, probe acceleration and boot under emulation (180 s).
_VERBS: Final = (
    Verb("create_instance", PlanRequest, RecordAnswer, 600, True, Where.CHILD,
         "have an instance exist and run"),
    Verb("stop_instance", InstanceRequest, RecordAnswer, 300, True, Where.CHILD,
         "end it: guest, SIGTERM, SIGKILL; a sleeping one loses its snapshot"),
    Verb("sleep_instance", InstanceRequest, RecordAnswer, 600, True, Where.CHILD,
         "seal its memory and release all it used"),
    Verb("wake_instance", PlanRequest, RecordAnswer, 300, True, Where.CHILD,
         "go on where it left off"),
    Verb("attach_drives", PlanRequest, RecordAnswer, 300, True, Where.CHILD,
         "have its data volume exist and open with the tenant's key, before its first start"),
    Verb("setup_network", PlanRequest, RecordAnswer, 180, True, Where.CHILD,
         "put bridge, addresses and port of a running instance back as they must be"),
    Verb("destroy_instance", DestroyRequest, Nothing, 600, True, Where.CHILD,
         "stop it and delete what it had"),
    Verb("inspect_instance", InstanceRequest, RecordAnswer, 300, False, Where.CHILD,
         "what it is now, after recovery"),
    Verb("list_instances", ListRequest, ListAnswer, 10, False, Where.LOOP,
         "what is recorded of all of them"),
    Verb("inspect_tenant", TenantRequest, TenantAnswer, 10, False, Where.LOOP,
         "specification, revisions and subnet, to make plans from"),
    Verb("list_tenants", TenantsRequest, TenantsAnswer, 10, False, Where.LOOP,
         "what the tenants are, as specified"),
    Verb("read_console", ConsoleRequest, ConsoleAnswer, 10, False, Where.LOOP,
         "what a guest wrote to its console, a piece at a time"),
    Verb("verify_network", Nothing, NetworkAnswer, 120, False, Where.CHILD,
         "what of bridges, taps and rules is not as it must be"),
    Verb("open_channel", ChannelRequest, ChannelAnswer, 10, False, Where.LOOP,
         "a connected session with a running guest, held while the connection is open"),
    Verb("close_channel", CloseRequest, Nothing, 10, False, Where.LOOP,
         "give back the session of this connection"),
    Verb("ping", Nothing, NodeAnswer, 10, False, Where.LOOP,
         "whether the daemon answers, and who it is"),
)  # fmt: skip

VERBS: Final[dict[str, Verb]] = {verb.name: verb for verb in _VERBS}
