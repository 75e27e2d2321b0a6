"""`mvm audit verify`."""

from __future__ import annotations

from mvm.cli.app import App, pass_app
from mvm.cli.base import LazyGroup, command
from mvm.cli.params import optional_tenant
from mvm.core.errors import IntegrityError
from mvm.core.ids import TenantId

group = LazyGroup(
    "audit",
    entries={"verify": ("mvm.cli.audit", "verify", "Check that no entry was changed, lost or moved.")},
    help="""What was done, by a log that shows tampering.

    Every tenant has a log of what was done to it and by which command. Each entry seals the one before.""",
)


@command("verify", examples="mvm audit verify\nmvm audit verify acme")
@optional_tenant
@pass_app
def verify(app: App, tenant: TenantId | None) -> None:
    """Check the audit log of a tenant, or of all, those that were destroyed included.

    Shows any entry that was edited, lost or moved, by its line, and exits with 13. The head it prints is the seal
    of the whole log: kept elsewhere, it also shows if the log is rewritten.
    """
    node = app.node()
    failures = []
    tenants = [tenant] if tenant is not None else node.audited()
    for name in tenants:
        try:
            verified = node.verify_audit(name)
        except IntegrityError as error:
            failures.append(name)
            app.answer({"tenant": name, "ok": False, "problem": error.brief, "details": error.details})
            app.say(f"{name}: {error.brief}")
            if tenant is not None:
                raise
            continue
        app.answer({"tenant": name, "ok": True, "entries": verified.count, "head": verified.head})
        app.say(f"{name}: {verified.count} entries, sound, head {verified.head}")
    if failures:
        raise IntegrityError(
            f"{len(failures)} of {len(tenants)} audit logs are not sound",
            details=", ".join(failures),
            resolution="Keep the files as evidence and compare them with copies.",
        )
    if not tenants:
        app.say("There is no audit log yet.")
