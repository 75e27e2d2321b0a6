"""Builds on this machine with its own nix: a DEVELOPMENT builder.

Nix's sandbox separates a build from the files and network of the host, not from its kernel, and nix runs as root in
single-user mode. Production builds belong into a fresh microVM each; `NOTICE` is what to tell the operator meanwhile.

For a Debian-based flake the steps are: stage the flake, see which locked packages the store lacks, fetch those with
the host's apt, check each sha256, add them to the store, then run nix, which needs no network from there on.
Any other flake is nix's business entirely.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mvm.builder import package_lock
from mvm.builder.apt import private_apt
from mvm.builder.bootstrap import extract_busybox
from mvm.builder.flakes import (
    PROFILES,
    guest_source_dir,
    is_package_flake,
    local_flake_dir,
    lock_hash_of,
    stage,
)
from mvm.builder.model import Artifacts
from mvm.builder.store_path import nar_sha256, recursive_path, sri
from mvm.core.errors import (
    BuildFailed,
    CommandFailed,
    InvalidInput,
    MissingPrerequisite,
    Refused,
    ResourceExhausted,
)
from mvm.linux import process
from mvm.linux.files import read_bounded

if TYPE_CHECKING:
    from mvm.builder.model import BuildRequest, LineSink, ProgressSink
    from mvm.builder.package_lock import Package

NOTICE = "development builder: nix runs on this host as root, separated from it by nix's sandbox only"
BUILD_S = 3600.0
_QUERY_S = 120.0
_TAIL_LINES = 30
NEEDED_BYTES = 2 << 30
"""Free space under /nix/store and the temporary directory before a build that has something to do."""
_PARTS = ("tenant-kernel", "tenant-rootfs", "tenant-fc-base")


def _quiet_line(_: str) -> None:
    pass


def _quiet_progress(_: str, __: float | None) -> None:
    pass


class HostNixBuilder:
    """`cache_dir`: nix's evaluation cache. `cwd`: what relative flake references are relative to."""

    def __init__(self, cache_dir: Path = Path("/var/cache/mvm"), cwd: Path | None = None) -> None:
        self._cache_dir = cache_dir
        self._cwd = cwd

    def build(
        self,
        request: BuildRequest,
        *,
        on_line: LineSink | None = None,
        on_progress: ProgressSink | None = None,
    ) -> Artifacts:
        """See `Builder.build`."""
        line, progress = on_line or _quiet_line, on_progress or _quiet_progress
        check_profile(request.profile)
        flake_dir = local_flake_dir(request.flake_ref, self._cwd or Path.cwd())
        self._check_host()
        # The parent of the staged flake; its name never reaches nix's hashes, since a path flake is copied by content.
        with tempfile.TemporaryDirectory(prefix="mvm-build-") as name:
            scratch = Path(name)
            scratch.chmod(0o755)
            if flake_dir is None:
                resolved, lock_hash = self._resolve_remote(request.flake_ref)
                source, offline = resolved, False
            else:
                resolved, lock_hash = str(flake_dir), lock_hash_of(flake_dir)
                source, offline = f"path:{flake_dir}", False
            if request.lock_hash is not None and request.lock_hash != lock_hash:
                raise Refused(
                    "the flake is not at the locked state that was asked for",
                    details=f"sha256 of flake.lock: {lock_hash}\nasked for:            {request.lock_hash}",
                    resolution="check out the matching flake.lock, or pin the new one",
                )
            if flake_dir is not None and is_package_flake(flake_dir):
                staged = scratch / "flake"
                stage(flake_dir, guest_source_dir(), staged)
                self._provide_packages(staged, request.profile, scratch, line, progress)
                source, offline = f"path:{staged}", True
            return self._run_nix(
                source, request.profile, resolved, lock_hash, scratch, line, progress, offline
            )

    def _check_host(self) -> None:
        if os.geteuid() != 0:
            raise MissingPrerequisite(
                "building needs root", details=NOTICE, resolution="run the command with sudo"
            )
        if process.find_program("nix") is None:
            raise MissingPrerequisite(
                "nix is not installed", resolution="install it: apt-get install nix-bin"
            )

    def _environment(self, *, offline: bool) -> dict[str, str]:
        config = [
            "experimental-features = nix-command flakes",
            "build-users-group =",
            "sandbox = true",
            "warn-dirty = false",
        ]
        if offline:
            config += ["substituters =", "flake-registry =", "use-registries = false"]
        env = {
            "NIX_CONFIG": "\n".join(config),
            "XDG_CACHE_HOME": str(self._cache_dir),
            "HOME": str(self._cache_dir),
        }
        for key in ("NIX_SSL_CERT_FILE", "http_proxy", "https_proxy", "no_proxy"):
            if not offline and key in os.environ:
                env[key] = os.environ[key]
        return env

    def _resolve_remote(self, flake_ref: str) -> tuple[str, str]:
        """(locked reference, hash of its flake.lock) of a flake that is not a local directory."""
        argv = ["nix", "flake", "metadata", "--json", "--no-write-lock-file", flake_ref]
        try:
            done = process.run(argv, timeout=BUILD_S, env=self._environment(offline=False))
            metadata = json.loads(done.stdout)
            return str(metadata["url"]), lock_hash_of(Path(metadata["path"]))
        except CommandFailed as error:
            raise InvalidInput(
                f"nix cannot find the flake {flake_ref}",
                details=error.details,
                resolution="check the reference with: nix flake metadata",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise BuildFailed(
                "nix answered with something unexpected",
                details=repr(error),
                resolution="check: nix --version",
            ) from error

    def _provide_packages(
        self, staged: Path, profile: str, scratch: Path, line: LineSink, progress: ProgressSink
    ) -> None:
        """Bring into the store what the lock names and the store lacks."""
        lock = package_lock.parse_lock(read_bounded(staged / "packages/packages.json", package_lock.LOCK_MAX))
        packages_nar = nar_sha256(staged / "packages")
        pinned = read_bounded(staged / "flake.lock", package_lock.LOCK_MAX).decode("utf-8", "replace")
        if sri(packages_nar) not in pinned:
            raise InvalidInput(
                "flake.lock does not pin these packages",
                details=f"packages/ hashes to {sri(packages_nar)}, which flake.lock does not hold",
                resolution="restore both from version control, or renew both with: mvm flake update",
            )
        env = self._environment(offline=True)
        wanted = lock.wanted(("kernel", "tools", profile))
        paths = {package_lock.package_path(package): name for name, package in wanted.items()}
        source_path, bootstrap_path = (
            recursive_path(packages_nar, "source"),
            package_lock.bootstrap_path(lock),
        )
        absent = self._absent([*paths, source_path, bootstrap_path], env)
        if not absent:
            return
        check_space(Path("/nix/store"))
        check_space(scratch)
        names = {paths[path] for path in absent if path in paths}
        if bootstrap_path in absent:
            names.add(package_lock.BOOTSTRAP_PACKAGE)
        files = self._fetch({name: wanted[name] for name in names}, scratch, line, progress)
        for name in sorted(files):
            self._add(["nix-store", "--add-fixed", "sha256", str(files[name])], env)
        if bootstrap_path in absent:
            tree = scratch / package_lock.BOOTSTRAP_NAME
            extract_busybox(files[package_lock.BOOTSTRAP_PACKAGE], tree)
            self._add(["nix-store", "--add-fixed", "--recursive", "sha256", str(tree)], env)
        if source_path in absent:
            # Nix before 2.26 cannot fetch a locked relative input; it takes it from the store by its narHash.
            self._add(["nix", "store", "add-path", "--name", "source", str(staged / "packages")], env)
        left = self._absent(absent, env)
        if left:
            raise BuildFailed(
                "the store did not take what the lock names",
                details="\n".join(left),
                resolution="the package lock is inconsistent; renew it with: mvm flake update",
            )

    def _absent(self, paths: list[str], env: dict[str, str]) -> list[str]:
        done = process.run(
            ["nix-store", "--check-validity", "--print-invalid", *paths], timeout=_QUERY_S, ok=(0, 1), env=env
        )
        return [text for text in done.stdout.decode().split() if text.startswith("/")]

    def _add(self, argv: list[str], env: dict[str, str]) -> None:
        try:
            process.run(argv, timeout=_QUERY_S, env=env)
        except CommandFailed as error:
            raise BuildFailed(
                "nix could not add a package to its store",
                details=error.details,
                resolution="check free space and /nix",
            ) from error

    def _fetch(
        self, wanted: dict[str, Package], scratch: Path, line: LineSink, progress: ProgressSink
    ) -> dict[str, Path]:
        """Download and verify; name -> file, named as the store wants it."""
        if not wanted:
            return {}
        total = sum(package.size for package in wanted.values())
        label = f"fetching {len(wanted)} Debian packages ({total / 1e6:.0f} MB)"
        line(label)
        progress(label, 0.0)
        into = scratch / "download"
        into.mkdir()
        into.chmod(0o777)  # apt writes as the user _apt; the directory above is ours alone to rename in
        with private_apt(scratch) as apt:
            pairs = {name: package.version for name, package in wanted.items()}
            offered = apt.show(pairs.items())
            if offered.keys() != pairs.keys():
                line("the machine's package lists do not name every locked package: fetching new lists")
                apt.update(line)
                offered = apt.show(pairs.items())
            gone = sorted(pairs.keys() - offered.keys())
            other = sorted(name for name in offered if offered[name].sha256 != wanted[name].sha256)
            if gone or other:
                raise stale_lock(wanted, gone, other)
            files = apt.download(pairs.items(), into, lambda fraction, _: progress(label, fraction))
        verified: dict[str, Path] = {}
        for name, package in wanted.items():
            path = files.get(name)
            if path is None or _sha256(path) != package.sha256:
                raise BuildFailed(
                    f"{name} is not the locked package",
                    details=f"expected sha256 {package.sha256}, got {_sha256(path) if path else 'nothing'}",
                    resolution="try again; if it persists the mirror is damaged or serves other bytes",
                )
            verified[name] = path.rename(scratch / package.file)
        return verified

    def _run_nix(
        self, source: str, profile: str, resolved: str, lock_hash: str, scratch: Path,
        line: LineSink, progress: ProgressSink, offline: bool,
    ) -> Artifacts:  # fmt: skip
        targets = [f"{source}#packages.x86_64-linux.{part}-{profile}" for part in _PARTS]
        link = scratch / "result"
        argv = ["nix", "build", "-L", "--no-write-lock-file", "--out-link", str(link), *targets]
        tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        label = f"building {profile}"
        progress(label, None)

        def take(text: str) -> None:
            tail.append(text)
            line(text)
            if text.startswith("building "):
                progress(
                    f"building {text.partition('-')[2].removesuffix('...').removesuffix(chr(39)).removesuffix('.drv')}",
                    None,
                )

        try:
            process.run(argv, timeout=BUILD_S, env=self._environment(offline=offline), on_line=take)
        except CommandFailed as error:
            raise BuildFailed(
                f"the flake {resolved} did not build for profile {profile}",
                details="\n".join(tail) or error.details,
                resolution="the end of the log is above; correct the flake and build again",
            ) from error
        progress(label, 1.0)
        return collect(
            sorted(Path(os.readlink(path)) for path in scratch.glob("result*")), resolved, profile, lock_hash
        )


def collect(outputs: list[Path], resolved: str, profile: str, lock_hash: str) -> Artifacts:
    """Recognises the outputs by what they hold: nix numbers its links in an order of its own."""
    found: dict[str, Path] = {}
    for name in ("vmlinux", "initrd", "rootfs.ext4", "fc-base.json"):
        holders = [output / name for output in outputs if (output / name).is_file()]
        if len(holders) != 1:
            raise BuildFailed(
                f"the flake {resolved} built, but {len(holders)} of its outputs hold {name}, not one",
                details="\n".join(str(output) for output in outputs),
                resolution="the outputs must hold vmlinux and initrd, rootfs.ext4, fc-base.json",
            )
        found[name] = holders[0]
    return Artifacts(
        kernel=found["vmlinux"], initrd=found["initrd"], rootfs=found["rootfs.ext4"], fc_base=found["fc-base.json"],
        store_paths=tuple(str(output) for output in outputs), flake_ref=resolved, profile=profile, lock_hash=lock_hash,
    )  # fmt: skip


def check_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise InvalidInput(
            f"unknown profile {ascii(profile)[:40]}",
            details=f"profiles: {', '.join(PROFILES)}",
            resolution="use one of: " + ", ".join(PROFILES),
        )


def check_space(path: Path, needed: int = NEEDED_BYTES) -> None:
    """Raises ResourceExhausted unless the file system of `path` (or its nearest existing parent) has `needed` bytes."""
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < needed:
        raise ResourceExhausted(
            "not enough disk space to build",
            details=f"{path} has {free >> 20} MiB free, a build needs {needed >> 20} MiB",
            resolution="free some space (nix-collect-garbage removes unused build results) and build again",
        )


def stale_lock(wanted: dict[str, Package], gone: list[str], other: list[str]) -> BuildFailed:
    lines = [f"{name} {wanted[name].version}: no longer offered" for name in gone]
    lines += [f"{name} {wanted[name].version}: offered with other content" for name in other]
    return BuildFailed(
        "the archive no longer offers what the package lock names",
        details="\n".join(lines[:_TAIL_LINES]),
        resolution="renew the lock with: mvm flake update; then build again",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
