"""Puts the embedded flake into the wheel as mvm/_data/nix/embedded.

A static `force-include` would also copy it into an editable install, where a stale copy would shadow the
source tree.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EmbeddedFlake(BuildHookInterface):  # type: ignore[type-arg]  # generic over a private class
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["nix/embedded"] = "mvm/_data/nix/embedded"
