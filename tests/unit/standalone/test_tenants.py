"""Creating and destroying tenants, through the facade."""

from __future__ import annotations

import pytest
from tests.unit.standalone.fakes import FakeNode

from mvm.core.errors import Conflict, InvalidInput, NotFound, VmmError
from mvm.core.ids import InstanceId, TenantId
from mvm.core.lifecycle import Action, State
from mvm.core.spec import TenantSpec, new_tenant

ACME = TenantId("acme")
FIRST = InstanceId("acme", "default", 0)


def spec(tenant: str = "acme", **fields: object) -> TenantSpec:
    return new_tenant(TenantId(tenant), "nix/embedded", **fields)


@pytest.mark.req("L1", "N1")
def test_a_new_tenant_has_an_address_a_key_and_one_instance(fake: FakeNode) -> None:
    done = fake.open().create(spec())
    assert (done.ip, done.subnet, done.existed) == ("10.240.1.2", "10.240.1.0/24", False)
    assert fake.store.instances(ACME) == [FIRST]
    assert fake.state("acme/default-0") is State.CREATED
    assert fake.keys.versions(ACME) == (1,)
    assert fake.entries("acme") == [("tenant.create", "done")]


@pytest.mark.req("L5")
def test_creating_again_changes_nothing(fake: FakeNode) -> None:
    node = fake.open()
    node.create(spec())
    before = fake.store.allocations_file.read_bytes()
    again = node.create(spec())
    assert again.existed
    assert again.ip == "10.240.1.2"
    assert fake.store.allocations_file.read_bytes() == before
    assert fake.entries("acme") == [("tenant.create", "done")]


@pytest.mark.req("L5")
def test_creating_otherwise_names_the_differences(fake: FakeNode) -> None:
    node = fake.open()
    node.create(spec())
    with pytest.raises(Conflict) as refusal:
        node.create(spec(mem_mib=512, egress=()))
    assert refusal.value.details.splitlines() == [
        "mem_mib: it has 256, asked for 512",
        "egress: it has none, asked for nothing",
    ]
    assert fake.entries("acme")[-1] == ("tenant.create", "refused")
    assert fake.store.load_spec(ACME) == spec()


@pytest.mark.req("L5")
def test_pools_made_since_do_not_make_it_another_tenant(fake: FakeNode) -> None:
    from mvm.core.ids import PoolId

    node = fake.open()
    node.create(spec())
    node.create_pool(ACME, PoolId("web"), {"count": 1})
    assert node.create(spec()).existed
    assert len(fake.store.load_spec(ACME).pools) == 2


@pytest.mark.req("L2")
def test_a_fixed_address_is_kept_and_exclusive(fake: FakeNode) -> None:
    node = fake.open()
    done = node.create(spec(ip="10.240.9.20", mac="02:00:00:00:00:09"))
    assert done.ip == "10.240.9.20"
    assert fake.store.load_record(FIRST).network.mac == "02:00:00:00:00:09"
    with pytest.raises(Conflict, match="belongs to acme"):
        node.create(spec("other", ip="10.240.9.21"))


@pytest.mark.req("N1")
def test_a_refused_tenant_takes_no_subnet(fake: FakeNode) -> None:
    node = fake.open()
    node.create(spec())
    with pytest.raises(Conflict):
        node.create(spec(mem_mib=512))
    assert node.create(spec("next")).subnet == "10.240.2.0/24"


