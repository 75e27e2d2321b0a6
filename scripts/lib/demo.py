"""The demonstration behind scripts/demo: a tenant's life, through the command line, as a user would type it.

Every step is a real `mvm` command, printed before it runs; the times in the table at the end are those commands' own,
start-up of the command included, and the receipts that `sleep` and `wake` return. Any surprise ends the demo with exit
code 1: a worker that lost its memory, a file that came back changed, a process that is still there after sleep.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
MVM = str(HERE / ".venv/bin/mvm")
TENANT = "mvm-demo"
FLAKE = "nix/embedded"
STALE_LOCK = (
    16  # exit code of a build that failed; the message names `mvm flake update` if the lock is the reason
)

# Keeps a secret and a counter in memory only, and tells them over HTTP.
WORKER = """
import os, socket
secret, served = os.urandom(8).hex(), 0
server = socket.create_server(("0.0.0.0", 8080))
while True:
    client, _ = server.accept()
    with client:
        client.recv(4096)
        served += 1
        body = f"{secret} {served} {os.getpid()}"
        client.sendall(f"HTTP/1.0 200 OK\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
"""


class Surprise(Exception):
    """Something is not as the demo promises."""


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


class Failed(Surprise):
    """A command of mvm failed; `code` is its exit code, `error` what it said (empty if nothing)."""

    def __init__(self, arguments: tuple[str, ...], code: int, error: dict[str, Any]) -> None:
        said = ": ".join(filter(None, (error.get("brief"), error.get("details"))))
        super().__init__(f"mvm {' '.join(arguments)} exited with {code}\n{said}")
        self.code = code
        self.error = error


def mvm(*arguments: str, output: str = "json") -> tuple[Any, float]:
    """Run one command; (its answer, seconds it took). What it tells meanwhile is shown as it comes."""
    print(f"  $ mvm {' '.join(arguments)}", flush=True)
    error: dict[str, Any] = {}
    began = time.perf_counter()
    with subprocess.Popen(
        [MVM, *options(arguments, output)],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        for line in running.stderr:
            error = told(line) or error
        answer = running.stdout.read()
    seconds = time.perf_counter() - began
    if running.returncode:
        raise Failed(arguments, running.returncode, error)
    if output != "json":
        return answer, seconds
    lines = [json.loads(line) for line in answer.splitlines() if line.strip()]
    return (lines[0] if lines else {}), seconds


def told(line: str) -> dict[str, Any]:
    """Show a line of a command's standard error; returns the error in it, if it is one."""
    try:
        message = json.loads(line)
    except ValueError:
        print(f"    {line.rstrip()}", flush=True)
        return {}
    if "error" in message:
        return dict(message["error"])
    for kind in ("warning", "progress"):
        if kind in message:
            print(f"    {'warning: ' if kind == 'warning' else ''}{message[kind]}", flush=True)
    return {}


def options(arguments: tuple[str, ...], output: str) -> list[str]:
    """`--output` before a `--`, behind which everything is the guest's."""
    if output != "json":
        return list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return [*arguments[:cut], "--output", "json", *arguments[cut:]]


def ask(ip: str) -> tuple[str, int, int]:
    """The worker's (secret, requests served, process id), over the tenant's network."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://{ip}:8080/", timeout=5) as answer:
                secret, served, pid = answer.read().decode().split()
                return secret, int(served), int(pid)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def build(root: Path) -> float:
    """Create and build; with a lock that the mirror has moved past, renew it in a copy first."""
    mvm("tenant", "create", TENANT, "--flake", FLAKE, "--profile", "minimal", "--cpus", "1", "--mem", "256")
    try:
        return mvm("tenant", "build", TENANT)[1]
    except Failed as failure:
        if "mvm flake update" not in failure.error.get("resolution", ""):
            raise
    say("The locked Debian packages are no longer offered here: renewing the lock in a copy of the flake")
    copy = root / "demo-flake"
    mvm("flake", "update", FLAKE, "--copy-to", str(copy))
    mvm("tenant", "pin", TENANT, "--flake", str(copy))
    return mvm("tenant", "build", TENANT)[1]


def copy_both_ways(folder: Path) -> int:
    sent, back = folder / "sent", folder / "back"
    sent.write_bytes(os.urandom(1 << 20))
    mvm("tenant", "cp", str(sent), f"{TENANT}:/data/file")
    mvm("tenant", "cp", f"{TENANT}:/data/file", str(back))
    if hashlib.sha256(sent.read_bytes()).digest() != hashlib.sha256(back.read_bytes()).digest():
        raise Surprise("the file came back changed")
    return sent.stat().st_size


def sleep_and_wake(rows: list[tuple[str, str]], pid: int, number: str) -> dict[str, Any]:
    """One sleep and one wake; adds their rows, returns the wake's receipt."""
    slept, sleep_s = mvm("tenant", "sleep", TENANT)
    if Path(f"/proc/{pid}").exists():
        raise Surprise(f"the VM's process {pid} is still there")
    receipt = slept["receipt"]
    mib = 1 << 20
    print(
        f"    process {pid} is gone; {receipt['resident_bytes'] / mib:.0f} MiB of memory released", flush=True
    )
    woke, wake_s = mvm("tenant", "wake", TENANT)
    rows.append((f"{number} sleep, whole command", f"{sleep_s:.2f} s"))
    rows.append(("  memory held before", f"{receipt['resident_bytes'] / mib:.1f} MiB"))
    rows.append(("  written, encrypted", f"{receipt['written_bytes'] / mib:.1f} MiB"))
    rows.append((f"{number} wake, whole command", f"{wake_s:.2f} s"))
    rows.extend((f"  {phase['name']}", f"{phase['ns'] / 1e6:.0f} ms") for phase in woke["receipt"]["phases"])
    return dict(woke["receipt"])


def demonstrate(root: Path, folder: Path) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    say("1. Build the guest from its flake")
    rows.append(("build", f"{build(root):.1f} s"))
    say("2. Start it, cold")
    started, run_s = mvm("tenant", "run", TENANT)
    rows.append(("cold boot, whole command", f"{run_s:.2f} s"))
    say("3. Run a command in it, copy a file in and out")
    answer, exec_s = mvm("tenant", "exec", TENANT, "--", "uname", "-sr", output="human")
    print(f"    {answer.strip()}")
    rows.append(("exec, whole command", f"{exec_s:.2f} s"))
    print(f"    {copy_both_ways(folder)} bytes there and back, unchanged")
    say("4. Start a worker that keeps its state in memory only, and ask it over the network")
    (folder / "worker.py").write_text(WORKER)
    mvm("tenant", "cp", str(folder / "worker.py"), f"{TENANT}:/tmp/worker.py")
    mvm("tenant", "exec", TENANT, "--detach", "--", "python3", "/tmp/worker.py")
    secret, served, pid = ask(started["ip"])
    print(f"    worker {pid}: secret {secret}, request {served}")
    say("5. Sleep and wake, twice; the second time only what changed is written")
    for number in ("first", "second"):
        shown, _ = mvm("tenant", "show", TENANT)
        sleep_and_wake(rows, shown["instances"][0]["pid"], number)
        again, count, same = ask(started["ip"])
        served += 1
        if (again, count, same) != (secret, served, pid):
            raise Surprise(f"the worker is not the same: {again} {count} {same}, not {secret} {served} {pid}")
        print(f"    worker {same}: secret {again}, request {count}: it went on where it was", flush=True)
    say("6. Check the audit log")
    mvm("audit", "verify", TENANT)
    return rows


def clean_up() -> None:
    mvm("tenant", "destroy", TENANT, "--wipe-volumes", "--yes")


def exists() -> bool:
    listed = subprocess.run(
        [MVM, "tenant", "list", "--output", "json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return any(json.loads(line).get("tenant") == TENANT for line in listed.stdout.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="scripts/demo")
    parser.add_argument("--keep", action="store_true", help="leave the tenant running")
    keep = parser.parse_args().keep
    root = Path(os.environ.get("MVM_ROOT", "/var/lib/mvm"))
    began = time.perf_counter()
    try:
        if exists():
            say("A tenant of an earlier demo is there: removing it")
            clean_up()
        with tempfile.TemporaryDirectory(prefix="mvm-demo-") as folder:
            rows = demonstrate(root, Path(folder))
        if not keep:
            say("7. Destroy it")
            clean_up()
    except (Surprise, OSError, subprocess.SubprocessError) as surprise:
        print(f"\nThe demo failed: {surprise}", file=sys.stderr)
        return 1
    width = max(len(name) for name, _ in rows)
    say("What it took")
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>10}")
    print(f"  {'demo in all':<{width}}  {time.perf_counter() - began:>8.1f} s")
    if keep:
        say(f"The tenant is running. Try: .venv/bin/mvm tenant ssh {TENANT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
