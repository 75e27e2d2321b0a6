"""`mvm sync`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from mvm.cli.app import App, pass_app
from mvm.cli.base import command
from mvm.core.errors import GuestError


@command("sync", examples="mvm sync\nmvm sync ./my-flake\nmvm sync nix/embedded --name flake")
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(path_type=Path))
@click.option(
    "--name", metavar="NAME", help="What it is called in the node; the directory's own name if not given."
)
@pass_app
def sync(app: App, folder: Path, name: str | None) -> None:
    """Copy a directory, such as a flake or a checkout, into the development node's source area.

    It becomes /srv/mvm/NAME in the node, exactly as it is here: what is gone here is gone there. In a git work tree,
    what git ignores stays behind. Times, owners and the rest of the modes do not count: the same tree has the same
    id, and gives the same builds, from everywhere.
    """
    from mvm.cli import dev
    from mvm.cli.progress import Progress
    from mvm.dev import sync as trees

    node = dev.node(app)
    called = name or trees.default_name(folder)
    place = trees.target(called)
    with Progress(app, "copying into the development node") as progress:
        progress.phase("reading")
        tree = trees.pack(folder, _capture)
        progress.phase(f"sending {len(tree.data) >> 10} KiB")
        with tempfile.TemporaryFile() as archive:
            archive.write(tree.data)
            archive.flush()
            os.lseek(archive.fileno(), 0, os.SEEK_SET)
            code = node.run(
                trees.receive_command(called, tree), stdin=archive.fileno(), stdout=2, stderr=2, cwd="/"
            )
    if code != 0:
        raise GuestError(
            "the node did not take the directory",
            details=f"Unpacking it into {place} exited with {code}.",
            resolution="See the messages above, and the room on its disk: mvm shell -- df -h /srv/mvm",
        )
    app.answer({"place": place, "id": tree.id, "files": tree.files, "bytes": len(tree.data)})
    app.say(f"Copied {tree.files} files to {place} ({tree.id[:16]}).")


def _capture(argv: list[str]) -> tuple[int, bytes]:
    from mvm.dev import programs

    return programs.capture(argv)
