"""What is asked of device mapper and what it answers: bytes and /sys, without a kernel that has it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.linux import device_mapper as dm

KEY = "00112233" * 16


def answer(parameters: str, kind: bytes = b"crypt", count: int = 1) -> bytearray:
    """A DM_TABLE_STATUS answer, as <linux/dm-ioctl.h> describes it."""
    buffer = dm.render("mvm-acme--default-0")
    struct.pack_into("=I", buffer, 20, count)
    struct.pack_into("=QQiI16s", buffer, 312, 0, 131072, 0, 0, kind)
    text = parameters.encode() + b"\0"
    buffer[352 : 352 + len(text)] = text
    return buffer


@pytest.mark.req("K1")
def test_a_table_is_read_and_its_key_wiped() -> None:
    raw = answer(f"aes-xts-plain64 {KEY} 0 7:0 4096 1 sector_size:4096")
    assert dm.parse_crypt_table(raw) == dm.CryptTable("aes-xts-plain64", 4096, ("sector_size:4096",))
    assert KEY.encode() not in raw
    assert KEY[:8].encode() not in raw


def test_a_table_without_options() -> None:
    assert dm.parse_crypt_table(answer(f"aes-xts-plain64 {KEY} 0 7:0 4096")) == dm.CryptTable(
        "aes-xts-plain64", 4096, ()
    )


def test_another_kind_of_table_is_none() -> None:
    assert dm.parse_crypt_table(answer("7:0 0", kind=b"linear")) is None
    assert dm.parse_crypt_table(answer("", count=0)) is None


@pytest.mark.parametrize("text", ["", "aes", "aes key", "aes key 0 7:0", "aes key 0 7:0 x"])
def test_what_is_no_table_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"targets|words|table"):
        dm.parse_crypt_table(answer(text))
    with pytest.raises(ValueError, match="targets"):
        dm.parse_crypt_table(answer(text, count=2))


@given(st.binary(max_size=400))
def test_any_bytes_are_a_table_or_an_error(tail: bytes) -> None:
    raw = answer("")
    raw[352 : 352 + len(tail)] = tail
    try:
        dm.parse_crypt_table(raw)
    except ValueError:
        pass


def test_a_name_that_the_kernel_would_cut_is_refused() -> None:
    assert dm.render("x" * 127)[48 : 48 + 128] == b"x" * 127 + b"\0"
    for bad in ("", "x" * 128, "a\0b"):
        with pytest.raises(ValueError, match="name"):
            dm.render(bad)


def device(root: Path, number: int, name: str, *, slaves: dict[str, str | None]) -> None:
    base = root / f"dm-{number}"
    (base / "dm").mkdir(parents=True)
    (base / "dm" / "name").write_text(name + "\n")
    (base / "dm" / "uuid").write_text(f"CRYPT-LUKS2-{'0' * 32}-{name}\n")
    (base / "slaves").mkdir()
    for slave, backing in slaves.items():
        (base / "slaves" / slave).mkdir()
        if backing is not None:
            (base / "slaves" / slave / "loop").mkdir()
            (base / "slaves" / slave / "loop" / "backing_file").write_text(backing + "\n")


def test_devices_are_read_from_sys(tmp_path: Path) -> None:
    device(tmp_path, 0, "mvm-acme--default-0", slaves={"loop3": "/s/a b/data.img (deleted)"})
    device(tmp_path, 1, "vg-root", slaves={"sda2": None})
    (tmp_path / "sda").mkdir()
    (tmp_path / "dm-2").mkdir()  # going away
    first, second = dm.devices(str(tmp_path))
    assert (first.name, first.path, first.below) == (
        "mvm-acme--default-0",
        "/dev/dm-0",
        ("/s/a b/data.img (deleted)",),
    )
    assert second.below == ("/dev/sda2",)
    assert dm.devices(str(tmp_path / "none")) == []
