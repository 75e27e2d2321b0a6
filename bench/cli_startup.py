#!/usr/bin/env python3
"""How long the command line takes to start, as ratios within one run.

    python -m bench.cli_startup [--runs N] [--tenants N]

Measures, interleaved so that a change of the machine's load meets all of them alike, the median wall time of: a bare
interpreter, `mvm --version`, `mvm --help`, `mvm tenant --help`, and `mvm tenant list` over a state root with
many tenants (1,000), made for the purpose and removed again. Targets: --help at most 100 ms over the bare
interpreter; list under 2 x --version.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"


def make_root(root: Path, tenants: int) -> None:
    """`tenants` tenants, each with one instance, as the command line would have written them."""
    sys.path.insert(0, str(SOURCE))
    from mvm.core.ids import InstanceId, TenantId
    from mvm.core.record import encode_record, network_identity, new_record
    from mvm.core.spec import encode_spec, new_tenant

    for n in range(tenants):
        tenant = TenantId(f"t{n:04d}")
        instance = InstanceId(tenant, "default", 0)
        folder = root / "tenants" / tenant
        home = folder / "instances" / instance.dir_name
        home.mkdir(parents=True)
        (folder / "spec.json").write_bytes(encode_spec(new_tenant(tenant, "nix/embedded")))
        record = new_record(instance, network_identity(instance, n + 1, 0), now_ns=time.time_ns())
        (home / "state.json").write_bytes(encode_record(record))


def milliseconds(argv: list[str], env: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - began) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=15, help="measurements of each (default 15)")
    parser.add_argument("--tenants", type=int, default=1000, help="tenants in the list (default 1000)")
    options = parser.parse_args()
    script = Path(sys.executable).with_name("mvm")
    # The installed script if there is one: that is what people start.
    mvm = [str(script)] if script.exists() else [sys.executable, "-m", "mvm.cli"]
    with tempfile.TemporaryDirectory(prefix="mvm-bench-") as name:
        make_root(Path(name), options.tenants)
        env = {**os.environ, "MVM_ROOT": name, "PYTHONPATH": str(SOURCE)}
        cases = {
            "bare interpreter": [sys.executable, "-c", "pass"],
            "mvm --version": [*mvm, "--version"],
            "mvm --help": [*mvm, "--help"],
            "mvm tenant --help": [*mvm, "tenant", "--help"],
            f"mvm tenant list ({options.tenants})": [*mvm, "tenant", "list"],
        }
        times: dict[str, list[float]] = {case: [] for case in cases}
        for run in range(options.runs + 1):
            for case, argv in cases.items():
                took = milliseconds(argv, env)
                if run:  # the first one fills caches
                    times[case].append(took)
    median = {case: statistics.median(taken) for case, taken in times.items()}
    bare, version, *_, listed = median.values()
    print(
        f"medians of {options.runs} interleaved runs, {os.cpu_count()} CPUs, Python {sys.version.split()[0]}\n"
    )
    print(f"{'':28}{'ms':>8}{'over bare':>12}{'x --version':>13}")
    for case, took in median.items():
        print(f"{case:28}{took:8.1f}{took - bare:12.1f}{took / version:13.2f}")
    over = median["mvm --help"] - bare
    print(f"\n--help over the bare interpreter: {over:.1f} ms (target: at most 100)")
    print(f"list over --version: {listed / version:.2f} x (target: under 2)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
