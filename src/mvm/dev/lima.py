"""The node on macOS: a Debian machine of Lima's, driven through `limactl`.

Lima owns the image, the network and the way in. What is said here is what the machine is made of (`template`, which is
JSON and therefore YAML) and which limactl command each verb is. Lima shares no directory with it: what goes in goes by
`mvm sync`, as on Linux. mvm is installed from the wheel of the running mvm and from its locked requirements, through
the machine's own network.

On Apple hardware the guest's CPU is ARM, nested virtualization needs an M3 or later with macOS 15, and the embedded
flake builds x86-64 guests only: such a node runs the daemons and the tests that boot nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from mvm.core.errors import CommandFailed, Conflict, GuestError
from mvm.dev import programs, wheel
from mvm.dev.model import SOURCE_AREA, NodeSpec, NodeStatus, StartOptions, Tell
from mvm.dev.recipe import PACKAGES

LIMACTL: Final = "limactl"
INSTANCE: Final = "mvm"
DEBIAN: Final = "template://debian-12"
_STATES: Final = {"Running": "running", "Stopped": "stopped", "Broken": "stopped"}
# The machine comes with a kernel of its own, for its own architecture.
_NOT_THERE: Final = frozenset({"linux-image-amd64", "qemu-system-x86", "initramfs-tools", "lz4"})

_INSTALL: Final = """\
set -eu
cd "$1"
[ -x /opt/mvm/bin/python ] || python3 -m venv /opt/mvm
if [ "$(cat /opt/mvm/installed.sha256 2>/dev/null)" != "$2" ]; then
    hashes=
    ! grep -q -e --hash= requirements.txt || hashes=--require-hashes
    /opt/mvm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $hashes -r requirements.txt
    /opt/mvm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-index --force-reinstall \
        ./mvm-*.whl
    for name in mvm mvm-hostd; do
        ln -sf "/opt/mvm/bin/$name" "/usr/bin/$name"
    done
    echo "$2" >/opt/mvm/installed.sha256
fi
rm -rf "$1"
"""

# $1: the marker's file, $2: of which mvm. As on the Linux node: a machine without what baseline needs is set up for
# development, and says so. The machine is of use without the service too, so a failure is told and no more.
_BOOTSTRAP: Final = """\
set -eu
[ "$(cat "$1" 2>/dev/null)" != "$2" ] || exit 0
missing=15
code=0
mvm bootstrap || code=$?
if [ "$code" -eq "$missing" ]; then
    code=0
    mvm bootstrap --development || code=$?
fi
if [ "$code" -eq 0 ]; then
    echo "$2" >"$1"
else
    echo "mvm-hostd is not a service of the machine. See why: mvm shell -- mvm bootstrap --development" >&2
fi
"""
_BOOTSTRAPPED: Final = "/opt/mvm/bootstrapped.sha256"


def packages() -> list[str]:
    return sorted([*(name for name in PACKAGES if name not in _NOT_THERE), "qemu-system"])


def template(spec: NodeSpec) -> dict[str, Any]:
    """Lima's instance file, by its schema for `minimumLimaVersion`."""
    provision = "\n".join(
        [
            "#!/bin/sh",
            "set -eu",
            "export DEBIAN_FRONTEND=noninteractive",
            "[ ! -e /var/lib/mvm/.provisioned ] || exit 0",
            "apt-get -q update",
            f"apt-get -q install --yes --no-install-recommends {' '.join(packages())}",
            f"install -d -m 0755 /var/lib/mvm {SOURCE_AREA}",
            "touch /var/lib/mvm/.provisioned",
        ]
    )
    return {
        "minimumLimaVersion": "1.1.0",
        "base": DEBIAN,
        "vmType": "vz",
        "nestedVirtualization": True,
        "cpus": spec.vcpus,
        "memory": f"{spec.mem_mib}MiB",
        "disk": f"{spec.disk_gib}GiB",
        "mounts": [],
        "containerd": {"system": False, "user": False},
        "ssh": {"loadDotSSHPubKeys": False, "forwardAgent": False},
        "provision": [{"mode": "system", "script": provision + "\n"}],
    }


def render(spec: NodeSpec) -> bytes:
    return json.dumps(template(spec), indent=2).encode() + b"\n"


def parse_list(output: bytes) -> dict[str, Any] | None:
    """The instance in the output of `limactl list --format json`: one JSON object a line. None if it is not there."""
    for line in output.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.get("name") == INSTANCE:
            return found
    return None


