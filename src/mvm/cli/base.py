"""Commands and groups as mvm wants them: common options everywhere, sub-commands imported when used.

A `LazyGroup` knows its commands from a table of (module, attribute, short help), so that a list of commands
imports none of them. A test compares the table with the commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from mvm.cli import failures
from mvm.cli.app import App, current

Entry = tuple[str, str, str]
"""Module, attribute, short help."""


def _into_app(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        # None: not given here, so what the group or the environment said stands.
        if value is not None:
            setattr(current(ctx), name, value == "json" if name == "json" else value)

    return store


def _common() -> list[click.Option]:
    return [
        click.Option(
            ["--output"], type=click.Choice(["human", "json"]), expose_value=False, callback=_into_app("json"),
            help="Answer for people (the default), or as JSON lines.",
        ),
        click.Option(
            ["--root"], metavar="DIR",
            # Somebody without root may ask about what root keeps there; each command says what it cannot see.
            type=click.Path(file_okay=False, readable=False, resolve_path=True), expose_value=False,
            callback=_into_app("root"),
            help="Where state is kept: $MVM_ROOT, or /var/lib/mvm.",
        ),
        click.Option(
            ["--quiet"], is_flag=True, default=None, expose_value=False, callback=_into_app("quiet"),
            help="Show no progress and no remarks.",
        ),
        click.Option(
            ["--debug"], is_flag=True, default=None, expose_value=False, callback=_into_app("debug"),
            help="Show a traceback with errors.",
        ),
    ]  # fmt: skip


class _Common(click.Command):
    """Adds the common options, shown in a section of their own."""

    own: list[click.Parameter]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own = list(self.params)
        self.params = [*self.own, *_common()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], "Common options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            # Newer versions of click list arguments too; the usage line and the text say what those are.
            if record is not None and record[1]:
                groups["Options" if param in self.own else "Common options"].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


class Command(_Common):
    """`failure_code`: the exit code of mvm's own failures, where the command's is the guest's program's."""

    def __init__(
        self, *args: Any, failure_code: int | None = None, epilog: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = epilog
        self.failure_code = failure_code

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if self.failure_code is not None and not ctx.resilient_parsing:
            current(ctx).failure_code = self.failure_code
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                # Commands are to be copied, so they are not wrapped.
                for line in self.examples.strip().splitlines():
                    formatter.write(f"  {line.strip()}\n")


class LazyGroup(_Common, click.Group):
    def __init__(self, *args: Any, entries: Mapping[str, Entry], **kwargs: Any) -> None:
        kwargs.setdefault("no_args_is_help", True)
        super().__init__(*args, **kwargs)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = getattr(import_module(entry[0]), entry[1])
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.entries and not ctx.resilient_parsing:
            error = click.UsageError(f"there is no command {name!a}"[:200], ctx)
            close = failures.close_to(name, list(self.entries))
            if close:
                error.mvm_hint = f"Did you mean {' or '.join(close)}?"  # type: ignore[attr-defined]
            raise error
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in self.entries.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=entry[2])
            for name, entry in self.entries.items()
            if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


class _Carried(Exception):
    """Takes an interrupt or an OSError past click's own handling of it, which prints and exits in its own way."""


class Root(LazyGroup):
    """Turns whatever comes out of a command into an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, OSError) as error:
            raise _Carried from error

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        app: App = extra.pop("obj", None) or App()
        app.json = failures.wants_json(arguments)
        app.debug = failures.wants_debug(arguments)
        app.command = ("mvm", *arguments)
        extra["standalone_mode"] = False
        code = 0
        try:
            code = super().main(arguments, prog_name or "mvm", obj=app, **extra) or 0
            sys.stdout.flush()
        except SystemExit:
            raise
        except click.exceptions.Exit as wanted:
            code = wanted.exit_code
        except BaseException as raised:
            carried = raised.__cause__ if isinstance(raised, _Carried) else None
            code = _ended(carried or raised, app)
        sys.exit(code if isinstance(code, int) else 0)


def _ended(error: BaseException, app: App) -> int:
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has seen enough.
        failures.silence_stdout()
        return 128 + 13
    try:
        return failures.report(error, app)
    except BrokenPipeError:
        return 1


def command(
    name: str, *, examples: str = "", failure_code: int | None = None, **settings: Any
) -> Callable[[Callable[..., Any]], Command]:
    """click.command with our class. `examples`: command lines, one per line."""

    def decorate(function: Callable[..., Any]) -> Command:
        made: Command = click.command(
            name, cls=Command, epilog=examples, failure_code=failure_code, **settings
        )(function)
        return made

    return decorate


def is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False
