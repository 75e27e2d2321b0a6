"""Data disks by dm-crypt, in the node, which has it: opened for a VM, locked with its end, whoever ends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from tests.node.conftest import Rig

pytestmark = [pytest.mark.node, pytest.mark.req("K1")]

Run = Callable[[str], list[str]]

# Runs in the node with the mvm that is installed there. `image`: a disk of 8 MiB of acme/default-0, not open.
PRELUDE = """
import os, sys, time
from pathlib import Path
from mvm.core.errors import MvmError
from mvm.core.ids import InstanceId
from mvm.hostd.keys.development import DevelopmentKeyProvider
from mvm.hostd.resources import dm_crypt, volume
from mvm.linux import device_mapper, process
root = Path("/state/volumes-test")
me = InstanceId("acme", "default", 0)
image = root / "volumes" / volume.IMAGE_NAME
SIZE = 8 << 20
if not root.exists():
    image.parent.mkdir(parents=True)
    provider = DevelopmentKeyProvider(root / "state")
    provider.create(me.tenant).close()
provider = DevelopmentKeyProvider(root / "state")
volume.wipe(image)
def names():
    return [mapping.vm_name for mapping in dm_crypt.opened()]
def gone(seconds=5.0):
    end = time.monotonic() + seconds
    while names() and time.monotonic() < end:
        time.sleep(0.01)
    return not names()
def without_dm_crypt():
    dm_crypt.unavailable = lambda: "not now"
"""
CREATE = "volume.create(image, SIZE, provider, me)\n"


@pytest.fixture
def run(rig: Rig) -> Iterator[Run]:
    """Runs Python in the node, after PRELUDE; its output's lines."""

    def run(script: str) -> list[str]:
        done = rig.mvm("shell", "--", "/opt/mvm/bin/python", "-c", PRELUDE + script)
        return done.stdout.decode().splitlines()

    yield run
    assert rig.sh("dmsetup ls | grep mvm- || true; losetup -a; rm -rf /state/volumes-test") == ""


@pytest.mark.req("S3")
def test_a_new_disk_is_luks2_blank_and_locked(run: Run) -> None:
    out = run(
        CREATE
        + """
print(volume.version(image), volume.payload_size(image), image.stat().st_size - SIZE, names())
print(sorted(p.name for p in image.parent.iterdir()))
with volume.attach(image, provider, me) as disk:
    print(disk.device, disk.key_fd, names(), device_mapper.crypt_table(dm_crypt.opened()[0].name))
    fd = os.open(disk.path, os.O_RDWR)
    ends = os.pread(fd, 4 << 20, 0) + os.pread(fd, 1 << 20, SIZE - (1 << 20))
    print(ends == bytes(5 << 20), os.lseek(fd, 0, os.SEEK_END))
    os.pwrite(fd, b"plain text " * 400, 5 << 20)
    os.fsync(fd); os.close(fd)
print(gone(), b"plain text" in image.read_bytes())
"""
    )
    assert out == [
        f"2 {8 << 20} {2 << 20} []",
        "['data.img', 'data.key']",
        "True None ['acme--default-0'] CryptTable(cipher='aes-xts-plain64', offset=4096, "
        "options=('sector_size:4096',))",
        f"True {8 << 20}",
        "True False",
    ]


def test_the_last_user_locks_it_and_so_does_its_death(run: Run) -> None:
    out = run(
        CREATE
        + """
child = os.fork()
if child == 0:
    with volume.attach(image, provider, me):
        os.kill(os.getpid(), 9)
print(os.waitpid(child, 0)[1], gone())
with volume.attach(image, provider, me) as disk:
    fd = os.open(disk.path, os.O_RDWR)
print(names())
os.close(fd)
print(gone())
"""
    )
    assert out == ["9 True", "['acme--default-0']", "True"]


