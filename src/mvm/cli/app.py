"""What one invocation of the command line knows: where state lies, how to answer, whom to ask.

Answers go to standard output: for people, or with `--output json` one JSON object per line. Everything else
(errors, progress, questions) goes to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mvm.core.ids import TenantId
    from mvm.hostd.store import Store
    from mvm.standalone.facade import Standalone
    from mvm.standalone.remote import MemberNode
    from mvm.standalone.views import InstanceRow, PoolRow, TenantRow

DEFAULT_ROOT = "/var/lib/mvm"
"""Also mvm.hostd.store.DEFAULT_ROOT, whose import `mvm --help` can do without; a test compares the two."""


class App:
    """The object of every click context (`current(ctx)`)."""

    def __init__(self, opener: Callable[[App], Standalone] | None = None) -> None:
        self.root = os.path.abspath(os.environ.get("MVM_ROOT") or DEFAULT_ROOT)
        self.json = False
        self.quiet = False
        self.debug = False
        self.verbose = False
        self.failure_code: int | None = None
        """Exit code of mvm's own failures, where the command's exit code is somebody else's (exec)."""
        self.command: tuple[str, ...] = ("mvm",)
        self._opener = opener or _open
        self._node: Standalone | None = None

    def node(self) -> Standalone:
        """The facade, opened at the first call."""
        if self._node is None:
            self._node = self._opener(self)
        return self._node

    def by_daemon(self) -> bool:
        """Whether this user sees the node through mvm-hostd: without root rights, where there is a daemon."""
        if os.geteuid() == 0:
            return False
        from mvm.standalone.compose import daemon_socket

        return daemon_socket(Path(self.root)) is not None

    def store(self) -> Store:
        """For reading only: nothing is made, root rights are not asked for."""
        from mvm.hostd.store import Store

        return self.node().store if self.by_daemon() else Store(Path(self.root))

    # Rows of lists: from the documents, or from the daemon where they are not this user's to read.

    def tenant_rows(self) -> Iterator[TenantRow]:
        """Every tenant, in order."""
        if (member := self.member()) is not None:
            return member.tenant_rows()
        from mvm.standalone import views

        return views.list_tenants(self.root)

    def instance_rows(self, tenant: TenantId | None) -> Iterator[InstanceRow]:
        """The instances of one tenant, which must exist, or of all."""
        if (member := self.member()) is not None:
            return member.instance_rows(tenant)
        from mvm.standalone import views

        return views.list_instances(self.store(), self._names(tenant))

    def pool_rows(self, tenant: TenantId | None) -> Iterator[PoolRow]:
        """The pools of one tenant, which must exist, or of all."""
        if (member := self.member()) is not None:
            return member.pool_rows(tenant)
        from mvm.standalone import views

        return views.list_pools(self.store(), self._names(tenant))

    def _names(self, tenant: TenantId | None) -> list[str]:
        store = self.store()
        if tenant is not None:
            store.load_spec(tenant)
            return [str(tenant)]
        return [str(t) for t in store.tenants()]

    def member(self) -> MemberNode | None:
        """The node as mvm-hostd shows it, where this user sees no other."""
        if not self.by_daemon():
            return None
        from mvm.standalone.remote import MemberNode

        node = self.node()
        return node if isinstance(node, MemberNode) else None

    def say(self, text: str) -> None:
        """A sentence for people; not part of JSON output."""
        if not self.json and not self.quiet:
            click.echo(printable(text))

    def warn(self, text: str) -> None:
        if not self.quiet:
            click.echo(to_json({"warning": text}) if self.json else f"warning: {printable(text)}", err=True)

    def answer(self, value: Any) -> None:
        """One JSON object, if JSON was asked for."""
        if self.json:
            emit(value)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> None:
        """For people: aligned columns, drawn by rich if this is a terminal. `empty`: said without rows."""
        table = list(rows)
        if not table:
            self.say(empty)
        elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            _draw(headers, table)
        else:
            click.echo("\n".join(aligned([headers, *table])))

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask on a terminal; InvalidInput where nobody can be asked, Abort for a no."""
        if yes:
            return
        if not sys.stdin.isatty():
            from mvm.core.errors import InvalidInput

            raise InvalidInput(
                "this needs a confirmation",
                details=question,
                resolution="There is no terminal to ask on: add --yes if this is what you want.",
            )
        click.confirm(question, abort=True, err=True)


def current(ctx: click.Context) -> App:
    return ctx.find_root().ensure_object(App)


pass_app = click.make_pass_decorator(App, ensure=True)


def emit(value: Any) -> None:
    """One JSON line on standard output. Field order is the object's."""
    sys.stdout.write(to_json(value) + "\n")


def to_json(value: Any) -> str:
    import msgspec

    def plain(item: Any) -> Any:
        # msgspec encodes exact str only, and ids are subclasses of it.
        if isinstance(item, str):
            return str.__str__(item)
        raise TypeError(type(item).__name__)

    text = msgspec.json.encode(value, enc_hook=plain).decode()
    # JSON leaves alone what some terminals obey: C1 controls, and what turns the direction of writing.
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def printable(text: str) -> str:
    """One line of `text`, without control characters, which would be commands to the terminal; tabs become spaces.

    What a guest wrote, or a program quoted, ends in errors and tables; everything that is shown goes through here.
    """
    return "".join(c if c.isprintable() else " " if c == "\t" else "?" for c in text)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns two spaces apart; the last column is as long as it is. Printable, whatever is in them."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    form = "  ".join(f"%-{width}s" if width else "%s" for width in widths)
    return [form % tuple(row) for row in rows]


def _draw(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        # As text: square brackets in a name are no markup.
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


def tenant_names(root: str) -> list[str]:
    """For completion: what can be read, in order, or nothing."""
    try:
        with os.scandir(f"{root}/tenants") as entries:
            return sorted(e.name for e in entries if os.path.exists(f"{e.path}/spec.json"))
    except OSError:
        return []


def _open(app: App) -> Standalone:
    from mvm.standalone.facade import Standalone

    return Standalone.open(Path(app.root), app.command)
