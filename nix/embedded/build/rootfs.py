"""$out/rootfs.ext4: the guest's read-only root, made of locked packages, the guest agent and what is written below.

Package scripts never run, so this module does openly what they would have done: accounts, the merged /usr, the
certificate bundle, byte code. Nothing here is secret and no account has a password.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import subprocess  # noqa: TID251 - runs inside the build, where there is no mvm

from debs import Entry, entries
from ext4 import write_image

Tree = dict[str, Entry]

PASSWD = """\
root:x:0:0:root:/root:{shell}
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:x:2:2:bin:/bin:/usr/sbin/nologin
sys:x:3:3:sys:/dev:/usr/sbin/nologin
mail:x:8:8:mail:/var/mail:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
GROUP = """\
root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
mail:x:8:
kmem:x:15:
www-data:x:33:
shadow:x:42:
utmp:x:43:
staff:x:50:
users:x:100:
nogroup:x:65534:
"""
FILES = {
    "etc/shells": "/bin/sh\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\n",
    "etc/profile": "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nPS1='\\u@\\h:\\w\\$ '\n",
    # busybox and dash read it too; a locale would need files the image does without.
    "etc/environment": "LANG=C.UTF-8\n",
}
LINKS = {
    "bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64",
    "etc/hostname": "/run/hostname", "etc/hosts": "/run/hosts", "etc/machine-id": "/run/machine-id",
    "etc/mtab": "/proc/self/mounts", "etc/resolv.conf": "/run/resolv.conf",
    "home": "var/home", "root": "var/root", "usr/sbin/init": "../lib/mvm/init",
}  # fmt: skip
DIRECTORIES = {
    "data": 0o755, "dev": 0o755, "etc/mvm/services.d": 0o755, "mnt": 0o755, "opt": 0o755, "proc": 0o555, "run": 0o755,
    "srv": 0o755, "sys": 0o555, "tmp": 0o1777, "usr/local/bin": 0o755, "usr/local/sbin": 0o755, "var": 0o755,
}  # fmt: skip


def put(tree: Tree, path: str, entry: Entry) -> None:
    parent = os.path.dirname(path)
    if parent and parent not in tree:
        put(tree, parent, Entry("d", 0o755, 0, 0, b""))
    tree[path] = entry


def add_text(tree: Tree, path: str, text: str, mode: int = 0o644) -> None:
    put(tree, path, Entry("f", mode, 0, 0, text.encode()))


def add_link(tree: Tree, path: str, target: str) -> None:
    put(tree, path, Entry("l", 0o777, 0, 0, target.encode()))


def add_packages(tree: Tree, debs: list[str], drop: list[str]) -> None:
    dropped = re.compile("|".join(fnmatch.translate(pattern + "*") for pattern in drop))
    for deb in sorted(debs, key=os.path.basename):
        for path, entry in entries(deb):
            if dropped.match(path + "/" if entry.kind == "d" else path):
                continue
            # Licences travel with the image; the rest of the documentation does not.
            if path.startswith("usr/share/doc/") and not path.endswith("/copyright"):
                continue
            if entry.kind == "d" and path in tree:
                continue
            # The guest is one trust domain: nothing in it needs to gain privilege through a set-id file.
            put(tree, path, entry._replace(mode=entry.mode & 0o1777))


def add_applets(tree: Tree, scratch: str) -> None:
    """A link to busybox for every applet that no package provides."""
    program = f"{scratch}/busybox"
    with open(program, "wb") as file:
        file.write(tree["usr/bin/busybox"].data)
    os.chmod(program, 0o755)
    listed = subprocess.run([program, "--list-full"], check=True, stdout=subprocess.PIPE, text=True).stdout
    os.unlink(program)
    for applet in sorted(listed.split()):
        name = os.path.basename(applet)
        folder = "usr/sbin" if applet.split("/")[-2:-1] == ["sbin"] else "usr/bin"
        if not any(f"{place}/{name}" in tree for place in ("usr/bin", "usr/sbin")):
            add_link(tree, f"{folder}/{name}", "/usr/bin/busybox")


