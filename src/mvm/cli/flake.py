"""`mvm flake update`."""

from __future__ import annotations

from pathlib import Path

import click

from mvm.cli.app import App, pass_app
from mvm.cli.base import LazyGroup, command
from mvm.cli.progress import Progress

group = LazyGroup(
    "flake",
    entries={"update": ("mvm.cli.flake", "update", "Lock a flake to the packages offered now.")},
    help="""What guests are made from.

    The flakes that come with mvm build from Debian packages, each locked by version and SHA-256.""",
)


@command("update", examples="mvm flake update ./guests\nmvm flake update nix/embedded --copy-to ./guests")
@click.argument("flake_ref", metavar="FLAKE")
@click.option(
    "--copy-to", type=click.Path(path_type=Path), metavar="DIR", help="Leave FLAKE as it is; update a copy."
)
@pass_app
def update(app: App, flake_ref: str, copy_to: Path | None) -> None:
    """Lock a flake to the package versions that this machine's Debian mirror offers now.

    Mirrors drop old versions, and a build from a lock they have moved past fails. The new lock gives new revisions;
    nothing that is built or running changes.
    """
    from mvm.standalone import flakes

    with Progress(app, f"updating {flake_ref}") as progress:
        folder, done = flakes.update(flake_ref, Path.cwd(), copy_to=copy_to, on_line=progress.line)
    app.answer(
        {
            "flake": str(folder),
            "lock_sha256": done.lock_hash,
            "changes": {name: {"old": old, "new": new} for name, (old, new) in sorted(done.changes.items())},
        }
    )
    for name, (old, new) in sorted(done.changes.items()):
        app.say(f"{name}  {old or 'not there'} -> {new or 'gone'}")
    if not done.changes:
        app.say(f"{folder} is up to date.")
    else:
        app.say(f"Updated {folder}: {len(done.changes)} packages. Build with: mvm tenant build TENANT")
