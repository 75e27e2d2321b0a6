"""What is measured, as it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import in_node, profile_wake, sleep_wake
from bench.target import Target, of_options

from mvm.hostd.vmm.choice import PROGRAMS


def test_without_options_it_is_qemu_and_guests_are_built() -> None:
    assert of_options(sleep_wake.parse([])).vmm == "qemu"
    assert Target() == Target("qemu", Path(PROGRAMS), None)


def test_firecracker_from_a_directory_with_a_given_revision() -> None:
    words = ["--vmm", "firecracker", "--firecracker", "/srv/fc", "--revision", "/srv/revision"]
    found = of_options(sleep_wake.parse(words))
    assert found == Target("firecracker", Path("/srv/fc"), Path("/srv/revision"))
    assert found.environment() == {"MVM_HOSTD": "", "MVM_VMM": "firecracker", "MVM_FIRECRACKER": "/srv/fc"}
    assert found.driver(Path("/nowhere")).name == "firecracker"


def test_in_the_node_what_is_carried_is_given_and_the_rest_goes_through() -> None:
    options, rest = in_node.parse(["--firecracker", "here", "--vmm", "firecracker", "--sizes", "256"])
    assert options.firecracker == Path("here")
    told = in_node.command(options.program, rest, firecracker=True)
    assert told[1:3] == ["-m", "bench.sleep_wake"]
    found = sleep_wake.parse(told[3:])
    assert found.sizes == (256,)
    assert of_options(found).programs == Path(in_node.PLACE) / "firecracker"
    assert "--firecracker" not in in_node.command("profile_wake", [], firecracker=False)


@pytest.mark.parametrize("main", [sleep_wake.main, profile_wake.main])
def test_no_other_vmm(main: object) -> None:
    assert callable(main)
    with pytest.raises(SystemExit):
        main(["--vmm", "other"])
