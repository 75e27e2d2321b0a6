"""The real QEMU, in its jail, asked whether a real guest kernel boots with this host's KVM."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from mvm.builder.model import Artifacts
from mvm.hostd.vmm.qemu.driver import QemuDriver
from mvm.hostd.vmm.qemu.probe import KVM

pytestmark = [pytest.mark.root, pytest.mark.vm]


@pytest.mark.req("H4", "O1")
def test_the_probe_gets_as_far_as_the_host_lets_it(artifacts: Artifacts) -> None:
    if not os.access(KVM, os.R_OK | os.W_OK) or os.stat(KVM).st_mode & 0o060 != 0o060:
        pytest.skip(f"there is no {KVM} that its group may use")
    with tempfile.TemporaryDirectory(prefix="mvm-probe-") as folder:
        driver = QemuDriver(Path(folder))
        found = driver.acceleration(artifacts.kernel, artifacts.initrd)
        # Whether KVM is any good is the host's to say; that QEMU finds all it needs in the jail is ours.
        if found.accel == "tcg":
            assert "no stock kernel boots" in found.reason
            for ours in ("shared librar", "No such file", "Could not open", "Permission denied", "firmware"):
                assert ours not in found.reason
        assert driver.acceleration(artifacts.kernel, artifacts.initrd) == found
        assert not (Path(folder) / "probe").exists()
