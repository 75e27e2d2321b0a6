"""`mvm pool`, `mvm instance`, `mvm audit`, `mvm completion` and `mvm` itself."""

from __future__ import annotations

import json
from typing import cast

import click
import pytest
from tests.unit.cli.conftest import Run
from tests.unit.standalone.fakes import FakeNode

from mvm import __version__
from mvm.cli.app import DEFAULT_ROOT
from mvm.cli.base import LazyGroup
from mvm.cli.params import SIZE
from mvm.cli.reference import exit_codes, render_page
from mvm.cli.root import root
from mvm.core.lifecycle import State
from mvm.hostd import store


@pytest.fixture
def acme(run: Run) -> Run:
    run("tenant", "create", "acme", "--flake", "nix/embedded")
    run("tenant", "build", "acme")
    return run


def groups() -> list[tuple[str, LazyGroup]]:
    found: list[tuple[str, LazyGroup]] = []

    def walk(path: str, group: LazyGroup) -> None:
        found.append((path, group))
        for name in group.entries:
            inner = group.get_command(click.Context(group), name)
            if isinstance(inner, LazyGroup):
                walk(f"{path} {name}", inner)

    walk("mvm", root)
    return found


@pytest.mark.req("L5")
def test_the_tables_of_commands_hold_what_they_promise() -> None:
    for path, group in groups():
        for name, (_, _, short) in group.entries.items():
            command = group.get_command(click.Context(group), name)
            assert command is not None, f"{path} {name}"
            assert command.name == name, f"{path} {name}"
            assert command.help, f"{path} {name} has no help"
            assert len(short) <= 60, f"{path} {name}"


@pytest.mark.req("L5")
def test_every_command_is_there() -> None:
    names = {path: set(group.entries) for path, group in groups()}
    assert names["mvm tenant"] == {
        "create", "build", "run", "ssh", "exec", "cp", "logs", "sleep", "wake", "stop", "destroy", "list", "show",
        "pin", "rollback", "secrets",
    }  # fmt: skip
    assert names["mvm tenant secrets"] == {"set", "rotate"}
    assert names["mvm pool"] == {"create", "scale", "list", "show", "destroy"}
    assert names["mvm instance"] == {
        "list",
        "show",
        "start",
        "stop",
        "sleep",
        "wake",
        "exec",
        "logs",
        "destroy",
    }


@pytest.mark.req("L5")
def test_every_command_takes_the_common_options_and_shows_an_example() -> None:
    for path, group in groups():
        for name in group.entries:
            command = group.get_command(click.Context(group), name)
            assert command is not None
            options = {word for p in command.params for word in p.opts}
            assert {"--output", "--root", "--quiet", "--debug"} <= options, f"{path} {name}"
            if not isinstance(command, click.Group):
                examples = cast("str", getattr(command, "examples", ""))
                assert f"{path} {name}" in examples, f"{path} {name} shows no example"


@pytest.mark.req("L5")
def test_help_of_every_command(run: Run) -> None:
    for path, group in groups():
        for name in group.entries:
            result = run(*path.split()[1:], name, "--help")
            assert result.exit_code == 0
            assert f"Usage: {path} {name}" in result.stdout


@pytest.mark.req("L5", "O6")
def test_the_reference_is_up_to_date() -> None:
    from pathlib import Path

    page = Path(__file__).resolve().parents[3] / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == render_page(), "python -m mvm.cli.reference > docs/cli.md"


@pytest.mark.req("L5")
def test_the_reference_lists_every_exit_code() -> None:
    codes = {code for code, _, _ in exit_codes()}
    assert {1, 2, *range(10, 20), 130, 141} == codes
    assert all(meaning for _, _, meaning in exit_codes())


def test_the_default_root_is_the_stores() -> None:
    assert str(store.DEFAULT_ROOT) == DEFAULT_ROOT


