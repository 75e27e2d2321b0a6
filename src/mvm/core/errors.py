"""What can go wrong, as types a caller can act on.

Three families, never mixed: `Refused` (the request is understood and not allowed), `OperatorError` (something the
operator can put right, with the way to do it), and anything else, which is a bug of ours and keeps its traceback.
Every error carries `brief` (one line), `details` (what was seen) and `resolution` (what to do next).
The exit codes are part of the command line's contract: docs/cli.md lists them from this table.
"""

from __future__ import annotations

from typing import ClassVar


class MvmError(Exception):
    """Base of every error mvm raises on purpose.

    `brief`: one line, no trailing full stop. `details`: what was observed, may span lines. `resolution`: the next
    step, as an instruction. `exit_code`: what the command line exits with.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "internal"

    def __init__(self, brief: str, *, details: str = "", resolution: str = "") -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details
        self.resolution = resolution


class InvalidInput(MvmError):
    """A value is not of the form its type demands. Nothing was changed."""

    exit_code = 2
    kind = "invalid-input"


class NotFound(MvmError):
    """The named tenant, pool, instance, revision or file does not exist."""

    exit_code = 10
    kind = "not-found"


class Conflict(MvmError):
    """The request is well formed but not legal in the present state."""

    exit_code = 11
    kind = "conflict"


class Busy(MvmError):
    """Another command holds the instance; trying again later can succeed."""

    exit_code = 12
    kind = "busy"


class Refused(MvmError):
    """Not allowed: authority, integrity or policy says no."""

    exit_code = 13
    kind = "refused"


class IntegrityError(Refused):
    """Stored bytes are damaged, foreign or out of order, and were not used."""

    kind = "integrity"


class ResourceExhausted(MvmError):
    """Not enough memory, disk, addresses or channels."""

    exit_code = 14
    kind = "resources"


class MissingPrerequisite(MvmError):
    """The host lacks a program, device or privilege that this needs."""

    exit_code = 15
    kind = "prerequisite"


class BuildFailed(MvmError):
    """A flake did not build; `details` holds the end of its log."""

    exit_code = 16
    kind = "build-failed"


class GuestError(MvmError):
    """The guest did not answer, or answered with something that is not the protocol."""

    exit_code = 17
    kind = "guest"


class VmmError(MvmError):
    """The virtual machine monitor failed or died."""

    exit_code = 18
    kind = "vmm"


class CommandFailed(MvmError):
    """A program this host ran ended with a failure; `details` holds the command, copy-pasteable, and its output."""

    exit_code = 19
    kind = "command-failed"
