"""A seccomp filter for the calling thread that lets everything through: what can be read of it is real, no more."""

from __future__ import annotations

import ctypes

_PR_SET_SECCOMP, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 22, 15, 38
_MODE_FILTER = 2
_RETURN, _ALLOW = 0x06, 0x7FFF0000

_libc = ctypes.CDLL(None, use_errno=True)


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


def apply() -> None:
    allow = _Instruction(_RETURN, 0, 0, _ALLOW)
    program = _Program(1, ctypes.pointer(allow))
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def name_thread(name: str) -> None:
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
