"""The command line as processes: what it imports, how it ends, and what it does to a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.contract.guest.conftest import Agent

ROOT = Path(__file__).resolve().parents[3]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TERM": "xterm"}
MVM = [sys.executable, "-m", "mvm.cli"]
DRIVER = [sys.executable, str(Path(__file__).with_name("driver.py"))]

Mvm = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    started = Agent(tmp_path)
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
def mvm(tmp_path: Path, agent: Agent) -> Mvm:
    """`mvm` with a tenant that runs; its guest is the agent."""

    def run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        argv = [*DRIVER, str(tmp_path / "root"), str(agent.path), *words]
        return subprocess.run(argv, env=ENV, input=stdin, capture_output=True, timeout=60)

    for words in (("create", "acme", "--flake", "nix/embedded"), ("run", "acme", "--build")):
        done = run("tenant", *words)
        assert done.returncode == 0, done.stderr
    return run


def imported(*arguments: str) -> set[str]:
    """Every module that the command imports beyond a bare interpreter's; the command may fail."""
    return _imports("-m", "mvm.cli", *arguments) - _imports("-c", "pass")


def _imports(*arguments: str) -> set[str]:
    argv = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(argv, env=ENV, capture_output=True, timeout=60)
    lines = done.stderr.decode().splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def packages(modules: set[str]) -> set[str]:
    """The top-level packages among them that are neither ours nor the standard library's."""
    # Some distributions import a hook of their own when a program fails.
    ours = {"mvm", "apport_python_hook"}
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - ours


@pytest.mark.req("L5")
@pytest.mark.parametrize(
    "words",
    [(), ("--help",), ("--version",), ("tenant", "--help"), ("pool", "--help"), ("instance", "--help")],
)
def test_help_imports_next_to_nothing(words: tuple[str, ...]) -> None:
    modules = imported(*words)
    assert packages(modules) == {"click"}
    assert not {
        m for m in modules if m.startswith(("mvm.hostd", "mvm.standalone", "mvm.builder", "mvm.wire"))
    }


@pytest.mark.req("L5")
def test_a_list_imports_neither_hostd_nor_rich(tmp_path: Path) -> None:
    modules = imported("tenant", "list", "--root", str(tmp_path))
    assert packages(modules) <= {"click", "msgspec", "typing_extensions"}
    assert not {m for m in modules if m.startswith(("mvm.hostd", "mvm.builder"))}


@pytest.mark.root
@pytest.mark.req("S7", "L5")
def test_waking_imports_only_what_it_needs(tmp_path: Path) -> None:
    from tests.unit.standalone.fakes import FakeNode

    from mvm.core.ids import TenantId
    from mvm.core.lifecycle import Action
    from mvm.core.spec import new_tenant

    fake = FakeNode(tmp_path / "root")
    node = fake.open()
    node.create(new_tenant(TenantId("acme"), "nix/embedded"))
    node.build(TenantId("acme"))
    node.act(TenantId("acme"), Action.RUN)
    node.act(TenantId("acme"), Action.SLEEP)
    # The real host: it imports all it needs, then finds that this revision has no files.
    modules = imported("tenant", "wake", "acme", "--root", str(tmp_path / "root"))
    assert "mvm.hostd.host" in modules
    assert packages(modules) <= {
        "click",
        "msgspec",
        "cryptography",
        "typing_extensions",
        "zstandard",
        "lz4",
        "_cffi_backend",
    }
    assert not {m for m in modules if m.startswith(("mvm.builder", "rich", "asyncio", "logging"))}


