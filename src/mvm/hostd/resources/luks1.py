"""Writing a LUKS1 header (the on-disk format 1.2.3 of the LUKS specification), pure: randomness comes in,
bytes go out.

Why here and not `qemu-img create -f luks`: that times PBKDF2 on every creation, for two seconds whatever
`iter-time` asks for, and gives up ("Unable to get accurate CPU usage") where the kernel counts CPU time in
ticks. Its timing has no purpose for us: iterations make a guessable passphrase dear, and our passphrase is
256 random bits, which no number of guesses finds. So the smallest count that readers accept is used, which
also makes every open, on every wake, faster.

Reading is left to QEMU (and, with dm-crypt, cryptsetup): the contract tests open what this writes with QEMU.

    sector  contents (512 bytes each, integers big-endian)
    0       header, 592 bytes: magic, version 1, cipher aes-xts-plain64, hash sha256, payload offset, key
    bytes 64,
            digest of the master key with salt and iterations, uuid, eight key slots
    8       material of key slot 0: the master key split into 4000 stripes, encrypted by the passphrase
    8+504i  material of slot i; all but slot 0 are disabled and zero
    4096    payload, to the end of the file
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvm.linux.secret import SecretBytes

SECTOR = 512
PAYLOAD_SECTOR = 4096
PAYLOAD_OFFSET = PAYLOAD_SECTOR * SECTOR
MAGIC = b"LUKS\xba\xbe\0\x01"
KEY_BYTES = 64
STRIPES = 4000
ITERATIONS = 1000
"""The least that the specification's readers take."""
SALT_BYTES = 32
RANDOM_BYTES = 2 * SALT_BYTES + 16 + KEY_BYTES * (STRIPES - 1)
"""What `header` needs: two salts, a uuid, and all stripes but the last."""
_SLOTS = 8
_SLOT_SECTOR = 8
_SLOT_SECTORS = 504
_ENABLED, _DISABLED = 0x00AC71F3, 0x0000DEAD
_HEADER = struct.Struct(">8s32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
_DIGEST = 20


def header(passphrase: SecretBytes, master_key: SecretBytes, random: bytes) -> bytes:
    """The first bytes of an image, up to and with the material of slot 0; what follows, to the payload, is
    zero.

    `master_key`: KEY_BYTES, the two halves of an AES-256-XTS key. `random`: RANDOM_BYTES, never used before.
    """
    if len(master_key) != KEY_BYTES or len(random) != RANDOM_BYTES:
        raise ValueError("wrong size of the key or of the randomness")
    slot_salt, digest_salt = random[:SALT_BYTES], random[SALT_BYTES : 2 * SALT_BYTES]
    uuid = random[2 * SALT_BYTES : 2 * SALT_BYTES + 16]
    stripes = random[2 * SALT_BYTES + 16 :]
    digest = hashlib.pbkdf2_hmac("sha256", master_key.view(), digest_salt, ITERATIONS, _DIGEST)
    slot_key = hashlib.pbkdf2_hmac("sha256", passphrase.view(), slot_salt, ITERATIONS, KEY_BYTES)
    material = encrypt_sectors(slot_key, split(master_key, stripes))
    head = _HEADER.pack(
        MAGIC, b"aes", b"xts-plain64", b"sha256", PAYLOAD_SECTOR, KEY_BYTES, digest, digest_salt, ITERATIONS,
        _uuid_text(uuid),
    )  # fmt: skip
    slots = b"".join(
        _SLOT.pack(
            _DISABLED if i else _ENABLED, 0 if i else ITERATIONS, bytes(SALT_BYTES) if i else slot_salt,
            _SLOT_SECTOR + i * _SLOT_SECTORS, STRIPES,
        )
        for i in range(_SLOTS)
    )  # fmt: skip
    return (head + slots).ljust(_SLOT_SECTOR * SECTOR, b"\0") + material


def split(master_key: SecretBytes, stripes: bytes) -> bytearray:
    """The anti-forensic split: STRIPES blocks of which every single one is needed to get the key back."""
    state = 0
    for at in range(0, len(stripes), KEY_BYTES):
        mixed = state ^ int.from_bytes(stripes[at : at + KEY_BYTES], "big")
        state = int.from_bytes(_diffuse(mixed.to_bytes(KEY_BYTES, "big")), "big")
    result = bytearray(stripes)
    # Byte by byte, so that the key is never part of an immutable object.
    result += bytes(KEY_BYTES)
    start = len(stripes)
    for i, (ours, key) in enumerate(zip(state.to_bytes(KEY_BYTES, "big"), master_key.view(), strict=True)):
        result[start + i] = ours ^ key
    return result


def _diffuse(block: bytes) -> bytes:
    size = hashlib.sha256().digest_size
    return b"".join(
        hashlib.sha256(struct.pack(">I", i) + block[at : at + size]).digest()
        for i, at in enumerate(range(0, len(block), size))
    )


def encrypt_sectors(key: bytes, data: bytearray) -> bytes:
    """aes-xts-plain64 over whole sectors, numbered from 0."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    algorithm = algorithms.AES(key)
    parts = []
    for number, at in enumerate(range(0, len(data), SECTOR)):
        encryptor = Cipher(algorithm, modes.XTS(number.to_bytes(16, "little"))).encryptor()
        parts.append(encryptor.update(bytes(data[at : at + SECTOR])))
    return b"".join(parts)


def _uuid_text(random: bytes) -> bytes:
    """A version 4 UUID as the header wants it: text."""
    octets = bytearray(random)
    octets[6] = octets[6] & 0x0F | 0x40
    octets[8] = octets[8] & 0x3F | 0x80
    text = octets.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}".encode()
