"""A real release, made by packaging/release from this checkout. The dependencies' wheels are packed again from what
is installed: nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
INSTALLER = ROOT / "packaging" / "mvm-install.sh"


def run(*argv: str | Path, code: int | None = 0, env: Mapping[str, str] | None = None) -> str:
    """Both outputs of a program that must end so."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, env=env
    )
    assert code is None or done.returncode == code, done.stdout.decode()
    return done.stdout.decode()


class Release:
    """A release directory and the keys. `copy` gives one to change; `sign` makes its list and signature anew."""

    def __init__(self, folder: Path, private: Path, public: Path) -> None:
        self.folder, self.private, self.public = folder, private, public

    def copy(self, target: Path) -> Release:
        shutil.copytree(self.folder, target)
        return Release(target, self.private, self.public)

    def sign(self, sums: str | None = None) -> None:
        if sums is None:
            names = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("SHA256SUMS"))
            sums = "".join(f"{sha256(self.folder / name)}  {name}\n" for name in names)
        (self.folder / "SHA256SUMS").write_text(sums)
        signature = self.folder / "SHA256SUMS.sig"
        run(
            "openssl", "pkeyutl", "-sign", "-inkey", self.private, "-rawin", "-in", self.folder / "SHA256SUMS",
            "-out", signature,
        )  # fmt: skip

    def install(self, root: Path, *options: str | Path, code: int | None = 0) -> str:
        return run(
            INSTALLER, "--key", self.public, "--from", self.folder, "--root", root, *options, code=code
        )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_key(private: Path, *, algorithm: str = "ed25519") -> Path:
    """The public half's file."""
    public = private.with_suffix(".pub")
    run("openssl", "genpkey", "-algorithm", algorithm, "-out", private)
    run("openssl", "pkey", "-in", private, "-pubout", "-out", public)
    return public


def pack(name: str, folder: Path) -> Path:
    """A wheel of an installed distribution."""
    found = importlib.metadata.distribution(name)
    tag = re.search(r"^Tag: (.*)$", found.read_text("WHEEL") or "", re.MULTILINE)
    assert tag is not None
    path = folder / f"{found.metadata['Name'].replace('-', '_')}-{found.version}-{tag[1]}.whl"
    record, home = [], ""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in found.files or ():
            place = file.as_posix()
            if place.startswith("../") or "__pycache__" in place or place.endswith(("/RECORD", "/INSTALLER")):
                continue
            data = Path(str(file.locate())).read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{place},sha256={digest},{len(data)}\n")
            archive.writestr(place, data)
            if place.endswith(".dist-info/METADATA"):
                home = place.partition("/")[0]
        archive.writestr(f"{home}/RECORD", "".join(record) + f"{home}/RECORD,,\n")
    return path


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("release")
    public = make_key(folder / "signer.pem")
    wheels = folder / "wheels"
    wheels.mkdir()
    locked = re.findall(r"^([A-Za-z0-9_.-]+)==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    lines = []
    for name in locked:
        path = pack(name, wheels)
        version = importlib.metadata.version(name)
        lines.append(f"{name}=={version} --hash=sha256:{sha256(path)}\n")
    (wheels / "requirements.lock").write_text("".join(lines))
    argv = (
        ROOT / "packaging" / "release",
        "--key",
        folder / "signer.pem",
        "--wheels",
        wheels,
        "--allow-dirty",
    )
    run(*argv, folder / "made")
    return Release(folder / "made", folder / "signer.pem", public)


@pytest.fixture(scope="session")
def installed(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the release in it. Not to be changed."""
    root = tmp_path_factory.mktemp("installed")
    assert "next: mvm bootstrap" in release.install(root)
    return root


def end(process: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    """The process and all it started, in its own session."""
    os.killpg(process.pid, signum)
    process.wait(60)
