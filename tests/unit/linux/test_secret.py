"""Secrets: locked, not dumped, wiped, never shown."""

from __future__ import annotations

import copy
import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.linux.secret import SecretBytes


@pytest.mark.req("K2")
@given(st.binary(max_size=10_000))
def test_content_is_kept_until_wiped(data: bytes) -> None:
    secret = SecretBytes.copy_of(data)
    view = secret.view()
    assert view == data
    assert len(secret) == len(data)
    secret.wipe()
    secret.wipe()
    assert bytes(view) == bytes(len(data)), "an open view sees zeros"


@pytest.mark.req("K2")
def test_wiped_is_unusable() -> None:
    with SecretBytes.from_random(32) as secret:
        assert not secret.wiped
    assert secret.wiped
    with pytest.raises(ValueError):
        secret.view()


@pytest.mark.req("K2")
def test_nothing_shows_it() -> None:
    secret = SecretBytes.copy_of(b"hunter2")
    assert "hunter2" not in repr(secret) + str(secret) + f"{secret}"
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.copy(secret)
    with pytest.raises(TypeError):
        bytes(secret)  # type: ignore[call-overload]


@pytest.mark.req("K2")
def test_copy_of_can_wipe_its_source() -> None:
    source = bytearray(b"hunter2")
    secret = SecretBytes.copy_of(source, wipe=True)
    assert source == bytes(7)
    assert secret.equals(SecretBytes.copy_of(b"hunter2"))
    assert not secret.equals(SecretBytes.copy_of(b"hunter3"))


def test_random_secrets_differ() -> None:
    assert not SecretBytes.from_random(32).equals(SecretBytes.from_random(32))


def test_a_short_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"1234")
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        with pytest.raises(EOFError):
            SecretBytes.from_fd(fd, 5)
    finally:
        os.close(fd)


def _flags_of(secret: SecretBytes) -> set[str]:
    """The kernel's flags of the mapping, found by its content's address."""
    import ctypes

    address = ctypes.addressof(ctypes.c_char.from_buffer(secret._map))
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and ":" not in head:
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    return set()


@pytest.mark.req("K2")
def test_the_kernel_says_locked_and_not_dumped() -> None:
    secret = SecretBytes.from_random(32)
    if not secret.locked:
        pytest.skip("RLIMIT_MEMLOCK is too low here")
    assert {"lo", "dd"} <= _flags_of(secret)


@pytest.fixture
def no_locked_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
    yield
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


@pytest.mark.req("K2")
def test_without_the_right_to_lock_it_says_so(no_locked_memory: None) -> None:
    secret = SecretBytes.copy_of(b"hunter2")
    assert bytes(secret.view()) == b"hunter2"
    flags = _flags_of(secret)
    assert ("lo" in flags) == secret.locked
    assert "dd" in flags
