"""What posture reads of a VMM that is Firecracker (the strict fake, under its jailer), and what it makes of that."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.fake_firecracker import install
from tests.support.firecracker_world import firecracker_world

from mvm.hostd.inspect.guarantees import SCENE_JUDGES
from mvm.hostd.inspect.scene import read_scene

pytestmark = pytest.mark.root


@pytest.mark.req("O6", "K3", "H4", "H6")
def test_a_started_and_a_woken_guest(tmp_path: Path) -> None:
    with firecracker_world(install(tmp_path / "programs")) as world:
        plan, host = world.plan(), world.host()
        for begin in (host.create_instance, host.wake_instance):
            begin(plan)
            scene = read_scene(world.store, world.keys)
            (vmm,) = scene.vmms
            assert vmm.driver == "firecracker"
            assert vmm.keeper
            for name in ("secrets-sealed", "vmm-uid", "vmm-no-new-privs", "vmm-seccomp", "no-key-in-sight"):
                verdict = SCENE_JUDGES[name](scene)
                assert verdict.held is True, (name, verdict)
            host.sleep_instance(plan.instance)
