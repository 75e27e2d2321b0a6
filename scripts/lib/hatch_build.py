"""Puts the embedded flake and the service's files into the wheel as mvm/_data/nix/embedded and mvm/_data/systemd.

A static `force-include` would also copy them into an editable install, where a stale copy would shadow the
source tree.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Data(BuildHookInterface):  # type: ignore[type-arg]  # generic over a private class
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["nix/embedded"] = "mvm/_data/nix/embedded"
            build_data["force_include"]["systemd"] = "mvm/_data/systemd"
