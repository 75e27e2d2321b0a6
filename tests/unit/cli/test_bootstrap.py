"""`mvm bootstrap` before it touches anything, and `mvm ssh`."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tests.unit.cli.conftest import Run

from mvm.cli.app import App
from mvm.cli.bootstrap import _strict_filter
from mvm.cli.root import root
from mvm.cli.shell import shell
from mvm.cli.ssh import ssh
from mvm.core.errors import InvalidInput, MissingPrerequisite
from mvm.hostd.install import observe, units
from mvm.hostd.install.plan import StrictFilter


def test_it_serves_one_root_only(run: Run) -> None:
    """`run` names another."""
    done = run("bootstrap")
    assert done.exit_code == InvalidInput.exit_code
    assert "mvm-hostd --root DIR" in done.stderr


def test_it_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("MVM_ROOT", raising=False)
    done = CliRunner().invoke(root, ["bootstrap"], obj=App())
    assert done.exit_code == MissingPrerequisite.exit_code
    assert "sudo" in done.stderr


@pytest.mark.req("O3")
def test_without_systemd_it_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(observe, "_RUNNING", tmp_path / "none")
    with pytest.raises(MissingPrerequisite) as caught:
        observe.require_systemd()
    assert "mvm-hostd" in caught.value.resolution
    monkeypatch.setattr(observe, "_RUNNING", tmp_path)
    observe.require_systemd()


@pytest.mark.req("O3")
def test_only_the_installed_mvm_is_made_a_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(units, "HOSTD", tmp_path / "mvm-hostd")
    missing = observe.program_check()
    assert missing.result.value == "fail"
    assert "mvm-install.sh" in missing.fix
    (tmp_path / "mvm-hostd").write_text("#!/bin/sh\n")
    (tmp_path / "mvm-hostd").chmod(0o755)
    other = observe.program_check()
    assert other.result.value == "fail"
    assert "and this mvm's is" in other.seen


def test_what_others_can_change_is_no_program_of_roots(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_text("")
    path.chmod(0o777)
    assert observe._changeable([path]).startswith(str(path))


@pytest.mark.req("O4")
def test_ssh_is_shell() -> None:
    """The same options and arguments, so the two cannot come to differ."""
    assert ssh.own == shell.own
    assert ssh.failure_code == shell.failure_code
    seen = {}

    @click.command()
    @click.pass_context
    def probe(ctx: click.Context) -> None:
        seen.update(ssh.make_context("ssh", ["--user", "u", "--", "true"], parent=ctx).params)

    CliRunner().invoke(probe, obj=App())
    assert (seen["user"], seen["argv"]) == ("u", ("true",))
    assert "no SSH" in (ssh.help or "")


@pytest.mark.req("H6")
@pytest.mark.parametrize("why", [MissingPrerequisite("no list", details="of 1.15.0"), OSError("no compiler")])
def test_a_strict_filter_that_cannot_be_made_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: Exception
) -> None:
    def fail() -> None:
        raise why

    monkeypatch.setattr(observe, "strict_filter", fail)
    assert _strict_filter(App()) is None
    assert "no strict seccomp filter" in capsys.readouterr().err


@pytest.mark.req("H6")
def test_one_that_the_settings_cannot_take_is_a_warning_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = StrictFilter("1.16.1", Path("/usr/lib/mvm/firecracker/1.16.1"), b"compiled")
    monkeypatch.setattr(observe, "strict_filter", lambda: found)
    monkeypatch.setattr(observe, "settings_text", lambda: None)
    assert _strict_filter(App()) == found
    monkeypatch.setattr(observe, "settings_text", lambda: "mode = 3")
    assert _strict_filter(App()) is None
    assert "not valid" in capsys.readouterr().err
