"""`mvm tenant list`. Its imports are counted: see bench/cli_startup.py."""

from __future__ import annotations

from mvm.cli.app import App, pass_app
from mvm.cli.base import command

_HEADERS = ("TENANT", "STATE", "INSTANCES", "PROFILE", "CPUS", "MEM", "IP")


@command("list", examples="mvm tenant list\nmvm tenant list --output json")
@pass_app
def list_(app: App) -> None:
    """List the tenants, with what was last recorded of them.

    A machine that died since the last command still shows as running; `mvm tenant show` looks.
    """
    rows = app.tenant_rows()
    if app.json:
        for row in rows:
            app.answer(row)
        return
    app.table(
        _HEADERS,
        [
            (r.tenant, r.state, str(r.instances), r.profile, str(r.vcpus), f"{r.mem_mib} MiB", r.ip)
            for r in rows
        ],
        "There is no tenant yet. Create one with: mvm tenant create NAME --flake nix/embedded",
    )
