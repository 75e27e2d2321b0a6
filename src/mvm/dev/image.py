"""Building a node's image: Debian by mmdebstrap, mvm's dependencies by pip, a file system by mke2fs.

On disk, below the cache directory:

    lock                     held while an image is built or removed
    images/<digest>/         root.ext4, vmlinuz, initrd, packages.txt; complete as soon as it has this name
    build-<random>/          a build under way; what a killed one left is removed by the next

No user namespaces and no loop devices: the tree is made by root in a directory, and mke2fs copies it into the file.
Nothing of this machine's configuration stays in the image: no source list, no proxy, no resolver, no key.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final, NamedTuple

from mvm.core.errors import BuildFailed, CommandFailed, MissingPrerequisite, ResourceExhausted
from mvm.dev import sources
from mvm.dev.model import Tell
from mvm.dev.recipe import Recipe
from mvm.linux.files import ensure_dir, fsync_dir, locked, remove_tree
from mvm.linux.process import find_program, run

KEEP: Final = 2
"""Images that stay; the oldest go first. Nodes have copies of their own."""
NEEDED_BYTES: Final = 5 << 30
_BOOTSTRAP_S, _INSTALL_S, _FETCH_S, _FORMAT_S = 1800.0, 600.0, 900.0, 600.0
_LOCK_S: Final = 1800.0
_PROGRAMS: Final = {
    "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "chroot": "coreutils", "apt-get": "apt",
    "unshare": "util-linux",
}  # fmt: skip
_MACHINE_SETTINGS: Final = (
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "HOME", "XDG_CONFIG_HOME",
)  # fmt: skip
_UNITS: Final = (
    "mvm-node-seed.service", "mvm-node-agent.service", "mvm-node-install.service", "mvm-node-bootstrap.service",
    "mvm-node-steady.service",
)  # fmt: skip
_MASKED: Final = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer",
    "getty@tty1.service", "serial-getty@ttyS0.service", "systemd-pstore.service", "e2scrub_reap.service",
    "systemd-binfmt.service",
)  # fmt: skip
# Without these, a node is the same and its image a third smaller.
_LEFT_OUT: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


class Image(NamedTuple):
    """A finished image. All paths are read-only to nodes."""

    digest: str
    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root.ext4"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"


def missing_programs() -> list[str]:
    """Debian packages whose programs a build needs and this machine lacks."""
    return sorted({package for program, package in _PROGRAMS.items() if find_program(program) is None})


def obtain(recipe: Recipe, cache: Path, tell: Tell, *, rebuild: bool = False) -> Image:
    """The recipe's image, built if it is not there. BuildFailed, MissingPrerequisite, ResourceExhausted."""
    image = Image(recipe.digest, cache / "images" / recipe.digest)
    if image.folder.is_dir() and not rebuild:
        os.utime(image.folder)
        return image
    if missing := missing_programs():
        raise MissingPrerequisite(
            "the programs that build a node's image are not installed",
            details=f"Missing packages: {', '.join(missing)}.",
            resolution=f"install them: apt-get install --no-install-recommends {' '.join(missing)}",
        )
    sources.check_keyrings(recipe.sources)
    ensure_dir(cache, 0o755)
    ensure_dir(cache / "images", 0o755)
    tell.phase("waiting for another build")
    with locked(cache / "lock", wait=_LOCK_S):
        _sweep(cache)
        if image.folder.is_dir() and not rebuild:
            return image
        _check_space(cache)
        scratch = cache / f"build-{os.urandom(6).hex()}"
        ensure_dir(scratch, 0o755)
        try:
            _build(recipe, scratch, tell)
            remove_tree(image.folder)
            os.rename(scratch / "out", image.folder)
            fsync_dir(image.folder.parent)
        finally:
            remove_tree(scratch)
        _collect(cache, image)
    return image


