"""The data disk of an instance: an encrypted image that is opened for its VMM only.

    volumes/data.key   the passphrase's 256 bits, wrapped by the tenant's key, bound to the instance
    volumes/data.img   LUKS, sparse, 2 MiB of header and a payload of the size asked for

    host with dm-crypt      new images are LUKS2; the kernel opens them (`dm_crypt`), the VMM gets a block device
    host without dm-crypt   new images are LUKS1, the version QEMU reads: the VMM gets the file and the passphrase
    LUKS1 anywhere          works either way;  LUKS2 without dm-crypt: MissingPrerequisite

Rules. The passphrase reaches cryptsetup on its standard input and a VMM through an inherited memfd, never through
argv, environment or disk. What `attach` opens lives as long as the VMM; `lock` makes sure of its end.
The caller holds the instance's lock.

Half of a disk is never taken for a step cut short: an image whose key somebody lost, or a key whose image somebody
moved away, is left as it is until a wipe is asked for. A step cut short says so itself, durably before its first
effect:

    volumes/data.key.new   a creation: the key, until the image has its name. Alone, the next creation replaces it;
                           beside an image, it is the key, and gets its name
    volumes/data.wiping    a wipe, which goes the other way round (the key first, after which the image is noise);
                           whoever finds it finishes the wipe

The image is as large as its payload and a header of 2 MiB, but takes only the space that was written to.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from mvm.core.errors import (
    Conflict,
    IntegrityError,
    InvalidInput,
    MissingPrerequisite,
    NotFound,
    ResourceExhausted,
)
from mvm.hostd import keys
from mvm.hostd.resources import dm_crypt
from mvm.linux import files, memfd, process
from mvm.linux.secret import SecretBytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mvm.core.ids import InstanceId

IMAGE_NAME = "data.img"
KEY_NAME = "data.key"
NEW_KEY_NAME = "data.key.new"
WIPING_NAME = "data.wiping"
PAYLOAD_OFFSET = 4096 * 512
"""Bytes before the payload: header and key slots, as cryptsetup lays out LUKS1 on a plain file, and LUKS2 if told."""
MAGIC = b"LUKS\xba\xbe"
"""Two bytes of version follow."""
_VERSIONS = {b"\0\x01": 1, b"\0\x02": 2}
_FORMAT_S = 60.0
# Where the guest looks for signatures: the last is a LUKS2 header's second copy at 4 MiB, and RAID at the end.
_BLANK_HEAD = 4 << 20 | 64 << 10
_BLANK_TAIL = 1 << 20
_HEX = b"0123456789abcdef"
_MAX_KEY_FILE = 1024
_SIZE_STEP = 1 << 20


class Attached(NamedTuple):
    """What a VMM is given. `path`: the image, or the block device that the kernel decrypts it to; `key_fd`: of the
    image, for a VMM that opens it itself."""

    path: str
    device: bool
    key_fd: int | None


def context(instance: InstanceId) -> bytes:
    """What the wrapped key is bound to."""
    return b"data-disk/" + str(instance).encode()


def key_path(image: Path) -> Path:
    return image.with_name(KEY_NAME)


def create(
    image: Path, size: int, provider: keys.KeyProvider, instance: InstanceId, *, uid: int = 0, gid: int = 0
) -> None:
    """Make an empty encrypted disk of `size` bytes (whole MiB), owned by the VMM's `uid`, `gid`.

    Conflict if it exists, or the key of one that is not there. ResourceExhausted unless the file system has room for
    all of it now: space is taken only as the guest writes, and may still run out later.
    """
    if size <= 0 or size % _SIZE_STEP:
        raise InvalidInput(f"a data disk of {size} bytes is not possible", details="use whole mebibytes")
    if os.path.lexists(image):
        raise Conflict(
            f"{image} exists already", resolution="use it, or destroy the instance with its volumes"
        )
    require_space(image.parent, size + PAYLOAD_OFFSET)
    settle(image)
    if os.path.lexists(key_path(image)):
        raise Conflict(
            "the data disk is gone, and its key is still there",
            details=f"Another disk would take the place of {key_path(image)}, without which {image} opens no more.",
            resolution="Put the image back; or destroy the instance with its volumes, and start it again.",
        )
    # What an interrupted command has left open; a mapping has room for one image.
    lock(image, instance)
    luks = 1 if dm_crypt.unavailable() else 2
    temporary = files.temporary_beside(image)
    with SecretBytes.from_random(keys.KEY_SIZE) as data_key, passphrase(data_key) as phrase:
        with provider.tenant_key(instance.tenant) as tenant_key:
            wrapped = tenant_key.wrap(data_key, context(instance))
            files.write_atomic(image.with_name(NEW_KEY_NAME), wrapped, 0o600)
        try:
            _make(temporary, size, phrase, luks, instance, uid, gid)
            os.rename(temporary, image)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            files.raise_if_full(error, image)
            if error.errno == errno.EFBIG:
                raise InvalidInput(
                    f"the file system takes no file of {size} bytes", details=str(error)
                ) from error
            raise
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    files.fsync_dir(image.parent)
    settle(image)


def settle(image: Path) -> None:
    """Finish, or undo, what a creation or a wipe that was cut short has left. Nothing else is touched."""
    new, key = image.with_name(NEW_KEY_NAME), key_path(image)
    if is_wiping(image):
        wipe(image)
    elif new.exists():
        if image.exists():
            if os.path.lexists(key):
                return  # mvm never makes both; which of them opens it is not for us to guess
            # Who gave the image its name may have died before that was durable; without it this is its last key.
            files.fsync_dir(image.parent)
            os.rename(new, key)
        else:
            new.unlink()
        files.fsync_dir(image.parent)


def is_kept(image: Path) -> bool:
    """Whether there is a disk, or half of one, that no wipe has begun to destroy."""
    return (image.exists() or os.path.lexists(key_path(image))) and not is_wiping(image)


def is_there(image: Path) -> bool:
    """Whether a wipe would find anything to do."""
    return any(os.path.lexists(image.with_name(n)) for n in (IMAGE_NAME, KEY_NAME, NEW_KEY_NAME, WIPING_NAME))


def is_whole(image: Path) -> bool:
    """Whether image and key are there, the key possibly under the name it has while they are made."""
    return image.exists() and any(os.path.lexists(image.with_name(name)) for name in (KEY_NAME, NEW_KEY_NAME))


def is_wiping(image: Path) -> bool:
    """Whether a wipe has begun."""
    return image.with_name(WIPING_NAME).exists()


def render_format(image: Path, luks: int) -> list[str]:
    """The command that writes the header; the passphrase is its standard input.

    The iterations are the least that readers take: they make a guessable passphrase dear, and ours is 256 random bits,
    which a memory-hard function (argon2) would only make slow to open. (`qemu-img create` would time PBKDF2 for two
    seconds instead, and fails where the kernel counts CPU time in ticks.)

    LUKS2 in sectors of 4096 bytes: an eighth of the kernel's work for a guest's blocks. A write torn by a power loss is
    no worse than in a plain file, since XTS encrypts each 16 bytes of a sector for itself.
    """
    common = ["cryptsetup", "luksFormat", "--batch-mode", "--cipher", dm_crypt.CIPHER, "--key-size", "512"]
    common += ["--hash", "sha256", "--pbkdf-force-iterations", "1000"]
    if luks == 2:
        common += ["--type", "luks2", "--pbkdf", "pbkdf2", "--sector-size", "4096", "--disable-locks"]
        common += [
            "--offset",
            str(PAYLOAD_OFFSET // 512),
            "--luks2-metadata-size",
            "16k",
            "--disable-keyring",
        ]
    else:
        common += ["--type", "luks1"]
    return [*common, "--key-file", "-", str(image)]


def render_blank(image: Path, secret: str, size: int) -> list[str]:
    """The command that makes both ends of a LUKS1 payload read as zeros; `secret`: where the passphrase is read from.

    Unwritten sectors of a LUKS volume read as noise, and noise sometimes looks like a file system's signature: the
    guest, which formats only a disk that has none, would then leave this one alone for ever.
    """
    head, tail = min(size, _BLANK_HEAD), min(size, _BLANK_TAIL)
    return [
        "qemu-io", "--object", f"secret,id=key,file={secret}",
        "-c", f"write -P 0 0 {head}", "-c", f"write -P 0 {size - tail} {tail}",
        "--image-opts", f"driver=luks,key-secret=key,file.driver=file,file.filename={image}",
    ]  # fmt: skip


def _make(
    image: Path, size: int, phrase: SecretBytes, luks: int, instance: InstanceId, uid: int, gid: int
) -> None:
    fd = os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, PAYLOAD_OFFSET + size)
        argv, env = render_format(image, luks), dm_crypt.WITHOUT_UDEV
        process.run(argv, stdin=bytes(phrase.view()), timeout=_FORMAT_S, env=env)
        if luks == 2:
            _blank(image, size, phrase, instance)
        else:
            secret = memfd.of_bytes("mvm-data-key", phrase.view())
            try:
                argv = render_blank(image, memfd.proc_path(secret), size)
                process.run(argv, pass_fds=[secret], timeout=_FORMAT_S)
            finally:
                os.close(secret)
        if (uid, gid) != (0, 0):
            os.fchown(fd, uid, gid)
        os.fsync(fd)
    finally:
        os.close(fd)


def _blank(image: Path, size: int, phrase: SecretBytes, instance: InstanceId) -> None:
    """As `render_blank`, through the kernel."""
    held = dm_crypt.open_mapping(image, instance.vm_name, phrase, offset=PAYLOAD_OFFSET, luks=2)
    try:
        device = os.open(memfd.proc_path(held), os.O_RDWR | os.O_CLOEXEC)
        try:
            found = os.lseek(device, 0, os.SEEK_END)
            if found != size:
                raise IntegrityError(f"a data disk of {size} bytes has become one of {found}")
            for at, length in (
                (0, min(size, _BLANK_HEAD)),
                (size - min(size, _BLANK_TAIL), min(size, _BLANK_TAIL)),
            ):
                os.lseek(device, at, os.SEEK_SET)
                files.write_all(device, bytes(length))
            os.fsync(device)
        finally:
            os.close(device)
    finally:
        os.close(held)
        lock(image, instance)


@contextmanager
def attach(image: Path, provider: keys.KeyProvider, instance: InstanceId) -> Iterator[Attached]:
    """Open the disk for a VMM that is started inside the context; it takes over what is open, and ends it by its end.

    Errors are those of `open_key`; MissingPrerequisite for a LUKS2 image where the kernel has no dm-crypt.
    """
    luks = version(image)
    reason = dm_crypt.unavailable()
    if reason and luks == 2:
        raise MissingPrerequisite(
            "the data disk is a LUKS2 volume, which only the kernel's dm-crypt opens",
            details=f"{image}: {reason}.",
            resolution="modprobe -a loop dm_mod dm_crypt   # a container needs their devices; a kernel CONFIG_DM_CRYPT",
        )
    if reason:
        fd = open_key(image, provider, instance)
        attached = Attached(str(image), False, fd)
    else:
        with _unwrap(image, provider, instance) as data_key, passphrase(data_key) as phrase:
            fd = dm_crypt.open_mapping(image, instance.vm_name, phrase, offset=PAYLOAD_OFFSET, luks=luks)
        attached = Attached(memfd.proc_path(fd), True, None)
    try:
        yield attached
    finally:
        os.close(fd)


def lock(image: Path, instance: InstanceId) -> bool:
    """Return when the kernel has no way into the disk any more; False if it had none. Its VMM has ended. Busy if
    somebody else has it open."""
    return dm_crypt.close(image, instance.vm_name)


def open_key(image: Path, provider: keys.KeyProvider, instance: InstanceId) -> int:
    """An owned, sealed memfd with the passphrase, to be inherited by the VMM and closed here.

    For QEMU: `-object secret,id=...,file=/proc/self/fd/N`. NotFound if the disk or its key is gone,
    IntegrityError if the key is damaged or another instance's, or the image does not begin as LUKS.
    """
    version(image)
    with _unwrap(image, provider, instance) as data_key, passphrase(data_key) as phrase:
        return memfd.of_bytes("mvm-data-key", phrase.view())


def rewrap(image: Path, provider: keys.KeyProvider, instance: InstanceId) -> bool:
    """Wrap the key by the tenant's newest; the image is not touched. False if it already was."""
    old = _read_key(image)
    new = keys.rewrap(provider, instance.tenant, old, context(instance))
    if new == old:
        return False
    files.write_atomic(key_path(image), new, 0o600)
    return True


