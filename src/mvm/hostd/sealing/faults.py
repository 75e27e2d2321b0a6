"""What opening or reading a sealed image can answer: one error type, so that "refuse and stay asleep" is
one branch.

Bytes that are damaged, foreign or out of order are IntegrityError, whatever layer noticed: parsers, the
cipher, the decompressor and the file system. Only a fingerprint that differs has a type of its own, because
there the bytes are sound and a cold boot is the cure.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mvm.core.errors import IntegrityError

if TYPE_CHECKING:
    from typing import NoReturn

REMEDY = "boot the instance cold: what was in its memory is lost, its data disk is not touched"

_NOT_OUR_FILE = (
    errno.ENOENT,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENXIO,
    errno.EIO,
    errno.EBADMSG,
)
"""What open(2) and pread(2) answer when a file is missing, replaced by something else, or unreadable."""


class FingerprintMismatch(IntegrityError):
    """The image is sound but was made under another VMM, CPU or set of artifacts.

    `differences`: (name, value when sealed, value now) for each that differs; "" stands for absent.
    """

    kind = "fingerprint"

    def __init__(self, differences: tuple[tuple[str, str, str], ...]) -> None:
        super().__init__(
            "the snapshot was made under a different VMM, CPU or set of artifacts",
            details="\n".join(
                f"{name}: sealed under {old or 'nothing'}, now {new or 'nothing'}"
                for name, old, new in differences
            ),
            resolution=f"go back to what it was sealed under, or {REMEDY}",
        )
        self.differences = differences


def damaged(brief: str, details: str = "") -> IntegrityError:
    return IntegrityError(brief, details=details, resolution=REMEDY)


def raise_if_unusable(error: OSError, what: str) -> None:
    """A missing, replaced or unreadable file is damage; anything else (EMFILE, EACCES) the caller re-
    raises."""
    if error.errno in _NOT_OUR_FILE:
        raise damaged(f"{what} cannot be read", f"{error.strerror}") from error


def refuse(brief: str, details: str = "") -> NoReturn:
    raise damaged(brief, details)
