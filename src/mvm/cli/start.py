"""`mvm start`."""

from __future__ import annotations

import click

from mvm.cli.app import App, pass_app
from mvm.cli.base import command


@command("start", examples="mvm start\nmvm start --cpus 4 --memory 8192\nmvm start --rebuild")
@click.option("--cpus", type=click.IntRange(1, 64), help="Its CPUs; 2 for a new node.")
@click.option(
    "--memory", metavar="MIB", type=click.IntRange(1024, 1 << 20), help="Its memory; 4096 for a new node."
)
@click.option(
    "--disk", metavar="GIB", type=click.IntRange(2, 4096), help="Its state disk; 16 for a new node."
)
@click.option(
    "--rebuild", is_flag=True, help="Make the image anew, from what the package archive offers now."
)
@click.option(
    "--mirror", metavar="URL", help="Take Debian's packages from here, not from this machine's sources."
)
@click.option("-v", "--verbose", is_flag=True, help="Show what the image's build says.")
@pass_app
def start(
    app: App,
    cpus: int | None,
    memory: int | None,
    disk: int | None,
    rebuild: bool,
    mirror: str | None,
    verbose: bool,
) -> None:
    """Start the development node: a Linux machine in which everything that mvm needs is real.

    The first start builds its image from Debian packages, which takes a minute or more; later ones boot it. The mvm
    in the node is the one that you are running. On macOS the node is Lima's.
    """
    from mvm.cli import dev
    from mvm.cli.progress import Progress
    from mvm.dev.model import StartOptions

    app.verbose = verbose
    options = StartOptions(vcpus=cpus, mem_mib=memory, disk_gib=disk, rebuild=rebuild, mirror=mirror)
    node = dev.node(app)
    with Progress(app, "starting the development node") as progress:
        changed = node.start(options, progress)
    status = node.status()
    app.answer({"node": status, "changed": changed})
    app.say("The development node is running." if changed else "The development node was running already.")
    if changed:
        app.say("Use it with: mvm shell")