def payload_size(image: Path) -> int:
    """Bytes the guest sees."""
    version(image)
    return os.stat(image).st_size - PAYLOAD_OFFSET


def grow(image: Path, size: int) -> None:
    """Enlarge the payload to `size` bytes (whole MiB); the instance is stopped. Conflict if that would
    shrink it. Either format takes what the file has, when it is opened next.
    """
    now = payload_size(image)
    if size % _SIZE_STEP or size < now:
        raise Conflict(
            f"the data disk cannot become {size} bytes",
            details=f"it has {now}; it can only grow, by whole mebibytes",
        )
    require_space(image.parent, size - now)
    fd = os.open(image, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, PAYLOAD_OFFSET + size)
        os.fsync(fd)
    finally:
        os.close(fd)


def wipe(image: Path) -> None:
    """Destroy the disk: the key first, then what is stored of the image, then its name. Absent is done.

    The key loses its name before its bytes: cut short, this leaves a whole key or none, never one that is there
    and opens nothing.
    """
    folder = image.parent
    if not folder.is_dir():
        return
    marker = image.with_name(WIPING_NAME)
    if any(os.path.lexists(folder / name) for name in (IMAGE_NAME, KEY_NAME, NEW_KEY_NAME)):
        files.write_atomic(marker, b"", 0o600)
    for name in (KEY_NAME, NEW_KEY_NAME):
        if os.path.lexists(folder / name):
            os.rename(folder / name, files.temporary_beside(folder / name))
            files.fsync_dir(folder)
    for name in os.listdir(folder):
        if name.startswith(f"{files.TEMPORARY_PREFIX}{KEY_NAME}"):
            files.wipe(folder / name)
    files.sweep_temporaries(folder)
    files.wipe(image)
    # After the image's end is durable, and durable itself: a mark left behind would wipe a disk put back later.
    files.fsync_dir(folder)
    marker.unlink(missing_ok=True)
    files.fsync_dir(folder)


