"""Debian packages through the machine's own apt, without touching the machine's package state.

The host decides where packages come from: its sources, keys, proxies. Everything else is private and forgotten: an
empty dpkg status, so that resolution does not depend on what is installed here; own preferences, which admit the
distribution's packages only; own caches; no hooks (an `APT::Update::Post-Invoke` of the host must not run for us).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mvm.core.errors import BuildFailed, CommandFailed, MissingPrerequisite
from mvm.linux import process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_UPDATE_S = 300.0
_QUERY_S = 120.0
_DOWNLOAD_S = 1800.0
_PREFERENCES = (
    "Package: *\nPin: release o=Debian\nPin-Priority: 990\n\nPackage: *\nPin: release *\nPin-Priority: -10\n"
)
# Which of the host's settings say where packages come from and how to get there.
_KEPT = re.compile(
    r'(Acquire::[^ ]+|Dir::Etc::(?:sourcelist|sourceparts|trusted|trustedparts|netrc|netrcparts)) "'
)
_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_URI = re.compile(r"^'[^']*' (\S+)_(\S+)_(\S+)\.deb (\d+)", re.MULTILINE)
_STATUS = re.compile(r"dlstatus:[^:]*:([0-9.]+):(.*)")


class Version(NamedTuple):
    """A package as the archive offers it now. `size` in bytes, `sha256` in hex."""

    version: str
    size: int
    sha256: str


class Apt:
    """A private view of the archive; made by `private_apt`."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._folder = folder
        self._env = env

    def update(self, on_line: Callable[[str], None] | None = None) -> None:
        """Fetch the archive's present package lists. Raises BuildFailed if the mirror cannot be reached."""
        lists = self._folder / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        os.chmod(lists, 0o755)
        self._env = {**self._env, "APT_CONFIG": str(_write_config(self._folder, lists))}
        try:
            process.run(
                ["apt-get", "-q", "update", "--error-on=any"],
                timeout=_UPDATE_S,
                env=self._env,
                on_line=on_line,
            )
        except CommandFailed as error:
            raise BuildFailed(
                "the package lists could not be fetched",
                details=error.details,
                resolution="check the network and the machine's apt sources with: apt-get update",
            ) from error

    def resolve(self, names: Sequence[str]) -> dict[str, str]:
        """name -> version of everything that installing `names` on an empty system takes, without recommendations."""
        try:
            done = process.run(
                ["apt-get", "-y", "--print-uris", "install", *names], timeout=_QUERY_S, env=self._env
            )
        except CommandFailed as error:
            raise BuildFailed(
                "apt cannot resolve the packages of the guest",
                details=error.details,
                resolution="the flake needs Debian's package sources; check: apt-cache policy busybox-static",
            ) from error
        found = _URI.findall(done.stdout.decode())
        return {name: urllib.parse.unquote(version) for name, version, _, _ in found}

    def show(self, wanted: Iterable[tuple[str, str]]) -> dict[str, Version]:
        """name -> what the archive says of each (name, version) it still offers; those it does not are left out."""
        pairs = dict(wanted)
        if not pairs:
            return {}
        argv = ["apt-cache", "show", *(f"{name}={version}" for name, version in sorted(pairs.items()))]
        found: dict[str, Version] = {}
        output = process.run(argv, timeout=_QUERY_S, ok=(0, 100), env=self._env).stdout.decode(
            "utf-8", "replace"
        )
        for stanza in output.split("\n\n"):
            fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.MULTILINE))
            name = fields.get("Package", "")
            if pairs.get(name) == fields.get("Version") and "SHA256" in fields:
                found[name] = Version(fields["Version"], int(fields["Size"]), fields["SHA256"])
        return found

    def download(
        self,
        wanted: Iterable[tuple[str, str]],
        into: Path,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> dict[str, Path]:
        """Fetch (name, version) pairs into `into`; name -> file. Progress is a fraction and apt's own words."""
        pairs = sorted(wanted)

        def line(text: str) -> None:
            match = _STATUS.match(text)
            if match and on_progress:
                on_progress(min(1.0, float(match[1]) / 100), match[2])

        argv = [
            "apt-get",
            "-qq",
            "-o",
            "APT::Status-Fd=1",
            "download",
            *(f"{name}={version}" for name, version in pairs),
        ]
        try:
            process.run(argv, timeout=_DOWNLOAD_S, env=self._env, cwd=into, on_line=line)
        except CommandFailed as error:
            raise BuildFailed(
                "packages could not be downloaded",
                details=error.details,
                resolution="check the network and the machine's apt sources with: apt-get update; then build again",
            ) from error
        files: dict[str, Path] = {}
        for path in into.iterdir():
            if path.name.endswith(".deb"):
                files[path.name.split("_", 1)[0]] = path
        return files


def _write_config(folder: Path, lists: Path | None) -> Path:
    dump = process.run(["apt-config", "dump"], timeout=_QUERY_S).stdout.decode("utf-8", "replace")
    kept = [line for line in dump.splitlines() if _KEPT.match(line)]
    own = {
        "Dir::Etc::main": "/dev/null", "Dir::Etc::parts": "/dev/null", "Dir::Etc::preferences": f"{folder}/preferences",
        "Dir::Etc::preferencesparts": "/dev/null", "Dir::State::status": f"{folder}/status",
        "Dir::Cache": f"{folder}/cache",
        "APT::Architecture": "amd64", "APT::Architectures": "amd64", "APT::Install-Recommends": "false",
        "APT::Install-Suggests": "false", "Debug::NoLocking": "true", "Acquire::Languages": "none",
    }  # fmt: skip
    if lists is not None:
        own["Dir::State::lists"] = str(lists)
    config = folder / "apt.conf"
    config.write_text(
        "\n".join(kept + [f'{key} "{value}";' for key, value in own.items()]) + "\n", encoding="utf-8"
    )
    return config


@contextlib.contextmanager
def private_apt(scratch: Path) -> Iterator[Apt]:
    """An apt of our own under `scratch`, gone afterwards. Starts with the host's package lists."""
    if process.find_program("apt-get") is None:
        raise MissingPrerequisite(
            "apt-get is not installed",
            details="the embedded flake is built from Debian packages",
            resolution="build on Debian or a derivative, or use a flake with its own inputs",
        )
    with tempfile.TemporaryDirectory(prefix="mvm-apt-", dir=scratch) as name:
        folder = Path(name)
        # apt reads and downloads as the user _apt, who must be able to enter.
        os.chmod(folder, 0o755)
        (folder / "cache/archives/partial").mkdir(parents=True)
        (folder / "status").write_bytes(b"")
        (folder / "preferences").write_text(_PREFERENCES, encoding="utf-8")
        env = {"APT_CONFIG": str(_write_config(folder, None)), "DEBIAN_FRONTEND": "noninteractive"}
        env.update({key: os.environ[key] for key in _PROXIES if key in os.environ})
        yield Apt(folder, env)
