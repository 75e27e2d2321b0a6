"""How fast this host's time-stamp counter runs, measured.

No file tells it reliably: `cpu MHz` in /proc/cpuinfo is the core's present clock where that changes. So RDTSC is
executed twice and compared with CLOCK_MONOTONIC. The instruction lives in a memfd mapped readable and executable, never
writable, so that it also works where writable-and-executable memory is denied.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
_CODE = bytes.fromhex("0f3148c1e2204809d0c3")
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def tsc_khz(over_s: float = 0.05) -> int:
    """Kilohertz of the x86 time-stamp counter, measured for `over_s` seconds. Raises OSError."""
    size = mmap.PAGESIZE
    fd = os.memfd_create("mvm-rdtsc", os.MFD_CLOEXEC)
    try:
        os.write(fd, _CODE)
        address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, fd, 0)
    finally:
        os.close(fd)
    if address in (None, _MAP_FAILED):
        raise OSError(ctypes.get_errno(), "executable memory is not to be had")
    try:
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
        read()  # the first call faults in what the others should not wait for
        began, first = time.monotonic_ns(), read()
        time.sleep(over_s)
        ended, last = time.monotonic_ns(), read()
    finally:
        _libc.munmap(address, size)
    khz: int = round((last - first) * 1_000_000 / (ended - began))
    return khz
