"""What an image is made of: where packages come from, what the digest covers, how mmdebstrap is called."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import InvalidInput
from mvm.dev import image, recipe, sources
from mvm.dev.sources import Source

TARGETS = """\
MetaKey: main/binary-amd64/Packages
Origin: Debian
Component: main
Created-By: Packages
Release: bookworm
Repo-URI: https://mirror.example/debian/
Signed-By: /etc/apt/keyrings/own.gpg

MetaKey: contrib/binary-amd64/Packages
Origin: Debian
Component: contrib
Created-By: Packages
Release: bookworm
Repo-URI: https://mirror.example/debian/
Signed-By: /etc/apt/keyrings/own.gpg

MetaKey: main/binary-amd64/Packages
Origin: Debian
Component: main
Created-By: Packages
Release: bookworm-security
Repo-URI: https://mirror.example/debian-security/

MetaKey: main/binary-amd64/Packages
Origin: Somebody Else
Component: main
Created-By: Packages
Release: stable
Repo-URI: https://elsewhere.example/apt/
"""
SOURCES = (Source("https://mirror.example/debian/", "bookworm", ("main",), sources.KEYRING),)


def test_only_debians_own_sources_count() -> None:
    assert sources.parse_targets(TARGETS) == (
        Source("https://mirror.example/debian-security/", "bookworm-security", ("main",), sources.KEYRING),
        Source(
            "https://mirror.example/debian/", "bookworm", ("contrib", "main"), "/etc/apt/keyrings/own.gpg"
        ),
    )


def test_the_release_is_the_one_the_others_add_to() -> None:
    assert sources.main_suite(sources.parse_targets(TARGETS)) == "bookworm"


def test_every_source_is_rendered_with_the_key_that_must_sign_it() -> None:
    text = sources.render(sources.parse_targets(TARGETS))
    stanzas = [dict(line.split(": ", 1) for line in s.splitlines()) for s in text.split("\n\n")]
    assert [s["Suites"] for s in stanzas] == ["bookworm-security", "bookworm"]
    assert all(s["Signed-By"].startswith("/") for s in stanzas)
    assert stanzas[1]["Components"] == "contrib main"


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_ignored(text: str) -> None:
    sources.parse_targets(text)


@pytest.mark.parametrize(
    "url", ["", "mirror.example/debian", "https://m.example/ x", "-o", "https://m\nSigned-By: x"]
)
def test_what_is_no_mirror_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput):
        sources.from_mirror(url)


def test_a_named_mirror_is_signed_by_debian() -> None:
    (source,) = sources.from_mirror("https://mirror.example/debian")
    assert source.signed_by == sources.KEYRING


@pytest.mark.req("O4")
def test_the_digest_changes_with_every_input() -> None:
    first = recipe.make(SOURCES, "click==1\n")
    assert first.digest == recipe.make(SOURCES, "click==1\n").digest
    changed = [
        recipe.make(SOURCES, "click==2\n"),
        recipe.make(sources.from_mirror("https://other.example/debian"), "click==1\n"),
        msgspec.structs.replace(first, packages=(*first.packages, "vim")),
        msgspec.structs.replace(first, files=(*first.files[1:], (first.files[0][0], False, b"other"))),
        msgspec.structs.replace(first, root_gib=7),
        msgspec.structs.replace(first, schema=first.schema + 1),
    ]
    assert len({first.digest, *(r.digest for r in changed)}) == 1 + len(changed)


def test_the_image_has_a_probe_and_its_units() -> None:
    files = {name: (executable, data) for name, executable, data in recipe.image_files()}
    assert files["etc/initramfs-tools/scripts/init-top/mvm-probe"][0]
    for unit in image._UNITS:
        executable, data = files[f"etc/systemd/system/{unit}"]
        assert not executable
        assert b"[Install]" in data


def test_the_probe_says_what_the_prober_waits_for() -> None:
    from mvm.hostd.vmm.qemu.probe import MARKER

    (script,) = (data for name, _, data in recipe.image_files() if name.endswith("mvm-probe"))
    assert MARKER in script


def test_the_kernel_is_the_one_with_everything() -> None:
    """The cloud kernel has neither kvm_amd nor vhost_vsock."""
    assert "linux-image-amd64" in recipe.PACKAGES
    assert "linux-image-cloud-amd64" not in recipe.PACKAGES


def test_mmdebstrap_gets_the_machines_settings_and_no_source_on_its_command_line() -> None:
    made = recipe.make(SOURCES, "")
    argv = image.bootstrap_command(made, Path("/b/files"), Path("/b/root"), ['Acquire::Retries "3";'])
    assert '--aptopt=Acquire::Retries "3";' in argv
    assert argv[-3:] == ["bookworm", "/b/root", "-"]
    assert not any("mirror.example" in word for word in argv)
    assert argv.index("--essential-hook=sync-in /b/files /") > 0
