"""The one-file FUSE server against the kernel's ABI (include/uapi/linux/fuse.h), byte by byte, and against noise."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.linux import fuse

SIZE = 1_000_000
CONTENT = bytes(range(256)) * (SIZE // 256 + 1)


def server() -> fuse.FileServer:
    return fuse.FileServer(-1, SIZE, 1000, 1001, lambda at, n: [CONTENT[at : at + n]])


def request(opcode: int, body: bytes = b"", unique: int = 7) -> memoryview:
    head = struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, 1, 0, 0, 1, 0, 0)
    return memoryview(head + body)


def answer(opcode: int, body: bytes = b"") -> tuple[int, bytes]:
    """(error, payload) with the header checked."""
    made = server().answer(request(opcode, body))
    assert made is not None
    raw = b"".join(made)
    length, error, unique = struct.unpack_from("<IiQ", raw)
    assert (length, unique) == (len(raw), 7)
    return error, raw[16:]


def read_body(offset: int, size: int) -> bytes:
    return struct.pack("<QQIIQII", 0, offset, size, 0, 0, 0, 0)


def test_struct_sizes_are_the_kernels() -> None:
    sizes = {
        name: getattr(fuse, name).size for name in ("_IN", "_OUT", "_INIT_OUT", "_ATTR_OUT", "_OPEN_OUT")
    }
    assert sizes == {"_IN": 40, "_OUT": 16, "_INIT_OUT": 64, "_ATTR_OUT": 104, "_OPEN_OUT": 16}
    assert fuse._STORE_OUT.size == 24
    assert len(answer(fuse.STATFS)[1]) == 80, "struct fuse_statfs_out is one struct fuse_kstatfs"


def test_init_agrees_on_what_both_know() -> None:
    error, body = answer(fuse.INIT, struct.pack("<IIII", 7, 40, 1 << 20, 0xFFFFFFFF) + bytes(48))
    major, minor, readahead, flags, _, _, max_write, grain, pages = struct.unpack_from("<IIIIHHIIH", body)
    assert (error, major, minor) == (0, 7, 31)
    assert readahead == max_write == fuse.READ_MAX
    assert flags == (1 << 0) | (1 << 22), "asynchronous reads and large requests, nothing else"
    assert pages * 4096 == fuse.READ_MAX
    assert grain == 1
    assert answer(fuse.INIT, struct.pack("<IIII", 7, 30, 0, 0))[0] == -errno.EPROTO


def test_attributes_are_of_a_private_file() -> None:
    error, body = answer(fuse.GETATTR, bytes(16))
    fields = struct.unpack("<QIIQQQQQQIIIIIIIIII", body)
    ino, size, blocks = fields[3:6]
    mode, links, uid, gid = fields[12:16]
    assert error == 0
    assert (ino, size, mode, links, uid, gid) == (1, SIZE, 0o100600, 1, 1000, 1001)
    assert blocks == (SIZE + 511) // 512


@given(st.integers(0, SIZE + 5000), st.integers(0, fuse.READ_MAX))
def test_a_read_gives_the_bytes_up_to_the_end(offset: int, size: int) -> None:
    assert answer(fuse.READ, read_body(offset, size)) == (0, CONTENT[:SIZE][offset : offset + size])


@pytest.mark.parametrize(
    ("opcode", "error"),
    [
        (fuse.WRITE, errno.EROFS), (fuse.SETATTR, errno.EPERM), (fuse.FALLOCATE, errno.EOPNOTSUPP),
        (1, errno.ENOSYS), (24, errno.ENOSYS), (9999, errno.ENOSYS),
    ],
)  # fmt: skip
@pytest.mark.req("S2")
def test_nothing_can_be_changed(opcode: int, error: int) -> None:
    assert answer(opcode, bytes(64)) == (-error, b"")


@pytest.mark.parametrize("opcode", [fuse.FORGET, fuse.INTERRUPT, fuse.BATCH_FORGET])
def test_some_requests_have_no_answer(opcode: int) -> None:
    assert server().answer(request(opcode, bytes(16))) is None


@pytest.mark.req("S4")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
def test_a_read_that_fails_is_the_readers_error(number: int) -> None:
    def fail(_: int, __: int) -> list[bytes | memoryview]:
        raise OSError(number, "on purpose")

    made = fuse.FileServer(-1, SIZE, 0, 0, fail).answer(request(fuse.READ, read_body(0, 4096)))
    assert made is not None
    assert struct.unpack("<IiQ", b"".join(made)) == (16, -number, 7)


def test_a_request_without_its_header_is_no_request() -> None:
    for length in range(40):
        with pytest.raises(OSError, match="short") as caught:
            server().answer(request(fuse.READ)[:length])
        assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("opcode", [fuse.READ, fuse.INIT])
def test_a_body_that_is_too_short_is_an_error_and_no_crash(opcode: int) -> None:
    for length in range(16):
        assert answer(opcode, bytes(length)) == (-errno.EPROTO, b"")


@given(st.integers(0, 60), st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_any_request_is_answered_in_form(opcode: int, body: bytes, unique: int) -> None:
    made = server().answer(request(opcode, body, unique))
    if made is None:
        assert opcode in (fuse.FORGET, fuse.INTERRUPT, fuse.BATCH_FORGET)
        return
    raw = b"".join(made)
    length, error, seen = struct.unpack_from("<IiQ", raw)
    assert (length, seen) == (len(raw), unique)
    assert -512 < error <= 0, "the kernel refuses anything else"
    assert error == 0 or len(raw) == 16


@given(st.binary(max_size=300))
def test_noise_never_crashes(raw: bytes) -> None:
    if len(raw) >= 40:
        server().answer(memoryview(raw))
        return
    with pytest.raises(OSError, match="short"):
        server().answer(memoryview(raw))
