"""This checkout's driver tests in the node, and what runs them: pytest, by tar from the environment that runs now.

Everything carried is pure Python; mvm itself is the one that is installed in the node.
"""

from __future__ import annotations

import io
import tarfile
from importlib import metadata
from pathlib import Path

from tests.node.conftest import ROOT, Rig

PLACE = "/srv/checkout"
LIBRARY = "/srv/pytest"
NEEDED = ("pytest", "pluggy", "iniconfig", "packaging", "Pygments")
OURS = ("tests", "scripts/lib", "docs/requirements.toml", "pyproject.toml")


def carry(rig: Rig, revision: Path) -> str:
    """The directory in the node that `revision`, a directory here, has become."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in OURS:
            archive.add(ROOT / name, arcname=f"{PLACE}/{name}", filter=_no_bytecode)
        for name in NEEDED:
            for file in metadata.distribution(name).files or ():
                if ".." not in file.parts and file.suffix != ".pyc":
                    archive.add(file.locate(), arcname=f"{LIBRARY}/{file}")
        archive.add(revision, arcname=f"{PLACE}/revision")
    # Owner and times are not carried over: a node's clock may be behind.
    rig.sh("tar -x -m -C / --no-same-owner", stdin=out.getvalue())
    return f"{PLACE}/revision"


def _no_bytecode(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry
