"""Starting programs on macOS, for Lima.

`mvm.linux.process` is the door to programs everywhere else; it holds them by pidfd, which macOS does not have. So this
is the little that Lima's driver needs, on posix_spawn: a program on given descriptors, or with its output captured. It
also runs on Linux, where the tests of that driver are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Final

from mvm.core.errors import MissingPrerequisite

PATH: Final = "/opt/homebrew/bin:/opt/local/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_OUTPUT_MAX: Final = 64 << 20
# Lima finds its instances below HOME; the rest is for programs that draw on a terminal.
_KEPT: Final = ("HOME", "LIMA_HOME", "USER", "TERM", "TMPDIR", "SSH_AUTH_SOCK")


def environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {"LANG": "C.UTF-8", **kept, "PATH": os.environ.get("MVM_LIMA_PATH", PATH)}


def execute(argv: Sequence[str], *, stdin: int = -1, stdout: int = -1, stderr: int = -1) -> int:
    """Run it to its end on these descriptors (-1: /dev/null); 128 and the signal's number if it was killed."""
    env = environment()
    program = shutil.which(argv[0], path=env["PATH"])
    if program is None:
        raise MissingPrerequisite(
            f"the program {argv[0]} cannot be started",
            details=f"It is in none of {env['PATH']}.",
            resolution="install Lima: brew install lima" if argv[0] == "limactl" else f"install {argv[0]}",
        )
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        wanted = [fd if fd >= 0 else null for fd in (stdin, stdout, stderr)]
        # Through fresh numbers above the three, so that no copy overwrites the source of the next.
        high = [os.dup(fd) for fd in wanted]
        try:
            actions: list[tuple[int, int, int]] = [
                (os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(high)
            ]
            pid = os.posix_spawn(program, list(argv), env, file_actions=actions)
        finally:
            for fd in high:
                os.close(fd)
    finally:
        os.close(null)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def capture(argv: Sequence[str]) -> tuple[int, bytes]:
    """(exit status, standard output), which goes through a file: no pipe can fill up."""
    import tempfile

    with tempfile.TemporaryFile() as out:
        code = execute(argv, stdout=out.fileno())
        out.seek(0)
        return code, out.read(_OUTPUT_MAX)
