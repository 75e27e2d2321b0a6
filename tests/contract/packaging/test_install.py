"""packaging/mvm-install.sh, run for real: what is right is installed, and what is not changes nothing."""

from __future__ import annotations

import http.server
import mmap
import os
import signal
import ssl
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.contract.packaging.conftest import INSTALLER, ROOT, Release, end, make_key, run, sha256

pytestmark = pytest.mark.req("O3")


def tree(root: Path) -> list[tuple[str, str]]:
    """Everything below, with what links and small files say."""
    found = []
    for path in sorted(root.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else "directory" if path.is_dir() else sha256(path)
        found.append((path.relative_to(root).as_posix(), kind))
    return found


def releases(root: Path) -> set[str]:
    return {p.name for p in (root / "opt/mvm.d").iterdir() if p.is_dir() and not p.is_symlink()}


def test_what_is_right_is_installed_and_runs(installed: Path) -> None:
    assert run(installed / "usr/bin/mvm", "--version").startswith("mvm ")
    assert "privileged executor" in run(installed / "usr/bin/mvm-hostd", "--help")
    python = installed / "opt/mvm/bin/python"
    where = run(python, "-c", "import mvm, click, cryptography; print(mvm.__file__)").strip()
    assert Path(where).resolve().is_relative_to(installed / "opt/mvm.d")
    assert (installed / "opt/mvm").is_symlink()
    code = "from mvm.hostd.install import units; print(len(units.load()))"
    assert int(run(python, "-c", code)) > 4, "the service's files come along"


def test_again_changes_nothing(release: Release, installed: Path) -> None:
    before = os.stat(installed / "opt/mvm/bin/mvm").st_ino
    assert "is there already" in release.install(installed)
    assert os.stat(installed / "opt/mvm/bin/mvm").st_ino == before
    assert len(releases(installed)) == 1


def test_old_releases_go_unless_something_runs_from_them(release: Release, installed: Path) -> None:
    old = [installed / "opt/mvm.d" / name for name in ("0" * 16, "1" * 16)]
    for folder in old:
        folder.mkdir()
        (folder / ".complete").touch()
        (folder / "library.so").write_bytes(b"code")
    with open(old[1] / "library.so", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        release.install(installed)
        assert [folder.exists() for folder in old] == [False, True]
    release.install(installed)
    assert [folder.exists() for folder in old] == [False, False]


def _append(name: str) -> Callable[[Release], None]:
    def change(release: Release) -> None:
        with (release.folder / name).open("ab") as file:
            file.write(b"x")

    return change


def _wheel(release: Release) -> Path:
    (found,) = release.folder.glob("mvm-*.whl")
    return found


def _flip(release: Release) -> None:
    data = bytearray(_wheel(release).read_bytes())
    data[len(data) // 2] ^= 1
    _wheel(release).write_bytes(data)


def _truncate(release: Release) -> None:
    os.truncate(_wheel(release), _wheel(release).stat().st_size - 1)


def _other_signer(release: Release) -> None:
    mine = release.private
    release.private = release.folder.parent / "other.pem"
    make_key(release.private)
    release.sign()
    release.private = mine


def _link(release: Release) -> None:
    path = _wheel(release)
    os.rename(path, release.folder.parent / "elsewhere")
    path.symlink_to(release.folder.parent / "elsewhere")


def _signed_list(change: Callable[[str], str]) -> Callable[[Release], None]:
    return lambda r: r.sign(change((r.folder / "SHA256SUMS").read_text()))


def _another_wheel(release: Release) -> None:
    (release.folder / "mvm-9.9-py3-none-any.whl").write_bytes(b"")
    release.sign()


WRONG: dict[str, tuple[Callable[[Release], None], str]] = {
    "a bit of the wheel": (_flip, "not what was signed: mvm-"),
    "the lock": (_append("requirements.lock"), "not what was signed: requirements.lock"),
    "the installer": (_append("mvm-install.sh"), "not what was signed: mvm-install.sh"),
    "the list": (_append("SHA256SUMS"), "the signature of SHA256SUMS is not by"),
    "a wheel cut short": (_truncate, "not what was signed: mvm-"),
    "another signer": (_other_signer, "the signature of SHA256SUMS is not by"),
    "no signature": (lambda r: (r.folder / "SHA256SUMS.sig").unlink(), "has no file SHA256SUMS.sig"),
    "an empty signature": (
        lambda r: os.truncate(r.folder / "SHA256SUMS.sig", 0),
        "SHA256SUMS.sig is not an Ed25519 signature",
    ),
    "a signature cut short": (
        lambda r: os.truncate(r.folder / "SHA256SUMS.sig", 63),
        "SHA256SUMS.sig is not an Ed25519 signature",
    ),
    "no list": (lambda r: (r.folder / "SHA256SUMS").unlink(), "has no file SHA256SUMS"),
    "a file too many": (
        lambda r: (r.folder / "evil.whl").touch(),
        "a file that nobody signed: evil.whl",
    ),
    "a hidden file too many": (
        lambda r: (r.folder / ".pth").touch(),
        "a file that nobody signed: .pth",
    ),
    "a missing file": (lambda r: _wheel(r).unlink(), "has no file mvm-"),
    "a link": (_link, "has no file mvm-"),
    "a signed path": (
        _signed_list(lambda text: text.replace("  requirements", "  ../requirements")),
        "not a hash and a plain file name",
    ),
    "a signed option": (
        _signed_list(lambda text: text.replace("  requirements", "  -requirements")),
        "not a hash and a plain file name",
    ),
    "a name twice": (_signed_list(lambda text: text + text), "names a file twice"),
    "a list without a lock": (
        _signed_list(lambda text: "".join(t for t in text.splitlines(True) if "requirements" not in t)),
        "a file that nobody signed: requirements.lock",
    ),
    "two wheels of mvm": (_another_wheel, "not exactly one wheel of mvm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_changes_nothing(
    case: str, release: Release, installed: Path, tmp_path: Path
) -> None:
    change, says = WRONG[case]
    bad = release.copy(tmp_path / "release")
    change(bad)
    (tmp_path / "root").mkdir()
    for root in (tmp_path / "root", installed):
        before = tree(root) if root != installed else sorted(os.listdir(root / "opt/mvm.d"))
        said = bad.install(root, code=1)
        assert says in said
        assert "Nothing was changed." in said
        assert before == (tree(root) if root != installed else sorted(os.listdir(root / "opt/mvm.d")))


def test_a_key_of_another_kind_is_refused(release: Release, tmp_path: Path) -> None:
    """An RSA signature would verify too, by rules that nobody chose."""
    public = make_key(tmp_path / "rsa.pem", algorithm="rsa")
    argv = (INSTALLER, "--key", public, "--from", release.folder, "--root", tmp_path)
    assert "is not an Ed25519 public key" in run(*argv, code=1)
    make = (ROOT / "packaging/release", "--key", tmp_path / "rsa.pem", "--allow-dirty", tmp_path / "out")
    assert "is not an Ed25519 private key" in run(*make, code=1)


def test_without_a_key_nothing_is_looked_at(release: Release, tmp_path: Path) -> None:
    said = run(INSTALLER, "--from", release.folder, "--root", tmp_path, code=1)
    assert "--key is missing" in said


def test_verify_only_installs_nothing(release: Release, tmp_path: Path) -> None:
    assert "installed nothing" in release.install(tmp_path, "--verify-only")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_its_own_is_left_alone(release: Release, tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/mvm").write_text("somebody else's")
    before = tree(tmp_path)
    assert "is not a link of this program's" in release.install(tmp_path, code=1)
    assert tree(tmp_path) == before


@pytest.fixture
def newer(release: Release, tmp_path: Path) -> Release:
    made = release.copy(tmp_path / "newer")
    with (made.folder / "requirements.lock").open("a") as lock:
        lock.write("# newer\n")
    made.sign()
    return made


def test_an_interrupted_upgrade_leaves_the_old_and_goes_on_next_time(
    release: Release, newer: Release, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    release.install(root)
    old = os.readlink(root / "opt/mvm")
    argv: list[str | Path] = [INSTALLER, "--key", newer.public, "--from", newer.folder, "--root", root]
    null = subprocess.DEVNULL

    def begun() -> list[Path]:
        return [p for p in (root / "opt/mvm.d").glob("*/bin/python") if p.parents[1].name not in old]

    for signum in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True)
        while not begun():
            assert process.poll() is None
            time.sleep(0.02)
        end(process, signum)
        assert os.readlink(root / "opt/mvm") == old
        assert run(root / "usr/bin/mvm", "--version")
        assert bool(begun()) is (signum == signal.SIGKILL), "who can still act leaves nothing half done"
    newer.install(root)
    new = os.readlink(root / "opt/mvm")
    assert new != old
    assert run(root / "usr/bin/mvm", "--version")
    assert releases(root) == {Path(old).name, Path(new).name}, (
        "the one before stays, for what still runs from it"
    )
    # Back again is one more install.
    release.install(root)
    assert os.readlink(root / "opt/mvm") == old


def test_run_again_the_release_before_stays(release: Release, newer: Release, tmp_path: Path) -> None:
    """The way back must not be lost by running an installer twice."""
    release.install(tmp_path)
    old = releases(tmp_path)
    newer.install(tmp_path)
    both = releases(tmp_path)
    assert len(both) == 2
    assert old < both
    newer.install(tmp_path)
    newer.install(tmp_path)
    assert releases(tmp_path) == both


def _made(release: Release, year: int) -> Release:
    """The same release as of another commit."""
    wheel = _wheel(release)
    with zipfile.ZipFile(wheel) as source:
        members = [(info, source.read(info)) for info in source.infolist()]
    with zipfile.ZipFile(wheel, "w") as target:
        for info, data in members:
            info.date_time = (year, 1, 2, 3, 4, 6)
            target.writestr(info, data)
    release.sign()
    return release


def test_going_back_is_said(release: Release, tmp_path: Path) -> None:
    """A signature is good for ever: an old release with an old flaw has one too."""
    warning = "WARNING: this release is older than what is installed"
    old = _made(release.copy(tmp_path / "old"), 2000)
    new = _made(release.copy(tmp_path / "new"), 2001)
    root = tmp_path / "root"
    root.mkdir()
    assert "WARNING" not in old.install(root)
    assert "WARNING" not in new.install(root)
    assert "WARNING" not in new.install(root)
    for options in (("--verify-only",), ()):
        said = old.install(root, *options)
        assert warning in said
        assert "made 2001-01-02 03:04:06" in said
    assert "WARNING" not in old.install(root)


def test_the_callers_path_is_not_trusted(release: Release, tmp_path: Path) -> None:
    """What is first in it would say whether a signature holds."""
    fake, root = tmp_path / "bin", tmp_path / "root"
    fake.mkdir()
    root.mkdir()
    for name in ("openssl", "python3", "sha256sum"):
        (fake / name).write_text(f"#!/bin/sh\n: >{tmp_path}/executed\n")
        (fake / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}"}
    argv = (INSTALLER, "--key", release.public, "--from", release.folder, "--root", root, "--verify-only")
    assert "verified" in run(*argv, env=env)
    assert not (tmp_path / "executed").exists()


def test_one_at_a_time(release: Release, installed: Path) -> None:
    with open(installed / "opt/mvm.d/.lock") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another mvm-install is under way" in release.install(installed, code=1)


# By https.


@pytest.fixture
def site(release: Release, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """Address of the folder that holds releases, and the environment in which its certificate is believed."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    run(
        "openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=localhost", "-days", "2",
        "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate,
    )  # fmt: skip
    return serve(release.folder, certificate, key), {**os.environ, "SSL_CERT_FILE": str(certificate)}


def serve(folder: Path, certificate: Path, key: Path) -> str:
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"https://127.0.0.1:{server.server_address[1]}"


def test_a_release_is_fetched_over_https_and_verified_the_same(
    release: Release, site: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, env = site
    argv = (INSTALLER, "--key", release.public, "--verify-only", "--root", tmp_path, "--from")
    assert "verified: mvm" in run(*argv, address, env=env)
    assert "could not be fetched" in run(*argv, f"{address}/nowhere", env=env, code=1)
    # Nobody vouches for the server.
    assert "could not be fetched" in run(*argv, address, code=1)
    assert "is not an https address" in run(*argv, address.replace("https", "http"), code=1)


# Firecracker.


def binaries(folder: Path, *, jailer: str = "1.16.1", names: str = "{}") -> Path:
    """Programs that say a version, and leave a mark that they were executed; the file with their sums."""
    folder.mkdir()
    lines = []
    for name, said in (("firecracker", "1.16.1"), ("jailer", jailer)):
        path = folder / names.format(name)
        path.write_text(f"#!/bin/sh\n: >{folder.parent}/executed\necho '{name.capitalize()} v{said}'\n")
        path.chmod(0o755)
        lines.append(f"{sha256(path)}  {path.name}\n")
    sums = folder.parent / "sums"
    sums.write_text("".join(lines))
    return sums


def test_firecracker_is_installed_by_version(release: Release, installed: Path, tmp_path: Path) -> None:
    options = ("--firecracker", tmp_path / "fc", "--firecracker-sums", binaries(tmp_path / "fc"))
    assert "usr/lib/mvm/firecracker/1.16.1" in release.install(installed, *options)
    place = installed / "usr/lib/mvm/firecracker/1.16.1"
    assert sorted(p.name for p in place.iterdir()) == ["firecracker", "jailer"]
    for path in (place, *place.iterdir()):
        assert path.stat().st_mode & 0o777 == 0o755
        assert path.stat().st_uid == os.geteuid()
    assert os.readlink(place.parent / "current") == "1.16.1"
    release.install(installed, *options)
    (place / "jailer").write_text("another")
    assert "another one of the same version" in release.install(installed, *options, code=1)


def test_firecracker_by_the_names_of_its_releases(release: Release, tmp_path: Path) -> None:
    sums = binaries(tmp_path / "fc", names="{}-v1.16.1-" + os.uname().machine)
    options = ("--firecracker", tmp_path / "fc", "--firecracker-sums", sums, "--verify-only")
    assert "verified: Firecracker 1.16.1" in release.install(tmp_path, *options)


@pytest.mark.req("H6")
def test_what_the_strict_filter_is_made_of_is_installed_where_somebody_vouches_for_it(
    release: Release, installed: Path, tmp_path: Path
) -> None:
    """Also beside programs that are there already; by the names of a release."""
    machine = os.uname().machine
    sums = binaries(tmp_path / "fc", names="{}-v1.16.1-" + machine)
    more = [f"seccompiler-bin-v1.16.1-{machine}", f"seccomp-filter-v1.16.1-{machine}.json"]
    (tmp_path / "fc" / more[0]).write_text("#!/bin/sh\necho 'seccompiler v1.16.1'\n")
    (tmp_path / "fc" / more[1]).write_text("made of nothing")
    options = ("--firecracker", tmp_path / "fc", "--firecracker-sums", sums)
    release.install(tmp_path, *options)
    place = tmp_path / "usr/lib/mvm/firecracker/1.16.1"
    assert sorted(p.name for p in place.iterdir()) == ["firecracker", "jailer"]
    with sums.open("a") as file:
        file.writelines(f"{sha256(tmp_path / 'fc' / name)}  {name}\n" for name in more)
    before = (place / "firecracker").stat().st_ino
    release.install(tmp_path, *options)
    assert (place / "firecracker").stat().st_ino == before
    assert {p.name: p.stat().st_mode & 0o777 for p in place.iterdir()} == {
        "firecracker": 0o755, "jailer": 0o755, "seccomp-filter.json": 0o644, "seccompiler-bin": 0o755,
    }  # fmt: skip
    (tmp_path / "fc" / more[1]).write_text("made of something else")
    assert "is not what" in release.install(tmp_path, *options, code=1)


@pytest.mark.req("H6")
@pytest.mark.parametrize("wrong", ["compiler", "list"])
def test_what_the_strict_filter_is_made_of_is_of_the_programs_release(
    release: Release, tmp_path: Path, wrong: str
) -> None:
    machine = os.uname().machine
    sums = binaries(tmp_path / "fc")
    older = {"compiler": "1.16.1", "list": "1.16.1", wrong: "1.15.0"}
    said = f"#!/bin/sh\necho 'seccompiler v{older['compiler']}'\n"
    made = {"seccompiler-bin": said, f"seccomp-filter-v{older['list']}-{machine}.json": "made of nothing"}
    with sums.open("a") as file:
        for name, text in made.items():
            (tmp_path / "fc" / name).write_text(text)
            file.write(f"{sha256(tmp_path / 'fc' / name)}  {name}\n")
    options = ("--firecracker", tmp_path / "fc", "--firecracker-sums", sums, "--verify-only")
    refused = release.install(tmp_path, *options, code=1)
    assert "one release" in refused
    assert "Nothing was changed." in refused


def test_firecracker_that_is_not_what_the_operator_vouched_for_is_never_executed(
    release: Release, tmp_path: Path
) -> None:
    sums = binaries(tmp_path / "fc")
    options = ("--firecracker", tmp_path / "fc", "--firecracker-sums", sums)
    (tmp_path / "root").mkdir()
    with (tmp_path / "fc/jailer").open("a") as file:
        file.write("# more\n")
    said = release.install(tmp_path / "root", *options, code=1)
    assert "is not what" in said
    assert "Nothing was changed." in said
    assert not (tmp_path / "executed").exists()
    assert list((tmp_path / "root").iterdir()) == []


def test_firecracker_and_jailer_are_of_one_version(release: Release, tmp_path: Path) -> None:
    sums = binaries(tmp_path / "fc", jailer="1.15.0")
    (tmp_path / "root").mkdir()
    options = ("--firecracker", tmp_path / "fc", "--firecracker-sums", sums)
    said = release.install(tmp_path / "root", *options, code=1)
    assert "firecracker is 1.16.1 and jailer is 1.15.0" in said
    assert list((tmp_path / "root").iterdir()) == []
    assert "needs --firecracker-sums" in release.install(tmp_path / "root", *options[:2], code=1)
