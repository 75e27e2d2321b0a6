"""`mvm posture` reads a running, a sleeping and a woken QEMU guest right, and notices what is spoilt on purpose."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.support.qemu_world import QemuWorld, qemu_world

from mvm.builder.model import Artifacts
from mvm.core.plan import InstancePlan
from mvm.core.posture import GUARANTEES
from mvm.hostd import net_policy
from mvm.hostd.inspect.guarantees import SCENE_JUDGES
from mvm.hostd.inspect.scene import Scene, read_scene
from mvm.hostd.resources import forwarding, nft_rules, nftables, secrets_store, volume
from mvm.linux import process
from mvm.linux.secret import SecretBytes

pytestmark = [pytest.mark.root, pytest.mark.vm]

Started = tuple[QemuWorld, InstancePlan]
# What a guest under QEMU holds wherever it runs; the rest depends on the host, or is not built yet.
HELD = (
    "memory-in-ram", "volume-encrypted", "no-key-in-sight", "secrets-sealed", "vmm-uid", "vmm-no-capabilities",
    "vmm-no-new-privs", "vmm-seccomp", "artifacts-unchanged", "network-separate", "ipv6-closed", "no-network-control",
    "keys-wrapped", "firewall", "vmm-jail",
)  # fmt: skip


def looked(world: QemuWorld) -> Scene:
    return read_scene(world.store, world.keys)


def status(scene: Scene, name: str) -> tuple[bool | None, int, str]:
    verdict = SCENE_JUDGES[name](scene)
    return verdict.held, verdict.count, verdict.seen


@pytest.fixture(scope="module")
def started(artifacts: Artifacts) -> Iterator[Started]:
    with qemu_world(artifacts) as world:
        plan = world.plan(data_disk_mib=32)
        path = world.store.tenant_dir(plan.instance.tenant) / secrets_store.STORE_NAME
        with SecretBytes.from_random(16) as value:
            secrets_store.save(path, world.keys, plan.instance.tenant, {"token": value})
        world.host().create_instance(plan)
        yield world, plan


@pytest.mark.req("O6", "H4", "H6", "K1", "K2", "K3", "N1")
def test_a_running_guest(started: Started) -> None:
    world, plan = started
    scene = looked(world)
    (vmm,) = scene.vmms
    assert vmm.process.pid == world.record(plan).process.pid  # type: ignore[union-attr]
    assert len(vmm.process.threads) > 1
    for name in HELD:
        held, count, seen = status(scene, name)
        assert held is True, (name, seen)
        assert count, name
    # These are read from the process, not assumed.
    assert vmm.process.threads[0].uids == (plan.uid,) * 4
    accelerated = any(file.target == "anon_inode:kvm-vm" for file in vmm.process.files)
    assert status(scene, "hardware-virtualisation")[0] is accelerated
    assert status(scene, "key-provider")[0] is False
    assert status(scene, "volume-locked")[0] is (None if scene.hidden_processes else True)


@pytest.mark.req("O6", "K1")
def test_a_stranger_with_the_disk_open_is_named(started: Started) -> None:
    world, plan = started
    fd = os.open(world.paths(plan).data_disk, os.O_RDONLY)
    try:
        held, _, seen = status(looked(world), "volume-locked")
    finally:
        os.close(fd)
    assert held is False
    assert f"process {os.getpid()}" in seen


@pytest.mark.req("O6", "N2")
def test_ipv6_switched_on_by_hand_is_named(started: Started) -> None:
    world, plan = started
    switch = f"/proc/sys/net/ipv6/conf/{plan.network.bridge}/disable_ipv6"
    if not os.path.exists(switch):
        pytest.skip("this kernel has no IPv6")
    try:
        with open(switch, "w") as file:
            file.write("0")
        held, _, seen = status(looked(world), "ipv6-closed")
    finally:
        with open(switch, "w") as file:
            file.write("1")
    assert held is False
    assert plan.network.bridge in seen
    assert status(looked(world), "ipv6-closed")[0] is True


@pytest.mark.req("O6", "N2", "N3")
def test_a_rule_removed_by_hand_is_named(started: Started) -> None:
    world, _ = started
    policy = net_policy.wanted(world.store, forwarding.host_network())
    process.run(["nft", "delete", "table", "inet", nft_rules.TABLE], timeout=20)
    try:
        held, _, seen = status(looked(world), "firewall")
    finally:
        nftables.apply(policy)
    assert held is False
    assert "table inet" in seen
    assert status(looked(world), "firewall")[0] is True


@pytest.mark.req("O6", "S1", "S3", "S4")
def test_a_sleeping_and_a_woken_guest(started: Started) -> None:
    world, plan = started
    world.host().sleep_instance(plan.instance)
    asleep = looked(world)
    assert asleep.vmms == ()
    for name in ("memory-sealed", "snapshot-bound", "snapshot-private", "keys-wrapped"):
        held, count, seen = status(asleep, name)
        assert held is True, (name, seen)
        assert count, name
    assert status(asleep, "vmm-uid")[:2] == (True, 0)
    latest = world.paths(plan).latest
    (latest / "memory.raw").write_bytes(b"plain text")
    try:
        held, _, seen = status(looked(world), "memory-sealed")
        assert held is False
        assert "memory.raw" in seen
        assert status(looked(world), "snapshot-private")[0] is False
    finally:
        (latest / "memory.raw").unlink()
    world.host().wake_instance(plan)
    awake = looked(world)
    for name in (*HELD, "memory-sealed", "snapshot-bound", "snapshot-private"):
        held, count, seen = status(awake, name)
        assert held is True, (name, seen)
        assert count, name


@pytest.mark.req("O6", "K1")
def test_a_disk_without_its_header_is_named(started: Started) -> None:
    world, _ = started
    spoilt = world.store.tenants_dir / "gone" / "instances" / "default-0" / "volumes" / volume.IMAGE_NAME
    spoilt.parent.mkdir(parents=True)
    spoilt.write_bytes(b"\0" * 4096)
    try:
        scene = looked(world)
        assert status(scene, "volume-encrypted")[0] is False
        assert status(scene, "keys-wrapped")[0] is False
    finally:
        spoilt.unlink()


def test_every_guarantee_named_here_is_one() -> None:
    assert set(HELD) <= {guarantee.id for guarantee in GUARANTEES}