def add_certificates(tree: Tree) -> None:
    """What update-ca-certificates makes: one bundle, found by OpenSSL, GnuTLS, curl and Python alike."""
    found = [entry for path, entry in sorted(tree.items()) if path.startswith("usr/share/ca-certificates/")]
    bundle = b"".join(entry.data for entry in found if entry.kind == "f")
    if bundle:
        put(tree, "etc/ssl/certs/ca-certificates.crt", Entry("f", 0o644, 0, 0, bundle))
        add_link(tree, "usr/lib/ssl/cert.pem", "/etc/ssl/certs/ca-certificates.crt")


def add_system(tree: Tree, init: str, profile: str, shell: str) -> None:
    for path, mode in DIRECTORIES.items():
        put(tree, path, Entry("d", mode, 0, 0, b""))
    for path, text in FILES.items():
        add_text(tree, path, text)
    for path, target in LINKS.items():
        tree.pop(path, None)
        add_link(tree, path, target)
    add_link(tree, "usr/bin/sh", shell)
    if "usr/bin/mawk" in tree:
        add_link(tree, "usr/bin/awk", "mawk")
    login = "/bin/bash" if "usr/bin/bash" in tree else "/bin/sh"
    names = [line.partition(":")[0] for line in PASSWD.splitlines()]
    add_text(tree, "etc/passwd", PASSWD.format(shell=login))
    add_text(tree, "etc/group", GROUP)
    # "*" is no hash of anything: no password opens the account, and the agent needs none.
    add_text(tree, "etc/shadow", "".join(f"{name}:*:19000:0:99999:7:::\n" for name in names), 0o600)
    release = f'NAME="mvm guest"\nPRETTY_NAME="mvm guest ({profile})"\nID=mvm-guest\nID_LIKE=debian\n'
    release += f"VARIANT_ID={profile}\n"
    tree.pop("etc/os-release", None)
    add_text(tree, "etc/os-release", release)
    add_text(tree, "usr/lib/os-release", release)
    for name, path in (
        ("rootfs-init", "usr/lib/mvm/init"),
        ("inittab", "etc/inittab"),
        ("fstab", "etc/fstab"),
    ):
        with open(f"{init}/{name}", encoding="utf-8") as file:
            add_text(tree, path, file.read(), 0o755 if name == "rootfs-init" else 0o644)


def add_agent(tree: Tree, source: str) -> None:
    found = False
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8") as file:
                    add_text(tree, "usr/lib/mvm/mvm/guest/" + os.path.relpath(path, source), file.read())
                found = found or name == "__main__.py"
    if not found:
        raise SystemExit("the guest agent has no __main__.py")
    add_text(tree, "usr/lib/mvm/mvm/__init__.py", "")


def add_bytecode(tree: Tree) -> None:
    """Byte code that the interpreter takes without looking at the source (PEP 552 unchecked hash): the root is
    read-only, so the two cannot drift apart, and compiling or even checking at boot is slow under emulation."""
    tag = importlib.util.cache_from_source("x.py").rpartition("x.")[2]
    for path in sorted(path for path, entry in tree.items() if path.endswith(".py") and entry.kind == "f"):
        if not path.startswith(("usr/lib/python3", "usr/lib/mvm/")):
            continue
        source = tree[path].data
        try:
            code = compile(source, "/" + path, "exec", dont_inherit=True, optimize=0)
        except (SyntaxError, ValueError):
            continue  # templates and deliberately broken samples
        data = importlib._bootstrap_external._code_to_hash_pyc(  # type: ignore[attr-defined]
            code, importlib.util.source_hash(source), checked=False
        )
        folder, _, name = path.rpartition("/")
        put(tree, f"{folder}/__pycache__/{name[:-3]}.{tag}", Entry("f", 0o644, 0, 0, bytes(data)))


def main() -> None:
    env = os.environ
    with open(env["policy"], encoding="utf-8") as file:
        policy = json.load(file)
    profile = env["profile"]
    chosen = policy["profiles"][profile]
    scratch = os.getcwd() + "/scratch"
    os.mkdir(scratch)

    tree: Tree = {}
    add_packages(tree, env["debs"].split(), policy["drop"] + chosen["drop"])
    add_system(tree, env["init"], profile, chosen["shell"])
    add_applets(tree, scratch)
    add_certificates(tree)
    add_agent(tree, env["guest"])
    add_bytecode(tree)

    os.mkdir(env["out"])
    write_image(tree, f"{env['out']}/rootfs.ext4", scratch)


main()
