"""Errors as the user sees them: one look, one exit code each, whoever raised.

    error: <brief>
      <details>
    next: <resolution>

With `--output json`, one line on standard error: {"error": {kind, brief, details, resolution, exit_code}}.
A traceback is shown with --debug only.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from mvm.core.errors import InvalidInput, MissingPrerequisite, MvmError, ResourceExhausted

if TYPE_CHECKING:
    from mvm.cli.app import App

INTERRUPTED = 130
_NO_SPACE = (28, 122)  # ENOSPC, EDQUOT


class Terminated(KeyboardInterrupt):
    """A signal asked this command to end: it cleans up as after Ctrl-C. `number`: which signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Interrupted(MvmError):
    """Ctrl-C, or a signal that asks to end; then the exit code is 128 and its number."""

    exit_code = INTERRUPTED
    kind = "interrupted"


def report(error: BaseException, app: App) -> int:
    """Show `error`; the exit code."""
    if app.debug and not isinstance(error, click.ClickException | click.Abort):
        import traceback

        traceback.print_exception(error)
    shown = translated(error, app)
    code = shown.exit_code
    if isinstance(error, Terminated):
        code = 128 + error.number
    elif app.failure_code is not None and code != INTERRUPTED:
        code = app.failure_code
    if app.json:
        from mvm.cli.app import to_json

        fields = {
            "kind": shown.kind,
            "brief": shown.brief,
            "details": shown.details,
            "resolution": shown.resolution,
            "exit_code": code,
        }
        text = to_json({"error": fields})
    else:
        text = human(shown)
    click.echo(text, err=True)
    return code


def human(error: MvmError) -> str:
    """As above. Details quote guests' consoles and programs: what would command the terminal is not passed on."""
    from mvm.cli.app import printable

    lines = [f"error: {error.brief}"]
    lines += [f"  {line}" for line in error.details.splitlines()]
    if error.resolution:
        first, *rest = error.resolution.splitlines()
        lines += [f"next: {first}", *(f"  {line}" for line in rest)]
    return "\n".join(printable(line) for line in lines)


def translated(error: BaseException, app: App) -> MvmError:
    """Any exception as one with brief, details and resolution."""
    if isinstance(error, MvmError):
        return error
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return Interrupted(
            "interrupted",
            details="" if isinstance(error, click.Abort) else "What was under way may be half done.",
            resolution=""
            if isinstance(error, click.Abort)
            else "The next command on it finishes or undoes it.",
        )
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return MissingPrerequisite(
            "mvm needs root here",
            details=str(error),
            resolution=f"Run the command with sudo: the state below {app.root} belongs to root.",
        )
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return ResourceExhausted(
            "the disk is full", details=str(error), resolution="Free some space and run the command again."
        )
    if isinstance(error, OSError):
        return MvmError(
            "the system refused something",
            details=str(error),
            resolution="Run the command again with --debug to see where.",
        )
    return MvmError(
        f"this is a defect of mvm ({type(error).__name__})",
        details=str(error)[:500],
        resolution="Run the command again with --debug and report what it prints.",
    )


def _usage(error: click.ClickException) -> InvalidInput:
    details, resolution = "", "See the help: mvm --help"
    brief = error.format_message().rstrip(".")
    if isinstance(error, click.UsageError) and error.ctx is not None:
        details = error.ctx.get_usage()
        resolution = f"See the help: {error.ctx.command_path} --help"
    if isinstance(error, click.NoSuchOption):
        brief = f"there is no option {error.option_name} here"
        if error.possibilities:
            resolution = f"Did you mean {' or '.join(sorted(error.possibilities))}? {resolution}"
    elif isinstance(error, click.MissingParameter):
        what = error.param.make_metavar(error.ctx) if error.param is not None and error.ctx else "something"
        if error.param is not None and error.param.param_type_name == "option":
            what = error.param.opts[0]
        brief = f"{what} is missing"
    elif isinstance(error, click.BadParameter) and error.param is not None and error.ctx is not None:
        name = (
            error.param.opts[0]
            if error.param.param_type_name == "option"
            else error.param.make_metavar(error.ctx)
        )
        brief = f"{name}: {brief_of(error)}"
    hint = getattr(error, "mvm_hint", "")
    if hint:
        resolution = f"{hint} {resolution}"
    if brief[1:2].islower():
        brief = brief[:1].lower() + brief[1:]
    return InvalidInput(brief, details=details, resolution=resolution)


def brief_of(error: click.BadParameter) -> str:
    return str(error.message).rstrip(".")


def close_to(wrong: str, known: list[str]) -> list[str]:
    """Up to three names that `wrong` may have been meant to be, none much less likely than the first."""
    from difflib import SequenceMatcher, get_close_matches

    found = get_close_matches(wrong, known, n=3, cutoff=0.6)
    likely = [SequenceMatcher(None, name, wrong).ratio() for name in found]
    return [name for name, ratio in zip(found, likely, strict=True) if ratio > likely[0] - 0.15]


def silence_stdout() -> None:
    """After a broken pipe: the interpreter's own flush at exit must not complain again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass


def wants_json(arguments: list[str]) -> bool:
    """Whether JSON was asked for, read before arguments are parsed, for errors in parsing them."""
    value = ""
    for at, word in enumerate(arguments):
        if word == "--":
            break
        if word == "--output" and at + 1 < len(arguments):
            value = arguments[at + 1]
        elif word.startswith("--output="):
            value = word.partition("=")[2]
    return value == "json"


def wants_debug(arguments: list[str]) -> bool:
    return "--debug" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)
