"""A tenant's life on Firecracker (its strict fake), and what goes wrong: a typed error, a clean host, a legal state."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import msgspec
import pytest
from tests.support.firecracker_world import (
    FirecrackerWorld,
    PlainDiskDriver,
    break_with,
    count,
    firecracker_world,
)
from tests.support.network_lab import inside

from mvm.core.errors import IntegrityError, MissingPrerequisite, MvmError, Refused, VmmError
from mvm.core.lifecycle import State
from mvm.hostd import keeper
from mvm.hostd.inspect.process import read_process
from mvm.hostd.resources import network
from mvm.hostd.vmm.driver import Machine
from mvm.hostd.vmm.firecracker import jail
from mvm.hostd.vmm.firecracker import vm as vms
from mvm.hostd.vmm.firecracker.driver import Filter
from mvm.hostd.vmm.firecracker.programs import inspect
from mvm.linux.pidfd import is_alive
from mvm.linux.process import run

pytestmark = pytest.mark.root


@pytest.mark.req("L1", "S1", "S2", "L7")
def test_a_life(world: FirecrackerWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    world.assert_runs(plan)
    record = world.record(plan)
    assert record.vmm is not None
    assert (record.vmm.driver, record.vmm.version) == ("firecracker", "1.16.1")
    for _ in range(3):
        before = count(world, plan)
        host.sleep_instance(plan.instance)
        world.assert_nothing_runs(plan, sleeping=True)
        host.wake_instance(plan)
        world.assert_runs(plan)
        assert count(world, plan) >= before
    host.stop_instance(plan.instance)
    world.assert_nothing_runs(plan)
    host.create_instance(plan)
    host.destroy_instance(plan.instance, wipe_volumes=True)
    assert world.processes() == {}
    assert world.links() == set()


@pytest.mark.req("B7")
def test_what_it_booted_from_is_kept_with_the_paths_of_its_jail(world: FirecrackerWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    config = json.loads(world.paths(plan).fc_config.read_bytes())
    assert config["boot-source"]["kernel_image_path"] == "/vmlinux"
    assert config["network-interfaces"][0]["host_dev_name"] == plan.network.tap
    assert str(world.store.root) not in json.dumps(config)


@pytest.mark.req("H4", "L7")
def test_every_start_has_a_jail_of_its_own_and_the_host_sees_none(world: FirecrackerWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    identity = world.record(plan).process
    assert identity is not None
    assert os.listdir(world.paths(plan).jail) == []
    root = f"/proc/{identity.pid}/root"
    assert {"vmlinux", "rootfs", "data", "secrets", "run"} <= set(os.listdir(root))
    assert os.readlink(f"/proc/{identity.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    host.sleep_instance(plan.instance)
    host.wake_instance(plan)
    woken = world.record(plan).process
    assert woken is not None
    assert "memory" in os.listdir(f"/proc/{woken.pid}/root")
    assert not {"snapshot", "snapshot.new", "vmlinux"} & set(os.listdir(f"/proc/{woken.pid}/root"))


@pytest.mark.req("L3", "L7")
@pytest.mark.parametrize(
    "fault",
    [
        "jailer refuses", "jailer cannot exec", "exit at start 1", "exit at start 148", "no kvm", "refuse PUT /vsock",
        "exit 149 PUT /actions", "garbage PUT /boot-source", "cut PUT /machine-config", "signal 9 PUT /actions",
    ],
)  # fmt: skip
def test_a_start_that_fails_leaves_nothing(world: FirecrackerWorld, programs: Path, fault: str) -> None:
    break_with(programs, fault)
    plan = world.plan()
    with pytest.raises(VmmError):
        world.host().create_instance(plan)
    world.assert_nothing_runs(plan)
    assert world.record(plan).state in (State.CREATED, State.FAILED, State.STOPPED)
    break_with(programs)
    world.host().create_instance(plan)
    world.assert_runs(plan)


@pytest.mark.req("L3")
@pytest.mark.parametrize("fault", ["no socket", "jailer hangs", "hang PUT /drives/data"])
def test_what_never_answers_is_an_error_in_time(
    world: FirecrackerWorld, programs: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vms, "READY_S", 1.0)
    monkeypatch.setattr("mvm.hostd.vmm.firecracker.driver.CALL_S", 1.0)
    facts = world.driver.facts()
    monkeypatch.setattr(world.driver, "facts", lambda: facts)
    break_with(programs, fault)
    plan = world.plan()
    with pytest.raises(VmmError):
        world.host().create_instance(plan)
    world.assert_nothing_runs(plan)


@pytest.mark.req("S4", "L3")
@pytest.mark.parametrize(
    "fault", ["load fails", "jailer refuses", "signal 9 PUT /snapshot/load", "no socket"]
)
def test_a_wake_that_fails_leaves_it_asleep(
    world: FirecrackerWorld, programs: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    before = count(world, plan)
    host.sleep_instance(plan.instance)
    # The same program, as far as its fingerprint goes: only its behaviour is another.
    facts = world.driver.facts()
    monkeypatch.setattr(world.driver, "facts", lambda: facts)
    monkeypatch.setattr(vms, "READY_S", 1.0)
    break_with(programs, fault)
    with pytest.raises(VmmError):
        host.wake_instance(plan)
    assert world.record(plan).state is State.SLEEPING
    world.assert_nothing_runs(plan, sleeping=True)
    break_with(programs)
    host.wake_instance(plan)
    assert count(world, plan) >= before


@pytest.mark.req("S1", "L3")
@pytest.mark.parametrize(
    "fault",
    ["no space", "refuse PUT /snapshot/create", "refuse PATCH /vm Paused"],
)
def test_a_sleep_that_fails_leaves_it_running_and_reachable(
    world: FirecrackerWorld, programs: Path, fault: str
) -> None:
    break_with(programs, fault)
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    with pytest.raises(MvmError):
        host.sleep_instance(plan.instance)
    state = world.record(plan).state
    assert state in (State.RUNNING, State.FAILED)
    if state is State.RUNNING:
        assert count(world, plan) > 0
        world.assert_runs(plan)
    else:
        world.assert_nothing_runs(plan)


@pytest.mark.req("S1")
def test_a_sleep_broken_off_after_the_save_goes_on(world: FirecrackerWorld) -> None:
    plan = world.plan()
    world.host().create_instance(plan)

    def stumble(step: str) -> None:
        if step == "pages written":
            raise VmmError("broken off on purpose")

    with pytest.raises(VmmError):
        world.host(fault=stumble).sleep_instance(plan.instance)
    assert world.record(plan).state is State.RUNNING
    assert count(world, plan) > 0
    world.host().sleep_instance(plan.instance)
    world.host().wake_instance(plan)


@pytest.mark.req("S1", "L3")
@pytest.mark.parametrize("step", ["quiesced", "paused", "pages written", "sealed", "renamed", "committed"])
def test_killed_in_the_middle_of_a_sleep(world: FirecrackerWorld, step: str) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    assert world.killed_at(step, lambda host: host.sleep_instance(plan.instance))
    found = world.host().inspect_instance(plan.instance)
    if found.state is State.RUNNING:
        world.assert_runs(plan)
        assert count(world, plan) > 0
    else:
        assert found.state is State.SLEEPING
        world.assert_nothing_runs(plan, sleeping=True)


@pytest.mark.req("L3", "L7")
@pytest.mark.parametrize("step", ["intent", "started", "loaded"])
def test_killed_in_the_middle_of_a_wake(world: FirecrackerWorld, step: str) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    world.host().sleep_instance(plan.instance)
    assert world.killed_at(step, lambda host: host.wake_instance(plan))
    assert world.host().inspect_instance(plan.instance).state is State.SLEEPING
    world.assert_nothing_runs(plan, sleeping=True)
    world.host().wake_instance(plan)
    world.assert_runs(plan)


def _links_of(pid: int) -> dict[str, str]:
    """Name -> kind of what is up in a process's network."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with inside(namespace):
            return {name: link.kind for name, link in network.inspect().items() if link.up}
    finally:
        os.close(namespace)


