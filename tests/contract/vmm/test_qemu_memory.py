"""Whose memory QEMU's driver reads."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import msgspec
import pytest

from mvm.core.errors import VmmError
from mvm.hostd.vmm.qemu.driver import QemuVm
from mvm.linux.pidfd import identify

PAGE = 4096


@pytest.mark.req("S4")
def test_a_number_that_changed_hands_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU ended after it had said where the guest's memory is, and its pid is another process's now."""
    import ctypes

    ours = mmap.mmap(-1, PAGE)
    ours[:6] = b"secret"
    address = ctypes.addressof(ctypes.c_char.from_buffer(ours))
    monkeypatch.setattr(QemuVm, "_call", lambda *_, **__: f"Host virtual address is {address:#x}")
    me = identify(os.getpid())
    assert me is not None
    with QemuVm(me, None, PAGE, tmp_path).memory() as memory:
        page = bytearray(PAGE)
        memory.read_into(0, page)
        assert page[:6] == b"secret"
    gone = msgspec.structs.replace(me, start_ticks=me.start_ticks + 1)
    with pytest.raises(VmmError, match="QEMU ended"), QemuVm(gone, None, PAGE, tmp_path).memory():
        raise AssertionError("a stranger's memory can be read")
