"""What every test obeys.

Tests below tests/unit run with process creation and sockets forbidden, fixtures included. Every id in a `req`
mark must be a row of docs/requirements.toml. Tests marked root, vm, build or node run when this machine can
run them and are otherwise skipped with the reason.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolation import Guard, install

ROOT = Path(__file__).resolve().parent.parent
UNIT = ROOT / "tests" / "unit"

GUARD = install()

# mark -> programs it needs beside root
NEEDS_ROOT: dict[str, tuple[str, ...]] = {
    "root": (),
    "vm": ("qemu-system-x86_64",),
    "build": ("nix",),
    "node": ("qemu-system-x86_64",),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = tomllib.loads((ROOT / "docs" / "requirements.toml").read_text())["requirements"].keys()
    faults: list[str] = []
    for item in items:
        for mark in item.iter_markers("req"):
            if not mark.args:
                faults.append(f"{item.nodeid}: req names no requirement")
            faults += [f"{item.nodeid}: no requirement {i!r}" for i in mark.args if i not in known]
        if reason := _cannot_run(item):
            item.add_marker(pytest.mark.skip(reason=reason))
    if faults:
        raise pytest.UsageError("see docs/requirements.toml for the ids\n" + "\n".join(sorted(set(faults))))


def _cannot_run(item: pytest.Item) -> str:
    for name, programs in NEEDS_ROOT.items():
        if item.get_closest_marker(name) is None:
            continue
        if os.geteuid() != 0:
            return f"marked {name}: needs root"
        for program in programs:
            if shutil.which(program) is None:
                return f"marked {name}: needs {program}, which scripts/setup installs"
    return ""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Set-up and tear-down of fixtures are inside as well."""
    if not item.path.is_relative_to(UNIT):
        return (yield)
    with GUARD.enforced():
        return (yield)


def _reported() -> Iterator[None]:
    """Fail this phase of the test if a refusal in it was swallowed."""
    result = yield
    if GUARD.violations:
        swallowed = "; ".join(GUARD.violations)
        GUARD.violations.clear()
        pytest.fail(f"swallowed: {swallowed}", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    return (yield from _reported())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    return (yield from _reported())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    return (yield from _reported())


@pytest.fixture
def isolation_guard() -> Guard:
    """The guard of this run. Only the test of the guard itself has a reason to clear its violations."""
    return GUARD
