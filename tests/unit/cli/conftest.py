"""The command line over a node without VMs: `run("tenant", "list")`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.unit.standalone.fakes import FakeNode

from mvm.cli.app import App
from mvm.cli.root import root

Run = Callable[..., Result]


@pytest.fixture
def fake(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path / "root")


@pytest.fixture
def run(fake: FakeNode) -> Run:
    def invoke(*words: str, stdin: str | None = None) -> Result:
        app = App(lambda app: fake.open(app.command))
        return CliRunner().invoke(root, ["--root", str(fake.store.root), *words], input=stdin, obj=app)

    return invoke
