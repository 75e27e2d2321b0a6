"""$out/vmlinux (uncompressed ELF) and $out/initrd (uncompressed cpio) from Debian's cloud kernel package.

The ELF is what Firecracker wants and what QEMU enters directly by its PVH note. It is cut at the end of its own
sections: the bzImage payload carries a relocation table behind it, used only by the decompressor for KASLR.
The initrd is not compressed: it is small, and under software emulation copying is cheaper than inflating.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from typing import NamedTuple

from debs import Entry, entries

# Both transports, every device a guest may get, the root file system. The closure below adds what these need.
MODULES = (
    "virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio-rng", "virtio_balloon",
    "vmw_vsock_virtio_transport", "ext4",
)  # fmt: skip

# What init/initrd-init calls.
APPLETS = ("modprobe", "mount", "reboot", "sleep", "switch_root")


def elf_size(image: bytes) -> int:
    (shoff,) = struct.unpack_from("<Q", image, 0x28)
    entry, count = struct.unpack_from("<HH", image, 0x3A)
    (phoff,) = struct.unpack_from("<Q", image, 0x20)
    phentry, phcount = struct.unpack_from("<HH", image, 0x36)
    end = shoff + entry * count
    for index in range(phcount):
        offset, _, _, filesz = struct.unpack_from("<QQQQ", image, phoff + index * phentry + 8)
        end = max(end, offset + filesz)
    return int(end)


def extract_vmlinux(bzimage: bytes) -> bytes:
    """Offsets from the x86 boot protocol (Documentation/x86/boot.rst); the payload is an LZ4 legacy stream."""
    if bzimage[0x202:0x206] != b"HdrS":
        raise SystemExit("the package's vmlinuz is not a bzImage")
    sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    payload = bzimage[(sectors + 1) * 512 + offset :][:length]
    if payload[:4] != b"\x02\x21\x4c\x18":
        raise SystemExit(f"kernel payload starts {payload[:4].hex()}, which is not LZ4 legacy")
    lz4 = ctypes.CDLL("liblz4.so.1")
    out = bytearray()
    chunk = ctypes.create_string_buffer(8 << 20)
    position = 4
    (total,) = struct.unpack_from("<I", payload, len(payload) - 4)  # appended by the kernel's build
    while len(out) < total:
        (size,) = struct.unpack_from("<I", payload, position)
        block = payload[position + 4 : position + 4 + size]
        got = lz4.LZ4_decompress_safe(block, chunk, size, len(chunk))
        if got < 0:
            raise SystemExit(f"kernel payload is damaged at offset {position}")
        out += chunk.raw[:got]
        position += 4 + size
    if out[:4] != b"\x7fELF":
        raise SystemExit("the kernel payload is not an ELF image")
    return bytes(out[: elf_size(out)])


def modinfo(image: bytes) -> dict[str, list[str]]:
    """The .modinfo strings of a module: key -> values."""
    (shoff,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", image, shoff + i * size) for i in range(count)]
    strings = image[sections[names][4] :][: sections[names][5]]
    for name, _, _, _, offset, length in sections:
        if strings[name:].startswith(b".modinfo\0"):
            found: dict[str, list[str]] = {}
            for item in image[offset : offset + length].split(b"\0"):
                key, _, value = item.decode("utf-8", "replace").partition("=")
                found.setdefault(key, []).append(value)
            return found
    raise SystemExit("a kernel module has no .modinfo")


class Module(NamedTuple):
    """`file`: its name, unique in a kernel. `depends`: the files it needs, nearest first, all of them (modules.dep)."""

    file: str
    image: bytes
    depends: list[str]


def closure(modules: dict[str, tuple[str, bytes]], builtin: set[str]) -> list[Module]:
    """What `MODULES` need, with everything that needs in turn. `modules`: name -> (file, image)."""
    found: dict[str, Module] = {}

    def visit(name: str) -> list[str]:
        """The files to load for `name`: itself, then what it depends on. modprobe loads them last to first."""
        if name in builtin:
            return []
        if name not in modules:
            raise SystemExit(f"kernel has no module {name}, neither built in nor loadable")
        file, image = modules[name]
        if name not in found:
            depends: list[str] = []
            for item in ",".join(modinfo(image).get("depends", [])).split(","):
                for needed in visit(item.replace("-", "_")) if item else []:
                    if needed in depends:
                        depends.remove(needed)
                    depends.append(needed)
            found[name] = Module(file, image, depends)
        return [file, *found[name].depends]

    for name in MODULES:
        visit(name.replace("-", "_"))
    return sorted(found.values())


def cpio(tree: dict[str, Entry]) -> bytes:
    """The newc archive of `tree`, sorted, every time stamp 0."""
    out = bytearray()

    def add(name: str, mode: int, data: bytes, inode: int) -> None:
        fields = (inode, mode, 0, 0, 2 if mode & 0o40000 else 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        out.extend(bytes(-len(out) % 4) + data)
        out.extend(bytes(-len(out) % 4))

    kinds = {"d": 0o040000, "f": 0o100000, "l": 0o120000}
    for inode, (name, entry) in enumerate(sorted(tree.items()), 1):
        add(name, kinds[entry.kind] | entry.mode, entry.data, inode)
    add("TRAILER!!!", 0, b"", 0)
    out.extend(bytes(-len(out) % 512))
    return bytes(out)


def main() -> None:
    env = os.environ
    modules: dict[str, tuple[str, bytes]] = {}
    builtin: set[str] = set()
    bzimage, release = b"", ""
    for deb in env["debs"].split():
        for path, entry in entries(deb):
            if path.startswith("boot/vmlinuz-"):
                bzimage, release = entry.data, path.removeprefix("boot/vmlinuz-")
            elif path.endswith("/modules.builtin"):
                builtin = {
                    re.sub(r".*/|\.ko$", "", line).replace("-", "_") for line in entry.data.decode().split()
                }
            elif path.endswith(".ko"):
                modules[os.path.basename(path)[:-3].replace("-", "_")] = (os.path.basename(path), entry.data)
    if not bzimage:
        raise SystemExit("no kernel image in the locked kernel package")

    tree: dict[str, Entry] = {}

    def put(path: str, entry: Entry) -> None:
        parent = os.path.dirname(path)
        if parent and parent not in tree:
            put(parent, Entry("d", 0o755, 0, 0, b""))
        tree[path] = entry

    with open(env["bootstrap"] + "/bin/busybox", "rb") as file:
        put("bin/busybox", Entry("f", 0o755, 0, 0, file.read()))
    for applet in APPLETS:
        put(f"bin/{applet}", Entry("l", 0o777, 0, 0, b"busybox"))
    with open(env["init"], "rb") as file:
        put("init", Entry("f", 0o755, 0, 0, file.read()))
    # The guest's modprobe reads this instead of running depmod: every module with all it needs.
    lines = []
    for module in closure(modules, builtin):
        put(f"lib/modules/{release}/{module.file}", Entry("f", 0o644, 0, 0, module.image))
        lines.append(f"{module.file}: {' '.join(module.depends)}".rstrip() + "\n")
    put(f"lib/modules/{release}/modules.dep", Entry("f", 0o644, 0, 0, "".join(lines).encode()))
    for name in ("dev", "proc", "sys", "newroot"):
        put(name, Entry("d", 0o755, 0, 0, b""))

    os.mkdir(env["out"])
    for name, data in (("vmlinux", extract_vmlinux(bzimage)), ("initrd", cpio(tree))):
        with open(f"{env['out']}/{name}", "wb") as file:
            file.write(data)


main()
