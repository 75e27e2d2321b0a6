"""Wheel, seed and synced trees: bytes that depend on contents alone."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import InvalidInput, NotFound, ResourceExhausted
from mvm.dev import seed, sync, wheel
from mvm.dev.archive import Entry, tar

NAMES = st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}){0,3}", fullmatch=True)


def no_git(_argv: list[str]) -> tuple[int, bytes]:
    return 128, b""


@given(
    st.dictionaries(NAMES, st.binary(max_size=64), max_size=12).filter(lambda d: not clash(d)), st.randoms()
)
def test_order_does_not_matter_and_everything_comes_back(files: dict[str, bytes], random: object) -> None:
    entries = [Entry(name, data) for name, data in files.items()]
    shuffled = list(entries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    archive = tar(entries)
    assert tar(shuffled) == archive
    with tarfile.open(fileobj=io.BytesIO(archive)) as read:
        found = {m.name: read.extractfile(m).read() for m in read if m.isreg()}  # type: ignore[union-attr]
        assert {m.mtime for m in read} <= {0}
        assert {m.uid for m in read} <= {0}
    assert found == files


def clash(files: dict[str, bytes]) -> bool:
    """A name that is a directory in another."""
    return any(b.startswith(a + "/") for a in files for b in files)


def test_a_wheel_records_every_file_with_its_hash() -> None:
    data = wheel.assemble(
        "1.2", {"METADATA": b"Name: mvm\n"}, {"mvm/a.py": (b"A", False), "mvm/b": (b"", True)}
    )
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        record = archive.read("mvm-1.2.dist-info/RECORD").decode().splitlines()
        assert archive.getinfo("mvm/b").external_attr >> 16 & 0o111
        assert not archive.getinfo("mvm/a.py").external_attr >> 16 & 0o111
    assert {line.split(",")[0] for line in record} == set(names)
    # urlsafe base64 of the SHA-256 of "A", without padding
    assert "mvm/a.py,sha256=VZrq0IJk1XldOQlxjN0Fq9SVcuhP5VWQ7vMaiKCP3_0,1" in record


def test_the_same_files_give_the_same_wheel(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "__pycache__").mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("x")
        os.utime(tmp_path / name / "a.py", (len(name) + ord(name[0]), 5))
        (tmp_path / name / "__pycache__" / "a.pyc").write_text(name)
    none = tmp_path / "none"
    one, two = (wheel.contents(tmp_path / name, none, none) for name in ("one", "two"))
    assert one == two == {"mvm/a.py": (b"x", False)}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("click>=8.1", "click"),
        ("zstandard>=0.22 ; python_version > '3'", "zstandard"),
        ("Markdown_It-py (>=2)", "markdown-it-py"),
        ("pytest>=8; extra == 'dev'", ""),
        ("rich", "rich"),
    ],
)
def test_what_a_requirement_names(line: str, name: str) -> None:
    assert wheel._required_name(line) == name


def test_the_seed_brings_the_agent_its_package_and_the_wheel() -> None:
    entries = {e.name: e.data for e in seed.contents(wheel.package_dir(), "mvm-1-py3-none-any.whl", b"wheel")}
    assert {
        "agent.py",
        "install.sh",
        "bootstrap.sh",
        "steady.py",
        "mvm/__init__.py",
        "mvm/guest/__main__.py",
        "wheel.sha256",
    } <= set(entries)
    ours = {name for name in entries if name.startswith("mvm/")} - {"mvm/__init__.py"}
    assert all(name.startswith("mvm/guest/") for name in ours), (
        "the agent is all that runs before the install"
    )
    assert entries["wheel.sha256"] == hashlib.sha256(b"wheel").hexdigest().encode() + b"\n"


def test_the_nodes_agent_serves_ports_and_never_vsock(tmp_path: Path) -> None:
    from mvm.dev.node.agent import arguments

    (tmp_path / "port").touch()
    words = arguments([("mvm.0", str(tmp_path / "port"))])
    assert words[:2] == ["--no-devices", "--no-disks"]
    assert words[2] == "--port-fd"
    os.close(int(words[3]))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "flake"
    (folder / "sub").mkdir(parents=True)
    (folder / "flake.nix").write_text("{ }\n")
    (folder / "sub" / "run").write_text("#!/bin/sh\n")
    (folder / "sub" / "run").chmod(0o700)
    (folder / "link").symlink_to("flake.nix")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    (folder / "sub" / "__pycache__").mkdir()
    (folder / "sub" / "__pycache__" / "x.pyc").write_text("junk")
    return folder


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {m.name: m for m in archive}


@pytest.mark.req("B8")
def test_a_tree_is_its_content(tree: Path) -> None:
    first = sync.pack(tree, no_git)
    found = members(first.data)
    assert set(found) == {"flake.nix", "link", "sub", "sub/run"}
    assert found["sub/run"].mode == 0o755
    assert found["link"].linkname == "flake.nix"
    (tree / "flake.nix").chmod(0o600)
    os.utime(tree / "sub" / "run", (1, 1))
    assert sync.pack(tree, no_git) == first


@pytest.mark.req("B8")
@pytest.mark.parametrize("change", ["content", "executable", "link", "name", "gone"])
def test_what_counts_changes_the_id(tree: Path, change: str) -> None:
    first = sync.pack(tree, no_git).id
    changes: dict[str, Callable[[], object]] = {
        "content": lambda: (tree / "flake.nix").write_text("{}\n"),
        "executable": lambda: (tree / "sub" / "run").chmod(0o644),
        "link": lambda: (tree / "link").rename(tree / "sub" / "link"),
        "name": lambda: (tree / "flake.nix").rename(tree / "flake2.nix"),
        "gone": lambda: (tree / "sub" / "run").unlink(),
    }
    changes[change]()
    assert sync.pack(tree, no_git).id != first


@pytest.mark.req("B8")
def test_in_a_work_tree_git_says_what_belongs(tree: Path) -> None:
    def git(argv: list[str]) -> tuple[int, bytes]:
        return (0, b"true\n") if "rev-parse" in argv else (0, b"flake.nix\0deleted\0link\0")

    assert set(members(sync.pack(tree, git).data)) == {"flake.nix", "link"}


def test_pipes_are_refused(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(InvalidInput, match="neither a file nor a link"):
        sync.pack(tree, no_git)


def test_too_much_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "MAX_FILES", 2)
    with pytest.raises(ResourceExhausted):
        sync.pack(tree, no_git)


def test_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        sync.pack(tmp_path / "none", no_git)


@pytest.mark.parametrize("name", ["", "..", "../etc", "a/b", "A", "-x", ".hidden", "a" * 64, "a\n"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        sync.target(name)


@given(st.text(max_size=80).filter(lambda t: "\0" not in t and "/" not in t))
def test_a_directorys_name_always_gives_one(name: str) -> None:
    sync.target(sync.default_name(Path("/somewhere") / name))
