"""Names of open data disks, and which of the host's mapped devices are whose."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvm.core import limits
from mvm.core.errors import MissingPrerequisite
from mvm.core.ids import InstanceId
from mvm.hostd.install import units
from mvm.hostd.resources import dm_crypt, udev, volume
from mvm.linux import process
from mvm.linux.device_mapper import NAME_MAX, Device

ACME = InstanceId("acme", "default", 0)
NAME = "mvm-acme--default-0.0123456789ab"
UUID = f"CRYPT-LUKS2-{'0' * 32}-{NAME}"


@pytest.mark.req("K1")
def test_names_and_uuids_fit_for_the_longest_ids_and_are_read_back() -> None:
    """Also the uuid that cryptsetup makes of it: what is too long it cuts, and two disks could be taken for one."""
    longest = InstanceId("t" * limits.TENANT_ID_MAX, "p" * limits.POOL_ID_MAX, limits.INSTANCES_PER_POOL - 1)
    for instance in (ACME, longest):
        name = dm_crypt.render_name(Path("/s/data.img"), instance.vm_name)
        assert len(name) <= NAME_MAX
        assert len(f"CRYPT-LUKS2-{'0' * 32}-{name}") <= 128
        assert dm_crypt.parse_name(name) == (instance.vm_name, dm_crypt.mark(Path("/s/other.img")))
    with pytest.raises(ValueError, match="too long"):
        dm_crypt.render_name(Path("/s/data.img"), "x" * 111)


@pytest.mark.parametrize(
    ("name", "uuid"),
    [
        ("mvm-root", "LVM-abcdef"),  # a volume group of that name
        (NAME, UUID + "-1"),
        (NAME, ""),
        ("luks-0", UUID),
        ("mvm-A.0123456789ab", f"CRYPT-LUKS2-{'0' * 32}-mvm-A.0123456789ab"),
        ("mvm-a", f"CRYPT-LUKS2-{'0' * 32}-mvm-a"),
        (f"{NAME}\n", f"{UUID}\n"),
    ],
)
def test_somebody_elses_device_is_never_taken_for_ours(name: str, uuid: str) -> None:
    assert dm_crypt.parse(Device(name, uuid, "/dev/dm-0", ("/s/data.img",))) is None


@pytest.mark.req("K1")
def test_a_mapping_is_known_by_the_directory_of_its_image(tmp_path: Path) -> None:
    """Whatever the kernel calls the image: in a namespace that is gone, a file has no beginning of its path."""
    image = tmp_path / "volumes" / "data.img"
    image.parent.mkdir()
    name = dm_crypt.render_name(image, ACME.vm_name)
    for below in (str(image), f"{image} (deleted)", "/volumes/data.img", ""):
        found = dm_crypt.parse(Device(name, f"{UUID[:45]}{name}", "/dev/dm-0", (below,)))
        assert found is not None
        assert found.vm_name == ACME.vm_name
        assert dm_crypt.is_of(found, image)
        assert dm_crypt.is_of(found, image.with_name(".tmp-1"))
        assert not dm_crypt.is_of(found, tmp_path / "other" / "data.img")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path)
        assert dm_crypt.is_of(found, tmp_path / "link" / "volumes" / "data.img")


@pytest.mark.req("K1", "K2")
def test_no_command_has_a_key_or_keeps_one_elsewhere() -> None:
    argv = dm_crypt.render_open(Path("/s/data.img"), NAME)
    assert argv[argv.index("--key-file") + 1] == "-"
    assert "--disable-keyring" in argv
    assert "--allow-discards" not in argv
    for luks in (1, 2):
        argv = volume.render_format(Path("/s/data.img"), luks)
        assert argv[argv.index("--key-file") + 1] == "-"


def test_the_kernel_is_expected_to_do_what_the_header_was_made_for() -> None:
    assert dm_crypt.table(volume.PAYLOAD_OFFSET, 2) == ("aes-xts-plain64", 4096, ("sector_size:4096",))
    assert dm_crypt.table(volume.PAYLOAD_OFFSET, 1) == ("aes-xts-plain64", 4096, ())


@pytest.mark.req("H4")
def test_the_rules_that_are_shipped_are_those_that_mvm_writes() -> None:
    text = (units.shipped_dir() / udev.NAME).read_text()
    assert [line for line in text.splitlines() if not line.startswith("#")] == [udev.RULES]
    (place,) = [f.target for f in units.FILES if f.source == udev.NAME]
    assert str(place) == f"{udev.FOLDERS[0]}/{udev.NAME}"


class Udev:
    """`/etc`, `/run` and `/usr/lib` below a directory, and how often udev was told to read them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.etc, self.run, self.lib = (str(folder / name) for name in ("etc", "run", "lib"))
        for name in (self.etc, self.lib):
            Path(name).mkdir()
        self.told = 0
        monkeypatch.setattr(udev, "FOLDERS", (self.etc, self.run, self.lib))
        monkeypatch.setattr(udev, "_WRITABLE", self.run)
        monkeypatch.setattr(udev, "_CONTROL", str(folder))
        monkeypatch.setattr(process, "run", self._tell)

    def _tell(self, *_: object, **__: object) -> None:
        self.told += 1

    def put(self, folder: str, text: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / udev.NAME).write_text(text)


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Udev:
    return Udev(tmp_path, monkeypatch)


@pytest.mark.req("H4")
def test_rules_that_say_what_ours_do_are_left(rules: Udev) -> None:
    rules.put(rules.etc, f"# by hand\n\n{udev.RULES}\n")
    rules.put(rules.lib, "")
    udev.keep_out()
    assert rules.told == 0
    assert not Path(rules.run).exists()


@pytest.mark.req("H4")
@pytest.mark.parametrize(
    "text", [None, "", "# ours\n", udev.RULES + "\n" + 'SUBSYSTEM=="block"\n', "\0" * 70000]
)
def test_what_udev_reads_first_has_to_say_it(rules: Udev, text: str | None) -> None:
    """An empty file under our name kept everybody but udev out."""
    if text is not None:
        rules.put(rules.lib, text)
        rules.put(rules.run, text)
    udev.keep_out()
    assert rules.told == 1
    assert udev.RULES in (Path(rules.run) / udev.NAME).read_text().splitlines()
    udev.keep_out()
    assert rules.told == 1


@pytest.mark.req("H4")
@pytest.mark.parametrize("masked", [False, True])
def test_what_stands_before_ours_and_says_less_is_refused(rules: Udev, masked: bool) -> None:
    if masked:
        (Path(rules.etc) / udev.NAME).symlink_to("/dev/null")
    else:
        rules.put(rules.etc, "# nothing\n")
    rules.put(rules.run, udev.RULES + "\n")
    with pytest.raises(MissingPrerequisite, match="udev would read"):
        udev.keep_out()
