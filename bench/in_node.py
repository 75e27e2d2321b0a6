"""Run a benchmark in the development node, which has to run (`mvm start`). Needs root.

    python -m bench.in_node [--firecracker DIR] [--program sleep_wake|profile_wake|uffd] [ARGUMENT...]

Builds the guest here, where nix is, carries it, the benchmarks and what DIR holds (firecracker and jailer) into the
node, and runs there, with every other argument:

    python -m bench.in_node --firecracker ./release --vmm firecracker --sizes 256,1024

mvm itself is the one that is installed in the node. What was carried is removed afterwards.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.node import FLAKE

from mvm.core.errors import MvmError
from mvm.core.ids import TenantId
from mvm.core.spec import Profile, new_tenant
from mvm.linux.process import run
from mvm.standalone.facade import Standalone

PLACE = "/srv/mvm-bench"
PYTHON = "/opt/mvm/bin/python"
RUN_S = 6 * 3600.0
_CARRY_S = 600.0


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="bench.in_node", description=__doc__.split("\n", 1)[0], allow_abbrev=False
    )
    parser.add_argument("--firecracker", type=Path, metavar="DIR", help="firecracker and jailer, here")
    parser.add_argument("--program", choices=("sleep_wake", "profile_wake", "uffd"), default="sleep_wake")
    return parser.parse_known_args(arguments)


def command(program: str, rest: Sequence[str], *, firecracker: bool) -> list[str]:
    """What runs in the node."""
    given = ["--revision", f"{PLACE}/revision", *(["--firecracker", f"{PLACE}/firecracker"] * firecracker)]
    return [PYTHON, "-m", f"bench.{program}", *given, *rest]


def main(arguments: Sequence[str] | None = None) -> int:
    options, rest = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="mvm-bench-", dir="/var/tmp") as folder:
            data = _archive(_built(Path(folder)), options.firecracker)
        _mvm(
            "shell",
            "--",
            "/bin/sh",
            "-euc",
            f"mkdir -p {PLACE}; tar -x -m -C {PLACE} --no-same-owner",
            stdin=data,
        )
        try:
            wanted = command(options.program, rest, firecracker=options.firecracker is not None)
            _mvm("shell", "--cwd", PLACE, "--", *wanted, stream=True)
        finally:
            _mvm("shell", "--", "rm", "-rf", PLACE)
    except MvmError as error:
        print(f"error: {error.brief}\n{error.details}\n{error.resolution}", file=sys.stderr)
        return 1
    return 0


def _built(root: Path) -> Path:
    """The directory of a revision of the benchmarks' flake."""
    node = Standalone.open(root / "root")
    tenant = TenantId("bench")
    node.create(new_tenant(tenant, FLAKE, profile=Profile.MINIMAL))
    return node.store.revisions_dir / node.build(tenant).built.revision


def _archive(revision: Path, firecracker: Path | None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for source in sorted(Path(__file__).parent.glob("*.py")):
            archive.add(source, arcname=f"bench/{source.name}")
        archive.add(revision, arcname="revision")
        for name in ("firecracker", "jailer") if firecracker is not None else ():
            assert firecracker is not None
            archive.add(firecracker / name, arcname=f"firecracker/{name}", filter=_roots)
    return out.getvalue()


def _roots(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """As an installed program's: others cannot change it."""
    entry.mode = 0o755
    return entry


def _mvm(*arguments: str, stdin: bytes = b"", stream: bool = False) -> None:
    env = {name: value for name, value in os.environ.items() if name.startswith("MVM_")}
    run(
        [sys.executable, "-m", "mvm.cli", *arguments],
        stdin=stdin,
        env=env,
        timeout=RUN_S if stream else _CARRY_S,
        on_line=(lambda line: print(line, flush=True)) if stream else None,
    )


if __name__ == "__main__":
    sys.exit(main())
