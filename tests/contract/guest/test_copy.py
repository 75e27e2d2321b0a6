"""Copies through the real agent, and from guests that try to write where they may not."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvm.core.errors import Conflict, GuestError, MvmError, NotFound, ResourceExhausted
from mvm.hostd.guest_channel import CopyLimits, CopyReport, GuestChannel, GuestRefusal
from mvm.hostd.guest_channel.extract import Extractor
from mvm.wire import framing, guest_api
from mvm.wire.guest_api import TREE_HEAD, U16, U32


def make_tree(root: Path) -> None:
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "big").write_bytes(os.urandom(1 << 16) * 20)
    (root / "empty").touch()
    (root / "sub" / "run").write_text("#!/bin/sh\n")
    (root / "sub" / "run").chmod(0o750)
    (root / "sub" / "deep").chmod(0o700)
    (root / "sub" / os.fsdecode(b"\xff name\n")).write_text("odd")
    (root / "link").symlink_to("sub/run")
    os.mkfifo(root / "pipe")


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(root)): (
            stat.S_IMODE(path.stat().st_mode),
            b"" if path.is_dir() else path.read_bytes(),
        )
        for path in sorted(root.rglob("*"))
        if not path.is_symlink() and not path.is_fifo()
    }


@pytest.mark.req("L6")
def test_a_tree_goes_in_and_comes_out_the_same(channel: GuestChannel, tmp_path: Path) -> None:
    source, guest, back = tmp_path / "source", tmp_path / "guest", tmp_path / "back"
    make_tree(source)
    guest.mkdir()
    progress: list[int] = []
    report = channel.copy_in(source, f"{guest}/", progress.append)
    assert report == CopyReport(entries=8, size=progress[-1], skipped=1)
    assert contents(guest / "source") == contents(source)
    assert os.readlink(guest / "source" / "link") == "sub/run"
    report = channel.copy_out(str(guest / "source"), back)
    assert report == CopyReport(entries=7, size=progress[-1], skipped=1)
    assert contents(back) == contents(source)
    assert not (back / "link").is_symlink()


@pytest.mark.req("L6")
def test_files_replace_files_with_their_mode(channel: GuestChannel, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("new")
    source.chmod(0o640)
    target.write_text("old")
    channel.copy_in(source, str(target))
    assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("new", 0o640)
    folder = tmp_path / "folder"
    folder.mkdir()
    channel.copy_out(str(target), folder)
    assert (folder / "target").read_text() == "new"
    source.write_text("newer")
    channel.copy_out(str(source), folder / "target")
    assert (folder / "target").read_text() == "newer"
    assert os.listdir(folder) == ["target"]


@pytest.mark.req("L6")
def test_what_cannot_be_copied_is_said_and_the_channel_goes_on(channel: GuestChannel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").mkdir()
    with pytest.raises(NotFound):
        channel.copy_in(tmp_path / "absent", "/tmp/there")
    with pytest.raises(GuestRefusal, match="no such directory"):
        channel.copy_in(tmp_path / "file", str(tmp_path / "no" / "where"))
    with pytest.raises(GuestRefusal, match="is a directory"):
        channel.copy_in(tmp_path / "file", str(tmp_path / "there"))
    with pytest.raises(GuestRefusal, match="No such file"):
        channel.copy_out(str(tmp_path / "absent"), tmp_path / "out")
    with pytest.raises(GuestRefusal, match="neither a file nor a directory"):
        channel.copy_out("/dev/zero", tmp_path / "out")
    with pytest.raises(Conflict):
        channel.copy_out(str(tmp_path / "file"), tmp_path / "there")
    with pytest.raises(NotFound):
        channel.copy_out(str(tmp_path / "file"), tmp_path / "absent" / "out")
    assert sorted(os.listdir(tmp_path / "there")) == ["file"]
    assert not (tmp_path / "out").exists()
    assert channel.status().sessions == 0


@pytest.mark.req("L6")
def test_limits_stop_a_copy_and_leave_nothing(channel: GuestChannel, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ResourceExhausted, match="more than allowed"):
        channel.copy_out(str(source), tmp_path / "out", limits=CopyLimits(max_bytes=100_000))
    with pytest.raises(ResourceExhausted, match="more files"):
        channel.copy_out(str(source), tmp_path / "out", limits=CopyLimits(max_entries=3))
    assert sorted(os.listdir(tmp_path)) == before


def head(kind: int, name: bytes = b"", mode: int = 0o644) -> bytes:
    return TREE_HEAD.pack(kind, mode, len(name)) + name


DIR = head(guest_api.TREE_DIR, mode=0o755)
UP = head(guest_api.TREE_UP)
BODY = U32.pack(2) + b"hi" + U32.pack(0)


def file(name: bytes) -> bytes:
    return head(guest_api.TREE_FILE, name) + BODY


HOSTILE = {
    "parent": DIR + file(b".."),
    "path": DIR + file(b"../evil"),
    "absolute": DIR + file(b"/etc/evil"),
    "nul": DIR + file(b"a\0b"),
    "dot": DIR + head(guest_api.TREE_DIR, b"."),
    "no name": DIR + head(guest_api.TREE_FILE),
    "twice": DIR + file(b"a") + file(b"a"),
    "directory over file": DIR + file(b"a") + head(guest_api.TREE_DIR, b"a"),
    "up at the root": UP,
    "link at the root": head(guest_api.TREE_LINK) + U16.pack(4) + b"/etc",
    "unknown kind": DIR + head(9, b"a"),
    "long name": DIR + head(guest_api.TREE_FILE, b"a" * 256),
    "huge chunk": head(guest_api.TREE_FILE) + U32.pack(framing.CHUNK + 1),
    "more after the end": file(b"") + file(b""),
    "deep": DIR + head(guest_api.TREE_DIR, b"d") * 64,
    "source failed": head(guest_api.TREE_FILE) + U32.pack(guest_api.TREE_FAILED),
}


@pytest.mark.req("L6")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tree_is_an_error_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    extractor = Extractor(inside / "out", inside / ".staging", CopyLimits())
    with pytest.raises(GuestError):
        extractor.feed(HOSTILE[case])
    extractor.discard()
    assert os.listdir(inside) == []
    assert os.listdir(tmp_path) == ["inside"]


@pytest.mark.req("L6")
def test_links_are_not_made_and_not_followed(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    extractor = Extractor(inside / "out", inside / ".staging", CopyLimits())
    link = head(guest_api.TREE_LINK, b"way") + U16.pack(2) + b".."
    extractor.feed(DIR + link + head(guest_api.TREE_DIR, b"way", 0o7777) + file(b"f") + UP + UP)
    extractor.commit()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "inside", "inside/out", "inside/out/way", "inside/out/way/f",
    ]  # fmt: skip
    assert stat.S_IMODE((inside / "out" / "way").stat().st_mode) == 0o777


@pytest.mark.req("L6")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.builds(head, st.integers(1, 6), st.sampled_from([b"", b"a", b"b", b"..", b"a/b"])),
            st.sampled_from([DIR, UP, BODY, file(b"c")]),
        ),
        max_size=12,
    ),
    st.integers(1, 40),
)
def test_any_tree_stays_inside_and_leaves_nothing_when_it_fails(
    tmp_path: Path, pieces: list[bytes], step: int
) -> None:
    inside = tmp_path / "fuzz"
    inside.mkdir(exist_ok=True)
    extractor = Extractor(inside / "out", inside / ".staging", CopyLimits(max_bytes=1000, max_entries=100))
    stream = b"".join(pieces)
    try:
        for at in range(0, len(stream), step):
            extractor.feed(stream[at : at + step])
        extractor.commit()
    except MvmError:
        extractor.discard()
        assert os.listdir(inside) == []
    else:
        assert os.listdir(inside) == ["out"]
        os.rename(inside / "out", tmp_path / f"done-{os.urandom(8).hex()}")
    assert ".staging" not in os.listdir(tmp_path)


def hostile(act: Callable[[socket.socket, bytes], None]) -> tuple[GuestChannel, threading.Thread]:
    """A channel to a guest that greets as it should, then does `act(socket, all it has read)`."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        data = b""
        while len(data) < 37:
            data += theirs.recv(4096)
        nonce = framing.HELLO_BODY.unpack(data[8:36])[3]
        body = framing.HELLO_ACK_BODY.pack(framing.HELLO_MAGIC, nonce, 1, 1 << 18)
        try:
            theirs.sendall(framing.encode(framing.HELLO_ACK, 0, body))
            act(theirs, data)
            while theirs.recv(65536):
                pass
        except OSError:
            pass
        finally:
            theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    return GuestChannel(ours), thread


