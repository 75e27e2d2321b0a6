"""docs/cli.md, from the commands themselves and the error classes: `python -m mvm.cli.reference > docs/cli.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from mvm.cli import failures, session
from mvm.cli.base import Command, LazyGroup
from mvm.cli.root import root
from mvm.core import errors

_INTRO = """\
# The command line

Generated from the commands by `python -m mvm.cli.reference`; do not edit.

`mvm NOUN VERB`. Answers go to standard output; errors, progress and questions to standard error. Every command takes
the common options:

| option | |
|---|---|
"""

_AFTER_OPTIONS = """
Changing commands can be repeated: what is already as asked for is left alone, and the command says so and exits with 0.
A command that was interrupted (Ctrl-C, a kill, a power loss) is finished or undone by the next one on the same
instance.

## JSON

With `--output json` a command prints JSON objects, one per line: a list one per row, an action one per instance it
acted on. Times end in `_ns` (nanoseconds since 1970, or a duration), sizes in `_mib` or `_bytes`. An error is one line
on standard error:

```
{"error":{"kind":"conflict","brief":"...","details":"...","resolution":"...","exit_code":11}}
```

Standard error can also have lines `{"warning":"..."}`, `{"progress":"..."}` and, with `--verbose`, `{"log":"..."}`;
`--quiet` leaves them out.

| command | fields |
|---|---|
| `tenant create` | `tenant`, `created`, `subnet`, `ip`, `flake_ref` |
| `tenant build` | `tenant`, `revision`, `changed`, `flake_ref`, `lock_sha256`, `store_paths`, `artifacts`, \
`collected` |
| `tenant run`, `sleep`, `wake`, `stop`, `instance start`, ... | `instance`, `action`, `state`, `changed`, `skipped`, \
`note`, `ip`, `revision`, and for sleep and wake `receipt` |
| `tenant list` | `tenant`, `state`, `instances`, `running`, `profile`, `vcpus`, `mem_mib`, `ip`, `flake_ref` |
| `tenant show` | `tenant`, `spec`, `subnet`, `instances`, `revisions`, `current`, `pinned` |
| `tenant destroy` | `tenant`, `destroyed`, `instances`, `kept_volumes` |
| `tenant pin` | `tenant`, `pinned` |
| `tenant rollback` | `tenant`, `revision`, `changed`, `instances` |
| `tenant secrets set`, `rotate` | `tenant`, `version`, `names`, `refreshed`, `failed` |
| `tenant exec --detach` | `instance`, `pid` |
| `tenant cp` | `instance`, `entries`, `bytes`, `skipped` |
| `tenant logs`, `instance logs` | `instance`, `line` |
| `pool create`, `scale`, `destroy` | `tenant`, `pool`, `changed`, `count`, `added`, `removed` |
| `pool list` | `tenant`, `pool`, `count`, `running`, `vcpus`, `mem_mib`, `data_disk_mib` |
| `pool show` | `pool`, `instances` |
| `instance list` | `instance`, `state`, `ip`, `revision`, `changed_ns` |
| `instance show` | `instance`, `state`, `pending`, `ip`, `mac`, `tap`, `bridge`, `revision`, `vmm`, `pid`, \
`snapshot`, `created_ns`, `changed_ns`, `last_receipt`, `last_error` |
| `instance destroy` | `instance`, `destroyed` |
| `audit verify` | `tenant`, `ok`, `entries`, `head`, or `problem` and `details` |
| `node info` | `node_id`, `root`, `host`, `tools`, `nft`, `vmm`, `key_provider`, `key_warning`, `networks`, \
`instances`, `unseen` |
| `doctor` | `id`, `what`, `result` (`ok`, `warning`, `fail`, `n/a`), `seen`, `fix`; with `--repair` \
first `undone` (`kind`, `name`, `why`) |
| `net verify` | one for each `kind`: `difference` (`where`, `what`, `fix`), `probe` (`instance`, `probe`, `ok`, \
`must`, `seen`), \
`summary` (`ok`, `tenants`, `running`, `differences`, `probes`, `failed`) |
| `posture` | `id`, `area`, `mode`, `status` (`held`, `not-held`, `not-there`, `nothing`, `unknown`), `statement`, \
`check`, `seen`, `requires`; last `mode`, `missing`, `unseen` |
| `start` | `node` (`driver`, `state`, `accel`, `accel_reason`, `image`, `vcpus`, `mem_mib`, `disk_gib`, \
`disk_used_bytes`, `uptime_s`, `pid`, `folder`), `changed` |
| `stop` | `how` (`absent`, `stopped`, `shut-down`, `killed`), `discarded`, `changed` |
| `status` | `node`, as for `start` |
| `sync` | `place`, `id`, `files`, `bytes` |
| `completion` | `shell`, `script` |
| `--version` | `version` |

