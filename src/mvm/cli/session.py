"""Exec, shell, copy and logs of one instance, for `mvm tenant` and `mvm instance`."""

from __future__ import annotations

import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from mvm.cli.app import App
from mvm.cli.base import is_terminal
from mvm.cli.params import environment
from mvm.core.errors import InvalidInput

if TYPE_CHECKING:
    from mvm.core.ids import InstanceId
    from mvm.wire.guest_api import CopyReport, ExitStatus

OWN_FAILURE: Final = 125


class ExecOptions(msgspec.Struct, frozen=True):
    """What follows `exec` on the command line. `env`: NAME=VALUE words."""

    detach: bool = False
    interactive: bool = False
    terminal: bool = False
    env: tuple[str, ...] = ()
    cwd: str = ""
    user: str = ""


def exec_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorator in (
        click.argument("argv", nargs=-1, metavar="-- COMMAND [ARGUMENT]..."),
        click.option("--user", default="", metavar="NAME", help="Be this user in the machine; root if not given."),
        click.option("--cwd", default="", metavar="DIR", help="Directory in the machine to run it in."),
        click.option("--env", multiple=True, metavar="NAME=VALUE", help="A variable of its environment. Repeatable."),
        click.option("-t", "--tty", "terminal", is_flag=True, help="Give it a terminal."),
        click.option("-i", "--interactive", is_flag=True, help="Send it our standard input."),
        click.option(
            "-d", "--detach", is_flag=True,
            help="Start it and come back; it stays when this command is gone. Prints its process id.",
        ),
    ):  # fmt: skip
        function = decorator(function)
    return function


def logs_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorator in (
        click.option(
            "--raw",
            is_flag=True,
            help="Pass control characters on to the terminal. The machine chooses them.",
        ),
        click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last so many lines."),
        click.option("-f", "--follow", is_flag=True, help="Go on showing what is added, until Ctrl-C."),
    ):
        function = decorator(function)
    return function


def execute(app: App, instance: InstanceId, argv: tuple[str, ...], options: ExecOptions) -> None:
    """Ends the command with the program's exit code."""
    if not argv:
        raise InvalidInput(
            "there is no command to run",
            details="The command follows --, and what follows it is not read by mvm.",
            resolution=f"For example: mvm tenant exec {instance.tenant} -- uname -a",
        )
    env = environment(options.env)
    if options.detach:
        if options.interactive or options.terminal:
            raise InvalidInput(
                "--detach goes with neither --interactive nor --tty",
                details="A command that stays when mvm is gone has no terminal and no input.",
                resolution="Leave one of them out.",
            )
        _detached(app, instance, argv, env, options)
        return
    if options.terminal and not is_terminal(1):
        raise InvalidInput(
            "--tty needs a terminal here too",
            details="Standard output is not one.",
            resolution="Leave --tty out to get standard output and standard error apart.",
        )
    status = _run(app, instance, "exec", argv, env, options)
    _exit_with(status)


def shell(app: App, instance: InstanceId, *, user: str, path: str) -> None:
    """An interactive login shell, on a terminal; or one that reads its commands from standard input."""
    terminal = is_terminal(0) and is_terminal(1)
    argv = (path, "-l") if terminal else (path,)
    env = {"TERM": os.environ.get("TERM", "dumb")} if terminal else {}
    options = ExecOptions(interactive=True, terminal=terminal, user=user)
    _exit_with(_run(app, instance, "shell", argv, env, options))


def _run(
    app: App,
    instance: InstanceId,
    action: str,
    argv: tuple[str, ...],
    env: dict[str, str],
    options: ExecOptions,
) -> ExitStatus:
    from mvm.hostd.guest_channel.terminal import pump

    node = app.node()
    sys.stdout.flush()
    with node.session(instance, action, audited(action, instance, argv)) as channel:
        with (
            _standard_input(options.interactive) as stdin,
            raw_terminal(options.terminal and options.interactive),
        ):
            return pump(
                channel, argv, stdin, 1, 2, tty=options.terminal, env=env, cwd=options.cwd, user=options.user
            )


