"""The secrets disk: a read-only ext4 image that exists in memory only, made anew for every run and wake.

The image is a memfd; mke2fs and debugfs reach it, and the values, through inherited descriptors. Names go
to debugfs on its standard input, so neither names nor values are ever in an argv or on a file system. All
images have the same size, so that a guest that wakes finds the disk it went to sleep with, whatever is on
it. No journal: nobody ever writes to it. Files are 0400, root's, in the root directory, nothing else is
there.

The kernel may swap a memfd's pages: a node that keeps secrets has no swap, or encrypted swap.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mvm.core.errors import CommandFailed
from mvm.hostd.resources.secrets_store import check_bounds
from mvm.linux import memfd, process

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mvm.linux.secret import SecretBytes

SIZE = 1 << 20
LABEL = "mvm-secrets"
_BLOCK = 1024
_INODES = 96
"""Eleven are the file system's own; the rest is more than limits.SECRET_FILES."""
_TIMEOUT_S = 20.0
# Without the host's mke2fs.conf: the image must not depend on where it is made.
_ENVIRONMENT = {"MKE2FS_CONFIG": "/dev/null"}


def render_format(target: str) -> list[str]:
    """The command that makes the empty file system in `target`."""
    return [
        "mke2fs", "-q", "-F", "-t", "ext4", "-O", "none,filetype,extent,sparse_super", "-b", str(_BLOCK),
        "-I", "128", "-N", str(_INODES), "-m", "0", "-L", LABEL,
        "-E", "nodiscard,lazy_itable_init=0,root_owner=0:0", target, str(SIZE // _BLOCK),
    ]  # fmt: skip


def render_script(sources: Mapping[str, str]) -> bytes:
    """What debugfs is told: `sources` is name -> path to copy from."""
    lines = ["rmdir lost+found", "set_inode_field / mode 040555"]
    for name, source in sources.items():
        lines.append(f"write {source} {name}")
        lines += [f"set_inode_field {name} {field}" for field in ("mode 0100400", "uid 0", "gid 0")]
    return "".join(f"{line}\n" for line in lines).encode()


def check_output(stdout: bytes, stderr: bytes, count: int) -> str:
    """What went wrong, or "". debugfs exits with 0 whatever its commands did, so its words are all there
    is.
    """
    complaints = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    # The first line is its version.
    if complaints and complaints[0].startswith("debugfs "):
        complaints = complaints[1:]
    if complaints:
        return "\n".join(complaints)
    written = stdout.count(b"Allocated inode:")
    return "" if written == count else f"{written} of {count} files were written"


def build(secrets: Mapping[str, SecretBytes]) -> int:
    """An owned, sealed memfd of SIZE bytes holding the file system, or nothing but zeros where there are no secrets.

    InvalidInput if the secrets exceed the limits.
    """
    check_bounds({name: len(value) for name, value in secrets.items()})
    image = memfd.create("mvm-secrets", SIZE)
    if not secrets:
        memfd.seal(image)
        return image
    sources: dict[str, int] = {}
    try:
        target = memfd.proc_path(image)
        process.run(render_format(target), pass_fds=[image], timeout=_TIMEOUT_S, env=_ENVIRONMENT)
        for name, value in sorted(secrets.items()):
            sources[name] = memfd.of_bytes("mvm-secret", value.view())
        script = render_script({name: memfd.proc_path(fd) for name, fd in sources.items()})
        argv = ["debugfs", "-w", "-f", "-", target]
        done = process.run(argv, stdin=script, pass_fds=[image, *sources.values()], timeout=_TIMEOUT_S)
        if problem := check_output(done.stdout, done.stderr, len(secrets)):
            raise CommandFailed(
                "the secrets disk could not be filled",
                details=f"{process.command_line(argv)}\n{problem}",
                resolution="this is a fault of mvm or of e2fsprogs: report it",
            )
        memfd.seal(image)
    except BaseException:
        os.close(image)
        raise
    finally:
        for fd in sources.values():
            os.close(fd)
    return image