@pytest.mark.req("H4", "N1", "S1")
def test_it_has_a_network_of_its_own_with_the_tap_it_slept_with(world: FirecrackerWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    net = plan.network
    before = ""
    for _ in range(2):
        identity = world.record(plan).process
        assert identity is not None
        for kind in ("net", "ipc", "pid", "mnt"):
            assert os.readlink(f"/proc/{identity.pid}/ns/{kind}") != os.readlink(
                f"/proc/thread-self/ns/{kind}"
            )
        facts = read_process(identity.pid, (), "")
        assert facts is not None
        assert {"mnt", "net", "pid"} <= set(facts.own_namespaces)
        assert (facts.root, facts.apart) == ("own", False), "what posture judges"
        expected = {net.tap: "tun", "mvm-in": "bridge", "mvm-out": "veth"}
        assert _links_of(identity.pid) == expected
        port = network.inspect()[net.tap]
        assert (port.kind, port.master, port.isolated, port.up) == ("veth", net.bridge, True, True)
        config = json.loads(world.paths(plan).fc_config.read_bytes())
        (interface,) = config["network-interfaces"]
        assert (interface["host_dev_name"], interface["guest_mac"]) == (net.tap, net.mac)
        assert before in ("", interface["guest_mac"])
        before = interface["guest_mac"]
        host.sleep_instance(plan.instance)
        assert world.links() == set()
        host.wake_instance(plan)


@pytest.mark.req("L3", "L7")
@pytest.mark.parametrize("victim", ["vmm", "keeper"])
def test_killed_its_network_goes_though_nobody_cleans_up(world: FirecrackerWorld, victim: str) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    identity = world.record(plan).process
    assert identity is not None
    pid = identity.pid if victim == "vmm" else keeper.anything_left(world.paths(plan).runtime)
    assert pid
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while (plan.network.tap in world.links() or is_alive(identity)) and time.monotonic() < until:
        time.sleep(0.02)
    assert world.links() == {plan.network.bridge}
    assert host.inspect_instance(plan.instance).state is State.FAILED
    world.assert_nothing_runs(plan)


@pytest.mark.req("L3", "L7")
@pytest.mark.parametrize("victim", ["vmm", "keeper"])
@pytest.mark.parametrize("woken", [False, True])
def test_a_lost_vmm_or_pager_is_seen_and_cleared(world: FirecrackerWorld, victim: str, woken: bool) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    if woken:
        host.sleep_instance(plan.instance)
        host.wake_instance(plan)
    identity = world.record(plan).process
    assert identity is not None
    pid = identity.pid if victim == "vmm" else keeper.anything_left(world.paths(plan).runtime)
    assert pid
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 10
    # A process closes its files, and so lets go of its lock, some time before it has ended.
    while (
        keeper.anything_left(world.paths(plan).runtime) is not None or is_alive(identity)
    ) and time.monotonic() < until:
        time.sleep(0.01)
    assert host.inspect_instance(plan.instance).state is State.FAILED
    world.assert_nothing_runs(plan)


@pytest.mark.req("L7")
def test_stale_sockets_are_in_nobodys_way(world: FirecrackerWorld) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    host.stop_instance(plan.instance)
    run = world.paths(plan).runtime / "vmm"
    run.mkdir()
    for name in ("api.sock", "vsock.sock", "log"):
        (run / name).write_text("in the way")
    (run / "vsock.sock_5252").symlink_to("/etc/shadow")
    host.create_instance(plan)
    world.assert_runs(plan)


@pytest.mark.req("S4")
def test_a_snapshot_of_another_version_is_refused_with_the_way_on(
    world: FirecrackerWorld, programs: Path
) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    host.sleep_instance(plan.instance)
    break_with(programs, version="1.15.1")
    with pytest.raises(IntegrityError) as refused:
        host.wake_instance(plan)
    assert "VMM version" in refused.value.details
    assert "start it cold" in refused.value.resolution
    assert world.record(plan).state is State.SLEEPING
    host.stop_instance(plan.instance)
    host.create_instance(plan)
    world.assert_runs(plan)


@pytest.mark.req("H6")
@pytest.mark.parametrize("fault", ["no filter", "vcpu without filter"])
def test_without_its_filters_baseline_refuses_and_development_says_so(programs: Path, fault: str) -> None:
    break_with(programs, fault)
    with firecracker_world(programs) as world:
        plan = world.plan()
        world.host().create_instance(plan)
        assert "Seccomp 0" in (world.paths(plan).runtime / "unfiltered").read_text()
    with firecracker_world(programs, confined=True) as world:
        plan = world.plan()
        programs.chmod(0o755)
        with pytest.raises(VmmError, match="seccomp"):
            world.host().create_instance(plan)
        world.assert_nothing_runs(plan)


@pytest.mark.req("H6")
def test_a_strict_filter_is_one_that_was_pinned(programs: Path, tmp_path: Path) -> None:
    import hashlib

    from mvm.core.spec import SeccompPolicy

    made = tmp_path / "strict.bpf"
    made.write_bytes(b"compiled")
    made.chmod(0o444)
    good = Filter("1.16.1", made, hashlib.sha256(b"compiled").hexdigest())
    for filters, error in (
        ((), MissingPrerequisite),
        ((msgspec.structs.replace(good, version="1.15.0"),), MissingPrerequisite),
        ((msgspec.structs.replace(good, sha256="0" * 64),), Refused),
        ((good,), None),
    ):
        with firecracker_world(programs, strict_filters=filters) as world:
            plan = msgspec.structs.replace(world.plan(), seccomp=SeccompPolicy.STRICT)
            if error is not None:
                with pytest.raises(error):
                    world.host().create_instance(plan)
                continue
            world.host().create_instance(plan)
            identity = world.record(plan).process
            assert identity is not None
            assert b"--seccomp-filter" in Path(f"/proc/{identity.pid}/cmdline").read_bytes()


@pytest.mark.req("H4")
def test_nothing_is_executed_that_is_not_what_was_pinned(tmp_path: Path) -> None:
    made = tmp_path / "programs"
    made.mkdir()
    for name in ("firecracker", "jailer"):
        (made / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\necho Firecracker v1.16.1\n")
        (made / name).chmod(0o755)
    for pins in ({"firecracker": "0" * 64}, {"jailer": "0" * 64}):
        with pytest.raises(Refused):
            inspect(made, tmp_path / "cache", pins=pins, confined=False)
    assert not (tmp_path / "executed").exists()


@pytest.mark.req("H4")
@pytest.mark.parametrize("place", ["", "1.16.1", "1.16.1/firecracker", "elsewhere"])
def test_baseline_executes_nothing_that_others_could_replace(programs: Path, place: str) -> None:
    """The directory that is asked for is a link, into one beside it."""
    base = programs.parent / "base"
    (base / "elsewhere").mkdir(parents=True, mode=0o755)
    shutil.copytree(programs, base / "1.16.1")
    for path in (base, *base.rglob("*")):
        path.chmod(0o755)
    (base / "elsewhere/current").symlink_to("../1.16.1")
    cache = programs.parent / "cache"
    inspect(base / "elsewhere/current", cache, pins={}, confined=True)
    (base / place).chmod(0o777)
    with pytest.raises(Refused, match="replaced") as refused:
        inspect(base / "elsewhere/current", cache, pins={}, confined=True)
    assert str(base / place) in refused.value.details
    inspect(base / "elsewhere/current", cache, pins={}, confined=False)


@pytest.mark.req("H4")
def test_programs_are_what_was_pinned(programs: Path) -> None:
    with firecracker_world(programs, pins={"firecracker": "0" * 64}) as world, pytest.raises(Refused):
        world.host().create_instance(world.plan())


@pytest.mark.parametrize(
    ("fault", "error"), [("version Firecracker v1.14.4", MvmError), ("version nonsense", VmmError)]
)
def test_programs_that_are_no_release_are_refused(programs: Path, fault: str, error: type[Exception]) -> None:
    break_with(programs, fault)
    with firecracker_world(programs) as world, pytest.raises(error):
        world.driver.version()


@pytest.mark.req("L3", "S4")
@pytest.mark.parametrize(
    ("step", "state"),
    [
        ("started", State.SLEEPING),
        ("loaded", State.FAILED),
    ],  # the commit point is before the resume that then fails
)
def test_a_pager_that_dies_during_a_wake_ends_the_vmm(
    world: FirecrackerWorld, step: str, state: State
) -> None:
    plan = world.plan()
    world.host().create_instance(plan)
    world.host().sleep_instance(plan.instance)

    def kill_pager(name: str) -> None:
        if name == step:
            pid = keeper.anything_left(world.paths(plan).runtime)
            assert pid
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(MvmError):
        world.host(fault=kill_pager).wake_instance(plan)
    assert world.host().inspect_instance(plan.instance).state is state
    world.assert_nothing_runs(plan, sleeping=state is State.SLEEPING)
    if state is State.SLEEPING:
        world.host().wake_instance(plan)
    else:
        world.host().create_instance(plan)
    world.assert_runs(plan)


class DeviceDriver(PlainDiskDriver):
    """Gives the VMM its data disk as a device that goes with its last user, as a mapping of dm-crypt does."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.ours: list[int] = []

    def _plain(self, machine: Machine) -> Machine:
        drives = []
        for drive in super()._plain(machine).drives:
            if drive.id == "data":
                # Told to go while it is open, it does as soon as nobody has it open.
                loop = run(["losetup", "--find", "--show", drive.path], timeout=10).stdout.decode().strip()
                self.ours.append(os.open(loop, os.O_RDONLY | os.O_CLOEXEC))
                run(["losetup", "--detach", loop], timeout=10)
                drive = msgspec.structs.replace(drive, path=f"/proc/self/fd/{self.ours[-1]}", device=True)
            drives.append(drive)
        return msgspec.structs.replace(machine, drives=tuple(drives))

    def let_go(self) -> Path:
        """As a command does when it is done. What says which file the last device is of, while it is."""
        number = os.fstat(self.ours[-1]).st_rdev
        loop = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        while self.ours:
            os.close(self.ours.pop())
        return loop / "loop" / "backing_file"


@pytest.mark.req("S3", "H4")
def test_a_taken_over_vmm_cannot_open_what_gets_its_disks_number_next(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.firecracker_world.PlainDiskDriver", DeviceDriver)
    with firecracker_world(programs) as world:
        assert isinstance(world.driver, DeviceDriver)
        plan, host = world.plan(), world.host()
        for begin in (host.create_instance, host.wake_instance):
            begin(plan)
            disk = world.driver.let_go()
            assert disk.read_text().strip() == str(world.driver.disks / f"{plan.instance.vm_name}.img")
            guest = world.guest(plan)
            try:
                assert guest.ask("take_over", path="/data") == {"closed": 1, "errno": errno.ENOENT}
            finally:
                guest.close()
            assert disk.exists(), "the number would be free for another disk"
            host.sleep_instance(plan.instance)
            assert not disk.exists()


@pytest.mark.req("H4", "L7")
@pytest.mark.parametrize("path", ["/", "/run"])
def test_a_taken_over_vmm_fills_its_jail_and_not_the_host(world: FirecrackerWorld, path: str) -> None:
    plan, host = world.plan(), world.host()
    host.create_instance(plan)
    base = world.paths(plan).base
    for entry in base.rglob("*"):
        assert not entry.is_dir() or entry.stat().st_uid == 0, f"{entry} is the VMM's"
    names = sorted(base.rglob("*"))
    guest = world.guest(plan)
    try:
        found = guest.ask("fill", path=path)
    finally:
        guest.close()
    assert found["made"] < jail.ROOM_FILES
    assert found["written"] < jail.ROOM_BYTES
    assert sorted(base.rglob("*")) == names
    host.stop_instance(plan.instance)
    world.assert_nothing_runs(plan)


@pytest.mark.req("S4")
def test_a_number_that_changed_hands_is_not_read(
    world: FirecrackerWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Firecracker has ended, and its pid is another process's now."""
    plan = world.plan()
    world.host().create_instance(plan)
    identity = world.record(plan).process
    assert identity is not None
    runtime, size = world.paths(plan).runtime, plan.mem_mib
    vm = world.driver.adopt(identity, plan.instance.vm_name, size, runtime)
    with vm.memory() as memory:
        assert memory.size == size << 20
    monkeypatch.setattr("mvm.hostd.keeper.await_end", lambda *_, **__: True)
    stranger = msgspec.structs.replace(identity, start_ticks=identity.start_ticks + 1)
    monkeypatch.setattr("mvm.hostd.vmm.firecracker.driver.is_alive", lambda _: True)
    gone = world.driver.adopt(stranger, plan.instance.vm_name, size, runtime)
    with pytest.raises(VmmError, match="ended"), gone.memory():
        raise AssertionError("a stranger's memory can be read")