@pytest.mark.req("L5", "L3")
def test_an_interrupted_create_is_finished_by_the_next(
    fake: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = fake.open()

    def dies(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake.store, "save_spec", dies)
    with pytest.raises(KeyboardInterrupt):
        node.create(spec())
    monkeypatch.undo()
    assert fake.entries("acme") == [("tenant.create", "failed")]
    assert node.create(spec()).subnet == "10.240.1.0/24"
    assert fake.state("acme/default-0") is State.CREATED


@pytest.mark.req("L3")
def test_a_create_that_died_before_the_addresses_is_finished_by_the_next(
    fake: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = fake.open()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mvm.standalone.instances.add_records", dies)
    with pytest.raises(KeyboardInterrupt):
        node.create(spec())
    monkeypatch.undo()
    assert fake.state("acme/default-0") is None
    assert node.create(spec()).ip == "10.240.1.2"
    assert fake.state("acme/default-0") is State.CREATED


@pytest.mark.req("L7", "N1")
def test_destroying_keeps_the_audit_log_and_retires_the_subnet(fake: FakeNode) -> None:
    node = fake.open()
    node.create(spec())
    done = node.destroy(ACME, wipe_volumes=False)
    assert (done.existed, done.instances, done.kept_volumes) == (True, (FIRST,), ())
    assert fake.store.tenants() == []
    assert fake.keys.versions(ACME) == ()
    assert not fake.store.tenant_dir(ACME).joinpath("revisions.json").exists()
    assert node.create(spec()).subnet == "10.240.2.0/24"
    actions = [action for action, _ in fake.entries("acme")]
    assert actions == ["tenant.create", "instance.destroy", "tenant.destroy", "tenant.create"]
    assert node.verify_audit(ACME).count == 4


@pytest.mark.req("L7", "L5")
def test_volumes_stay_with_the_keys_that_open_them_until_they_are_wiped(fake: FakeNode) -> None:
    node = fake.open()
    node.create(spec())
    node.build(ACME)
    node.act(ACME, Action.RUN)
    kept = node.destroy(ACME, wipe_volumes=False)
    assert kept.kept_volumes == (FIRST,)
    assert fake.keys.versions(ACME) == (1,)
    again = node.destroy(ACME, wipe_volumes=False)
    assert (again.existed, again.kept_volumes) == (False, (FIRST,))
    wiped = node.destroy(ACME, wipe_volumes=True)
    assert wiped.kept_volumes == ()
    assert fake.keys.versions(ACME) == ()
    assert not fake.store.instance_paths(FIRST).base.exists()


@pytest.mark.req("L5")
def test_destroying_what_never_was_is_an_error(fake: FakeNode) -> None:
    with pytest.raises(NotFound, match="there is no tenant acme"):
        fake.open().destroy(ACME, wipe_volumes=True)


@pytest.mark.req("L3")
def test_a_destroy_that_fails_half_way_is_finished_by_the_next(fake: FakeNode) -> None:
    node = fake.open()
    node.create(spec())
    fake.host.fail = VmmError("will not die")
    with pytest.raises(VmmError):
        node.destroy(ACME, wipe_volumes=True)
    assert fake.store.load_spec(ACME) == spec()
    assert fake.entries("acme")[-2:] == [("instance.destroy", "failed"), ("tenant.destroy", "failed")]
    assert node.destroy(ACME, wipe_volumes=True).existed
    assert fake.store.tenants() == []


@pytest.mark.req("O2")
def test_a_refusal_that_cannot_be_logged_is_still_the_refusal(fake: FakeNode) -> None:
    node = fake.open()
    node.create(spec())
    log = fake.store.tenant_dir(ACME) / "audit.log"
    log.write_bytes(b"")
    with pytest.raises(Conflict) as refusal:
        node.create(spec(mem_mib=512))
    assert "audit log" in refusal.value.__notes__[0]


@pytest.mark.req("O2")
def test_the_log_holds_the_command_within_its_bounds(fake: FakeNode) -> None:
    import msgspec

    node = fake.open(("mvm", "x" * 100_000, *["y"] * 200))
    node.create(spec())
    line = (fake.store.tenant_dir(ACME) / "audit.log").read_bytes()
    command = msgspec.json.decode(line)["command"]
    assert command[0] == "mvm"
    assert len(command) == 64
    assert command[-1] == "... (202 words)"
    assert node.verify_audit(ACME).count == 1


def test_a_mac_in_capitals_is_refused_by_the_specification() -> None:
    with pytest.raises(InvalidInput, match="mac"):
        spec(mac="02:00:00:00:00:0A")
