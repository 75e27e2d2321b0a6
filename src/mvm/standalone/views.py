"""What lists show, read straight from the documents: fast, without locks, without recovery.

A list says what is recorded. It can be behind the truth by what was interrupted or died since the last command;
`mvm tenant show` looks. One unreadable tenant is one row that says so, never the end of the list.

A thousand tenants take a few tens of milliseconds, so every step here is chosen for that: files are named
relative to a directory descriptor, read in one call, and decoded into the few fields that are shown. What is
decoded loosely here is never acted upon.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mvm.hostd.store import Store

_LIMIT: Final = 256 * 1024
_FIRST: Final = 4096
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
UNREADABLE: Final = "unreadable"


class _Pool(msgspec.Struct):
    id: str
    count: int = 1
    vcpus: int | None = None
    mem_mib: int | None = None
    data_disk_mib: int | None = None


class _Spec(msgspec.Struct):
    id: str
    flake_ref: str
    profile: str
    vcpus: int
    mem_mib: int
    data_disk_mib: int
    pools: list[_Pool]


class _Network(msgspec.Struct):
    ip: str


class _Pending(msgspec.Struct):
    intent: str


class _Record(msgspec.Struct):
    state: str
    network: _Network
    changed_ns: int
    pending: _Pending | None = None
    revision: str | None = None


class TenantRow(msgspec.Struct, frozen=True):
    """`state`: of its instance, or `3 running, 1 sleeping`; `instances`: asked for; `ip`: of the first one."""

    tenant: str
    state: str
    instances: int
    running: int
    profile: str
    vcpus: int
    mem_mib: int
    ip: str
    flake_ref: str


class InstanceRow(msgspec.Struct, frozen=True):
    """`revision`: what it was last started from, or ""; `changed_ns`: of its state, nanoseconds since 1970."""

    instance: str
    state: str
    ip: str
    revision: str
    changed_ns: int


class PoolRow(msgspec.Struct, frozen=True):
    """Sizes as its instances have them."""

    tenant: str
    pool: str
    count: int
    running: int
    vcpus: int
    mem_mib: int
    data_disk_mib: int


_decode_spec: Final = msgspec.json.Decoder(_Spec).decode
_decode_record: Final = msgspec.json.Decoder(_Record).decode
_FAULTS: Final = (OSError, msgspec.MsgspecError, UnicodeDecodeError)


def list_tenants(root: str) -> Iterator[TenantRow]:
    """Every tenant, sorted. PermissionError if the state is not ours to read."""
    try:
        folder = os.open(f"{root}/tenants", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for name in sorted(os.listdir(folder)):
            row = _tenant(folder, name)
            if row is not None:
                yield row
    finally:
        os.close(folder)


def _tenant(folder: int, name: str) -> TenantRow | None:
    try:
        spec = _decode_spec(_read(f"{name}/spec.json", folder))
    except (FileNotFoundError, NotADirectoryError):
        return None  # destroyed, its audit log is what is left
    except _FAULTS:
        return TenantRow(name, UNREADABLE, 0, 0, "", 0, 0, "", "")
    states: list[str] = []
    ip = ""
    for pool in spec.pools:
        for ordinal in range(pool.count):
            try:
                record = _decode_record(_read(f"{name}/instances/{pool.id}-{ordinal}/state.json", folder))
            except FileNotFoundError:
                states.append("absent")
                continue
            except _FAULTS:
                states.append(UNREADABLE)
                continue
            ip = ip or record.network.ip
            states.append(_state(record))
    return TenantRow(
        name, summary(states), len(states), states.count("running"), spec.profile,
        spec.vcpus, spec.mem_mib, ip, spec.flake_ref,
    )  # fmt: skip


def _read(path: str, folder: int) -> bytes:
    fd = os.open(path, _READ, dir_fd=folder)
    try:
        # os.read allocates what it is asked for, so a small read first: nearly every document fits.
        data = os.read(fd, _FIRST)
        if len(data) == _FIRST:
            data += os.read(fd, _LIMIT)
        return data
    finally:
        os.close(fd)


def _state(record: _Record) -> str:
    return record.state if record.pending is None else f"{record.state} ({record.pending.intent})"


def summary(states: list[str]) -> str:
    if len(states) < 2:
        return states[0] if states else "empty"
    counts = dict.fromkeys(states, 0)
    for state in states:
        counts[state] += 1
    if len(counts) == 1:
        return states[0]
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def list_instances(store: Store, tenants: list[str]) -> Iterator[InstanceRow]:
    """Every instance with a record of the given tenants (checked ids), in order."""
    for tenant in tenants:
        base = f"{store.tenants_dir}/{tenant}/instances"
        try:
            folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            for name in sorted(os.listdir(folder), key=_natural):
                try:
                    record = _decode_record(_read(f"{name}/state.json", folder))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except _FAULTS:
                    yield InstanceRow(f"{tenant}/{name}", UNREADABLE, "", "", 0)
                    continue
                yield InstanceRow(
                    f"{tenant}/{name}",
                    _state(record),
                    record.network.ip,
                    record.revision or "",
                    record.changed_ns,
                )
        finally:
            os.close(folder)


def _natural(name: str) -> tuple[str, int, str]:
    pool, _, ordinal = name.rpartition("-")
    return (pool, int(ordinal), name) if ordinal.isascii() and ordinal.isdigit() else (name, -1, name)


def list_pools(store: Store, tenants: list[str]) -> Iterator[PoolRow]:
    """The pools of the given tenants (checked ids)."""
    for tenant in tenants:
        try:
            folder = os.open(f"{store.tenants_dir}/{tenant}", _DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            spec = _decode_spec(_read("spec.json", folder))
        except FileNotFoundError:
            continue
        finally:
            os.close(folder)
        live = [row.instance for row in list_instances(store, [tenant]) if row.state == "running"]
        for pool in spec.pools:
            running = sum(1 for name in live if name.rpartition("-")[0] == f"{tenant}/{pool.id}")
            yield PoolRow(
                tenant, pool.id, pool.count, running, pool.vcpus or spec.vcpus, pool.mem_mib or spec.mem_mib,
                pool.data_disk_mib or spec.data_disk_mib,
            )  # fmt: skip
