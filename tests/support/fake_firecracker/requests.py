"""From a method, a path and a body to an `Action`, or to the refusal that the API thread answers by itself."""

from __future__ import annotations

from . import schema, versions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .versions import Since, Version


class ApiError(Exception):
    """A request that is refused: `status` and the fault message."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Action:
    """`name` as `vmm.Vmm` knows it, `value` the checked body, `deprecated` if a field or value is."""

    def __init__(self, name: str, value: Any = None, deprecated: bool = False) -> None:
        self.name, self.value, self.deprecated = name, value, deprecated


# method and first word of the path -> (action, schema, since)
_BODIES: dict[tuple[str, str], tuple[str, str, Since]] = {
    ("PUT", "actions"): ("action", "action", versions.ALWAYS),
    ("PUT", "balloon"): ("put balloon", "balloon", versions.ALWAYS),
    ("PUT", "boot-source"): ("put boot source", "boot source", versions.ALWAYS),
    ("PUT", "cpu-config"): ("put cpu config", "cpu config", versions.ALWAYS),
    ("PUT", "logger"): ("put logger", "logger", versions.ALWAYS),
    ("PUT", "serial"): ("put serial", "serial", versions.SERIAL),
    ("PUT", "machine-config"): ("put machine", "machine", versions.ALWAYS),
    ("PUT", "metrics"): ("put metrics", "metrics", versions.ALWAYS),
    ("PUT", "vsock"): ("put vsock", "vsock", versions.ALWAYS),
    ("PUT", "entropy"): ("put entropy", "entropy", versions.ALWAYS),
    ("PATCH", "machine-config"): ("put machine", "machine update", versions.ALWAYS),
    ("PATCH", "vm"): ("patch vm", "vm", versions.ALWAYS),
}
# The same for resources with an id: (action, schema, name of the id in the body, since)
_RESOURCES: dict[tuple[str, str], tuple[str, str, str, Since]] = {
    ("PUT", "drives"): ("put drive", "drive", "drive_id", versions.ALWAYS),
    ("PATCH", "drives"): ("patch drive", "drive update", "drive_id", versions.ALWAYS),
    ("PUT", "network-interfaces"): ("put net", "net", "iface_id", versions.ALWAYS),
    ("PATCH", "network-interfaces"): ("patch net", "net update", "iface_id", versions.ALWAYS),
    ("PUT", "pmem"): ("put pmem", "pmem", "id", versions.PMEM),
    ("PATCH", "pmem"): ("patch pmem", "pmem update", "id", versions.PMEM_LIMIT),
}
_EMPTY = {
    "GET": "GET request cannot have a body.",
    "PUT": "Empty PUT request.",
    "PATCH": "Empty PATCH request.",
    "DELETE": "Empty Delete request.",
}


def parse(method: str, path: str, body: bytes | None, version: Version) -> Action:
    """Raises ApiError."""
    words = path.lstrip("/").split("/")
    if words[-1] == "":
        words.pop()
    first, rest = (words[0], words[1:]) if words else ("", [])
    if method == "GET":
        return _get(first, rest, body, version)
    if method == "DELETE":
        if body is not None:
            raise ApiError(_EMPTY[method])
        if first in ("drives", "pmem", "network-interfaces") and versions.has(version, versions.HOTPLUG):
            return Action("unplug", (first, _id(rest)))
        raise _unknown(method, first)
    if first == "balloon" and method == "PATCH":
        return _patch_balloon(rest, body, version)
    if body is None:
        raise ApiError(_EMPTY[method])
    if (method, first) in _RESOURCES:
        name, form, key, since = _RESOURCES[method, first]
        if not versions.has(version, since):
            raise _unknown(method, first)
        return _resource(name, form, key, rest, body, version)
    if first == "mmds":
        return _mmds(method, rest, body, version)
    if first == "snapshot" and method == "PUT":
        return _snapshot(rest, body, version)
    if first == "hotplug" and rest[:1] == ["memory"] and versions.has(version, versions.MEMORY_HOTPLUG):
        form = "memory hotplug" if method == "PUT" else "memory hotplug update"
        return Action(f"{method.lower()} memory hotplug", _parse(body, form, version))
    if (method, first) in _BODIES and versions.has(version, _BODIES[method, first][2]):
        name, form, _ = _BODIES[method, first]
        value = _parse(body, form, version)
        if form == "machine update" and all(item is None for item in value.values()):
            raise ApiError(_EMPTY["PATCH"])
        deprecated = value.get("cpu_template") is not None or value.get("vsock_id") is not None
        return Action(name, value, deprecated)
    raise _unknown(method, first)


def _get(first: str, rest: list[str], body: bytes | None, version: Version) -> Action:
    if body is not None:
        raise ApiError(_EMPTY["GET"])
    if first == "balloon":
        named = {
            (): "get balloon",
            ("statistics",): "get balloon statistics",
            ("hinting", "status"): "get hinting",
        }
        name = named.get(tuple(rest))
        if name is None or (name == "get hinting" and not versions.has(version, versions.HINTING)):
            raise ApiError(f"Unrecognized GET request path `{'/'.join(rest)}`.")
        return Action(name)
    if (first, *rest[:1]) == ("vm", "config"):
        return Action("get config")
    if (first, *rest[:1]) == ("hotplug", "memory") and versions.has(version, versions.MEMORY_HOTPLUG):
        return Action("get memory hotplug")
    simple = {
        "": "get instance",
        "version": "get version",
        "machine-config": "get machine",
        "mmds": "get mmds",
    }
    if first in simple:
        return Action(simple[first])
    raise _unknown("GET", first)


def _patch_balloon(rest: list[str], body: bytes | None, version: Version) -> Action:
    if rest[:1] == ["hinting"] and versions.has(version, versions.HINTING):
        if rest[1:] == ["start"]:
            return Action("start hinting", _parse(body, "hinting start", version) if body else {})
        if rest[1:] == ["stop"]:
            return Action("stop hinting")
        raise ApiError(f"Unrecognized PATCH request path `/{'/'.join(rest)}`.")
    if body is None:
        raise ApiError(_EMPTY["PATCH"])
    if rest == ["statistics"]:
        return Action("patch balloon statistics", _parse(body, "balloon statistics update", version))
    return Action("patch balloon", _parse(body, "balloon update", version))


def _resource(name: str, form: str, key: str, rest: list[str], body: bytes, version: Version) -> Action:
    found = _id(rest)
    value = _parse(body, form, version)
    if value[key] != found:
        if key == "iface_id":
            raise ApiError(
                f"The id from the path [{found}] does not match the id from the body [{value[key]}]!"
            )
        raise ApiError("The id from the path does not match the id from the body!")
    return Action(name, value)


def _mmds(method: str, rest: list[str], body: bytes, version: Version) -> Action:
    if method == "PUT" and rest == ["config"]:
        value = _parse(body, "mmds config", version)
        return Action("put mmds config", value, value.get("version", "V1") == "V1")
    if rest:
        raise ApiError(f"Unrecognized {method} request path `{rest[0]}`.")
    try:
        return Action(f"{method.lower()} mmds", schema.decode(body))
    except schema.Malformed as error:
        raise _malformed(error) from None


def _snapshot(rest: list[str], body: bytes, version: Version) -> Action:
    if not rest:
        raise ApiError("Missing snapshot operation type.")
    if rest[0] == "create":
        return Action("create snapshot", _parse(body, "snapshot create", version))
    if rest[0] != "load":
        raise ApiError(f"Invalid request method and/or path: PUT /snapshot/{rest[0]}.")
    value = _parse(body, "snapshot load", version)
    given = [key for key in ("mem_backend", "mem_file_path") if value.get(key) is not None]
    if len(given) != 1:
        problem = "exclusively is required" if given else "is required"
        kind = "too many fields" if given else "missing field"
        raise _malformed(f"{kind}: either `mem_backend` or `mem_file_path` {problem}")
    if given == ["mem_file_path"]:
        value["mem_backend"] = {"backend_type": "File", "backend_path": value["mem_file_path"]}
    deprecated = given == ["mem_file_path"] or value.get("enable_diff_snapshots", False)
    return Action("load snapshot", value, deprecated)


def _id(rest: list[str]) -> str:
    found = rest[0] if rest else ""
    if not found:
        raise ApiError("The ID cannot be empty.")
    if not all(c == "_" or c.isalnum() for c in found):
        raise ApiError("API Resource IDs can only contain alphanumeric characters and underscores.")
    return found


def _parse(body: bytes | None, form: str, version: Version) -> dict[str, Any]:
    try:
        return schema.parse(body or b"", form, version)
    except schema.Malformed as error:
        raise _malformed(error) from None


def _malformed(error: object) -> ApiError:
    return ApiError(f"An error occurred when deserializing the json body of a request: {error}.")


def _unknown(method: str, first: str) -> ApiError:
    return ApiError(f"Invalid request method and/or path: {method} {first}.")