class LimaNode:
    """`folder` holds node.json, the size the node was made with, and the template."""

    name = "lima"

    def __init__(self, folder: Path, flake: Callable[[], Path]) -> None:
        self._folder = folder
        self._flake = flake

    def start(self, options: StartOptions, tell: Tell) -> bool:
        found = self._found()
        kept = self._kept() if found else None
        spec = _merged(kept, options)
        if found is not None and kept is not None and (spec != kept or options.rebuild):
            raise Conflict(
                "the node was made with another size",
                details=f"It has {kept.vcpus} CPUs, {kept.mem_mib} MiB and a disk of {kept.disk_gib} GiB.",
                resolution="Give it up and make it anew: mvm stop --discard",
            )
        began = found is None or found.get("status") != "Running"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if found is None:
            tell.phase("making the machine (Lima fetches Debian's image the first time)")
            file = self._folder / "lima.yaml"
            file.write_bytes(render(spec))
            (self._folder / "node.json").write_bytes(msgspec.json.encode(spec))
            self._limactl("start", "--tty=false", f"--name={INSTANCE}", str(file))
        elif began:
            tell.phase("starting the machine")
            self._limactl("start", "--tty=false", INSTANCE)
        tell.phase("installing this mvm")
        self._install()
        return began

    def _install(self) -> None:
        name, data = wheel.build(self._flake())
        requirements = wheel.requirements().encode()
        digest = hashlib.sha256(data + requirements).hexdigest()
        with tempfile.TemporaryDirectory(prefix="mvm-lima-") as scratch:
            (Path(scratch) / name).write_bytes(data)
            (Path(scratch) / "requirements.txt").write_bytes(requirements)
            # A fresh name each time: into a directory that exists, the copy would go one level deeper.
            there = f"/tmp/mvm-install-{os.urandom(6).hex()}"
            self._limactl("copy", "--recursive", scratch, f"{INSTANCE}:{there}")
            self._limactl(*self._inside("root", "/bin/sh", "-c", _INSTALL, "mvm-install", there, digest))
        script = ("/bin/sh", "-c", _BOOTSTRAP, "mvm-bootstrap", _BOOTSTRAPPED, digest)
        self._limactl(*self._inside("root", *script))

    def stop(self, *, grace_s: float, discard: bool, tell: Tell) -> str:
        found = self._found()
        how = "absent" if found is None else "stopped"
        if found is not None and found.get("status") == "Running":
            how = "shut-down"
            tell.phase("shutting down")
            # limactl bounds an orderly stop itself, at three minutes.
            if grace_s <= 0 or programs.execute([LIMACTL, "stop", INSTANCE]) != 0:
                self._limactl("stop", "--force", INSTANCE)
                how = "killed"
        if discard and found is not None:
            tell.phase("removing its disks")
            self._limactl("delete", "--force", INSTANCE)
            for name in ("node.json", "lima.yaml"):
                (self._folder / name).unlink(missing_ok=True)
        return how

    def status(self) -> NodeStatus:
        found = self._found()
        if found is None:
            return NodeStatus(self.name, "absent", folder=str(self._folder))
        spec = self._kept() or NodeSpec()
        folder = str(found.get("dir") or self._folder)
        state = _STATES.get(str(found.get("status")), "starting")
        return NodeStatus(
            driver=self.name,
            state=state,  # type: ignore[arg-type]  # the values of _STATES are states
            accel=str(found.get("vmType", "")),
            accel_reason="Lima's choice",
            image=DEBIAN,
            vcpus=spec.vcpus,
            mem_mib=spec.mem_mib,
            disk_gib=spec.disk_gib,
            disk_used_bytes=_used(Path(folder)),
            folder=folder,
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        tty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
    ) -> int:
        found = self._found()
        if found is None or found.get("status") != "Running":
            raise Conflict(
                "the node is not running",
                details=f"Lima has no running instance {INSTANCE}.",
                resolution="Start it with: mvm start",
            )
        words = [*(f"{key}={value}" for key, value in (env or {}).items()), *argv]
        # `env` ends its own options at the first word with an equals sign, or at the program.
        command = self._inside(user or "root", "/usr/bin/env", *words, cwd=cwd or "/")
        return programs.execute([LIMACTL, *command], stdin=stdin, stdout=stdout, stderr=stderr)

    def _inside(self, user: str, *argv: str, cwd: str = "/") -> list[str]:
        return ["shell", f"--workdir={cwd}", INSTANCE, "sudo", "-n", "-H", "-u", user, "--", *argv]

    def _limactl(self, *arguments: str) -> None:
        code = programs.execute([LIMACTL, *arguments], stderr=2)
        if code != 0:
            raise CommandFailed(
                f"limactl {arguments[0]} exited with {code}",
                details=" ".join([LIMACTL, *arguments])[:2000],
                resolution=f"See the machine's logs: {LIMACTL} list; run the command by hand to see more.",
            )

    def _found(self) -> dict[str, Any] | None:
        code, output = programs.capture([LIMACTL, "list", "--format", "json"])
        if code != 0:
            raise GuestError(
                "Lima does not list its machines",
                details=f"limactl list exited with {code}.",
                resolution=f"run: {LIMACTL} list",
            )
        return parse_list(output)

    def _kept(self) -> NodeSpec | None:
        try:
            return msgspec.json.decode((self._folder / "node.json").read_bytes(), type=NodeSpec)
        except (FileNotFoundError, msgspec.DecodeError):
            return None


def _merged(kept: NodeSpec | None, options: StartOptions) -> NodeSpec:
    base = kept or NodeSpec()
    return NodeSpec(
        vcpus=options.vcpus or base.vcpus,
        mem_mib=options.mem_mib or base.mem_mib,
        disk_gib=options.disk_gib or base.disk_gib,
    )


def _used(folder: Path) -> int:
    try:
        return sum(os.stat(path).st_blocks * 512 for path in folder.iterdir() if path.is_file())
    except OSError:
        return 0
