"""The audit log on disk: what a crash leaves is healed, what somebody did to it is noticed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvm.core import audit as chain
from mvm.core.errors import IntegrityError, NotFound, ResourceExhausted
from mvm.core.ids import NodeId, TenantId
from mvm.hostd.resources import audit

ACME = TenantId("acme")


def entry(detail: str = "") -> chain.AuditEntry:
    return chain.AuditEntry(
        time_ns=1,
        tenant=ACME,
        action="instance.sleep",
        outcome="done",
        node=NodeId("0" * 32),
        host="h",
        detail=detail,
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / audit.LOG_NAME
    for i in range(4):
        audit.append(path, entry(str(i)))
    return path


@pytest.mark.req("O2")
def test_appended_entries_verify(log: Path) -> None:
    head = audit.append(log, entry())
    assert audit.verify(log, ACME) == chain.Verified(5, head.hash)
    assert audit.verify(log, ACME, expected=head).count == 5
    assert audit.read_head(log) == head
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    with pytest.raises(NotFound):
        audit.verify(log.with_name("none") / "audit.log")


@pytest.mark.req("O2")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_is_noticed(log: Path, data: st.DataObject) -> None:
    good = log.read_bytes()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    log.write_bytes(bad)
    try:
        with pytest.raises(IntegrityError):
            audit.verify(log, ACME)
    finally:
        log.write_bytes(good)


def _drop(n: int) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: lines[:n] + lines[n + 1 :]


@pytest.mark.req("O2")
@pytest.mark.parametrize(
    "change",
    [
        _drop(0), _drop(1), _drop(3),  # the last: a whole line lost at the end
        lambda lines: lines[:1], lambda lines: [],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [lines[0], *lines],
        lambda lines: [*lines[:-1], lines[-1][:-1]],  # the end of an acknowledged line lost
    ],
)  # fmt: skip
def test_loss_and_reorder_are_noticed(log: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    log.write_bytes(b"".join(change(log.read_bytes().splitlines(keepends=True))))
    with pytest.raises(IntegrityError):
        audit.verify(log, ACME)


@pytest.mark.req("O2")
def test_nothing_is_appended_to_a_log_that_lost_its_end(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    for left in (b"".join(lines[:3]), b"", b"".join(lines)[:-1]):
        log.write_bytes(left)
        with pytest.raises(IntegrityError):
            audit.append(log, entry())
        assert log.read_bytes() == left


@pytest.mark.req("O2")
def test_missing_files_are_noticed(log: Path) -> None:
    head, lines = audit.head_path(log).read_bytes(), log.read_bytes()
    audit.head_path(log).unlink()
    for act in (lambda: audit.verify(log), lambda: audit.append(log, entry())):
        with pytest.raises(IntegrityError, match="head"):
            act()
    audit.head_path(log).write_bytes(b"nonsense")
    with pytest.raises(IntegrityError):
        audit.verify(log)
    audit.head_path(log).write_bytes(head)
    log.unlink()
    with pytest.raises(IntegrityError, match="cut off"):
        audit.verify(log)
    with pytest.raises(IntegrityError, match="cut off"):
        audit.append(log, entry())
    log.write_bytes(lines)
    assert audit.verify(log).count == 4


@pytest.mark.req("O2")
def test_another_log_with_sound_lines_is_noticed(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / audit.LOG_NAME
    other.parent.mkdir()
    for _ in range(4):
        audit.append(other, entry("another story"))
    log.write_bytes(other.read_bytes())
    for act in (lambda: audit.verify(log), lambda: audit.append(log, entry())):
        with pytest.raises(IntegrityError):
            act()
    with pytest.raises(IntegrityError):
        audit.verify(other, TenantId("other"))


@pytest.mark.req("O2", "L3")
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("torn", [b"{", b'{"action":"x', b"\0" * 100])
def test_a_torn_line_is_healed_and_recorded(tmp_path: Path, before: int, torn: bytes) -> None:
    log = tmp_path / audit.LOG_NAME
    for _ in range(before):
        audit.append(log, entry())
    with log.open("ab") as file:
        file.write(torn)
    assert not before or audit.verify(log).count == before, "it was never acknowledged"
    audit.append(log, entry("after"))
    assert audit.verify(log, ACME).count == before + 2
    healed, last = (chain.parse_line(line) for line in log.read_bytes().splitlines()[-2:])
    assert (healed.action, last.detail) == (audit.HEALED, "after")
    assert str(len(torn)) in healed.detail


@pytest.mark.req("O2", "L3")
@pytest.mark.parametrize("before", [0, 2])
def test_a_crash_between_line_and_head_loses_nothing(tmp_path: Path, before: int) -> None:
    log = tmp_path / audit.LOG_NAME
    for _ in range(before):
        audit.append(log, entry())
    pid = os.fork()
    if pid == 0:
        try:
            real = os.fsync

            def die(fd: int) -> None:
                real(fd)
                if os.readlink(f"/proc/self/fd/{fd}") == str(log):
                    os._exit(9)

            setattr(os, "fsync", die)  # noqa: B010
            audit.append(log, entry("written"))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert audit.verify(log, ACME).count == before + 1
    audit.append(log, entry("next"))
    assert audit.verify(log, ACME).count == before + 2
    assert chain.parse_line(log.read_bytes().splitlines()[-2]).detail == "written"


@pytest.mark.req("O2")
def test_a_full_disk_leaves_the_log_as_it_was(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, calls = log.read_bytes(), os.write, 0

    def full(fd: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:20])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ResourceExhausted):
        audit.append(log, entry())
    monkeypatch.undo()
    assert log.read_bytes() == before
    audit.append(log, entry())
    assert audit.verify(log).count == 5


@pytest.mark.req("O2")
def test_concurrent_writers_make_one_chain(tmp_path: Path) -> None:
    log = tmp_path / audit.LOG_NAME
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(10):
                    audit.append(log, entry())
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert audit.verify(log, ACME).count == 30
