"""The strict filter of an installed Firecracker; with a stand-in for its release's compiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.fake_firecracker import install

from mvm.core.errors import CommandFailed, InvalidInput, MissingPrerequisite, Refused
from mvm.hostd import settings
from mvm.hostd.install import observe
from mvm.hostd.vmm.firecracker import programs
from mvm.hostd.vmm.firecracker.strict import THREADS, UNUSED

pytestmark = pytest.mark.root
COMPILER = """#!/bin/sh
[ "$1" != --version ] || { echo "seccompiler v1.16.1"; exit; }
[ "$1 $3 $5" = "--target-arch --input-file --output-file" ] || exit 2
{ echo compiled; cat "$4"; } >"$6"
"""


def policy() -> str:
    def rules(thread: str) -> list[object]:
        found: list[object] = [{"syscall": "read"}]
        for rule in UNUSED:
            args = [] if rule.argument < 0 else [{"index": rule.argument, "op": "eq", "val": rule.value}]
            found += [{"syscall": rule.syscall, "args": args}] if rule.thread == thread else []
        return found

    return json.dumps(
        {t: {"default_action": "trap", "filter_action": "allow", "filter": rules(t)} for t in THREADS}
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Firecracker is, by this host's settings."""
    made = install(tmp_path / "fc")
    file = tmp_path / "hostd.toml"
    file.write_text(f'[vmm]\ndirectory = "{made}"\n')
    monkeypatch.setattr(settings, "FILE", file)
    # The test's own directories are pytest's; only the files themselves are looked at.
    monkeypatch.setattr(programs, "require_owned", owned)
    (made / observe.COMPILER).write_text(COMPILER)
    (made / observe.COMPILER).chmod(0o755)
    (made / observe.POLICY).write_text(policy())
    return made


def owned(path: Path) -> None:
    if path.stat().st_mode & 0o022:
        raise Refused(f"{path} could be replaced")


@pytest.mark.req("H6")
def test_it_is_compiled_from_what_is_left_of_the_list(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    found = observe.strict_filter()
    assert found is not None
    assert (found.version, found.folder) == ("1.16.1", folder)
    said, _, compiled = found.data.partition(b"\n")
    assert said == b"compiled"
    assert {thread: part["filter"] for thread, part in json.loads(compiled).items()} == {
        thread: [{"syscall": "read"}] for thread in THREADS
    }
    again = observe.strict_filter()
    assert again is not None
    assert again.path == found.path
    assert sorted(path.name for path in folder.iterdir()) == before, "nothing is left there"


@pytest.mark.req("H6")
@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("exit 1", CommandFailed),
        ('[ "$1" != --version ] || echo "seccompiler v1.16.1"', OSError),
        ('echo "seccompiler v1.15.1"', MissingPrerequisite),
    ],
)
def test_a_compiler_that_fails_or_is_another_releases_makes_none(
    folder: Path, script: str, error: type[Exception]
) -> None:
    (folder / observe.COMPILER).write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(error):
        observe.strict_filter()


@pytest.mark.req("H6")
@pytest.mark.parametrize("name", [observe.COMPILER, observe.POLICY])
def test_nothing_is_made_by_or_of_what_others_could_write(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / observe.COMPILER).write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    (folder / name).chmod(0o777)
    with pytest.raises(Refused):
        observe.strict_filter()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [observe.COMPILER, observe.POLICY, "firecracker"])
def test_without_one_of_its_parts_there_is_none_to_make(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert observe.strict_filter() is None


def test_a_version_whose_list_nobody_read_gets_none(folder: Path) -> None:
    install(folder, version="1.15.1")
    (folder / observe.COMPILER).write_text(COMPILER.replace("1.16.1", "1.15.1"))
    with pytest.raises(MissingPrerequisite, match=r"1\.15\.1"):
        observe.strict_filter()


def test_a_list_that_lacks_a_rule_is_not_the_one_that_was_read(folder: Path) -> None:
    (folder / observe.POLICY).write_text(policy().replace("msync", "fsync"))
    with pytest.raises(InvalidInput, match="list of system calls"):
        observe.strict_filter()
