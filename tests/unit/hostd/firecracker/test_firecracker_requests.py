from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path

import pytest
from tests.support.fc_requests import config, every
from tests.support.openapi import Description

from mvm.core.errors import InvalidInput
from mvm.hostd.vmm.firecracker import requests as rq
from mvm.hostd.vmm.firecracker.version import NEWEST

PUBLISHED = os.environ.get("MVM_FIRECRACKER_OPENAPI", "")


@pytest.mark.req("B7")
@pytest.mark.skipif(not PUBLISHED, reason="MVM_FIRECRACKER_OPENAPI names no published API description")
def test_every_request_is_one_of_the_published_description() -> None:
    described = Description(Path(PUBLISHED))
    assert described.version == str(NEWEST)
    faults = [fault for call in every() for fault in described.check(call.method, call.path, call.body)]
    assert faults == []
    assert described.check("PUT", "/vsock", b'{"uds_path": "x"}') != [], "the check itself can fail"


def test_none_is_missing_from_that_check() -> None:
    made = {(call.method, call.path) for call in every()}
    kinds = [
        kind
        for _, kind in inspect.getmembers(rq, inspect.isclass)
        if isinstance(getattr(kind, "path", None), str)
    ]
    asked = {
        (str(vars(kind).get("method", "PUT")), str(vars(kind)["path"]))
        for kind in kinds
        if vars(kind).get("path")
    }
    asked |= {(c.method, c.path) for c in vars(rq).values() if isinstance(c, rq.Call)}
    assert asked <= made


def test_there_is_no_request_that_the_driver_does_not_make() -> None:
    names = {
        name
        for name, found in vars(rq).items()
        if isinstance(found, rq.Call)
        or isinstance(vars(found).get("path") if inspect.isclass(found) else None, str)
    }
    driver = "".join(path.read_text() for path in Path(rq.__file__).parent.glob("*.py"))
    assert {name for name in names if len(re.findall(rf"\b{name}\b", driver)) < 2} == set()


@pytest.mark.req("B7")
def test_the_machine_is_made_in_an_order_that_the_api_takes() -> None:
    paths = [call.path for call in rq.boot(config())]
    assert paths == [
        "/logger", "/metrics", "/machine-config", "/boot-source",
        "/drives/rootfs", "/drives/data", "/drives/secrets", "/network-interfaces/eth0",
        "/vsock", "/entropy", "/balloon", "/mmds/config", "/actions",
    ]  # fmt: skip


def test_fields_that_were_not_asked_for_are_not_sent() -> None:
    body = rq.LoadSnapshot("/s", rq.MemoryBackend("File", "/m")).call().body
    assert body is not None
    assert json.loads(body) == {
        "snapshot_path": "/s", "mem_backend": {"backend_type": "File", "backend_path": "/m"}
    }  # fmt: skip


def test_a_body_that_the_api_would_not_take_is_refused_here() -> None:
    with pytest.raises(InvalidInput):
        rq.call("PUT", "/machine-config", {"cpu_template": "x" * rq.BODY_MAX})
