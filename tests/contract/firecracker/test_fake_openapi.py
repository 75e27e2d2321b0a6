"""The fake against what is published and what the driver can say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support import fc_requests
from tests.support.fake_firecracker import requests, schema
from tests.support.fake_firecracker.client import DESCRIPTION_FILE, description, running

VERSION = (1, 16, 1)


@pytest.fixture
def published() -> None:
    if DESCRIPTION_FILE not in os.environ:
        pytest.skip(f"{DESCRIPTION_FILE} names no published description of Firecracker's API")


@pytest.mark.usefixtures("published")
def test_what_the_fake_takes_fits_the_published_description(tmp_path: Path) -> None:
    assert description().version == "1.16.1"
    limiter = {
        "ops": {"size": 1, "refill_time": 1},
        "bandwidth": {"size": 1, "refill_time": 1, "one_time_burst": 2},
    }
    with running(tmp_path) as fake:  # whose client checks each request that succeeds
        fake.boot()
        fake.state("Paused")
        assert fake.snapshot("Diff").status == 204
        fake.do("PATCH", "/drives/rootfs", {"drive_id": "rootfs", "rate_limiter": limiter})
    assert description().check("PUT", "/entropy", b'{"unknown": 1}')


@pytest.mark.usefixtures("published")
def test_every_published_field_is_known_and_no_other() -> None:
    names = {
        "Balloon": "balloon", "BalloonUpdate": "balloon update", "BalloonStatsUpdate": "balloon statistics update",
        "BalloonStartCmd": "hinting start", "BootSource": "boot source", "Drive": "drive", "Pmem": "pmem",
        "PartialDrive": "drive update", "PartialPmem": "pmem update", "EntropyDevice": "entropy",
        "InstanceActionInfo": "action", "Logger": "logger", "MachineConfiguration": "machine", "Metrics": "metrics",
        "MemoryBackend": "memory backend", "MmdsConfig": "mmds config", "NetworkInterface": "net",
        "PartialNetworkInterface": "net update", "RateLimiter": "limiter", "TokenBucket": "bucket",
        "SnapshotCreateParams": "snapshot create", "SnapshotLoadParams": "snapshot load", "Vm": "vm",
        "NetworkOverride": "network override", "VsockOverride": "vsock override", "SerialDevice": "serial",
        "Vsock": "vsock", "MemoryHotplugConfig": "memory hotplug", "MemoryHotplugSizeUpdate": "memory hotplug update",
    }  # fmt: skip
    definitions = description()._root["definitions"]
    for theirs, ours in names.items():
        fields = schema.SCHEMAS[ours]
        assert set(definitions[theirs]["properties"]) == set(fields), theirs
        required = {name for name, field in fields.items() if field.need == schema.REQUIRED}
        assert set(definitions[theirs].get("required", ())) <= required, theirs


def test_every_request_of_the_driver_is_one_the_fake_takes() -> None:
    count = 0
    for call in fc_requests.every():
        requests.parse(call.method, call.path, call.body or None, VERSION)
        count += 1
    assert count > 20