`exec` without `--detach` and `ssh` print what the program in the machine prints, whatever `--output` says.

## Exit codes

| code | kind | meaning |
|---|---|---|
| 0 | | It is as asked for. |
"""

_SESSION_CODES = f"""
`exec` and `ssh` exit with the code of the program they ran, 128 and the signal's number if it was killed, and
{session.OWN_FAILURE} if mvm itself failed; the error's `kind` then says why.

## What destroying keeps

`mvm tenant destroy` and `mvm instance destroy` keep data volumes, and the keys that open them, unless `--wipe-volumes`
is given. A tenant's audit log stays where it is, `tenants/TENANT/audit.log` below the state root; a tenant created
again under the name continues it, and `mvm audit verify TENANT` covers both. Its subnet is never given out again.

## Commands
"""


def render_page() -> str:
    ctx = click.Context(root, info_name="mvm")
    parts = [_INTRO]
    parts += [f"| `{option}` | {text} |\n" for option, text in _options(root, ctx, common=True)]
    parts.append(_AFTER_OPTIONS)
    parts += [f"| {code} | {kind} | {meaning} |\n" for code, kind, meaning in exit_codes()]
    parts.append(_SESSION_CODES)
    parts += [_section(command, context) for command, context in _walk(root, ctx)]
    return "\n".join(line.rstrip() for line in "".join(parts).rstrip().split("\n")) + "\n"


def exit_codes() -> list[tuple[int, str, str]]:
    """(code, kind, meaning) of every error class, and of an interrupt."""
    kinds = [k for k in vars(errors).values() if inspect.isclass(k) and issubclass(k, errors.MvmError)]
    rows = [(k.exit_code, f"`{k.kind}`", _first_line(k)) for k in kinds if k is not errors.MvmError]
    rows.append(
        (errors.MvmError.exit_code, f"`{errors.MvmError.kind}`", "A defect of mvm; --debug shows where.")
    )
    rows.append((failures.INTERRUPTED, f"`{failures.Interrupted.kind}`", _first_line(failures.Interrupted)))
    rows.append((128 + 13, "", "Whoever read the output went away."))
    return sorted(rows)


def _first_line(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def _walk(group: LazyGroup, ctx: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=ctx)
        yield command, inner
        if isinstance(command, LazyGroup):
            yield from _walk(command, inner)


def _section(command: click.Command, ctx: click.Context) -> str:
    depth = (
        "###"
        if isinstance(command, click.Group) and ctx.parent is not None and ctx.parent.parent is None
        else "####"
    )
    text = inspect.cleandoc(command.help or "").replace("\b\n", "")
    out = [f"\n{depth} {ctx.command_path}\n\n{text}\n"]
    if isinstance(command, Command):
        usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
        out.append(f"\n```\n{usage}\n```\n")
        rows = list(_options(command, ctx, common=False))
        if rows:
            out.append("\n| option | |\n|---|---|\n")
            out += [f"| `{option}` | {help_text} |\n" for option, help_text in rows]
        if command.examples:
            out.append(
                "\nExamples:\n\n```\n"
                + "\n".join(line.strip() for line in command.examples.strip().splitlines())
            )
            out.append("\n```\n")
    return "".join(out)


def _options(command: click.Command, ctx: click.Context, *, common: bool) -> Iterator[tuple[str, str]]:
    own = getattr(command, "own", [])
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None and record[1] and (param not in own) == common:
            yield record[0].replace("|", "\\|"), " ".join(record[1].split()).replace("|", "\\|")


if __name__ == "__main__":
    print(render_page(), end="")
