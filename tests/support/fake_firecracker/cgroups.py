"""The jailer's control groups: `<hierarchy>/<parent>/<id>`, made only where a value is to be written.

Version 2 without a value moves the process into the parent itself, if that exists; if it does not, nothing is said.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Cgroups:
    """Raises `refusal(text)`. The move into a parent of version 2 happens here, before anything of the jail exists."""

    def __init__(
        self,
        version: str,
        parent: str,
        instance: str,
        values: list[str],
        proc_mounts: str,
        refusal: Callable[[str], Exception],
    ) -> None:
        self._refusal = refusal
        self._properties: list[tuple[str, str, str]] = []
        parts = parent.split("/")
        if parent.startswith("/") or parts[0] == "." or ".." in parts:
            raise refusal("Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'")
        if not version.isdigit() or int(version) > 255:
            raise refusal(f"{version} is an invalid cgroup version specifier")
        if not values and int(version) != 2:
            return
        v2, v1 = self._hierarchies(proc_mounts)
        if not {"1": v1, "2": v2}.get(version):
            raise refusal("Hierarchy not found: No hierarchy found for this cgroup version.")
        if not values:
            self._move(os.path.join(v2, parent))
        for value in values:
            file, mark, wanted = value.partition("=")
            if not mark or not wanted or "=" in wanted:
                raise refusal(f"Invalid format for cgroups: {value}")
            if file.startswith(("/", "./")) or ".." in file.split("/"):
                raise refusal(f"Cgroup invalid file: {value}")
            controller = file.split(".")[0]
            if "." not in file:
                raise refusal(f"Cgroup invalid file: {file}")
            base = v2 if int(version) == 2 else v1.get(controller, "")
            if int(version) == 2 and controller not in self._read(f"{v2}/cgroup.controllers").split():
                base = ""
            if not base:
                raise refusal(f"Controller {controller} is unavailable")
            self._properties.append((os.path.join(base, parent, instance), file, wanted))
        self._v2_root = v2 if int(version) == 2 else ""

    _v2_root = ""

    def setup(self) -> None:
        for folder, file, value in self._properties:
            os.makedirs(folder, exist_ok=True)
            if self._v2_root:
                self._delegate(folder, file.split(".")[0])
            self._write(os.path.join(folder, file), value)
        for folder in sorted({folder for folder, _, _ in self._properties}):
            self._write(os.path.join(folder, "cgroup.procs" if self._v2_root else "tasks"), str(os.getpid()))

    def _delegate(self, folder: str, controller: str) -> None:
        """The controller is switched on in every group above."""
        at = self._v2_root
        for part in os.path.relpath(folder, self._v2_root).split("/"):
            self._write(os.path.join(at, "cgroup.subtree_control"), f"+{controller}")
            at = os.path.join(at, part)

    def _move(self, folder: str) -> None:
        if not os.path.exists(folder):
            return
        try:
            with open(os.path.join(folder, "cgroup.procs"), "w") as file:
                file.write(str(os.getpid()))
        except OSError as error:
            raise self._refusal(
                f"Failed to move process to cgroup ({folder}): {error.strerror}.\nHint: If you intended to create a "
                f"child cgroup under {folder}, pass any --cgroup parameters."
            ) from None

    def _write(self, path: str, value: str) -> None:
        try:
            with open(path, "w") as file:
                file.write(f"{value}\n")
        except OSError as error:
            raise self._refusal(f"Failed to write to {path}: {error.strerror}") from None

    @staticmethod
    def _read(path: str) -> str:
        try:
            with open(path) as file:
                return file.read()
        except OSError:
            return ""

    def _hierarchies(self, proc_mounts: str) -> tuple[str, dict[str, str]]:
        """(mount point of version 2, controller -> mount point of version 1)."""
        v2, v1 = "", dict[str, str]()
        for line in self._read(proc_mounts).splitlines():
            words = line.split()
            if len(words) < 4:
                continue
            if words[2] == "cgroup2" and not v2:
                v2 = words[1]
            elif words[2] == "cgroup":
                for controller in words[3].split(","):
                    v1.setdefault(controller, words[1])
        return v2, v1
