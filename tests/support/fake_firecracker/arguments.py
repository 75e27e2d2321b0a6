"""The command line of both programs: `--name value` and `--name`; no `=`, no abbreviations, no positions.

Everything after `--` is passed on. `--help`, `-h` and `--version` anywhere before it win over all else.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class BadArguments(Exception):
    """`kind` is the error's own name, as it is printed for debugging."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Option:
    def __init__(
        self,
        text: str,
        *,
        value: bool = True,
        default: str | None = None,
        required: bool = False,
        multiple: bool = False,
        requires: str = "",
        forbids: str = "",
    ) -> None:
        self.text, self.value, self.default = text, value, default
        self.required, self.multiple, self.requires, self.forbids = required, multiple, requires, forbids


class Arguments:
    """Parsed from argv (without the program's name). Raises BadArguments."""

    def __init__(self, options: dict[str, Option], argv: Sequence[str]) -> None:
        self._options = options
        self.given: dict[str, list[str]] = {}
        end = argv.index("--") if "--" in argv else len(argv)
        ours, self.extra = list(argv[:end]), list(argv[end + 1 :])
        self.help = "--help" in ours or "-h" in ours
        self.version = "--version" in ours and not self.help
        if not self.help and not self.version:
            self._parse(ours)

    def one(self, name: str) -> str | None:
        return self.given[name][-1] if name in self.given else self._options[name].default

    def many(self, name: str) -> list[str]:
        return self.given.get(name, [])

    def flag(self, name: str) -> bool:
        return name in self.given

    def _parse(self, argv: list[str]) -> None:
        rest = iter(argv)
        for word in rest:
            name = word[2:] if word.startswith("--") else word
            option = self._options.get(name) if word.startswith("--") else None
            if option is None:
                raise BadArguments(
                    f"Found argument '{name}' which wasn't expected, or isn't valid in this context.",
                    f'UnexpectedArgument("{name}")',
                )
            if name in self.given and not option.multiple:
                raise BadArguments(
                    f"The argument '{name}' was provided more than once.", f'DuplicateArgument("{name}")'
                )
            value = ""
            if option.value:
                value = next(rest, "--")
                if value.startswith("--"):
                    raise BadArguments(
                        f"The argument '{name}' requires a value, but none was supplied.",
                        f'MissingValue("{name}")',
                    )
            self.given.setdefault(name, []).append(value)
        for name in sorted(self._options):
            self._check(name, self._options[name], argv)

    def _check(self, name: str, option: Option, argv: list[str]) -> None:
        missing = name if option.required and name not in self.given else ""
        if name in self.given and option.requires and f"--{option.requires}" not in argv:
            missing = option.requires
        if missing:
            raise BadArguments(
                f"Argument '{missing}' required, but not found.", f'MissingArgument("{missing}")'
            )
        if name in self.given and option.forbids and f"--{option.forbids}" in argv:
            raise BadArguments(
                f"Argument '{option.forbids}' cannot be used together with argument '{name}'.",
                f'ForbiddenArgument("{name}", "{option.forbids}")',
            )


def help_text(options: dict[str, Option]) -> str:
    blocks = []
    for title, required in (("required arguments:", True), ("optional arguments:", False)):
        chosen = {n: o for n, o in sorted(options.items()) if o.required == required}
        shown = {n: f"  --{n} <{n}>" if o.value else f"  --{n}" for n, o in chosen.items()}
        if not required:
            shown["help"] = "  --help"
        width = max((len(text) for text in shown.values()), default=0)
        lines = []
        for name in sorted(shown):
            option = options.get(name)
            text = option.text if option else "Show the help message."
            if option and option.default is not None:
                text += f' [default: "{option.default}"]'
            lines.append(f"{shown[name]:<{width}}   {text}")
        if lines:
            blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks)