@pytest.mark.req("L5")
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    from tests.unit.standalone.fakes import FakeNode

    from mvm.core.ids import TenantId
    from mvm.core.spec import new_tenant

    node = FakeNode(tmp_path / "root").open()
    node.create(new_tenant(TenantId("acme"), "nix/embedded"))
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*MVM, "tenant", "list", "--root", str(tmp_path / "root")],
            env=ENV, stdout=write, stderr=subprocess.PIPE, timeout=60,
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.req("L6")
def test_streams_and_codes_of_a_real_guest_program(mvm: Mvm) -> None:
    done = mvm("tenant", "exec", "acme", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    done = mvm(
        "tenant", "exec", "acme", "-i", "--env", "A=1", "--", "sh", "-c", "cat; echo $A", stdin=b"in\n"
    )
    assert (done.returncode, done.stdout) == (0, b"in\n1\n")
    # Without -i the program sees the end of its input at once.
    done = mvm("tenant", "exec", "acme", "--", "cat", stdin=b"in\n")
    assert (done.returncode, done.stdout) == (0, b"")
    assert mvm("tenant", "exec", "acme", "--", "sh", "-c", "kill -9 $$").returncode == 137


@pytest.mark.req("L6")
def test_copies_to_and_from_a_real_guest(mvm: Mvm, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_bytes(b"x" * 100_000)
    there = tmp_path / "guest"
    assert mvm("tenant", "cp", str(tmp_path / "tree"), f"acme:{there}").returncode == 0
    done = mvm("tenant", "cp", f"acme:{there}", str(tmp_path / "back"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "a").read_bytes() == b"x" * 100_000
    missing = mvm("tenant", "cp", "acme:/no/such/file", str(tmp_path / "y"))
    assert missing.returncode == 17
    assert missing.stderr.startswith(b"error: the guest refused")


@pytest.mark.req("L6")
def test_a_signal_reaches_the_program_in_the_guest(tmp_path: Path, mvm: Mvm, agent: Agent) -> None:
    argv = [*DRIVER, str(tmp_path / "root"), str(agent.path), "tenant", "exec", "acme", "--", "sh", "-c"]
    script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        [*argv, script], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"ready\n"
        started.send_signal(signal.SIGTERM)
        out, _ = started.communicate(timeout=60)
    assert (started.returncode, out) == (5, b"caught\n")


class Terminal:
    """`mvm` on a terminal of its own."""

    def __init__(self, argv: list[str]) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (33, 101))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.seen = b""
        self.process = subprocess.Popen(
            argv, env=ENV, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )

    def read_until(self, wanted: bytes) -> None:
        until = time.monotonic() + 30
        while wanted not in self.seen:
            assert time.monotonic() < until, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def shell(mvm: Mvm, tmp_path: Path, agent: Agent) -> Iterator[Terminal]:
    terminal = Terminal([*DRIVER, str(tmp_path / "root"), str(agent.path), "tenant", "ssh", "acme"])
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.mark.req("L6")
def test_an_interactive_shell(shell: Terminal) -> None:
    shell.type(b"stty size; echo on $((40+2))\n")
    shell.read_until(b"on 42")
    assert b"33 101" in shell.seen
    termios.tcsetwinsize(shell.slave, (40, 120))
    shell.process.send_signal(signal.SIGWINCH)
    shell.type(b"sleep 0.3; stty size\n")
    shell.read_until(b"40 120")
    # Ctrl-C is the guest's: it ends the program there and not us.
    shell.type(b"echo waiting; sleep 100\n")
    shell.read_until(b"waiting\r\n")
    time.sleep(0.3)
    shell.type(b"\x03")
    shell.type(b"echo still $((1+1))\n")
    shell.read_until(b"still 2")
    shell.type(b"exit 4\n")
    assert shell.process.wait(30) == 4
    assert termios.tcgetattr(shell.slave) == shell.before


@pytest.mark.req("L6")
def test_the_terminal_is_put_back_when_the_guest_dies(shell: Terminal, agent: Agent) -> None:
    shell.type(b"echo on $((40+2))\n")
    shell.read_until(b"on 42")
    assert termios.tcgetattr(shell.slave) != shell.before
    agent.process.kill()
    assert shell.process.wait(30) == 125
    assert termios.tcgetattr(shell.slave) == shell.before
    shell.read_until(b"error: ")


@pytest.mark.req("L5")
def test_lists_are_drawn_on_a_terminal(mvm: Mvm, tmp_path: Path) -> None:
    terminal = Terminal([*MVM, "--root", str(tmp_path / "root"), "tenant", "list"])
    try:
        terminal.read_until(b"running")
        assert "─".encode() in terminal.seen
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()


@pytest.mark.req("L5", "L3")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupt_is_orderly(tmp_path: Path, mvm: Mvm, number: signal.Signals, code: int) -> None:
    # `logs -f` waits for ever, which is what is interrupted.
    argv = [*DRIVER, str(tmp_path / "root"), "-", "tenant", "logs", "acme", "-f", "--output", "json"]
    log = tmp_path / "root/tenants/acme/instances/default-0/runtime/logs/console.log"
    log.write_bytes(b"begun\n")
    with subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert b"begun" in started.stdout.readline()
        started.send_signal(number)
        _, err = started.communicate(timeout=60)
    assert started.returncode == code
    assert b'"kind":"interrupted"' in err
    assert b"Traceback" not in err


@pytest.mark.req("L5")
def test_without_root_rights(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        done = subprocess.run([*MVM, "tenant", "run", "acme"], env=ENV, capture_output=True, timeout=60)
    else:
        state = tmp_path / "root"
        state.mkdir(mode=0o700)
        (state / "tenants").mkdir(mode=0o700)
        script = (
            "import os, sys; import mvm.cli.__main__ as m, mvm.cli.tenant_life, mvm.standalone.facade, "
            "mvm.standalone.compose; os.setgid(65534); os.setuid(65534); m.main()"
        )
        argv = [sys.executable, "-c", script, "--root", str(state), "tenant", "run", "acme"]
        done = subprocess.run(argv, env=ENV, capture_output=True, timeout=60)
    assert done.returncode == 15
    assert b"error: mvm needs root here" in done.stderr
    assert b"sudo" in done.stderr


@pytest.mark.req("L5")
def test_completion_in_a_real_shell(tmp_path: Path, mvm: Mvm) -> None:
    script = subprocess.run(
        [*MVM, "completion", "bash"], env=ENV, capture_output=True, timeout=60
    ).stdout.decode()
    program = tmp_path / "mvm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mvm.cli "$@"\n')
    program.chmod(0o755)
    ask = f"""{script}
    COMP_WORDS=(mvm tenant wake a); COMP_CWORD=3; _mvm_completion {program}; echo "${{COMPREPLY[@]}}" """
    env = {**ENV, "MVM_ROOT": str(tmp_path / "root"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["/bin/bash", "--norc", "-c", ask], env=env, capture_output=True, timeout=60)
    assert done.stdout.decode().split() == ["acme"], done.stderr
