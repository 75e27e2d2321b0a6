"""Writes a tree as a minimal ext4 image whose bytes depend on nothing but the tree.

mke2fs makes the empty file system and debugfs fills it from a sorted script. `mke2fs -d` is not used: at 1.47.0 it
takes directory order and change times from the build's own disk. Fixed: UUID, hash seed, every time stamp
(E2FSPROGS_FAKE_TIME; 1 is the least it accepts as set), inode order. No journal and no checksums: the image is only
ever mounted read-only, and its sha256 is what is trusted. Ends with a full check by e2fsck.
"""

from __future__ import annotations

import os
import stat
import subprocess  # noqa: TID251 - runs inside the build, where there is no mvm
from typing import NoReturn

from debs import Entry

BLOCK = 4096
INODE = 256
UUID = "6d766d00-0000-4000-8000-726f6f746673"


def _fail(what: str, output: str) -> NoReturn:
    raise SystemExit(f"{what}:\n{output[-4000:]}")


def _tool(name: str, *args: str, stdin: str = "") -> str:
    tools = os.environ["tools"]  # noqa: SIM112 - nix passes attributes by their names
    library = f"{tools}/lib/x86_64-linux-gnu:{tools}/usr/lib/x86_64-linux-gnu"
    program = next(p for p in (f"{tools}/sbin/{name}", f"{tools}/usr/sbin/{name}") if os.path.exists(p))
    env = {
        "E2FSPROGS_FAKE_TIME": "1", "MKE2FS_CONFIG": "/dev/null", "E2FSCK_CONFIG": "/dev/null",
        "TZ": "UTC", "PATH": "", "PAGER": "cat",
    }  # fmt: skip
    done = subprocess.run(
        [f"{tools}/ld.so", "--library-path", library, program, *args],
        input=stdin, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        _fail(f"{name} ended with {done.returncode}", done.stdout)
    return done.stdout


def _quoted(path: str) -> str:
    if "\n" in path or '"' in path:
        raise SystemExit(f"file name cannot be given to debugfs: {path!r}")
    return f'"{path}"'


def _geometry(tree: dict[str, Entry]) -> tuple[int, int]:
    """(blocks, inodes) that hold `tree`, with a little to spare for extents and group descriptors."""
    blocks = 0
    children: dict[str, int] = {}
    for path, entry in tree.items():
        parent, _, name = path.rpartition("/")
        children[parent] = children.get(parent, 24) + 12 + len(name.encode())
        if entry.kind == "f" or len(entry.data) > 59:
            blocks += -(-len(entry.data) // BLOCK)
    blocks += sum(1 + size * 5 // 4 // BLOCK for size in children.values()) + sum(
        e.kind == "d" for e in tree.values()
    )
    inodes = -(-(len(tree) + 32) // 32) * 32
    blocks += inodes * INODE // BLOCK + 64
    # A group of 32,768 blocks spends up to three on bitmaps and backups, and rounds its inode table up.
    return blocks + blocks * 12 // BLOCK + (blocks // 32768 + 1) * 8, inodes


def _script(tree: dict[str, Entry], workdir: str) -> str:
    lines = ["rmdir lost+found"]
    here = None
    for number, (path, entry) in enumerate(
        sorted(tree.items(), key=lambda item: (item[0].count("/"), item[0]))
    ):
        parent, _, name = path.rpartition("/")
        target = _quoted("/" + path)
        if parent != here:
            lines.append(f"cd {_quoted('/' + parent)}")
            here = parent
        if entry.kind == "d":
            lines.append(f"mkdir {_quoted(name)}")
            if entry.mode != 0o755:
                lines.append(f"sif {target} mode 0{stat.S_IFDIR | entry.mode:o}")
        elif entry.kind == "l":
            lines.append(f"symlink {_quoted(name)} {_quoted(entry.data.decode())}")
        else:
            source = f"{workdir}/{number}"
            with open(source, "wb") as file:
                file.write(entry.data)
            os.chmod(source, 0o644)
            lines.append(f"write {source} {_quoted(name)}")
            if entry.mode != 0o644:
                lines.append(f"sif {target} mode 0{stat.S_IFREG | entry.mode:o}")
        for field, value in (("uid", entry.uid), ("gid", entry.gid)):
            if value:
                lines.append(f"sif {target} {field} {value}")
    return "\n".join(lines) + "\n"


def write_image(tree: dict[str, Entry], image: str, workdir: str) -> None:
    """`tree`: relative path -> Entry, with every parent present. `workdir` is scratch space."""
    blocks, inodes = _geometry(tree)
    _tool(
        "mke2fs", "-q", "-F", "-t", "ext4", "-O", "none,extent,filetype,sparse_super,large_file,extra_isize",
        "-b", str(BLOCK), "-I", str(INODE), "-N", str(inodes), "-m", "0", "-U", UUID, "-L", "mvm-root",
        "-E", f"hash_seed={UUID},root_owner=0:0,nodiscard,lazy_itable_init=0", image, str(blocks),
    )  # fmt: skip
    script = f"{workdir}/script"
    with open(script, "w", encoding="utf-8") as file:
        file.write(_script(tree, workdir))
    # debugfs goes on after a failed command and still ends with 0: anything it says beyond the echo is a failure.
    for line in _tool("debugfs", "-w", "-f", script, image).splitlines():
        if line and not line.startswith(("debugfs: ", "debugfs 1.", "Allocated inode: ")):
            _fail("debugfs could not fill the image", line)
    _tool("e2fsck", "-f", "-n", image)