def require_space(folder: Path, size: int) -> None:
    """ResourceExhausted unless `size` bytes are free for us on the file system of `folder`."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < size:
        raise ResourceExhausted(
            f"not enough disk space: {size >> 20} MiB needed, {free >> 20} MiB free",
            details=f"on the file system of {folder}",
            resolution="free space, or ask for a smaller data disk",
        )


def passphrase(data_key: SecretBytes) -> SecretBytes:
    """The key as lower-case hexadecimal: QEMU takes only passphrases that are UTF-8."""
    phrase = SecretBytes(2 * len(data_key))
    out = phrase.view()
    for i, octet in enumerate(data_key.view()):
        out[2 * i] = _HEX[octet >> 4]
        out[2 * i + 1] = _HEX[octet & 15]
    return phrase


def _unwrap(image: Path, provider: keys.KeyProvider, instance: InstanceId) -> SecretBytes:
    return keys.unwrap(provider, instance.tenant, _read_key(image), context(instance))


def _read_key(image: Path) -> bytes:
    try:
        return files.read_bounded(key_path(image), _MAX_KEY_FILE)
    except FileNotFoundError:
        raise NotFound(
            "the data disk's key is gone",
            details=str(key_path(image)),
            resolution="restore it from a backup: without it the disk cannot be read",
        ) from None
    except InvalidInput as error:
        raise IntegrityError("the data disk's key is damaged", details=error.brief) from error


def version(image: Path) -> int:
    """Of LUKS: 1 or 2. NotFound if there is no image, IntegrityError if it does not begin as one."""
    try:
        fd = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound("the instance has no data disk", details=str(image)) from None
    try:
        head = os.pread(fd, len(MAGIC) + 2, 0)
        found = _VERSIONS.get(head[len(MAGIC) :]) if head.startswith(MAGIC) else None
        if found is None or os.fstat(fd).st_size <= PAYLOAD_OFFSET:
            raise IntegrityError(
                "the data disk is damaged",
                details=f"{image} does not begin as a LUKS image, or is cut off",
                resolution="restore it from a backup",
            )
        return found
    finally:
        os.close(fd)
