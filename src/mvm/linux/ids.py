"""Fresh random identifiers, and numeric ids of named users."""

from __future__ import annotations

import os

from mvm.core.errors import MissingPrerequisite


def random_hex(size: int = 16) -> str:
    """`size` random bytes as lower-case hexadecimal; 16 bytes never collide."""
    return os.urandom(size).hex()


def user_ids(name: str) -> tuple[int, int]:
    """(uid, primary gid) of a system user."""
    import pwd

    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise MissingPrerequisite(
            f"there is no user {name}",
            resolution=f"create it: useradd --system --no-create-home --shell /usr/sbin/nologin {name}",
        ) from None
    return entry.pw_uid, entry.pw_gid
