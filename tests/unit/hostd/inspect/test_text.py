"""What the kernel prints, parsed: real captures, and any text at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import InvalidInput
from mvm.hostd.inspect import text

STATUS = """\
Name:\tqemu-system-x86
Umask:\t0077
Uid:\t2000512\t2000512\t2000512\t2000512
Gid:\t2000512\t2000512\t2000512\t2000512
Groups:\t
CapInh:\t0000000000000000
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
CapBnd:\t000001fffeffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t1
"""
TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 7131 1
   1: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 81 1
"""
PACKET = "sk               RefCnt Type Proto  Iface R Rmem   User   Inode\n0000000000000000 3 3 0003 2 1 0 0 4711\n"
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max core file size        0                    0                    bytes
"""


@pytest.mark.req("H4", "H6")
def test_the_status_of_a_confined_thread() -> None:
    seen = text.parse_status(STATUS)
    assert seen.uids == (2000512,) * 4 == seen.gids
    assert (seen.groups, seen.no_new_privs, seen.seccomp, seen.capabilities) == ((), True, 2, 0)


@pytest.mark.parametrize("name", ["CapInh", "CapPrm", "CapEff", "CapAmb"])
def test_a_capability_in_any_set_counts(name: str) -> None:
    changed = STATUS.replace(f"{name}:\t0000000000000000", f"{name}:\t0000000000001000")
    assert text.parse_status(changed).capabilities == 1 << 12


@pytest.mark.parametrize("name", ["Uid", "Gid", "Groups", "CapEff", "NoNewPrivs", "Seccomp"])
def test_a_status_without_a_field_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        text.parse_status("\n".join(line for line in STATUS.split("\n") if not line.startswith(f"{name}:")))


def test_a_name_cannot_forge_a_field() -> None:
    # The kernel escapes line ends in names, and the first of two equal fields counts.
    forged = STATUS.replace("Seccomp:\t2", "Seccomp:\t0") + "Seccomp:\t2\n"
    assert text.parse_status(forged).seccomp == 0


def test_captures() -> None:
    swaps = (
        "Filename\tType\tSize\tUsed\tPriority\n/dev/dm-1 partition 100 0 -2\n/swap\\040file file 100 0 -3\n"
    )
    assert text.parse_swaps(swaps) == (text.Swap("/dev/dm-1", "partition"), text.Swap("/swap file", "file"))
    assert text.parse_unified_cgroup("9:memory:/x\n0::/mvm.slice/a-0\n") == "/mvm.slice/a-0"
    assert text.parse_unified_cgroup("9:memory:/x\n") == ""
    assert text.parse_core_limit(LIMITS) == "0 0"
    assert text.parse_fd_flags("pos:\t0\nflags:\t0100002\nmnt_id:\t1\n") & 3 == 2
    assert text.parse_socket_table(TCP) == {7131, 81}
    assert text.parse_socket_table(PACKET) == {4711}
    assert text.parse_os_release('NAME="x"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n').startswith(
        "Debian"
    )


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", "7.2.22"),
        ("cryptsetup 2.6.1 flags: UDEV", "2.6.1"),
        ("nftables v1.0.6 (Lester Gooch #5)", "1.0.6"),
        ("ip utility, iproute2-6.1.0, libbpf 1.1.2", "6.1.0"),
        ("Firecracker v1.16.1\n", "1.16.1"),
        ("nix (Nix) 2.8.0", "2.8.0"),
        ("no version", ""),
    ],
)
def test_versions(said: str, version: str) -> None:
    assert text.parse_version(said) == version


@pytest.mark.req("K2")
def test_what_could_be_a_key_is_noticed_and_not_repeated() -> None:
    ordinary = ["qemu-system-x86_64", "-name", "acme-default-0", "/proc/self/fd/40", "tsc_early_khz=2445432"]
    assert text.key_like(ordinary) == []
    assert text.key_like(["-x", "a" * 32]) == ["argument 1"]
    assert text.key_like(["key=Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MGFiY2Rl"]) == ["argument 0"]


@given(st.text())
def test_any_text_gives_a_value_or_invalid_input(anything: str) -> None:
    for parse in (text.parse_status, text.parse_fd_flags):
        try:
            parse(anything)
        except InvalidInput:
            pass
    for total in (
        text.parse_swaps, text.parse_unified_cgroup, text.parse_core_limit, text.parse_socket_table,
        text.parse_os_release, text.parse_version,
    ):  # fmt: skip
        total(anything)


@given(st.dictionaries(st.sampled_from([line.partition(":")[0] for line in STATUS.split("\n")]), st.text()))
def test_any_values_in_a_status(values: dict[str, str]) -> None:
    changed = [
        f"{name}:\t{values.get(name, rest)}"
        for name, _, rest in (x.partition(":") for x in STATUS.split("\n"))
    ]
    try:
        text.parse_status("\n".join(changed))
    except InvalidInput:
        pass


@given(st.binary(min_size=32, max_size=32))
def test_every_key_in_hexadecimal_is_noticed(key: bytes) -> None:
    assert text.key_like([f"secret,id=key,data={key.hex()}"]) == ["argument 0"]


@pytest.mark.req("S3")
def test_writable_mappings_of_files() -> None:
    maps = """\
55d0c8a00000-55d0c8c00000 r-xp 00000000 fe:00 1234                       /usr/bin/qemu-system-x86_64
55d0c9000000-55d0c9100000 rw-p 00900000 fe:00 1234                       /usr/bin/qemu-system-x86_64
7f0000000000-7f0010000000 rw-s 00000000 00:2d 2                          /memory with spaces
7f0020000000-7f0030000000 rw-p 00000000 00:00 0
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
"""
    assert text.parse_writable_maps(maps) == (
        text.Mapping("/usr/bin/qemu-system-x86_64", "254:0", 1234, 1 << 20, False),
        text.Mapping("/memory with spaces", "0:45", 2, 256 << 20, True),
    )


def test_mounts() -> None:
    table = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n31 22 0:28 / /a\\040b rw - tmpfs tmpfs rw\nx\n"
    assert text.parse_mounts(table) == (text.Mount("/", "254:0", "ext4"), text.Mount("/a b", "0:28", "tmpfs"))


@given(st.text())
def test_any_text_is_a_list_of_mappings_and_of_mounts(anything: str) -> None:
    text.parse_writable_maps(anything)
    text.parse_mounts(anything)
