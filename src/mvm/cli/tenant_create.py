"""`mvm tenant create`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvm.cli.app import App, pass_app
from mvm.cli.base import command
from mvm.cli.params import SIZE, ChoiceType, tenant_argument
from mvm.core.ids import TenantId
from mvm.core.spec import EgressRule, Profile, Quotas, SeccompPolicy, SleepPolicy, new_tenant

_EXAMPLES = """
mvm tenant create acme --flake nix/embedded --profile minimal --cpus 1 --mem 256
mvm tenant create ci --flake ./guests --mem 2G --data-disk 20G --egress 203.0.113.7:443
mvm tenant create agent --flake github:owner/name --idle-seconds 300
"""


@command("create", examples=_EXAMPLES)
@tenant_argument
@click.option(
    "--flake",
    "flake_ref",
    required=True,
    metavar="REF",
    help="What its machine is built from: a directory with a flake.nix, a Nix flake reference, or nix/embedded "
    "for the one that comes with mvm.",
)
@click.option(
    "--profile",
    type=ChoiceType([p.value for p in Profile]),
    default=Profile.BASELINE.value,
    show_default=True,
    help="Which variant of the flake.",
)
@click.option("--cpus", "vcpus", type=int, default=1, show_default=True, help="Virtual CPUs.")
@click.option(
    "--mem",
    "mem_mib",
    type=SIZE,
    metavar="SIZE",
    default=256,
    show_default=True,
    help="Memory, in MiB or as 2G.",
)
@click.option(
    "--data-disk",
    "data_disk_mib",
    type=SIZE,
    metavar="SIZE",
    default="2G",
    show_default=True,
    help="Size of the encrypted data disk, /data in the machine.",
)
@click.option(
    "--seccomp",
    type=ChoiceType([p.value for p in SeccompPolicy]),
    default=SeccompPolicy.BASELINE.value,
    show_default=True,
    help="System-call filter of the virtual machine monitor.",
)
@click.option("--metadata", is_flag=True, help="Offer the metadata service on the gateway's address.")
@click.option(
    "--egress",
    multiple=True,
    metavar="RULE",
    help="Let traffic out only to this network: 203.0.113.0/24, 203.0.113.7:443, 203.0.113.7:53/udp. Repeatable; "
    "without it anywhere outside the fleet.",
)
@click.option("--no-egress", is_flag=True, help="Let no traffic out.")
@click.option("--ip", metavar="ADDRESS", help="Fixed address of the first instance, inside 10.240.0.0/12.")
@click.option("--mac", metavar="MAC", help="Fixed MAC address of the first instance.")
@click.option("--idle-seconds", "idle_s", type=int, help="Sleep after this long without activity.")
@click.option(
    "--min-running",
    "min_running_s",
    type=int,
    default=SleepPolicy().min_running_s,
    show_default=True,
    help="Seconds to stay awake after a start or a wake, idle or not.",
)
@click.option("--pinned", is_flag=True, help="Never put it to sleep by policy.")
@click.option(
    "--quota-cpus", "quota_vcpus", type=int, help="At most this many virtual CPUs in all its instances."
)
@click.option(
    "--quota-mem", "quota_mem_mib", type=SIZE, metavar="SIZE", help="At most this much memory in all."
)
@click.option(
    "--quota-disk", "quota_disk_mib", type=SIZE, metavar="SIZE", help="At most this much data disk in all."
)
@click.option("--quota-instances", type=int, help="At most this many instances.")
@click.option("--quota-running", type=int, help="At most this many of them running.")
@pass_app
def create(app: App, /, tenant: TenantId, **given: Any) -> None:
    """Make a tenant known: write down what it is, and give it a subnet, an address and a key.

    Nothing is built or started. Creating a tenant again with the same options changes nothing; with other options
    it is refused.

    What --seccomp, --metadata, --egress, --idle-seconds, --min-running, --pinned and the quotas on CPUs, memory and
    running instances ask for is written down; in this version nothing acts on it yet.
    """
    egress = tuple(EgressRule.parse(rule) for rule in given.pop("egress"))
    if given.pop("no_egress"):
        if egress:
            raise click.UsageError("--egress and --no-egress exclude each other")
        rules: tuple[EgressRule, ...] | None = ()
    else:
        rules = egress or None
    if given["mac"]:
        from mvm.core.addressing import parse_mac

        given["mac"] = parse_mac(given["mac"])
    quotas = Quotas(**{name: given.pop(f"quota_{name}") for name in Quotas.__struct_fields__})
    sleep = SleepPolicy(**{name: given.pop(name) for name in SleepPolicy.__struct_fields__})
    flake_ref = given.pop("flake_ref")
    given["profile"] = Profile(given["profile"])
    given["seccomp"] = SeccompPolicy(given["seccomp"])
    # Checked before the facade is opened, which needs root.
    spec = new_tenant(tenant, flake_ref, egress=rules, quotas=quotas, sleep=sleep, **given)
    node = app.node()
    resolved = node.workshop.resolve(flake_ref, Path.cwd())
    if resolved != flake_ref:
        spec = new_tenant(tenant, resolved, egress=rules, quotas=quotas, sleep=sleep, **given)
    done = node.create(spec)
    app.answer(
        {
            "tenant": tenant,
            "created": not done.existed,
            "subnet": done.subnet,
            "ip": done.ip,
            "flake_ref": resolved,
        }
    )
    if done.existed:
        app.say(f"{tenant} exists already, as asked for; nothing changed.")
        return
    app.say(f"Created {tenant}: {done.ip} in {done.subnet}.")
    if node.keys.warning:
        app.warn(node.keys.warning)
    app.say(f"Next: mvm tenant build {tenant}")
