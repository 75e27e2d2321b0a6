#!/usr/bin/env python3
"""limactl as far as mvm uses it: machines are entries of a JSON file, and a "machine" runs programs here, as this user.

$LIMA_HOME/machines.json: name -> {"status", "template"}; $LIMA_HOME/calls: one JSON list a line. It accepts exactly the
options that the real one documents for these commands, and fails as it does where an instance is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

HOME = Path(os.environ["LIMA_HOME"])
FILE = HOME / "machines.json"


def main(arguments: list[str]) -> int:
    with (HOME / "calls").open("a") as log:
        log.write(json.dumps(arguments) + "\n")
    machines = json.loads(FILE.read_text()) if FILE.exists() else {}
    verb, *rest = arguments
    code = {"list": listing, "start": start, "stop": stop, "delete": delete, "copy": copy, "shell": shell}[
        verb
    ](machines, rest)
    FILE.write_text(json.dumps(machines))
    return code


Machines = dict[str, dict[str, str]]


def listing(machines: Machines, rest: list[str]) -> int:
    assert rest == ["--format", "json"]
    for name, machine in machines.items():
        print(
            json.dumps({"name": name, "status": machine["status"], "vmType": "vz", "dir": str(HOME / name)})
        )
    return 0


def start(machines: Machines, rest: list[str]) -> int:
    options = [word for word in rest if word.startswith("--")]
    (what,) = (word for word in rest if not word.startswith("--"))
    names = [word.removeprefix("--name=") for word in options if word.startswith("--name=")]
    assert "--tty=false" in options
    if names:
        template = json.loads(Path(what).read_text())
        assert template["base"]
        assert names[0] not in machines
        machines[names[0]] = {"status": "Running", "template": what}
        (HOME / names[0]).mkdir()
        return 0
    if what not in machines:
        return 1
    machines[what]["status"] = "Running"
    return 0


def stop(machines: Machines, rest: list[str]) -> int:
    forced = "--force" in rest
    (name,) = (word for word in rest if word != "--force")
    if name not in machines or (machines[name]["status"] != "Running" and not forced):
        return 1
    if (HOME / "hangs").exists() and not forced:
        return 1
    machines[name]["status"] = "Stopped"
    return 0


def delete(machines: Machines, rest: list[str]) -> int:
    assert rest[0] == "--force"
    machines.pop(rest[1], None)
    shutil.rmtree(HOME / rest[1], ignore_errors=True)
    return 0


def copy(machines: Machines, rest: list[str]) -> int:
    option, source, target = rest
    assert option == "--recursive"
    name, _, path = target.partition(":")
    assert machines[name]["status"] == "Running"
    shutil.copytree(source, HOME / name / path.lstrip("/"))
    return 0


def shell(machines: Machines, rest: list[str]) -> int:
    folder, name, *command = rest
    assert folder.startswith("--workdir=/")
    assert machines[name]["status"] == "Running"
    assert command[:4] == ["sudo", "-n", "-H", "-u"], command
    assert command[5] == "--"
    program = command[6:]
    if "mvm-install" in program:
        # What the installation needs must have arrived.
        there = HOME / name / program[program.index("mvm-install") + 1].lstrip("/")
        return 0 if list(there.glob("mvm-*.whl")) and (there / "requirements.txt").exists() else 1
    if "mvm-bootstrap" in program:
        return 0
    FILE.write_text(json.dumps(machines))
    os.execvp(program[0], program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
