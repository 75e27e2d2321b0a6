"""What bootstrap would do, for every way in which a host can differ from what is wanted."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import Conflict, InvalidInput
from mvm.hostd import settings
from mvm.hostd.install import units
from mvm.hostd.install.observe import parse_unit
from mvm.hostd.install.plan import (
    FilterSeen,
    MakeFilter,
    MakeNodeId,
    Observed,
    RemoveFile,
    Run,
    Step,
    Unit,
    WriteFile,
    plan,
    with_filter,
    with_mode,
)

ROOT = Path("/var/lib/mvm")
SHIPPED = {f.target: units.rendered(f.source, f"content of {f.source}\n") for f in units.FILES}
UP = Unit(enabled=True, active=True, failed=False, stale=False)
DOWN = Unit(enabled=False, active=False, failed=False, stale=False)
DONE = Observed(
    files={path: data for path, data in SHIPPED.items() if path not in units.CONDITIONAL},
    settings='mode = "baseline"\n', group=True, places=True, node_id=True, service=UP, socket=UP, code_changed=False,
)  # fmt: skip
BARE = Observed(
    files={},
    settings=None,
    group=False,
    places=False,
    node_id=False,
    service=DOWN,
    socket=DOWN,
    code_changed=False,
)


def steps(
    mode: str = "baseline", conditional: tuple[Path, ...] = (), before: Observed = DONE, **changes: Any
) -> list[Step]:
    return plan(
        msgspec.structs.replace(before, **changes), SHIPPED, mode=mode, conditional=conditional, root=ROOT
    )


def commands(found: list[Step]) -> list[str]:
    return [" ".join(step.argv) for step in found if isinstance(step, Run)]


@pytest.mark.req("H7")
def test_a_host_that_is_as_wanted_gives_no_steps() -> None:
    assert steps() == []


def test_a_bare_host_gets_everything_in_order() -> None:
    found = steps(before=BARE)
    assert [type(step) for step in found] == [WriteFile] * 6 + [Run] * 3 + [WriteFile, MakeNodeId, Run, Run]
    assert {s.path for s in found if isinstance(s, WriteFile)} == {
        *SHIPPED.keys() - units.CONDITIONAL, settings.FILE,
    }  # fmt: skip
    assert commands(found)[-2:] == [
        "systemctl enable mvm-hostd.socket mvm-hostd.service",
        "systemctl start mvm-hostd.socket mvm-hostd.service",
    ]
    assert all(step.describe() for step in found)


@pytest.mark.parametrize("path", sorted(DONE.files))
def test_an_older_file_is_replaced_and_taken_up(path: Path) -> None:
    found = steps(files={**DONE.files, path: units.MARK.encode() + b"\nolder"})
    assert found[0] == WriteFile("an older one is there", path, SHIPPED[path])
    after = commands(found)
    if path.parent == Path("/etc/systemd/system"):
        assert after[0] == "systemctl daemon-reload"
        assert after[-1].startswith("systemctl restart" if path.name != units.SOCKET else "systemctl start")
    else:
        assert not any("restart" in command for command in after)


def test_a_new_socket_takes_the_service_down_first() -> None:
    path = Path("/etc/systemd/system") / units.SOCKET
    found = commands(steps(files={**DONE.files, path: units.MARK.encode()}))
    assert found == [
        "systemctl daemon-reload",
        "systemctl stop mvm-hostd.socket mvm-hostd.service",
        "systemctl start mvm-hostd.socket mvm-hostd.service",
    ]


def test_what_somebody_else_wrote_stays() -> None:
    with pytest.raises(Conflict, match=r"tmpfiles\.d"):
        steps(files={**DONE.files, units.TMPFILES: b"d /run/mvm 0777 -\n"})


def test_new_code_and_new_settings_restart_the_daemon() -> None:
    assert commands(steps(code_changed=True)) == ["systemctl restart mvm-hostd.service"]
    found = steps(mode="development")
    assert [type(step) for step in found] == [WriteFile, Run]
    assert commands(found) == ["systemctl restart mvm-hostd.service"]


def test_a_daemon_that_failed_is_started_again() -> None:
    down = msgspec.structs.replace(UP, active=False, failed=True)
    assert commands(steps(service=down)) == [
        "systemctl reset-failed mvm-hostd.socket mvm-hostd.service",
        "systemctl start mvm-hostd.socket mvm-hostd.service",
    ]


@pytest.mark.parametrize("path", sorted(units.CONDITIONAL))
def test_a_drop_in_is_there_where_the_host_needs_it_and_goes_where_not(path: Path) -> None:
    (write, *after) = steps(conditional=(path,))
    assert isinstance(write, WriteFile)
    assert write.path == path
    assert commands(after)[-1] == "systemctl restart mvm-hostd.service"
    assert steps(conditional=(path,), files={**DONE.files, path: SHIPPED[path]}) == []
    (remove, *after) = steps(files={**DONE.files, path: SHIPPED[path]})
    assert isinstance(remove, RemoveFile)
    assert remove.path == path
    assert commands(after) == ["systemctl daemon-reload", "systemctl restart mvm-hostd.service"]


def test_the_daemon_is_up_at_the_end_whatever_there_was() -> None:
    """Every state of both units, with and without changes: nothing is started that runs, nothing is left down."""
    flags = [False, True]
    for enabled, active, sock, failed, stale, code in product(flags, repeat=6):
        service = Unit(enabled=enabled, active=active, failed=failed and not active, stale=stale)
        socket = Unit(enabled=enabled, active=sock, failed=False, stale=False)
        found = commands(steps(service=service, socket=socket, code_changed=code and active))
        last = found[-1] if found else ""
        if not active or not sock:
            assert last.startswith(("systemctl start", "systemctl restart")), (service, socket)
        if stale:
            assert any("daemon-reload" in c or "enable" in c for c in found)


# hostd.toml


def test_a_new_file_says_the_mode_and_nothing_more() -> None:
    text = with_mode(None, "baseline")
    assert settings.parse(text) == settings.Settings(mode="baseline")


OLD = 'group = "games"  # players\n\n# limits\n[limits]\nvcpus = 2\n'


def test_everything_else_in_the_file_stays() -> None:
    text = with_mode(OLD, "baseline")
    assert text == 'mode = "baseline"\n' + OLD
    again = with_mode(text, "development")
    assert again == 'mode = "development"\n' + OLD
    assert with_mode(again, "development") == again


@pytest.mark.parametrize(
    "line", ['mode="baseline"', '  mode = "baseline" # why', "mode = 'baseline'", '"mode" = "baseline"']
)
def test_a_mode_that_is_there_in_another_form_stays(line: str) -> None:
    assert with_mode(line + "\n" + OLD, "baseline") == line + "\n" + OLD
    assert settings.parse(with_mode(line + "\n" + OLD, "development")).mode == "development"


def test_a_file_that_is_not_valid_is_not_touched() -> None:
    for text in ("mode = 3\n", "nonsense", 'unknown = "x"\n'):
        with pytest.raises(InvalidInput):
            with_mode(text, "baseline")


@given(
    st.lists(
        st.sampled_from(
            [
                "# mode = nothing",
                "",
                'group = "g"',
                "operations = 3",
                'mode = "development"',
                "[limits]",
                "vcpus = 1",
            ]
        ),
        max_size=8,
    ),
    st.sampled_from(["baseline", "development"]),
)
def test_any_valid_file_says_the_mode_afterwards_and_the_rest_as_before(lines: list[str], mode: str) -> None:
    text = "\n".join(lines)
    try:
        before = settings.parse(text)
    except InvalidInput:
        return
    after = settings.parse(with_mode(text, mode))
    assert after == msgspec.structs.replace(before, mode=mode)


# Units


def test_systemds_answers_are_read() -> None:
    shown = "ActiveState=active\nUnitFileState=enabled\nNeedDaemonReload=no\nMainPID=77\n"
    assert parse_unit(shown) == (UP, 77)
    assert parse_unit("ActiveState=inactive\nUnitFileState=\nMainPID=0\n") == (DOWN, 0)
    assert parse_unit("ActiveState=activating\nUnitFileState=enabled\n")[0].active
    failed, _ = parse_unit("ActiveState=failed\nNeedDaemonReload=yes\n")
    assert (failed.failed, failed.active, failed.stale) == (True, False, True)


@given(st.text(max_size=200))
def test_any_answer_is_read_or_ignored(text: str) -> None:
    parse_unit(text)


def test_what_is_shipped_is_all_that_there_is() -> None:
    """A file in systemd/ that nobody installs would be forgotten."""
    assert {f.source for f in units.FILES} == {path.name for path in units.shipped_dir().iterdir()}
    assert all(data.startswith(units.MARK.encode()) for data in units.load().values())


@pytest.mark.req("H7")
def test_the_unit_executes_what_is_installed() -> None:
    text = (units.shipped_dir() / units.SERVICE).read_text()
    assert f"ExecStart={units.HOSTD}\n" in text
    assert "Slice=mvm.slice\n" in text


FOLDER = Path("/usr/lib/mvm/firecracker/1.16.1")
FILTER = FilterSeen("1.16.1", FOLDER, wanted=b"{}", derived=None, sha256="")
PINNED = with_filter(DONE.settings or "", "1.16.1", FOLDER / "strict.bpf", "ab" * 32)


@pytest.mark.req("H6")
def test_a_strict_filter_is_made_and_pinned_once() -> None:
    found = steps(filter=FILTER)
    assert [type(step) for step in found] == [MakeFilter, Run]
    assert commands(found) == ["systemctl restart mvm-hostd.service"]
    done = msgspec.structs.replace(FILTER, derived=b"{}", sha256="ab" * 32)
    assert steps(filter=done, settings=PINNED) == []
    for other in (
        msgspec.structs.replace(done, wanted=b"{ }"), msgspec.structs.replace(done, sha256="cd" * 32),
        msgspec.structs.replace(done, sha256=""), msgspec.structs.replace(done, version="1.16.2"),
    ):  # fmt: skip
        assert any(isinstance(step, MakeFilter) for step in steps(filter=other, settings=PINNED))


def test_an_operators_own_filter_is_left_alone() -> None:
    own = with_filter(DONE.settings or "", "1.16.1", Path("/etc/mvm/own.bpf"), "ab" * 32)
    assert steps(filter=FILTER, settings=own) == []


@pytest.mark.parametrize(
    "text",
    [
        "", 'mode = "baseline"  # said\n', "# none\n\n[limits]\nvcpus = 2 # few\n", '[vmm]\ndriver = "auto"\n',
        '[[vmm.strict_filters]]\nversion = "1.15.0"\npath = "/x"\nsha256 = "' + "0" * 64 + '"\n\n[limits]\nvcpus = 3\n',
    ],
)  # fmt: skip
def test_pinning_a_filter_keeps_all_else_that_the_settings_say(text: str) -> None:
    path = FOLDER / "strict.bpf"
    once = with_filter(text, "1.16.1", path, "ab" * 32)
    assert all(line in once.split("\n") for line in text.split("\n"))
    before, after = settings.parse(text), settings.parse(with_filter(once, "1.16.1", path, "cd" * 32))
    ours = [one for one in after.vmm.strict_filters if one.path == str(path)]
    assert [(one.version, one.sha256) for one in ours] == [("1.16.1", "cd" * 32)]
    rest = tuple(one for one in after.vmm.strict_filters if one.path != str(path))
    assert (
        msgspec.structs.replace(after, vmm=msgspec.structs.replace(after.vmm, strict_filters=rest)) == before
    )


def test_a_filter_that_cannot_be_pinned_is_refused() -> None:
    inline = f'[vmm]\nstrict_filters = [{{version = "1.16.1", path = "/x", sha256 = "{"0" * 64}"}}]\n'
    with pytest.raises(InvalidInput):
        with_filter(inline, "1.16.1", FOLDER / "strict.bpf", "ab" * 32)
