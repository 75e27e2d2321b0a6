"""Keeping a program from asking for huge pages, without its help.

QEMU advises MADV_HUGEPAGE on all guest memory. On a private mapping of a file the kernel takes that as leave to read
2 to 4 MiB around every missing page (do_sync_mmap_readahead), which for a file that is decrypted page by page costs
more than everything the guest wanted. QEMU has no switch for it, and PR_SET_THP_DISABLE does not undo the advice, so
the call is answered with EINVAL, as a kernel without huge pages would.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_ARCH_X86_64, _MADVISE, _MADV_HUGEPAGE = 0xC000003E, 28, 14
_AT_NUMBER, _AT_ARCH, _AT_THIRD = 0, 4, 32  # struct seccomp_data

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]  # ctypes wants a list


def render() -> bytes:
    """The filter, 8 bytes an instruction: madvise(_, _, MADV_HUGEPAGE) is EINVAL, everything else is as it was."""
    steps = [
        (_LOAD, 0, 0, _AT_ARCH),
        (_EQUAL, 0, 5, _ARCH_X86_64),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_EQUAL, 0, 3, _MADVISE),
        (_LOAD, 0, 0, _AT_THIRD),
        (_EQUAL, 0, 1, _MADV_HUGEPAGE),
        (_RETURN, 0, 0, _ERRNO | errno.EINVAL),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


def refuse_advice() -> None:
    """From here on this process and its children cannot ask for huge pages. Needs no_new_privs or CAP_SYS_ADMIN.

    Does nothing on other processors than x86-64. Raises OSError.
    """
    if platform.machine() != "x86_64":
        return
    code = render()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no system call filter")