def _check_space(cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < NEEDED_BYTES:
        raise ResourceExhausted(
            "too little disk space to build a node's image",
            details=f"{free >> 20} MiB are free below {cache}; a build takes {NEEDED_BYTES >> 20} MiB.",
            resolution=f"free space on the file system of {cache}",
        )


def _sweep(cache: Path) -> None:
    for entry in cache.iterdir():
        if entry.name.startswith("build-"):
            remove_tree(entry)


def _collect(cache: Path, newest: Image) -> None:
    found = sorted((cache / "images").iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
    for folder in [p for p in found if p != newest.folder][KEEP - 1 :]:
        remove_tree(folder)


def _build(recipe: Recipe, scratch: Path, tell: Tell) -> None:
    root, out = scratch / "root", scratch / "out"
    out.mkdir(mode=0o755)
    try:
        tell.phase("Debian's packages")
        _bootstrap(recipe, scratch, root, tell)
        tell.phase("mvm's dependencies")
        _dependencies(recipe, scratch, root, tell)
        tell.phase("settings")
        _configure(root)
        _take_boot_files(root, out)
        tell.phase("file system")
        run(
            [
                "mke2fs", "-q", "-t", "ext4", "-L", "mvm-root", "-m", "0", "-d", str(root),
                "-E", "lazy_itable_init=1,lazy_journal_init=1", str(out / "root.ext4"), f"{recipe.root_gib}G",
            ],
            timeout=_FORMAT_S,
        )  # fmt: skip
    except CommandFailed as error:
        raise BuildFailed(
            "the node's image could not be built",
            details=error.details,
            resolution="check the machine's package sources with: apt-get update; then start again",
        ) from error
    for name in os.listdir(out):
        os.chmod(out / name, 0o644)
        with open(out / name, "rb") as file:
            os.fsync(file.fileno())


def bootstrap_command(recipe: Recipe, files: Path, root: Path, apt_options: list[str]) -> list[str]:
    """mmdebstrap's arguments; the sources come on its standard input.

    In mount and process namespaces of its own: what it mounts into the tree, and what it started, is gone with it even
    when it is killed.
    """
    argv = [
        "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--",
        "mmdebstrap", "--mode=root", "--format=directory", "--variant=apt", "--architectures=amd64",
        f"--include={','.join(recipe.packages)}", "--aptopt=APT::Install-Recommends \"false\"",
    ]  # fmt: skip
    argv += [f"--aptopt={option}" for option in apt_options]
    argv += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    # Before the kernel is installed, whose initrd is made at once and as these files say.
    argv += [f"--essential-hook=sync-in {files} /"]
    return [*argv, sources.main_suite(recipe.sources), str(root), "-"]


def _bootstrap(recipe: Recipe, scratch: Path, root: Path, tell: Tell) -> None:
    files = scratch / "files"
    for name, executable, data in recipe.files:
        path = files / name
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if executable else 0o644)
    for folder in [files, *(p for p in files.rglob("*") if p.is_dir())]:
        folder.chmod(0o755)
    dump = run(["apt-config", "dump"], timeout=60).stdout.decode("utf-8", "replace")
    # How this machine reaches its mirror: proxies, certificates, time-outs.
    apt_options = [line for line in dump.splitlines() if line.startswith("Acquire::") and ' "";' not in line]
    run(
        bootstrap_command(recipe, files, root, apt_options),
        stdin=sources.render(recipe.sources).encode(),
        timeout=_BOOTSTRAP_S,
        env=_settings(),
        on_line=tell.line,
    )


def _settings() -> dict[str, str]:
    """What of this command's environment says how to reach package indexes."""
    kept = {name: os.environ[name] for name in _MACHINE_SETTINGS if name in os.environ}
    return kept | {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def _dependencies(recipe: Recipe, scratch: Path, root: Path, tell: Tell) -> None:
    """A virtual environment at /opt/mvm. Wheels are fetched here, where the machine's settings are, for the node's
    Python, and installed inside without a network."""
    interpreter = max(root.glob("usr/bin/python3.*[0-9]"), key=lambda p: int(p.name.rpartition(".")[2]))
    version = interpreter.name.removeprefix("python")
    wheels = root / "tmp/mvm-wheels"
    wheels.mkdir()
    lock = wheels / "requirements.txt"
    lock.write_text(recipe.requirements, encoding="utf-8")
    hashes = ["--require-hashes"] if "--hash=" in recipe.requirements else []
    inside = ["chroot", str(root)]
    run([*inside, "/usr/bin/python3", "-m", "venv", "/opt/mvm"], timeout=_INSTALL_S)
    # The node's own pip, so that this machine needs none; its Python is the one the wheels are for.
    tags = ["--python-version", version, "--implementation", "cp", "--abi", f"cp{version.replace('.', '')}"]
    tags += ["--abi", "abi3", "--abi", "none"]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any"):
        tags += ["--platform", platform]
    run(
        [
            *host_pip(root, version), "download", "--quiet", *hashes, "--no-deps", "--only-binary", ":all:", *tags,
            "--dest", str(wheels), "--requirement", str(lock),
        ],
        timeout=_FETCH_S,
        env=_settings(),
        on_line=tell.line,
    )  # fmt: skip
    run(
        [
            *inside, "/opt/mvm/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
            "--no-index", "--no-deps", *hashes, "--find-links", "/tmp/mvm-wheels",
            "--requirement", "/tmp/mvm-wheels/requirements.txt",
        ],
        timeout=_INSTALL_S,
    )  # fmt: skip
    remove_tree(wheels)


def host_pip(root: Path, version: str) -> list[str]:
    """pip for this machine's Python: the image's own copy, run from its directory."""
    return ["python3", f"{root}/opt/mvm/lib/python{version}/site-packages/pip", "--disable-pip-version-check"]


def _configure(root: Path) -> None:
    for folder in ("state", "nix", "srv/mvm", "var/lib/mvm"):
        (root / folder).mkdir(mode=0o755, parents=True, exist_ok=True)
    for name in ("etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/machine-id"):
        (root / name).unlink(missing_ok=True)
    (root / "etc/hostname").write_text("mvm-node\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost mvm-node\n::1 localhost\n")
    # Empty: the command line of the kernel says it, and systemd must not take this for a first boot.
    (root / "etc/machine-id").write_text("")
    for name in ("etc/apt/sources.list", "etc/apt/apt.conf.d/99mmdebstrap"):
        (root / name).unlink(missing_ok=True)
    for entry in (root / "etc/apt/sources.list.d").iterdir():
        entry.unlink()
    inside = ["chroot", str(root)]
    run([*inside, "systemctl", "enable", *_UNITS], timeout=_INSTALL_S)
    run([*inside, "systemctl", "mask", *_MASKED], timeout=_INSTALL_S)
    run([*inside, "systemctl", "set-default", "multi-user.target"], timeout=_INSTALL_S)


def _take_boot_files(root: Path, out: Path) -> None:
    listing = run(["chroot", str(root), "dpkg-query", "-W"], timeout=60).stdout
    (out / "packages.txt").write_bytes(listing)
    for pattern, name in (("vmlinuz-*", "vmlinuz"), ("initrd.img-*", "initrd")):
        found = sorted((root / "boot").glob(pattern))
        if not found:
            raise BuildFailed(
                "the node's kernel packages brought no kernel or no initrd",
                details=f"nothing matches /boot/{pattern}",
                resolution="see the packages of the machine's archive: apt-cache policy linux-image-amd64",
            )
        # Booted from outside; inside they would only be copied along.
        os.rename(found[-1], out / name)
