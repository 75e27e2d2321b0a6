"""What the shipped units say, where a mistake shows on a booting host only."""

from __future__ import annotations

import re

import pytest

from mvm.core.errors import InvalidInput, Refused
from mvm.hostd.install import units

SERVICE = (units.shipped_dir() / units.SERVICE).read_text()
STATIC = frozenset(
    {"/dev/net/tun", "/dev/fuse", "/dev/vhost-vsock", "/dev/mapper/control", "/dev/loop-control"}
)
"""systemd-tmpfiles makes these before any module is loaded, from modules.devname (kmod-static-nodes.service)."""


@pytest.mark.req("O3", "L3")
def test_every_device_is_allowed_whether_or_not_its_module_is_loaded_when_the_unit_starts() -> None:
    """systemd leaves a rule out whose device is not there. Without KVM's, no instance that slept could wake after a
    boot in which udev was slower than the daemon."""
    allowed = re.findall(r"^DeviceAllow=(\S+)", SERVICE, re.MULTILINE)
    assert "/dev/char/10:232" in allowed, "KVM_MINOR"
    named = {
        name for name in allowed if not name.startswith(("block-", "char-", "/dev/char/", "/dev/block/"))
    }
    assert named <= STATIC


def test_settings_that_are_wrong_do_not_start_the_daemon_over_and_over() -> None:
    (codes,) = re.findall(r"^RestartPreventExitStatus=(.*)$", SERVICE, re.MULTILINE)
    assert {int(code) for code in codes.split()} == {InvalidInput.exit_code, Refused.exit_code}
