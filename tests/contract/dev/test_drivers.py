"""What every driver of a node does: Lima's, over a limactl that keeps its machines in a file, and the fake.

QEMU's driver does the same with a machine, in tests/node.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.contract.dev.fake_node import FakeNode

from mvm.builder.flakes import embedded_flake_dir
from mvm.core.errors import Conflict, MissingPrerequisite
from mvm.dev import lima
from mvm.dev.lima import LimaNode
from mvm.dev.model import NodeDriver, NodeSpec, Quiet, StartOptions

LIMACTL = Path(__file__).with_name("fake_limactl.py")
pytestmark = pytest.mark.req("O4")


@pytest.fixture
def lima_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A limactl and a sudo on Lima's path; sudo is only ever named as an argument."""
    bin_dir, home = tmp_path / "bin", tmp_path / "lima"
    bin_dir.mkdir()
    home.mkdir()
    shutil.copy(LIMACTL, bin_dir / "limactl")
    monkeypatch.setenv("MVM_LIMA_PATH", f"{bin_dir}:{os.environ['PATH']}")
    monkeypatch.setenv("LIMA_HOME", str(home))
    return home


@pytest.fixture(params=["fake", "lima"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> NodeDriver:
    if request.param == "fake":
        return FakeNode(tmp_path / "node")
    request.getfixturevalue("lima_home")
    return LimaNode(tmp_path / "node", embedded_flake_dir)


def run(
    node: NodeDriver, argv: Sequence[str], stdin: bytes = b"", **extra: object
) -> tuple[int, bytes, bytes]:
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        code = node.run(
            argv,
            stdin=given.fileno(),
            stdout=out.fileno(),
            stderr=err.fileno(),
            **extra,  # type: ignore[arg-type]
        )
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def test_a_life(node: NodeDriver) -> None:
    assert node.status().state == "absent"
    assert node.stop(grace_s=5, discard=False, tell=Quiet()) == "absent"
    assert node.start(StartOptions(vcpus=3), Quiet()) is True
    assert (node.status().state, node.status().vcpus) == ("running", 3)
    assert node.start(StartOptions(), Quiet()) is False
    assert node.stop(grace_s=5, discard=False, tell=Quiet()) == "shut-down"
    assert node.stop(grace_s=5, discard=False, tell=Quiet()) == "stopped"
    assert node.status().state == "stopped"
    assert node.start(StartOptions(), Quiet()) is True
    assert node.status().vcpus == 3, "the size is kept"
    assert node.stop(grace_s=0, discard=True, tell=Quiet()) == "killed"
    assert node.status().state == "absent"


def test_another_size_while_it_runs_is_a_conflict(node: NodeDriver) -> None:
    node.start(StartOptions(), Quiet())
    with pytest.raises(Conflict) as caught:
        node.start(StartOptions(vcpus=NodeSpec().vcpus + 1), Quiet())
    assert "mvm stop" in caught.value.resolution


def test_nothing_runs_in_a_node_that_does_not(node: NodeDriver) -> None:
    with pytest.raises(Conflict) as caught:
        run(node, ["true"])
    assert "mvm start" in caught.value.resolution


@pytest.mark.skipif(shutil.which("sudo") is None and os.geteuid() != 0, reason="nothing stands in for sudo")
def test_a_program_has_its_input_outputs_variables_and_exit_code(
    node: NodeDriver, request: pytest.FixtureRequest
) -> None:
    node.start(StartOptions(), Quiet())
    script = 'cat; echo "$WORD" >&2; exit 7'
    assert run(node, ["sh", "-c", script], b"in", env={"WORD": "two words"}) == (7, b"in", b"two words\n")


def test_lima_is_told_to_share_nothing_and_gets_the_wheel(lima_home: Path, tmp_path: Path) -> None:
    LimaNode(tmp_path / "node", embedded_flake_dir).start(StartOptions(), Quiet())
    calls = [json.loads(line) for line in (lima_home / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == ["list", "start", "copy", "shell", "shell"]
    assert "mvm-bootstrap" in calls[-1]
    assert json.loads((tmp_path / "node" / "lima.yaml").read_text())["mounts"] == []


@pytest.mark.parametrize(
    ("codes", "asked", "done"),
    [
        ({"bootstrap": 0}, ["bootstrap"], True),
        ({"bootstrap": 15, "bootstrap --development": 0}, ["bootstrap", "bootstrap --development"], True),
        ({"bootstrap": 15, "bootstrap --development": 12}, ["bootstrap", "bootstrap --development"], False),
        ({"bootstrap": 12}, ["bootstrap"], False),
    ],
)
def test_a_lima_machine_is_set_up_once_as_well_as_it_can_be(
    codes: dict[str, int], asked: list[str], done: bool, tmp_path: Path
) -> None:
    answers = "".join(f"'{words}') exit {code} ;;\n" for words, code in codes.items())
    (tmp_path / "mvm").write_text(
        f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\ncase "$*" in\n{answers}esac\nexit 99\n'
    )
    (tmp_path / "mvm").chmod(0o755)
    argv = ["/bin/sh", "-c", lima._BOOTSTRAP, "mvm-bootstrap", str(tmp_path / "marker"), "digest"]
    for _ in range(2):
        found = subprocess.run(
            argv, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, timeout=60
        )
        assert found.returncode == 0
        assert (b"not a service" in found.stderr) is not done
    assert (tmp_path / "asked").read_text().splitlines() == asked * (1 if done else 2)


def test_a_machine_that_does_not_stop_is_forced(lima_home: Path, tmp_path: Path) -> None:
    node = LimaNode(tmp_path / "node", embedded_flake_dir)
    node.start(StartOptions(), Quiet())
    (lima_home / "hangs").touch()
    assert node.stop(grace_s=5, discard=False, tell=Quiet()) == "killed"
    assert node.status().state == "stopped"


def test_without_lima_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVM_LIMA_PATH", str(tmp_path))
    with pytest.raises(MissingPrerequisite) as caught:
        LimaNode(tmp_path / "node", embedded_flake_dir).status()
    assert "brew install lima" in caught.value.resolution
