"""Parameter types: text from the command line to checked values, with completion."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import CompletionItem

from mvm.cli import failures
from mvm.cli.app import current, tenant_names
from mvm.core.errors import InvalidInput
from mvm.core.ids import InstanceId, PoolId, TenantId

if TYPE_CHECKING:
    _Type = click.ParamType[Any]
    _Choice = click.Choice[str]
else:
    # Generic only in newer versions of click.
    _Type, _Choice = click.ParamType, click.Choice

_SIZE = re.compile(r"([0-9]{1,9})\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_MIB = {"": 1, "m": 1, "g": 1024, "t": 1024 * 1024}


class TenantType(_Type):
    name = "tenant"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> TenantId:
        return value if isinstance(value, TenantId) else TenantId.parse(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(n) for n in tenant_names(current(ctx).root) if n.startswith(incomplete)]


class PoolType(_Type):
    name = "pool"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> PoolId:
        return value if isinstance(value, PoolId) else PoolId.parse(value)


class InstanceType(_Type):
    name = "instance"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> InstanceId:
        return value if isinstance(value, InstanceId) else InstanceId.parse(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from mvm.standalone.views import list_instances

        app = current(ctx)
        try:
            rows = list(list_instances(app.store(), tenant_names(app.root)))
        except OSError:
            return []
        return [CompletionItem(row.instance) for row in rows if row.instance.startswith(incomplete)]


class SizeType(_Type):
    """`512`, `512M`, `2G`, `2GiB`: mebibytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None or match[2].lower() == "k":
            self._refuse(value, param, ctx)
        return int(match[1]) * _MIB[match[2].lower()]

    def _refuse(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
        self.fail(f"{value[:40]!a} is not a size. Use mebibytes, or a unit: 256, 256M, 2G", param, ctx)


class ChoiceType(_Choice):
    """A choice that suggests what was meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            names = [str(choice) for choice in self.choices]
            shown = f"{str(value)[:40]!a} is not one of {', '.join(names)}"
            fresh = click.BadParameter(shown, ctx=ctx, param=param)
            close = failures.close_to(str(value), names)
            if close:
                fresh.mvm_hint = f"Did you mean {close[0]}?"  # type: ignore[attr-defined]
            raise fresh from error


def environment(pairs: tuple[str, ...]) -> dict[str, str]:
    """`("K=V", ...)` as a mapping. InvalidInput for a pair without a name."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InvalidInput(
                f"{pair[:40]!a} is not NAME=VALUE",
                details="Each --env gives one variable of the program's environment.",
                resolution="Use, for example, --env LANG=C.UTF-8.",
            )
        found[name] = value
    return found


TENANT = TenantType()
POOL = PoolType()
INSTANCE = InstanceType()
SIZE = SizeType()

tenant_argument = click.argument("tenant", type=TENANT, metavar="TENANT")
optional_tenant = click.argument("tenant", type=TENANT, metavar="[TENANT]", required=False)
instance_argument = click.argument("instance", type=INSTANCE, metavar="INSTANCE")
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
wipe_option = click.option(
    "--wipe-volumes",
    is_flag=True,
    help="Delete the data volumes too: their keys first, then their bytes. This cannot be undone.",
)
