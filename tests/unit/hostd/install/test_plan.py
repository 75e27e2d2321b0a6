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
    MakeNodeId,
    Observed,
    RemoveFile,
    Run,
    Step,
    StrictFilter,
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
    mode: str = "baseline",
    conditional: tuple[Path, ...] = (),
    before: Observed = DONE,
    strict: StrictFilter | None = None,
    **changes: Any,
) -> list[Step]:
    observed = msgspec.structs.replace(before, **changes)
    return plan(observed, SHIPPED, mode=mode, conditional=conditional, root=ROOT, strict=strict)


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


FILTER = StrictFilter("1.16.1", Path("/usr/lib/mvm/firecracker/1.16.1"), b"compiled")
OTHER = msgspec.structs.replace(FILTER, data=b"compiled anew")
OWN = """[[vmm.strict_filters]]  # by hand
  version = "1.16.1"
path = "/etc/mvm/strict-0123456789ab.bpf"
sha256 = "%s"
""" % ("0" * 64)


def pins(text: str) -> list[tuple[str, str, str]]:
    return [(one.version, one.path, one.sha256) for one in settings.parse(text).vmm.strict_filters]


@pytest.mark.req("H6")
def test_a_strict_filter_is_written_and_pinned_once() -> None:
    found = steps(strict=FILTER)
    assert [type(step) for step in found] == [WriteFile, WriteFile, Run]
    file, pinned, _ = found
    assert isinstance(file, WriteFile)
    assert (file.path, file.data) == (FILTER.path, b"compiled")
    assert isinstance(pinned, WriteFile)
    assert pins(pinned.data.decode()) == [("1.16.1", str(FILTER.path), FILTER.sha256)]
    assert commands(found) == ["systemctl restart mvm-hostd.service"]
    text = pinned.data.decode()
    there = {**DONE.files, FILTER.path: FILTER.data}
    assert steps(strict=FILTER, settings=text, files=there) == []
    assert len(steps(strict=OTHER, settings=text, files=there)) == 3
    for files in (DONE.files, {**there, FILTER.path: b"damaged"}):
        [again] = steps(strict=FILTER, settings=text, files=files)
        assert isinstance(again, WriteFile)
        assert (again.path, again.data) == (FILTER.path, FILTER.data)


@pytest.mark.parametrize("place", ["", "# above\n\n", '[vmm]\ndriver = "auto"\n\n'])
@pytest.mark.parametrize("after", ["", "\n# my limits\n[limits]\nvcpus = 2 # few\n"])
def test_what_is_compiled_anew_takes_the_place_of_what_was(place: str, after: str) -> None:
    text = with_filter(f'mode = "baseline" # said\n{place}', FILTER).rstrip("\n") + " # a word\n" + after
    made = with_filter(text, OTHER)
    assert pins(made) == [("1.16.1", str(OTHER.path), OTHER.sha256)]
    changed = [pair for pair in zip(text.split("\n"), made.split("\n"), strict=True) if pair[0] != pair[1]]
    assert [line.partition("=")[0].strip() for line, _ in changed] == ["path", "sha256"]
    assert changed[1][1].endswith(" # a word")
    assert with_filter(made, OTHER) == made


def test_another_version_has_a_pin_of_its_own() -> None:
    newer = StrictFilter("1.16.2", Path("/usr/lib/mvm/firecracker/1.16.2"), b"newer")
    made = with_filter(with_filter("", FILTER), newer)
    assert [version for version, _, _ in pins(made)] == ["1.16.1", "1.16.2"]


@pytest.mark.req("H6")
def test_an_operators_own_filter_is_left_alone() -> None:
    assert with_filter(OWN, FILTER) == OWN
    assert steps(strict=FILTER, settings=f'mode = "baseline"\n{OWN}') == []


@pytest.mark.parametrize(
    "text",
    [
        f'[vmm]\nstrict_filters = [{{version = "1.15.0", path = "/x", sha256 = "{"0" * 64}"}}]\n',
        "".join(OWN.replace("1.16.1", f"1.15.{n}") for n in range(16)),
        with_filter("", FILTER).replace('sha256 = "', "sha256 = '").rstrip('"\n') + "'\n",
    ],
)
def test_settings_that_cannot_be_changed_are_said_to_be(text: str) -> None:
    settings.parse(text)
    with pytest.raises(InvalidInput, match="cannot be changed"):
        with_filter(text, OTHER)
