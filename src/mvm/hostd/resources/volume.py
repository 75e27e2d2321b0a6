"""The data disk of an instance: an encrypted image that the VMM opens and the host never does.

    volumes/data.key   the passphrase's 256 bits, wrapped by the tenant's key, bound to the instance
    volumes/data.img   LUKS1, sparse, payload of the size asked for

Rules. The passphrase reaches the VMM through an inherited memfd, never through argv, environment or disk.
The key file is durable before the image gets its name, so an image without a key cannot exist; a key
without an image is what an interrupted creation leaves, and the next creation replaces it. Wiping goes the
other way round: the key first, after which the image is noise. The caller holds the instance's lock.

The image is as large as its payload and a header of 2 MiB, but takes only the space that was written to.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from mvm.core.errors import Conflict, IntegrityError, InvalidInput, NotFound, ResourceExhausted
from mvm.hostd import keys
from mvm.linux import files, memfd, process
from mvm.linux.secret import SecretBytes

if TYPE_CHECKING:
    from pathlib import Path

    from mvm.core.ids import InstanceId

IMAGE_NAME = "data.img"
KEY_NAME = "data.key"
PAYLOAD_OFFSET = 4096 * 512
"""Bytes before the payload: header and key slots, as cryptsetup lays out LUKS1 on a plain file."""
MAGIC = b"LUKS\xba\xbe\0\x01"
_FORMAT_S = 60.0
# Where the guest looks for signatures: the last is a LUKS2 header's second copy at 4 MiB, and RAID at the end.
_BLANK_HEAD = 4 << 20 | 64 << 10
_BLANK_TAIL = 1 << 20
_HEX = b"0123456789abcdef"
_MAX_KEY_FILE = 1024
_SIZE_STEP = 1 << 20


def context(instance: InstanceId) -> bytes:
    """What the wrapped key is bound to."""
    return b"data-disk/" + str(instance).encode()


def key_path(image: Path) -> Path:
    return image.with_name(KEY_NAME)


def create(
    image: Path, size: int, provider: keys.KeyProvider, instance: InstanceId, *, uid: int = 0, gid: int = 0
) -> None:
    """Make an empty encrypted disk of `size` bytes (whole MiB), owned by the VMM's `uid`, `gid`.

    Conflict if it exists. ResourceExhausted unless the file system has room for all of it now: space is
    taken only as the guest writes, and may still run out later.
    """
    if size <= 0 or size % _SIZE_STEP:
        raise InvalidInput(f"a data disk of {size} bytes is not possible", details="use whole mebibytes")
    if os.path.lexists(image):
        raise Conflict(
            f"{image} exists already", resolution="use it, or destroy the instance with its volumes"
        )
    require_space(image.parent, size + PAYLOAD_OFFSET)
    temporary = files.temporary_beside(image)
    with SecretBytes.from_random(keys.KEY_SIZE) as data_key, passphrase(data_key) as phrase:
        with provider.tenant_key(instance.tenant) as tenant_key:
            files.write_atomic(key_path(image), tenant_key.wrap(data_key, context(instance)), 0o600)
        try:
            _make(temporary, size, phrase, uid, gid)
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


def render_format(image: Path) -> list[str]:
    """The command that writes the header; the passphrase is its standard input.

    LUKS1, because QEMU, which opens the disk, reads no other version. The iterations are the least that readers take:
    they make a guessable passphrase dear, and ours is 256 random bits. (`qemu-img create` would time PBKDF2 for two
    seconds instead, and fails where the kernel counts CPU time in ticks.)
    """
    return [
        "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--cipher", "aes-xts-plain64",
        "--key-size", "512", "--hash", "sha256", "--pbkdf-force-iterations", "1000", "--key-file", "-", str(image),
    ]  # fmt: skip


def render_blank(image: Path, secret: str, size: int) -> list[str]:
    """The command that makes both ends of the payload read as zeros; `secret`: a path the passphrase is read from.

    Unwritten sectors of a LUKS volume read as noise, and noise sometimes looks like a file system's signature: the
    guest, which formats only a disk that has none, would then leave this one alone for ever.
    """
    head, tail = min(size, _BLANK_HEAD), min(size, _BLANK_TAIL)
    return [
        "qemu-io", "--object", f"secret,id=key,file={secret}",
        "-c", f"write -P 0 0 {head}", "-c", f"write -P 0 {size - tail} {tail}",
        "--image-opts", f"driver=luks,key-secret=key,file.driver=file,file.filename={image}",
    ]  # fmt: skip


def _make(image: Path, size: int, phrase: SecretBytes, uid: int, gid: int) -> None:
    fd = os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, PAYLOAD_OFFSET + size)
        process.run(render_format(image), stdin=bytes(phrase.view()), timeout=_FORMAT_S)
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


def open_key(image: Path, provider: keys.KeyProvider, instance: InstanceId) -> int:
    """An owned, sealed memfd with the passphrase, to be inherited by the VMM and closed here.

    For QEMU: `-object secret,id=...,file=/proc/self/fd/N`. NotFound if the disk or its key is gone,
    IntegrityError if the key is damaged or another instance's, or the image does not begin as LUKS1.
    """
    _check_magic(image)
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
    _check_magic(image)
    return os.stat(image).st_size - PAYLOAD_OFFSET


def grow(image: Path, size: int) -> None:
    """Enlarge the payload to `size` bytes (whole MiB); the instance is stopped. Conflict if that would
    shrink it.
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
    """Destroy the disk: the key first, then what is stored of the image, then its name. Absent is done."""
    if image.parent.is_dir():
        files.sweep_temporaries(image.parent)
        files.wipe(key_path(image))
        files.wipe(image)


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


def _check_magic(image: Path) -> None:
    try:
        fd = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound("the instance has no data disk", details=str(image)) from None
    try:
        if os.pread(fd, len(MAGIC), 0) != MAGIC or os.fstat(fd).st_size <= PAYLOAD_OFFSET:
            raise IntegrityError(
                "the data disk is damaged",
                details=f"{image} does not begin as a LUKS1 image, or is cut off",
                resolution="restore it from a backup",
            )
    finally:
        os.close(fd)
