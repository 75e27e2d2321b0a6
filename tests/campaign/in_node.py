"""What the campaign looks at in the node: everything of mvm's that its kernel and its disk show, against the records.

Runs there, by `python3 - < this file`, with the standard library alone and with nothing of mvm's, so that what is
checked is not what checks. Prints one JSON object: `states` (instance -> state, with `pending` where a step is under
way), `problems` (sentences), `counts` (objects seen, by kind).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import subprocess
from typing import Any

ROOT = "/var/lib/mvm"
CGROUPS = "/sys/fs/cgroup/mvm.slice/mvm-instances"
KEPT = {"logs", "metrics", "fc.final.json"}


def run(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def text(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def records() -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(glob.glob(f"{ROOT}/tenants/*/instances/*/state.json")):
        with open(path) as file:
            record = json.load(file)
        found[record["id"]] = {**record, "folder": os.path.dirname(path)}
    return found


def holders() -> dict[str, list[int]]:
    """Instance directory -> processes that have its `runtime/alive` open."""
    found: dict[str, list[int]] = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fds = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for fd in fds:
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            match = re.match(rf"({ROOT}/tenants/[^/]+/instances/[^/]+)/runtime/alive( \(deleted\))?$", target)
            if match and int(pid) not in found.setdefault(match[1], []):
                found[match[1]].append(int(pid))
    return found


def links() -> set[str]:
    return {
        row["ifname"] for row in json.loads(run("ip", "-json", "link") or "[]") if row["ifname"][:4] == "mvm-"
    }


def mounts() -> list[str]:
    """In this mount namespace, and in mvm-hostd's, which has one of its own."""
    daemon = run("systemctl", "show", "-P", "MainPID", "mvm-hostd.service").strip()
    found = set()
    for pid in ("self", daemon):
        for line in text(f"/proc/{pid}/mountinfo").splitlines():
            if (point := line.split()[4]).startswith(f"{ROOT}/"):
                found.add(point)
    return sorted(found)


def mappings() -> dict[str, str]:
    """Name -> what it is made from."""
    found = {}
    for path in glob.glob("/sys/block/dm-*"):
        name = text(f"{path}/dm/name")
        backing = glob.glob(f"{path}/slaves/*/loop/backing_file")
        found[name] = text(backing[0]) if backing else ""
    return {name: file for name, file in found.items() if name.startswith("mvm-")}


def loops() -> list[str]:
    files = [text(path) for path in glob.glob("/sys/block/loop*/loop/backing_file")]
    return [file for file in files if file.startswith(f"{ROOT}/")]


def files(known: dict[str, dict[str, Any]], problems: list[str]) -> None:
    for folder, names, others in os.walk(f"{ROOT}/tenants"):
        for name in (*names, *others):
            if name.startswith((".tmp-", ".new-", ".old-")):
                problems.append(f"half a file: {folder}/{name}")
    for record in known.values():
        state, folder = record["state"], record["folder"]
        snapshots = sorted(os.listdir(f"{folder}/snapshots")) if os.path.isdir(f"{folder}/snapshots") else []
        wanted = {"sleeping": [["latest"]], "running": [[], ["latest"]]}.get(state, [[]])
        if snapshots not in wanted:
            problems.append(f"{record['id']} is {state} and has snapshots {snapshots}")
        if state != "running" and os.path.isdir(f"{folder}/runtime"):
            left = set(os.listdir(f"{folder}/runtime")) - KEPT
            if left:
                problems.append(f"{record['id']} is {state} and has {sorted(left)} in runtime/")
    for folder in glob.glob(f"{ROOT}/tenants/*/instances/*"):
        if not os.path.exists(f"{folder}/state.json") and not os.path.exists(f"{folder}/volumes/data.img"):
            problems.append(f"remains of an instance: {folder}")


def main() -> None:
    problems: list[str] = []
    known = records()
    running = {i: r for i, r in known.items() if r["state"] == "running"}
    for instance, record in known.items():
        if record.get("pending"):
            problems.append(f"{instance} is still {record['pending']['intent']}")
        if record["state"] not in ("created", "running", "sleeping", "stopped", "failed"):
            problems.append(f"{instance} is {record['state']}")
        if bool(record.get("holds")) != (record["state"] == "running"):
            problems.append(f"{instance} is {record['state']} and its ledger says {record.get('holds')}")
    held, there = holders(), links()
    for folder, pids in held.items():
        if folder not in {r["folder"] for r in running.values()}:
            problems.append(f"processes {pids} of {folder}, which does not run")
        elif len(pids) != 2:
            problems.append(f"processes {pids} of {folder}, not a VMM and a keeper")
    for instance, record in running.items():
        if record["folder"] not in held:
            problems.append(f"{instance} has no process")
    wanted = {r["network"][kind] for r in running.values() for kind in ("tap", "bridge")}
    problems += [
        f"link {name} is {'missing' if name in wanted else 'left'}" for name in sorted(wanted ^ there)
    ]
    problems += [f"mount {point}" for point in mounts()]
    disks = {f"{r['folder']}/volumes/data.img" for r in running.values()}
    opened = mappings()
    problems += [
        f"mapping {name} of {file or 'nothing'}" for name, file in opened.items() if file not in disks
    ]
    problems += [f"loop device of {file}" for file in loops() if file not in disks]
    names = {r["id"].replace("/", "--") for r in running.values()}
    leaves = set(os.listdir(CGROUPS)) if os.path.isdir(CGROUPS) else set()
    leaves = {name for name in leaves if os.path.isdir(f"{CGROUPS}/{name}")}
    mark = f".{hashlib.sha256(ROOT.encode()).hexdigest()[:12]}"
    problems += [f"cgroup {name}" for name in sorted(leaves - {name + mark for name in names})]
    taps = {r["network"]["tap"] for r in known.values()}
    ruled = set(re.findall(r'"(mvm-t[0-9]+s[0-9]+)"', run("nft", "list", "ruleset")))
    problems += [f"rules for {tap}, which is nobody's" for tap in sorted(ruled - taps)]
    problems += [
        f"no rules for {r['network']['tap']}" for r in running.values() if r["network"]["tap"] not in ruled
    ]
    files(known, problems)
    counts = {
        "processes": sum(map(len, held.values())), "links": len(there), "mappings": len(opened),
        "cgroups": len(leaves), "records": len(known),
    }  # fmt: skip
    states = {instance: record["state"] for instance, record in known.items()}
    print(json.dumps({"states": states, "problems": problems, "counts": counts}))


main()