@pytest.mark.req("L6")
@pytest.mark.parametrize(
    "answer",
    [
        os.urandom(5000),
        framing.HEADER.pack(framing.DONE << 24 | 0xFFFFFF, 1),
        framing.encode(framing.EXIT, 1, b"\0\0"),
        framing.encode(framing.STATUS_REPLY, 1, b"short"),
        framing.encode(framing.STATUS_REPLY, 2, bytes(38)),
    ],
    ids=["noise", "huge length", "another verb's answer", "short", "another request's"],
)
def test_a_hostile_answer_is_a_guest_error(answer: bytes) -> None:
    channel, thread = hostile(lambda sock, _data: sock.sendall(answer))
    with pytest.raises(GuestError):
        channel.status(timeout=10)
    with pytest.raises(GuestError):
        channel.status()
    channel.close()
    thread.join()


@pytest.mark.req("L6")
def test_a_silent_guest_is_a_guest_error_in_time() -> None:
    channel, thread = hostile(lambda _sock, _data: None)
    with pytest.raises(GuestError, match="did not answer"):
        channel.status(timeout=0.2)
    channel.close()
    thread.join()


@pytest.mark.req("L6")
def test_a_guest_that_floods_beyond_its_credit_is_cut_off_in_bounded_memory(tmp_path: Path) -> None:
    def flood(sock: socket.socket, _data: bytes) -> None:
        while True:
            sock.sendall(framing.encode(framing.OUT_DATA, 1, b"\1" + bytes(30000)))

    channel, thread = hostile(flood)
    reader, writer = os.pipe()  # nobody reads
    with pytest.raises(GuestError, match="broke the protocol"):
        channel.exec(["anything"], stdout=writer)
    assert channel.buffered < 1 << 20
    channel.close()
    thread.join()
    os.close(reader)
    os.close(writer)


@pytest.mark.req("L6")
def test_a_connection_that_ends_is_a_guest_error() -> None:
    channel, thread = hostile(lambda sock, _data: sock.shutdown(socket.SHUT_RDWR))
    with pytest.raises(GuestError, match="lost"):
        channel.status()
    channel.close()
    thread.join()
