"""What every key provider does. A new provider is added to `provider`."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mvm.core.errors import IntegrityError, NotFound, Refused
from mvm.core.ids import TenantId
from mvm.hostd import keys
from mvm.hostd.keys.development import DevelopmentKeyProvider
from mvm.linux.secret import SecretBytes

ACME, OTHER = TenantId("acme"), TenantId("other")


@pytest.fixture(params=["development"])
def provider(request: pytest.FixtureRequest, tmp_path: Path) -> keys.KeyProvider:
    assert request.param == "development"
    return DevelopmentKeyProvider(tmp_path)


@pytest.mark.req("K2")
def test_no_key_before_create(provider: keys.KeyProvider) -> None:
    assert provider.versions(ACME) == ()
    with pytest.raises(NotFound):
        provider.tenant_key(ACME)
    with pytest.raises(NotFound):
        provider.rotate(ACME)
    provider.destroy(ACME)


@pytest.mark.req("K2")
def test_create_is_idempotent_and_per_tenant(provider: keys.KeyProvider) -> None:
    with SecretBytes.from_random(32) as key:
        with provider.create(ACME) as mine:
            blob = mine.wrap(key, b"c")
        with provider.create(ACME) as again, again.unwrap(blob, b"c") as found:
            assert found.equals(key)
        with provider.create(OTHER) as theirs, pytest.raises(IntegrityError):
            theirs.unwrap(blob, b"c")


@pytest.mark.req("K4")
def test_rotation_rewraps_and_retires(provider: keys.KeyProvider) -> None:
    with SecretBytes.from_random(32) as key:
        with provider.create(ACME) as first:
            old = first.wrap(key, b"c")
        with provider.rotate(ACME) as second:
            assert (first.version, second.version) == (1, 2)
        assert provider.versions(ACME) == (1, 2)
        with keys.unwrap(provider, ACME, old, b"c") as found:
            assert found.equals(key), "old versions still unwrap"
        new = keys.rewrap(provider, ACME, old, b"c")
        assert keys.parse_header(new).key_version == 2
        assert keys.rewrap(provider, ACME, new, b"c") == new
        provider.retire(ACME, 99)
        assert provider.versions(ACME) == (2,), "the newest is never retired"
        with keys.unwrap(provider, ACME, new, b"c") as found:
            assert found.equals(key)
        with pytest.raises(IntegrityError, match="damaged or was made for something else"):
            keys.unwrap(provider, ACME, old, b"c")


@pytest.mark.req("S6", "L7")
def test_destroyed_keys_are_gone(provider: keys.KeyProvider) -> None:
    with provider.create(ACME) as mine, SecretBytes.from_random(32) as key:
        blob = mine.wrap(key, b"")
    provider.destroy(ACME)
    provider.destroy(ACME)
    with pytest.raises(NotFound):
        keys.unwrap(provider, ACME, blob, b"")
    provider.create(ACME).close()
    with pytest.raises(IntegrityError):
        keys.unwrap(provider, ACME, blob, b"")


@pytest.mark.req("K2")
def test_the_development_provider_says_so(tmp_path: Path) -> None:
    provider = DevelopmentKeyProvider(tmp_path)
    assert "protect nothing" in provider.warning
    assert "WARNING" in provider.describe()


@pytest.mark.req("K2")
def test_development_keys_are_private_files(tmp_path: Path) -> None:
    provider = DevelopmentKeyProvider(tmp_path)
    provider.create(ACME).close()
    (path,) = (tmp_path / "keys" / "development" / "acme").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o640)
    with pytest.raises(Refused):
        provider.tenant_key(ACME)
    path.chmod(0o600)
    os.truncate(path, 31)
    with pytest.raises(IntegrityError):
        provider.tenant_key(ACME)


@pytest.mark.req("S6")
def test_development_destroy_wipes_leftovers_too(tmp_path: Path) -> None:
    provider = DevelopmentKeyProvider(tmp_path)
    provider.create(ACME).close()
    folder = tmp_path / "keys" / "development" / "acme"
    (folder / ".tmp-0000000002.key-abc").write_bytes(b"k" * 32)
    os.link(folder / ".tmp-0000000002.key-abc", tmp_path / "witness")
    provider.destroy(ACME)
    assert not folder.exists()
    assert (tmp_path / "witness").read_bytes() == bytes(32)
