"""`mvm tenant`: the table of its commands. Each set of commands is in a module of its own."""

from __future__ import annotations

from mvm.cli.base import LazyGroup

group = LazyGroup(
    "tenant",
    entries={
        "create": ("mvm.cli.tenant_create", "create", "Make a tenant known and give it an address."),
        "build": ("mvm.cli.tenant_build", "build", "Build what the tenant runs from its flake."),
        "run": ("mvm.cli.tenant_life", "run", "Start the tenant's instances."),
        "exec": ("mvm.cli.tenant_session", "exec_", "Run a command in the tenant's machine."),
        "ssh": ("mvm.cli.tenant_session", "ssh", "Open a shell in the tenant's machine."),
        "cp": ("mvm.cli.tenant_session", "cp", "Copy files into or out of the tenant's machine."),
        "logs": ("mvm.cli.tenant_session", "logs", "Show the console of the tenant's machine."),
        "sleep": ("mvm.cli.tenant_life", "sleep", "Put the tenant to sleep, its memory encrypted."),
        "wake": ("mvm.cli.tenant_life", "wake", "Wake the tenant where it left off."),
        "stop": ("mvm.cli.tenant_life", "stop", "Shut the tenant's instances down."),
        "destroy": ("mvm.cli.tenant_destroy", "destroy", "Remove the tenant and what it has."),
        "list": ("mvm.cli.tenant_list", "list_", "List the tenants."),
        "show": ("mvm.cli.tenant_show", "show", "Show one tenant, with its instances and revisions."),
        "pin": ("mvm.cli.tenant_build", "pin", "Build from this flake reference from now on."),
        "rollback": ("mvm.cli.tenant_build", "rollback", "Go back to an earlier revision."),
        "secrets": ("mvm.cli.tenant_secrets", "group", "Set and rotate the tenant's secrets."),
    },
    help="""Create, build, run, use and put to sleep tenants.

    A tenant has one instance (a microVM) unless pools say otherwise; verbs here act on all of a tenant's
    instances, or take --instance where they need one.""",
)