def test_a_disk_in_use_is_not_reported_as_locked(run: Run) -> None:
    out = run(
        CREATE
        + """
with volume.attach(image, provider, me) as disk:
    fd = os.open(disk.path, os.O_RDONLY)
try:
    dm_crypt.close(image, me.vm_name, wait_s=0.3)
except MvmError as error:
    print(error.kind, str(os.getpid()) in error.details, names())
os.close(fd)
print(gone(), volume.lock(image, me))
"""
    )
    assert out == ["busy True ['acme--default-0']", "True False"]


@pytest.mark.req("L7")
def test_what_a_killed_command_left_is_closed_by_the_next(run: Run) -> None:
    """Killed between cryptsetup's end and the moment from which the kernel looks after it."""
    out = run(
        CREATE
        + """
child = os.fork()
if child == 0:
    device_mapper.remove = lambda name, deferred=False: os.kill(os.getpid(), 9)
    with volume.attach(image, provider, me):
        pass
print(os.waitpid(child, 0)[1], names())
with volume.attach(image, provider, me):
    print(names())
print(gone())
child = os.fork()
if child == 0:
    device_mapper.remove = lambda name, deferred=False: os.kill(os.getpid(), 9)
    with volume.attach(image, provider, me):
        pass
print(os.waitpid(child, 0)[1], volume.lock(image, me), names())
"""
    )
    name = "['acme--default-0']"
    assert out == [f"9 {name}", name, "True", "9 True []"]


@pytest.mark.req("L7", "L3")
def test_what_a_daemon_left_is_known_when_its_mount_namespace_is_gone(run: Run) -> None:
    """The kernel then has no beginning of the image's path: found by a kill of mvm-hostd between two calls."""
    out = run(
        CREATE
        + """
import ctypes, subprocess
child = os.fork()
if child == 0:
    assert ctypes.CDLL(None).unshare(0x20000) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", str(root), str(root)], check=True)
    device_mapper.remove = lambda name, deferred=False: os.kill(os.getpid(), 9)
    with volume.attach(image, provider, me):
        pass
print(os.waitpid(child, 0)[1], names())
time.sleep(0.2)
print(dm_crypt.opened()[0].image)
print(volume.lock(image, me), names())
"""
    )
    assert out == ["9 ['acme--default-0']", "/volumes/data.img", "True []"]


def test_an_older_disk_works_both_ways(run: Run) -> None:
    """LUKS1, as a host without dm-crypt makes it; and LUKS2 without dm-crypt is refused with the way out."""
    out = run(
        """
real = dm_crypt.unavailable
without_dm_crypt()
"""
        + CREATE
        + """
def by_qemu(key, *commands):
    argv = ["qemu-io", "--object", f"secret,id=k,file=/proc/self/fd/{key}", "--image-opts",
            f"driver=luks,key-secret=k,file.driver=file,file.filename={image}"]
    for command in commands:
        argv += ["-c", command]
    return b"failed" not in process.run(argv, pass_fds=[key], timeout=60).stdout
with volume.attach(image, provider, me) as disk:
    print(volume.version(image), disk.device, by_qemu(disk.key_fd, "write -P 0x21 5M 64k"), names())
dm_crypt.unavailable = real
with volume.attach(image, provider, me) as disk:
    fd = os.open(disk.path, os.O_RDWR)
    print(disk.device, os.pread(fd, 65536, 5 << 20) == b"!" * 65536, os.pread(fd, 4096, 0) == bytes(4096))
    os.pwrite(fd, b"?" * 65536, 6 << 20); os.fsync(fd); os.close(fd)
print(gone())
volume.grow(image, 2 * SIZE)
without_dm_crypt()
with volume.attach(image, provider, me) as disk:
    print(by_qemu(disk.key_fd, "read -P 0x3f 6M 64k", "read 15M 1M"))
dm_crypt.unavailable = real
volume.wipe(image)
volume.create(image, SIZE, provider, me)
volume.grow(image, 2 * SIZE)
with volume.attach(image, provider, me) as disk:
    fd = os.open(disk.path, os.O_RDONLY)
    print(volume.version(image), os.lseek(fd, 0, os.SEEK_END) == 2 * SIZE)
    os.close(fd)
print(gone())
without_dm_crypt()
try:
    with volume.attach(image, provider, me):
        pass
except MvmError as error:
    print(error.kind, error.resolution.split("#")[0].strip())
"""
    )
    assert out == [
        "1 False True []", "True True True", "True", "True", "2 True", "True",
        "prerequisite modprobe -a loop dm_mod dm_crypt",
    ]  # fmt: skip


