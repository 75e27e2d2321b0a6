"""The locks say what pyproject.toml asks for, pinned by hash, and name no place to download from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = {
    "requirements.lock": PROJECT["dependencies"],
    "requirements-dev.lock": PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"],
}
RENEW = "run scripts/lock"


def entries(text: str) -> dict[str, tuple[str, list[str]]]:
    """Canonical name -> (version, hashes). Every line that is no comment must be an entry or a part of one."""
    found: dict[str, tuple[str, list[str]]] = {}
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        head, *hashes = re.split(r"\s--hash=", line)
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)(\s*;.*)?", head.strip())
        assert match, f"neither a comment nor a pinned package: {line[:80]!r}"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h.strip()) for h in hashes), line[:80]
        found[canonicalize_name(match[1])] = match[2], hashes
    return found


@pytest.mark.parametrize("name", WANTED)
def test_matches_pyproject(name: str) -> None:
    locked = entries((ROOT / name).read_text())
    for text in WANTED[name]:
        wanted = Requirement(text)
        assert canonicalize_name(wanted.name) in locked, f"{name} lacks {wanted.name}: {RENEW}"
        version = locked[canonicalize_name(wanted.name)][0]
        assert wanted.specifier.contains(Version(version)), f"{wanted} but {name} has {version}: {RENEW}"


@pytest.mark.parametrize("name", WANTED)
def test_every_package_has_hashes(name: str) -> None:
    locked = entries((ROOT / name).read_text())
    assert locked
    assert [package for package, (_, hashes) in locked.items() if not hashes] == []


@pytest.mark.parametrize("name", WANTED)
def test_names_no_place(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-", re.sub(r"^\s*--hash=", "", text, flags=re.M), flags=re.M), "an option"
    # A path, or a host: anything with a slash that is not a marker.
    assert "/" not in text.replace("scripts/lock", "")


def test_the_development_lock_holds_the_same_versions() -> None:
    runtime = entries((ROOT / "requirements.lock").read_text())
    development = entries((ROOT / "requirements-dev.lock").read_text())
    assert {name: development.get(name) for name in runtime} == runtime


def test_the_build_backend_is_locked() -> None:
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    locked = entries((ROOT / "requirements-dev.lock").read_text())
    assert {canonicalize_name(Requirement(b).name) for b in backend} <= locked.keys()


def test_the_parser_sees_what_is_wrong() -> None:
    with pytest.raises(AssertionError):
        entries("foo>=1")
    with pytest.raises(AssertionError):
        entries("foo @ file:///x")
    assert entries("foo==1 \\\n    --hash=sha256:" + "0" * 64) == {"foo": ("1", ["sha256:" + "0" * 64])}
    assert entries("foo==1") == {"foo": ("1", [])}
