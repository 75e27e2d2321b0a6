"""The linters, run as the tests they are. A failure prints the linter's own report."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

# ruff finds Python by its suffix; a script without one has to be named.
SOURCES = ["src", "tests", "scripts", "scripts/gen-docs"]
SHEBANGS = (b"#!/usr/bin/env bash", b"#!/bin/bash", b"#!/bin/sh")


def lint(*argv: str, cwd: Path = ROOT) -> None:
    done = subprocess.run(
        [str(BIN / argv[0]), *argv[1:]],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(argv)} exits {done.returncode}\n{done.stdout}", pytrace=False)


def test_ruff() -> None:
    lint("ruff", "check", "--quiet", *SOURCES)


def test_formatting() -> None:
    lint("ruff", "format", "--check", "--quiet", *SOURCES)


def test_types() -> None:
    lint("mypy")


def test_imports() -> None:
    lint("lint-imports", "--no-cache")


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("core/a.py", "import mvm.linux.files"),
        ("wire/a.py", "import mvm.linux.files"),
        ("linux/a.py", "import mvm.wire"),
        ("hostd/a.py", "from mvm import builder"),
        ("builder/a.py", "import mvm.hostd"),
        ("agentd/a.py", "import mvm.linux.process"),
        ("agentd/a.py", "import mvm.linux.runs"),
        ("coordinator/a.py", "import mvm.linux.process"),
        ("guest/a.py", "import mvm.core"),
        ("guest/a.py", "import mvm.wire"),
        ("guest/a.py", "import mvm.linux"),
        ("dev/a.py", "import mvm.cli"),
    ],
)
def test_the_import_rules_bite(tmp_path: Path, importer: str, statement: str) -> None:
    """Against a package with every zone and one forbidden import in it."""
    zones = [
        "core",
        "wire",
        "linux",
        "hostd",
        "agentd",
        "coordinator",
        "builder",
        "guest",
        "standalone",
        "dev",
        "cli",
    ]
    for zone in zones:
        (tmp_path / "mvm" / zone).mkdir(parents=True)
        (tmp_path / "mvm" / zone / "__init__.py").touch()
    (tmp_path / "mvm" / "__init__.py").touch()
    (tmp_path / "mvm" / "linux" / "process.py").touch()
    (tmp_path / "mvm" / "linux" / "files.py").touch()
    (tmp_path / "mvm" / "linux" / "runs.py").write_text("import mvm.linux.process\n")
    shutil.copy(ROOT / ".importlinter", tmp_path)
    lint_here = [str(BIN / "lint-imports"), "--no-cache"]
    env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}

    def code() -> int:
        return subprocess.run(lint_here, cwd=tmp_path, env=env, capture_output=True, timeout=60).returncode

    assert code() == 0
    (tmp_path / "mvm" / importer).write_text(statement + "\n")
    assert code() == 1


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("src/mvm/hostd/probe.py", False),
        ("src/mvm/cli/probe.py", False),
        ("src/mvm/linux/process.py", True),
        ("src/mvm/guest/probe.py", True),
    ],
)
def test_only_the_one_door_imports_subprocess(path: str, allowed: bool) -> None:
    done = subprocess.run(
        [str(BIN / "ruff"), "check", "--quiet", "--select", "TID251", "--stdin-filename", path, "-"],
        cwd=ROOT,
        input=b"import subprocess\n",
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == (0 if allowed else 1), done.stdout.decode()


def test_shell_scripts_parse() -> None:
    for path in sorted((ROOT / "scripts").rglob("*")):
        if path.is_file() and (path.suffix == ".sh" or path.read_bytes().startswith(SHEBANGS)):
            subprocess.run(["/bin/bash", "-n", str(path)], check=True, timeout=60)
