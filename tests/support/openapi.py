"""Checking JSON bodies against a Swagger 2.0 description: the subset of YAML and of the schema language that
Firecracker's published description of its API uses. Anything outside of that subset is an error, never a pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KEY = re.compile(r'^("[^"]*"|[^\s"\[{#][^:]*):(?:\s+(.*))?$')
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}
_SCHEMA_KEYS = {
    "type", "description", "required", "properties", "items", "$ref", "enum", "default", "minimum", "maximum",
    "format", "additionalProperties", "minLength", "maxLength", "pattern", "readOnly", "title", "example",
}  # fmt: skip


class Description:
    """`path`: the YAML file."""

    def __init__(self, path: Path) -> None:
        lines = [
            (len(line) - len(line.lstrip()), line.strip())
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip() and not line.lstrip().startswith("#")
        ]
        self._root, rest = _block(lines, 0)
        assert rest == len(lines), lines[rest]
        self.version: str = str(self._root["info"]["version"])

    def body_schema(self, method: str, path: str) -> dict[str, Any] | None:
        """Schema of the body of a request, None if it has none. KeyError if there is no such request."""
        for pattern, verbs in self._root["paths"].items():
            if re.fullmatch(re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(pattern)), path):
                for parameter in verbs[method.lower()].get("parameters", []):
                    if parameter["in"] == "body":
                        found: dict[str, Any] = parameter["schema"]
                        return found
                return None
        raise KeyError(path)

    def faults(self, value: Any, schema: dict[str, Any], where: str = "body") -> Iterator[str]:
        """What is wrong with `value`, one line each. A field that the schema does not name is wrong."""
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/definitions/")
            yield from self.faults(value, self._root["definitions"][name], where)
            return
        assert set(schema) <= _SCHEMA_KEYS, set(schema) - _SCHEMA_KEYS
        kind = schema.get("type", "object" if "properties" in schema else None)
        if kind is not None:
            right = isinstance(value, _TYPES[kind]) and not (isinstance(value, bool) and kind != "boolean")
            if not right:
                yield f"{where}: {value!r} is no {kind}"
                return
        if "enum" in schema and value not in schema["enum"]:
            yield f"{where}: {value!r} is none of {schema['enum']}"
        if isinstance(value, int | float):
            if ("minimum" in schema and value < schema["minimum"]) or (
                "maximum" in schema and value > schema["maximum"]
            ):
                yield f"{where}: {value} is out of bounds"
        if isinstance(value, list):
            for n, item in enumerate(value):
                yield from self.faults(item, schema["items"], f"{where}[{n}]")
        if isinstance(value, dict):
            properties = schema.get("properties", {})
            yield from (f"{where}: lacks {name}" for name in schema.get("required", []) if name not in value)
            for name, item in value.items():
                if name in properties:
                    yield from self.faults(item, properties[name], f"{where}.{name}")
                elif properties:
                    yield f"{where}: {name} is unknown"

    def check(self, method: str, path: str, body: bytes | None) -> list[str]:
        """Faults of a whole request."""
        try:
            schema = self.body_schema(method, path)
        except KeyError:
            return [f"{method} {path}: no such request"]
        if schema is None:
            return [] if body is None else [f"{method} {path}: takes no body"]
        return (
            [f"{method} {path}: lacks its body"]
            if body is None
            else list(self.faults(json.loads(body), schema))
        )


_Lines = list[tuple[int, str]]


def _block(lines: _Lines, at: int) -> tuple[Any, int]:
    """The mapping or list that begins at line `at`."""
    indent, text = lines[at]
    if text.startswith("- ") or text == "-":
        return _list(lines, at, indent)
    found: dict[str, Any] = {}
    while at < len(lines) and lines[at][0] == indent:
        matched = _KEY.match(lines[at][1])
        assert matched, lines[at]
        key, value = matched[1].strip('"'), matched[2]
        at += 1
        if value:
            found[key], at = _scalar(value, lines, at, indent)
        elif at < len(lines) and (
            lines[at][0] > indent or (lines[at][0] == indent and lines[at][1].startswith("- "))
        ):
            plain = not _KEY.match(lines[at][1]) and not lines[at][1].startswith("- ")
            if plain or key == "description":
                found[key], at = _scalar("", lines, at, indent)
            else:
                found[key], at = _block(lines, at)
        else:
            found[key] = None
    return found, at


def _list(lines: _Lines, at: int, indent: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    while at < len(lines) and lines[at][0] == indent and lines[at][1].startswith("- "):
        text = lines[at][1][2:]
        if _KEY.match(text):
            lines[at] = (indent + 2, text)
            value, at = _block(lines, at)
        else:
            value, at = _scalar(text, lines, at + 1, indent)
        found.append(value)
    return found, at


def _scalar(text: str, lines: _Lines, at: int, indent: int) -> tuple[Any, int]:
    """A value, with the lines that continue it."""
    while at < len(lines) and lines[at][0] > indent:
        text, at = f"{text} {lines[at][1]}".strip(), at + 1
    if text.startswith("[") and text.endswith("]"):
        return [_scalar(part.strip(), [], 0, 0)[0] for part in text[1:-1].split(",")], at
    if text[:1] in "\"'" and text[-1:] == text[:1]:
        return text[1:-1], at
    if text in ("true", "false"):
        return text == "true", at
    return (int(text) if re.fullmatch(r"-?\d+", text) else text), at
