"""$out/fc-base.json: the Firecracker configuration that holds before any instance exists."""

from __future__ import annotations

import json
import os


def main() -> None:
    env = os.environ
    with open(env["policy"], encoding="utf-8") as file:
        policy = json.load(file)
    config = {
        "boot-source": {
            "kernel_image_path": f"{env['kernel']}/vmlinux",
            "initrd_path": f"{env['kernel']}/initrd",
            "boot_args": policy["boot_args"],
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256, "smt": False},
        # Nothing is ever inflated: the guest reports what it has free, and Firecracker gives it back to the host.
        "balloon": {"amount_mib": 0, "deflate_on_oom": True, "free_page_reporting": True},
        "drives": [],
        "network-interfaces": [],
    }
    os.mkdir(env["out"])
    with open(f"{env['out']}/fc-base.json", "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, sort_keys=True)
        file.write("\n")


main()
