"""The rules of tests/conftest.py bite. Each case is a pytest run of its own: a copy of the rules and one test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Repository:
    """A repository with our rules and nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in (
            "pyproject.toml",
            "tests/conftest.py",
            "scripts/lib/isolation.py",
            "docs/requirements.toml",
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)

    def run(self, test: str, *arguments: str, where: str = "unit") -> tuple[int, str]:
        path = self.root / "tests" / where / "test_case.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import os, socket, subprocess, warnings\nimport pytest\n\n" + test)
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(
            argv, cwd=self.root, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_a_good_test_passes(repository: Repository) -> None:
    code, out = repository.run("@pytest.mark.req('L1')\ndef test_x(): pass\n")
    assert code == 0, out


def test_an_unknown_requirement_stops_the_run(repository: Repository) -> None:
    code, out = repository.run("@pytest.mark.req('L1', 'Q9')\ndef test_x(): pass\n")
    assert code == pytest.ExitCode.USAGE_ERROR, out
    assert "no requirement 'Q9'" in out


def test_an_empty_requirement_mark_stops_the_run(repository: Repository) -> None:
    code, out = repository.run("@pytest.mark.req\ndef test_x(): pass\n")
    assert code == pytest.ExitCode.USAGE_ERROR, out


def test_an_unknown_mark_is_an_error(repository: Repository) -> None:
    code, out = repository.run("@pytest.mark.slowish\ndef test_x(): pass\n")
    assert code != 0
    assert "slowish" in out


@pytest.mark.parametrize("body", ["warnings.warn('old')", "open('/dev/null')"])
def test_a_warning_is_a_failure(repository: Repository, body: str) -> None:
    code, out = repository.run(f"def test_x(): {body}\n")
    assert code == 1, out


def test_an_unexpected_pass_is_a_failure(repository: Repository) -> None:
    code, out = repository.run("@pytest.mark.xfail(reason='x')\ndef test_x(): pass\n")
    assert code == 1, out


SWALLOWED = """
def attempt():
    try:
        subprocess.run(["/bin/true"])
    except Exception:
        pass
"""


@pytest.mark.parametrize(
    "test",
    [
        "def test_x(): attempt()\n",
        "@pytest.fixture\ndef f(): attempt()\ndef test_x(f): pass\n",
        "@pytest.fixture\ndef f():\n    yield\n    attempt()\ndef test_x(f): pass\n",
    ],
    ids=["call", "setup", "teardown"],
)
def test_a_process_in_a_unit_test_fails_even_if_the_refusal_is_swallowed(
    repository: Repository, test: str
) -> None:
    code, out = repository.run(SWALLOWED + test)
    assert code == 1, out
    assert "unit tests start no process" in out
    code, out = repository.run(SWALLOWED + test, "tests/contract", where="contract")
    assert code == 0, out


@pytest.mark.parametrize("mark", ["root", "vm", "build", "node"])
def test_without_root_the_skip_says_so(repository: Repository, mark: str) -> None:
    (repository.root / "somebody.py").write_text("import os\nos.geteuid = lambda: 1000\n")
    code, out = repository.run(f"@pytest.mark.{mark}\ndef test_x(): assert False\n", "-p", "somebody")
    assert code == 0, out
    assert f"marked {mark}: needs root" in out
