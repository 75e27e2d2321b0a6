"""A strict filter is compiled, pinned, and then nothing is left to do; with a stand-in for the release's compiler."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tests.support.fake_firecracker import install

from mvm.core.errors import CommandFailed
from mvm.hostd import settings
from mvm.hostd.install import observe
from mvm.hostd.install.apply import execute
from mvm.hostd.install.plan import MakeFilter
from mvm.hostd.vmm.firecracker import programs

pytestmark = pytest.mark.root
COMPILER = """#!/bin/sh
[ "$1 $3 $5" = "--target-arch --input-file --output-file" ] || exit 2
{ echo compiled; cat "$4"; } >"$6"
"""
POLICY = json.dumps(
    {
        thread: {
            "default_action": "trap",
            "filter_action": "allow",
            "filter": [{"syscall": "read"}, {"syscall": "msync"}],
        }
        for thread in ("vmm", "api", "vcpu")
    }
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Firecracker is, by this host's settings."""
    made = install(tmp_path / "fc")
    file = tmp_path / "hostd.toml"
    file.write_text(f'mode = "baseline"\n[vmm]\ndirectory = "{made}"  # here\n')
    monkeypatch.setattr(settings, "FILE", file)
    monkeypatch.setattr(programs, "_require_owned", lambda path: None)  # the test's directory is pytest's
    (made / observe.COMPILER).write_text(COMPILER)
    (made / observe.COMPILER).chmod(0o755)
    (made / observe.POLICY).write_text(POLICY)
    return made


def make(folder: Path) -> MakeFilter:
    seen = observe.filter_seen(folder.parent / "cache")
    assert seen is not None
    return MakeFilter("", seen.version, seen.folder, seen.wanted)


@pytest.mark.req("H6")
def test_it_is_compiled_and_pinned(folder: Path) -> None:
    execute(make(folder))
    made = (folder / "strict.bpf").read_bytes()
    assert made.startswith(b"compiled\n")
    assert b"msync" in made, "of the threads that may"
    assert made.count(b"msync") == 2
    [pin] = settings.parse(settings.FILE.read_text()).vmm.strict_filters
    assert (pin.version, pin.path) == ("1.16.1", str(folder / "strict.bpf"))
    assert pin.sha256 == hashlib.sha256(made).hexdigest()
    seen = observe.filter_seen(folder.parent / "cache")
    assert seen is not None
    assert (seen.derived, seen.sha256) == (seen.wanted, pin.sha256)
    assert "# here" in settings.FILE.read_text()


@pytest.mark.req("H6")
@pytest.mark.parametrize("script", ["exit 1", ": # makes nothing"])
def test_a_compiler_that_fails_changes_neither_filter_nor_pin(folder: Path, script: str) -> None:
    execute(make(folder))
    before = (folder / "strict.bpf").read_bytes(), settings.FILE.read_text()
    (folder / observe.COMPILER).write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises((CommandFailed, OSError)):
        execute(make(folder))
    assert ((folder / "strict.bpf").read_bytes(), settings.FILE.read_text()) == before


@pytest.mark.parametrize("name", [observe.COMPILER, observe.POLICY, "firecracker"])
def test_without_one_of_its_parts_there_is_none_to_make(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert observe.filter_seen(folder.parent / "cache") is None


def test_a_version_whose_list_nobody_read_gets_none(folder: Path) -> None:
    install(folder, version="1.15.1")
    assert observe.filter_seen(folder.parent / "cache") is None