def _detached(
    app: App, instance: InstanceId, argv: tuple[str, ...], env: dict[str, str], options: ExecOptions
) -> None:
    with app.node().session(instance, "exec", audited("exec", instance, argv)) as channel:
        pid = channel.spawn(argv, env=env, cwd=options.cwd, user=options.user)
    app.answer({"instance": instance, "pid": pid})
    if not app.json:
        click.echo(str(pid))


def audited(action: str, instance: InstanceId, argv: tuple[str, ...]) -> tuple[str, ...]:
    """What the audit log gets to see: the program, and not its arguments, which may hold secrets."""
    rest = (f"({len(argv) - 1} arguments)",) if len(argv) > 1 else ()
    return ("mvm", action, str(instance), "--", *argv[:1], *rest)


def _exit_with(status: ExitStatus) -> None:
    click.get_current_context().exit(status.shell_code)


@contextmanager
def _standard_input(interactive: bool) -> Iterator[int]:
    if interactive:
        yield 0
        return
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield null
    finally:
        os.close(null)


@contextmanager
def raw_terminal(wanted: bool) -> Iterator[None]:
    """Our terminal in raw mode: every key, Ctrl-C included, is the guest's. Put back however the block ends."""
    if not wanted or not is_terminal(0):
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def copy_in(app: App, instance: InstanceId, source: str, target: str) -> None:
    from mvm.cli.progress import Progress

    command = ("mvm", "cp", source, f"{instance}:{target}")
    with app.node().session(instance, "copy-in", command) as channel:
        with Progress(app, "copying") as progress:
            report = channel.copy_in(Path(source), _in_guest(target), _sizes(progress.phase))
    _copied(app, instance, report)


def copy_out(app: App, instance: InstanceId, source: str, target: str) -> None:
    from mvm.cli.progress import Progress

    command = ("mvm", "cp", f"{instance}:{source}", target)
    with app.node().session(instance, "copy-out", command) as channel:
        with Progress(app, "copying") as progress:
            report = channel.copy_out(_in_guest(source), Path(target), _sizes(progress.phase))
    _copied(app, instance, report)


def _in_guest(path: str) -> str:
    if not path.startswith("/"):
        raise InvalidInput(
            f"{path[:80]!a} is not an absolute path",
            details="In the machine there is no present directory.",
            resolution="Write the machine's path from /, for example acme:/data/file.",
        )
    return path


def _sizes(tell: Callable[[str], None]) -> Callable[[int], None]:
    """Told the bytes so far, tells whole mebibytes."""
    last = -1

    def told(size: int) -> None:
        nonlocal last
        if size >> 20 != last:
            last = size >> 20
            tell(f"{last} MiB")

    return told


def _copied(app: App, instance: InstanceId, report: CopyReport) -> None:
    app.answer(
        {"instance": instance, "entries": report.entries, "bytes": report.size, "skipped": report.skipped}
    )
    app.say(f"Copied {report.size} bytes in {report.entries} file{'s'[: report.entries != 1]}.")
    if report.skipped:
        app.warn(f"{report.skipped} links or special files were left out")


def logs(app: App, instance: InstanceId, *, follow: bool, lines: int | None, raw: bool) -> None:
    from mvm.cli import console_log

    with app.node().console(instance) as read:
        log = console_log.ConsoleLog(read)
        show = _line_writer(app, instance, raw)
        for chunk in log.tail(lines):
            show(chunk)
        if follow:
            sys.stdout.flush()
            for chunk in log.follow():
                show(chunk)
                sys.stdout.flush()
        show(b"")


def _line_writer(app: App, instance: InstanceId, raw: bool) -> Callable[[bytes], None]:
    """Takes pieces of the log; an empty one is its end."""
    from mvm.cli.console_log import LineSplitter, visible

    splitter = LineSplitter()
    clean = not raw and is_terminal(1)

    def show(chunk: bytes) -> None:
        if app.json:
            for line in splitter.feed(chunk):
                app.answer({"instance": instance, "line": line.decode("utf-8", "replace")})
        elif clean:
            click.echo("".join(visible(line) + "\n" for line in splitter.feed(chunk)), nl=False)
        else:
            sys.stdout.buffer.write(chunk)

    return show