@pytest.mark.req("L4")
def test_the_root_comes_from_the_environment_or_the_option(
    run: Run, fake: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    run("tenant", "create", "acme", "--flake", "nix/embedded")
    monkeypatch.setenv("MVM_ROOT", str(fake.store.root))
    assert "acme" in CliRunner().invoke(root, ["tenant", "list"]).stdout
    elsewhere = CliRunner().invoke(root, ["tenant", "list", "--root", str(fake.store.root / "x")])
    assert "There is no tenant yet" in elsewhere.stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"mvm {__version__}\n"
    assert json.loads(run("--output", "json", "--version").stdout) == {"version": __version__}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tenent", "list"), "Did you mean tenant?"),
        (("pool", "lst"), "Did you mean list?"),
        (("--verion",), "Did you mean --version?"),
        (("zzzzz",), "See the help: mvm --help"),
        (("completion", "bahs"), "Did you mean bash?"),
        (("pool", "scale", "acme", "web", "many"), "COUNT"),
        (("pool", "scale", "acme", "Web", "1"), "Did you mean 'web'?"),
        (("instance", "show", "acme"), "<tenant>/<pool>-<number>"),
        (("instance", "stop", "acme/default"), "Did you mean 'acme/default-0'?"),
        (("tenant", "list", "--output", "xml"), "human"),
    ],
)
@pytest.mark.req("L5")
def test_slips_are_answered_with_a_suggestion(run: Run, words: tuple[str, ...], says: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.req("L1", "L5")
def test_pools(acme: Run, fake: FakeNode) -> None:
    assert (
        "Created pool web of acme with 2 instances."
        in acme("pool", "create", "acme", "web", "--count", "2").stdout
    )
    assert "exists already" in acme("pool", "create", "acme", "web", "--count", "2").stdout
    assert acme("pool", "create", "acme", "web", "--count", "3").exit_code == 11
    up = acme("pool", "scale", "acme", "web", "3", "--run")
    assert "Added acme/web-2." in up.stdout
    assert fake.state("acme/web-2") is State.RUNNING
    rows = [json.loads(line) for line in acme("pool", "list", "--output", "json").stdout.splitlines()]
    assert [(r["pool"], r["count"], r["running"]) for r in rows] == [("default", 1, 0), ("web", 3, 1)]
    shown = json.loads(acme("pool", "show", "acme", "web", "--output", "json").stdout)
    assert [i["instance"] for i in shown["instances"]] == ["acme/web-0", "acme/web-1", "acme/web-2"]
    assert "acme/web-2" in acme("pool", "show", "acme", "web").stdout
    down = acme("pool", "scale", "acme", "web", "1")
    assert down.exit_code == 2
    assert "acme/web-1, acme/web-2" in down.stderr
    acme("pool", "scale", "acme", "web", "1", "--yes")
    assert fake.state("acme/web-2") is None
    assert "has 1 already" in acme("pool", "scale", "acme", "web", "1").stdout
    assert acme("pool", "destroy", "acme", "web", "--yes").exit_code == 0
    assert acme("pool", "destroy", "acme", "default", "--yes").exit_code == 11
    assert acme("pool", "show", "acme", "web").exit_code == 10
    assert acme("pool", "list", "nobody").exit_code == 10
    assert acme("pool", "scale", "acme", "default", "--", "-1").exit_code == 2


@pytest.mark.req("L5")
def test_instances(acme: Run, fake: FakeNode) -> None:
    one = "acme/default-0"
    assert "is running at" in acme("instance", "start", one).stdout
    assert "sleeps" in acme("instance", "sleep", one).stdout
    assert acme("instance", "start", one).exit_code == 11
    assert "is awake" in acme("instance", "wake", one).stdout
    shown = acme("instance", "show", one).stdout
    assert "10.240.1.2" in shown
    assert "last wake" in shown
    value = json.loads(acme("instance", "show", one, "--output", "json").stdout)
    assert (value["state"], value["pid"]) == ("running", 4242)
    (row,) = [json.loads(line) for line in acme("instance", "list", "--output", "json").stdout.splitlines()]
    assert (row["instance"], row["state"]) == (one, "running")
    assert one in acme("instance", "list", "acme").stdout
    assert "is stopped" in acme("instance", "stop", one).stdout
    assert acme("instance", "destroy", one).exit_code == 2
    assert acme("instance", "destroy", one, "--yes").stdout == f"Destroyed {one}.\n"
    assert acme("instance", "destroy", one, "--yes").stdout == f"{one} is already destroyed.\n"
    assert acme("instance", "show", one).exit_code == 10
    assert acme("instance", "list").stdout == "There is no instance.\n"
    assert acme("instance", "start", "nobody/default-0").exit_code == 10


@pytest.mark.req("O2")
def test_audit_verify(acme: Run, fake: FakeNode) -> None:
    from mvm.core.ids import TenantId

    sound = json.loads(acme("audit", "verify", "acme", "--output", "json").stdout)
    assert (sound["ok"], sound["entries"]) == (True, 2)
    log = fake.store.tenant_dir(TenantId("acme")) / "audit.log"
    log.write_bytes(log.read_bytes().replace(b"tenant.build", b"tenant.built"))
    one = acme("audit", "verify", "acme")
    assert one.exit_code == 13
    assert "line 2" in one.stderr
    every = acme("audit", "verify", "--output", "json")
    assert every.exit_code == 13
    assert json.loads(every.stdout)["ok"] is False
    assert acme("audit", "verify", "nobody").exit_code == 10


@pytest.mark.req("L5")
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(run: Run, shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_MVM_COMPLETE" in script
    assert json.loads(run("completion", shell, "--output", "json").stdout)["shell"] == shell


@pytest.mark.req("L5")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mvm ten", {"tenant"}),
        ("mvm tenant ", {"create", "wake", "secrets", "rollback"}),
        ("mvm tenant wake a", {"acme"}),
        ("mvm tenant create acme --pro", {"--profile"}),
        ("mvm tenant create acme --profile mi", {"minimal"}),
        ("mvm instance wake ac", {"acme/default-0"}),
        ("mvm pool list ", {"acme"}),
        ("mvm completion z", {"zsh"}),
    ],
)
def test_completion(
    acme: Run, fake: FakeNode, monkeypatch: pytest.MonkeyPatch, words: str, expected: set[str]
) -> None:
    from click.shell_completion import ShellComplete

    monkeypatch.setenv("MVM_ROOT", str(fake.store.root))
    *before, last = words.split(" ")
    found = {
        item.value
        for item in ShellComplete(root, {}, "mvm", "_MVM_COMPLETE").get_completions(before[1:], last)
    }
    assert expected <= found
    assert all(value.startswith(last) for value in found)


@pytest.mark.parametrize(
    ("text", "mib"),
    [("1", 1), ("256", 256), ("256M", 256), ("256MiB", 256), ("2g", 2048), ("2 GiB", 2048), ("1T", 1 << 20)],
)
def test_sizes(text: str, mib: int) -> None:
    assert SIZE.convert(text, None, None) == mib


@pytest.mark.parametrize("text", ["", "x", "1K", "1.5G", "-1", "1P", "0x10", "1e3", "9" * 10, "٣"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)
