"""`mvm tenant`: what it answers and exits with, over a node without VMs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.cli.conftest import Run
from tests.unit.standalone.fakes import FakeNode

from mvm.core.errors import BuildFailed, Busy, IntegrityError, ResourceExhausted
from mvm.core.lifecycle import State

CREATE = ("tenant", "create", "acme", "--flake", "nix/embedded")


@pytest.fixture
def built(run: Run) -> Run:
    assert run(*CREATE).exit_code == 0
    assert run("tenant", "build", "acme").exit_code == 0
    return run


@pytest.mark.req("L5", "L1")
def test_the_main_path(run: Run, fake: FakeNode) -> None:
    steps = [
        (CREATE, "Created acme: 10.240.1.2 in 10.240.1.0/24."),
        (("tenant", "build", "acme"), "Built revision "),
        (("tenant", "run", "acme"), "acme/default-0 is running at 10.240.1.2."),
        (("tenant", "sleep", "acme"), "acme/default-0 sleeps, 0.01 s."),
        (("tenant", "wake", "acme"), "acme/default-0 is awake at 10.240.1.2, 0.41 s."),
        (("tenant", "stop", "acme"), "acme/default-0 is stopped."),
        (("tenant", "destroy", "acme", "--yes", "--wipe-volumes"), "Destroyed acme."),
    ]
    for words, said in steps:
        result = run(*words)
        assert result.exit_code == 0, result.stderr
        assert said in result.stdout
    assert fake.store.tenants() == []


@pytest.mark.req("L5")
@pytest.mark.parametrize(
    ("verb", "note"),
    [
        ("run", "is already running"),
        ("sleep", "is already sleeping"),
        ("wake", "is already awake"),
        ("stop", "is already stopped"),
    ],
)
def test_a_second_time_is_success_and_says_so(built: Run, verb: str, note: str) -> None:
    for before in {"run": [], "sleep": ["run"], "wake": ["run", "sleep"], "stop": ["run"]}[verb]:
        built("tenant", before, "acme")
    assert built("tenant", verb, "acme").exit_code == 0
    again = built("tenant", verb, "acme")
    assert again.exit_code == 0
    assert note in again.stdout


@pytest.mark.req("S7")
def test_every_wake_shows_where_the_time_went(built: Run) -> None:
    built("tenant", "run", "acme")
    built("tenant", "sleep", "acme")
    shown = built("tenant", "wake", "acme").stdout
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["restore", "other", "total"]


@pytest.mark.req("H4", "H5")
def test_a_vmm_without_jail_or_limits_is_said_aloud_at_every_start(built: Run, fake: FakeNode) -> None:
    assert "warning" not in built("tenant", "run", "acme").stderr
    built("tenant", "stop", "acme")
    fake.host.unconfined = ("without a jail: Operation not permitted", "without limits: cgroup v1")
    for verb in ("run", "sleep", "wake", "stop"):
        told = built("tenant", verb, "acme")
        warnings = [line for line in told.stderr.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == (2 if verb in ("run", "wake") else 0)
        assert all(line.startswith("warning: acme/default-0 runs without ") for line in warnings)
    told = built("--output", "json", "tenant", "run", "acme")
    assert [json.loads(line)["warning"].split(".")[0] for line in told.stderr.splitlines()] == [
        "acme/default-0 runs without a jail: Operation not permitted",
        "acme/default-0 runs without limits: cgroup v1",
    ]


@pytest.mark.req("L5")
def test_actions_as_json(built: Run) -> None:
    ran = json.loads(built("tenant", "run", "acme", "--output", "json").stdout)
    assert (ran["instance"], ran["state"], ran["changed"], ran["ip"]) == (
        "acme/default-0",
        "running",
        True,
        "10.240.1.2",
    )
    slept = json.loads(built("--output", "json", "tenant", "sleep", "acme").stdout)
    assert slept["receipt"]["kind"] == "sleep"
    woken = json.loads(built("tenant", "wake", "--output=json", "acme").stdout)
    assert woken["receipt"]["total_ns"] == 412_000_000
    again = json.loads(built("tenant", "wake", "--output=json", "acme").stdout)
    assert (again["changed"], again["note"]) == (False, "is already awake")
    assert "receipt" not in again


@pytest.mark.req("L5")
def test_running_before_building_names_the_command_or_builds(run: Run, fake: FakeNode) -> None:
    run(*CREATE)
    refused = run("tenant", "run", "acme")
    assert refused.exit_code == 10
    assert "next: Build it with: mvm tenant build acme" in refused.stderr
    assert fake.state("acme/default-0") is State.CREATED
    done = run("tenant", "run", "acme", "--build")
    assert done.exit_code == 0
    assert fake.state("acme/default-0") is State.RUNNING


@pytest.mark.req("L5")
def test_running_before_building_asks_on_a_terminal(
    run: Run, fake: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*CREATE)
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    said_no = run("tenant", "run", "acme", "--output", "human", stdin="n\n")
    assert "Build it now?" in said_no.stderr
    assert said_no.exit_code == 130
    assert fake.workshop.built == []
    said_yes = run("tenant", "run", "acme", stdin="y\n")
    assert said_yes.exit_code == 0
    assert fake.state("acme/default-0") is State.RUNNING


@pytest.mark.req("L5")
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("create", "Acme", "--flake", "x"), 2, "Did you mean 'acme'?"),
        (("create", "acme/default-0", "--flake", "x"), 2, "names an instance"),
        (("create", "a" * 33, "--flake", "x"), 2, "1 to 32 characters"),
        (("create", "acme"), 2, "--flake is missing"),
        (("create", "acme", "--flake", ""), 2, "flake_ref"),
        (("create", "acme", "--flake", "-rf"), 2, "no hyphen first"),
        (("create", "acme", "--flake", "x", "--profile", "minimul"), 2, "Did you mean minimal?"),
        (("create", "acme", "--flake", "x", "--seccomp", "none"), 2, "baseline, strict"),
        (("create", "acme", "--flake", "x", "--cpus", "0"), 2, "`vcpus` is 1 to 32"),
        (("create", "acme", "--flake", "x", "--cpus", "many"), 2, "--cpus"),
        (("create", "acme", "--flake", "x", "--mem", "64"), 2, "`mem_mib` is 128"),
        (("create", "acme", "--flake", "x", "--mem", "256K"), 2, "is not a size"),
        (("create", "acme", "--flake", "x", "--mem", "-1"), 2, "is not a size"),
        (("create", "acme", "--flake", "x", "--data-disk", "1"), 2, "`data_disk_mib` is 16"),
        (("create", "acme", "--flake", "x", "--egress", "example.org"), 2, "names are not accepted"),
        (("create", "acme", "--flake", "x", "--egress", "10.0.0.0/8", "--no-egress"), 2, "exclude each other"),
        (("create", "acme", "--flake", "x", "--ip", "192.168.0.1"), 2, "outside 10.240.0.0/12"),
        (("create", "acme", "--flake", "x", "--mac", "ff:ff:ff:ff:ff:ff"), 2, "locally administered"),
        (("create", "acme", "--flake", "x", "--idle-seconds", "1"), 2, "`idle_s` is 5"),
        (("create", "acme", "--flak", "x"), 2, "Did you mean --flake?"),
        (("create",), 2, "TENANT is missing"),
        (("create", "acme", "extra", "--flake", "x"), 2, "unexpected extra argument"),
        (("biuld", "acme"), 2, "Did you mean build?"),
        (("run", "nobody"), 10, "there is no tenant nobody"),
        (("build", "nobody"), 10, "mvm tenant create"),
        (("sleep", "nobody"), 10, "there is no tenant"),
        (("show", "nobody"), 10, "there is no tenant"),
        (("logs", "nobody"), 10, "there is no tenant"),
        (("exec", "nobody", "--", "ls"), 125, "there is no tenant"),
        (("ssh", "nobody"), 125, "there is no tenant"),
        (("ssh", "Not A Tenant"), 125, "is not a tenant id"),
        (("cp", "a", "b"), 2, "exactly one of source and target"),
        (("cp", "acme:/a", "acme:/b"), 2, "exactly one of source and target"),
        (("cp", "nobody:/a", "b"), 10, "there is no tenant"),
        (("pin", "acme"), 2, "either --flake or --clear"),
        (("pin", "acme", "--flake", "x", "--clear"), 2, "either --flake or --clear"),
        (("pin", "acme", "--clear", "--lock", "x"), 2, "--lock belongs to --flake"),
        (("rollback", "acme", "--steps", "0"), 2, "--steps"),
        (("secrets", "set", "acme"), 2, "--from-file is missing"),
        (("secrets", "sett", "acme"), 2, "Did you mean set?"),
        (("destroy", "nobody", "--yes"), 10, "there is no tenant"),
    ],
)  # fmt: skip
def test_wrong_input(run: Run, fake: FakeNode, words: tuple[str, ...], code: int, says: str) -> None:
    result = run("tenant", *words)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "\nnext: " in result.stderr
    assert says in result.stderr
    assert fake.store.tenants() == []
    assert not isinstance(result.exception, Exception)


@pytest.mark.req("L5")
def test_errors_as_json(run: Run) -> None:
    for words, kind, code in [
        (("tenant", "run", "nobody"), "not-found", 10),
        (("tenant", "create", "Bad", "--flake", "x"), "invalid-input", 2),
        (("tenant", "create", "acme", "--nonsense"), "invalid-input", 2),
        (("tenant", "exec", "nobody", "--", "--output", "human"), "not-found", 125),
    ]:
        first, *rest = words
        result = run(first, rest[0], "--output", "json", *rest[1:])
        (line,) = result.stderr.splitlines()
        error = json.loads(line)["error"]
        assert list(error) == ["kind", "brief", "details", "resolution", "exit_code"]
        assert (error["kind"], error["exit_code"], result.exit_code) == (kind, code, code)


@pytest.mark.req("L5")
def test_create_twice(run: Run) -> None:
    run(*CREATE)
    again = run(*CREATE)
    assert (again.exit_code, again.stdout) == (0, "acme exists already, as asked for; nothing changed.\n")
    other = run(*CREATE, "--mem", "1G")
    assert other.exit_code == 11
    assert "mem_mib: it has 256, asked for 1024" in other.stderr


@pytest.mark.req("L2")
def test_every_option_of_create_reaches_the_specification(run: Run, fake: FakeNode) -> None:
    from mvm.core.ids import TenantId

    result = run(
        *CREATE, "--profile", "python", "--cpus", "2", "--mem", "1G", "--data-disk", "4G", "--seccomp", "strict",
        "--metadata", "--egress", "203.0.113.7:443", "--egress", "203.0.113.0/24", "--ip", "10.240.5.9",
        "--mac", "02:00:00:00:00:0A", "--idle-seconds", "300", "--min-running", "10", "--pinned",
        "--quota-cpus", "4", "--quota-mem", "2G", "--quota-disk", "8G", "--quota-instances", "2",
        "--quota-running", "1", "--output", "json",
    )  # fmt: skip
    assert json.loads(result.stdout)["ip"] == "10.240.5.9"
    spec = fake.store.load_spec(TenantId("acme"))
    assert json.loads(result.stderr)["warning"].startswith("development key provider")
    assert (spec.profile, spec.vcpus, spec.mem_mib, spec.data_disk_mib) == ("python", 2, 1024, 4096)
    assert (spec.seccomp, spec.metadata, spec.ip, spec.mac) == (
        "strict",
        True,
        "10.240.5.9",
        "02:00:00:00:00:0a",
    )
    assert [str(rule) for rule in spec.egress or ()] == ["203.0.113.7/32:443/tcp", "203.0.113.0/24"]
    assert (spec.sleep.idle_s, spec.sleep.min_running_s, spec.sleep.pinned) == (300, 10, True)
    quotas = spec.quotas
    assert (quotas.vcpus, quotas.mem_mib, quotas.disk_mib, quotas.instances, quotas.running) == (
        4,
        2048,
        8192,
        2,
        1,
    )


def test_no_egress_is_not_the_same_as_none_given(run: Run, fake: FakeNode) -> None:
    from mvm.core.ids import TenantId

    run(*CREATE, "--no-egress")
    assert fake.store.load_spec(TenantId("acme")).egress == ()


@pytest.mark.req("L5")
def test_a_relative_flake_means_the_same_from_anywhere(run: Run, fake: FakeNode) -> None:
    from mvm.core.ids import TenantId

    run("tenant", "create", "acme", "--flake", "./guests")
    assert fake.store.load_spec(TenantId("acme")).flake_ref == str(Path.cwd() / "./guests")


@pytest.mark.req("L5", "L7")
def test_destroy_wants_a_confirmation(built: Run, fake: FakeNode) -> None:
    refused = built("tenant", "destroy", "acme", "--wipe-volumes")
    assert refused.exit_code == 2
    assert "DELETE their data volumes" in refused.stderr
    assert "--yes" in refused.stderr
    assert fake.store.tenants() == ["acme"]
    done = json.loads(built("tenant", "destroy", "acme", "--yes", "--output", "json").stdout)
    assert done == {"tenant": "acme", "destroyed": True, "instances": ["acme/default-0"], "kept_volumes": []}
    again = built("tenant", "destroy", "acme")
    assert (again.exit_code, again.stdout) == (0, "acme was destroyed already.\n")


@pytest.mark.req("L5")
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Busy("another command holds lock", details="process 7"), 12),
        (IntegrityError("the snapshot is damaged", resolution="start it cold"), 13),
        (ResourceExhausted("not enough memory"), 14),
        (OSError(28, "No space left on device"), 14),
        (OSError(5, "Input/output error"), 1),
        (RuntimeError("surprise"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_failure_has_its_exit_code(built: Run, fake: FakeNode, error: BaseException, code: int) -> None:
    fake.host.fail = error
    result = built("tenant", "run", "acme")
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert fake.entries("acme")[-1][1] in ("failed", "refused")


@pytest.mark.req("L5")
def test_a_traceback_is_shown_on_request(built: Run, fake: FakeNode) -> None:
    fake.host.fail = RuntimeError("surprise")
    result = built("tenant", "run", "acme", "--debug")
    assert "Traceback" in result.stderr
    assert "surprise" in result.stderr


@pytest.mark.req("B4", "L5")
def test_a_failed_build_shows_the_end_of_its_log(built: Run, fake: FakeNode) -> None:
    fake.workshop.fail = BuildFailed(
        "it did not build", details="cc: no such file\nmake: failed", resolution="correct it"
    )
    result = built("tenant", "build", "acme")
    assert result.exit_code == 16
    assert "  cc: no such file\n  make: failed\nnext: correct it\n" in result.stderr


@pytest.mark.req("B4")
def test_the_log_is_streamed_with_verbose(built: Run) -> None:
    assert "cc vmlinux.c" in built("tenant", "build", "acme", "--verbose").stderr
    assert "cc vmlinux.c" not in built("tenant", "build", "acme").stderr


@pytest.mark.req("B6", "L5")
def test_pin_and_roll_back(built: Run) -> None:
    assert (
        "builds from github:owner/name"
        in built("tenant", "pin", "acme", "--flake", "github:owner/name").stdout
    )
    built("tenant", "build", "acme")
    built("tenant", "run", "acme")
    result = built("tenant", "rollback", "acme", "--steps", "1")
    assert "is the current one now." in result.stdout
    assert "acme/default-0 is running with another one" in result.stdout
    shown = json.loads(built("tenant", "rollback", "acme", "--steps", "1", "--output", "json").stderr)
    assert shown["error"]["kind"] == "not-found"
    assert "builds from nix/embedded again" in built("tenant", "pin", "acme", "--clear").stdout


@pytest.mark.req("L5")
def test_list_and_show(built: Run) -> None:
    listed = built("tenant", "list")
    assert listed.stdout.splitlines()[0].split() == [
        "TENANT",
        "STATE",
        "INSTANCES",
        "PROFILE",
        "CPUS",
        "MEM",
        "IP",
    ]
    row = json.loads(built("tenant", "list", "--output", "json").stdout)
    assert (row["tenant"], row["state"], row["ip"]) == ("acme", "created", "10.240.1.2")
    shown = built("tenant", "show", "acme").stdout
    assert "10.240.1.0/24" in shown
    assert "default-0  created" in shown
    value = json.loads(built("tenant", "show", "acme", "--output", "json").stdout)
    assert value["spec"]["mem_mib"] == 256
    assert value["current"] == value["revisions"][0]["revision"]
    assert value["instances"][0]["instance"] == "acme/default-0"


@pytest.mark.req("K3", "L5")
def test_secrets(built: Run, tmp_path: Path) -> None:
    source = tmp_path / "s.json"
    source.write_text('{"TOKEN":"hunter2"}')
    done = built("tenant", "secrets", "set", "acme", "--from-file", str(source))
    assert done.stdout.startswith("acme has 1 secret, version 1.\n")
    built("tenant", "run", "acme")
    rotated = json.loads(built("tenant", "secrets", "rotate", "acme", "--output", "json").stdout)
    assert rotated == {
        "tenant": "acme",
        "version": 2,
        "names": ["TOKEN"],
        "refreshed": ["acme/default-0"],
        "failed": [],
    }
    source.write_text("{broken hunter2")
    refused = built("tenant", "secrets", "set", "acme", "--from-file", str(source))
    assert refused.exit_code == 2
    assert "hunter2" not in refused.stderr


@pytest.mark.req("L5")
def test_quiet_says_nothing(built: Run) -> None:
    result = built("tenant", "run", "acme", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