def test_another_roots_disk_of_the_same_name_is_left_alone(run: Run) -> None:
    out = run(
        CREATE
        + """
import shutil
other = root / "other" / volume.IMAGE_NAME
shutil.copytree(image.parent, other.parent)
with volume.attach(image, provider, me):
    print(volume.lock(other, me))
    with volume.attach(other, provider, me):
        print(names())
    print(volume.lock(other, me), names())
print(gone())
"""
    )
    both = ["acme--default-0", "acme--default-0"]
    assert out == ["False", f"{both}", "False ['acme--default-0']", "True"]


@pytest.mark.req("S4")
def test_a_header_that_names_another_cipher_is_refused(run: Run) -> None:
    """Same passphrase, same place, a weaker cipher: what the guest writes would be encrypted by it."""
    out = run(
        CREATE
        + """
with volume._unwrap(image, provider, me) as key, volume.passphrase(key) as phrase:
    argv = [a.replace("aes-xts-plain64", "aes-cbc-plain").replace("512", "256") for a in volume.render_format(image, 2)]
    process.run(argv, stdin=bytes(phrase.view()), timeout=60)
try:
    with volume.attach(image, provider, me):
        print("opened")
except MvmError as error:
    print(error.kind, "aes-cbc-plain" in error.details, names())
"""
    )
    assert out == ["integrity True []"]


@pytest.mark.req("H4")
def test_udev_does_not_read_what_a_guest_wrote(rig: Rig, run: Run) -> None:
    """Not even its label, from which it would make a name of the guest's choice."""
    out = run(
        CREATE
        + """
with volume.attach(image, provider, me) as disk:
    argv = ["mke2fs", "-q", "-F", "-L", "mvm-root", os.path.realpath(disk.path)]
    process.run(argv, timeout=60)
    process.run(["udevadm", "trigger", "--action=change", os.path.realpath(disk.path)], timeout=60)
    process.run(["udevadm", "settle"], timeout=60)
    seen = process.run(["udevadm", "info", os.path.realpath(disk.path)], timeout=60).stdout.decode()
    print("ID_FS" in seen, "DEVLINKS" in seen, "mvm-acme--default-0." in seen)
    print(os.path.realpath("/dev/disk/by-label/mvm-root"), sorted(os.listdir("/dev/mapper")))
    found = os.stat(disk.path)
    print(found.st_uid, found.st_gid, oct(found.st_mode & 0o777))
print(gone())
"""
    )
    root_disk = rig.sh("findmnt -no SOURCE /").strip()
    assert out == ["False False True", f"{root_disk} ['control']", "0 0 0o600", "True"]


def test_what_it_costs(run: Run, record_property: Callable[[str, object], None]) -> None:
    """Recorded, not judged: the node may be emulated."""
    (line,) = run(
        CREATE
        + """
import json
opened, locked, program = [], [], []
for _ in range(5):
    a = time.monotonic()
    with volume.attach(image, provider, me):
        b = time.monotonic()
    volume.lock(image, me)
    c = time.monotonic()
    process.run(["cryptsetup", "--version"], timeout=30)
    d = time.monotonic()
    opened.append(b - a); locked.append(c - b); program.append(d - c)
print(json.dumps({"open": sorted(opened)[2], "lock": sorted(locked)[2], "program": sorted(program)[2]}))
"""
    )
    for name, seconds in json.loads(line).items():
        record_property(f"{name}_ms", round(seconds * 1000))
