"""The package lock: what is read is checked, what is written is a function of the content."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.builder.apt import Version
from mvm.builder.flakes import embedded_flake_dir, lock_hash_of
from mvm.builder.package_lock import (
    BOOTSTRAP_PACKAGE,
    PackageLock,
    Seed,
    package_file,
    parse_lock,
    parse_seeds,
    render_flake_lock,
    render_lock,
)
from mvm.builder.relock import assemble, select
from mvm.builder.store_path import flat_path, nar_sha256, nix_base32, recursive_path, sri, store_name
from mvm.core.errors import InvalidInput

SHA = "ab" * 32

names = st.from_regex(r"[a-z0-9][a-z0-9+.-]{0,20}", fullmatch=True)
versions = st.builds(
    Version,
    st.from_regex(r"[0-9][A-Za-z0-9.+:~-]{0,20}", fullmatch=True),
    st.integers(0, 1 << 40),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
)


def lock(packages: dict[str, Version], sets: dict[str, list[str]]) -> PackageLock:
    return assemble(sets, {BOOTSTRAP_PACKAGE: Version("1", 1, SHA), **packages}, SHA)


@pytest.mark.req("B1")
@given(st.dictionaries(names, versions, max_size=8), st.randoms())
def test_render_parse_round_trip_and_order_does_not_matter(
    packages: dict[str, Version], random: object
) -> None:
    listed = list(packages)
    one = lock(packages, {"minimal": sorted(listed), "tools": []})
    random.shuffle(listed)  # type: ignore[attr-defined]
    other = lock({name: packages[name] for name in listed}, {"tools": [], "minimal": listed})
    assert render_lock(one) == render_lock(other)
    assert render_lock(parse_lock(render_lock(one))) == render_lock(one)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_lock_or_invalid_input(data: bytes) -> None:
    for parse in (parse_lock, parse_seeds):
        try:
            parse(data)
        except InvalidInput:
            pass


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("bootstrap", "nar_sha256"), "zz"),
        (("packages", "libc6", "sha256"), "0" * 63),
        (("packages", "libc6", "version"), "1 && reboot"),
        (("packages", "libc6", "file"), "../../etc/passwd"),
        (("packages", "libc6", "size"), -1),
        (("sets", "minimal"), ["nowhere"]),
    ],
)
def test_a_wrong_value_is_refused(path: tuple[str, ...], value: object) -> None:
    document = json.loads(render_lock(lock({"libc6": Version("2.36-9", 10, SHA)}, {"minimal": ["libc6"]})))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InvalidInput) as caught:
        parse_lock(json.dumps(document).encode())
    assert "flake update" in caught.value.resolution


@pytest.mark.req("B1")
def test_the_shipped_lock_is_complete_and_pinned() -> None:
    flake = embedded_flake_dir()
    shipped = parse_lock((flake / "packages/packages.json").read_bytes())
    seeds = parse_seeds((flake / "packages/seeds.json").read_bytes())
    assert shipped.sets.keys() == seeds.keys() == {"kernel", "tools", "baseline", "minimal", "python"}
    assert (flake / "packages/packages.json").read_bytes() == render_lock(shipped)
    assert (flake / "flake.lock").read_bytes() == render_flake_lock(nar_sha256(flake / "packages"))
    assert len(lock_hash_of(flake)) == 64
    for profile in ("baseline", "minimal", "python"):
        assert "e2fsprogs" in shipped.sets[profile]
        assert not [name for name in shipped.sets[profile] if "ssh-server" in name or name == "openssh"]


def test_select_leaves_out_and_keeps_only() -> None:
    resolved = {"a": "1", "linux-image-6.1-cloud-amd64": "2", "debconf": "3"}
    assert select(Seed(("a",), exclude=("debconf",)), resolved) == ["a", "linux-image-6.1-cloud-amd64"]
    assert select(Seed(("a",), only="linux-.*-cloud-amd64"), resolved) == ["linux-image-6.1-cloud-amd64"]
    with pytest.raises(InvalidInput):
        select(Seed(("a",), only="nothing"), resolved)


@given(st.text(min_size=1, max_size=300))
def test_store_names_are_what_nix_allows(text: str) -> None:
    name = store_name(text)
    assert len(name) <= 211
    assert not name.startswith(".")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-._?=")
    assert package_file("libc6", "2.36-9~deb12") == "libc6_2.36-9-deb12_amd64.deb"


def test_hashes_agree_with_nix() -> None:
    """Reference values printed by `nix-hash` and `nix-store --print-fixed-path` 2.8."""
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert nix_base32(bytes.fromhex(empty)) == "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
    assert sri(empty) == "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
    assert flat_path(empty, "x.deb") == "/nix/store/45066zl18zfxxvcy9wfqwy3wfgnym84w-x.deb"
    assert recursive_path(empty, "source") == "/nix/store/f6jkrn77ysv9dhs8hh6s2faflhjc930i-source"
