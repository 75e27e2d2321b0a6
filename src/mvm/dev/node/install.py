"""Puts the wheel of this start into /opt/mvm, whose dependencies are part of the image.

    python3 -I -S install.py WHEEL ENVIRONMENT

What pip does with a wheel of pure Python (PEP 427): unpack it beside what it imports, write its commands, note every
file with its hash in RECORD. pip takes ten seconds for that where the processor is emulated, at every start with
changed sources. The caller notes when it is done: what an interruption leaves is replaced the next time.

Standard library only, and nothing of mvm: it is what this installs.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

_COMMAND = """\
#!{python}
import sys

from {module} import {function}

if __name__ == "__main__":
    sys.exit({function}())
"""


def install(wheel: Path, environment: Path) -> None:
    """ValueError if the file is not one of ours or the environment has no place for packages."""
    places = list(environment.glob("lib/python3.*/site-packages"))
    if len(places) != 1:
        raise ValueError(f"{environment} is no virtual environment of one Python")
    (site,) = places
    for old in (site / "mvm", *site.glob("mvm-*.dist-info")):
        shutil.rmtree(old, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        infos = archive.infolist()
        (info,) = {entry.filename.partition("/")[0] for entry in infos if ".dist-info/" in entry.filename}
        tops = {entry.filename.partition("/")[0] for entry in infos}
        if tops != {"mvm", info} or not info.startswith("mvm-"):
            raise ValueError(f"{wheel} has {', '.join(sorted(tops))} in it")
        for entry in infos:
            made = archive.extract(entry, site)
            os.chmod(made, 0o755 if entry.external_attr >> 16 & 0o111 else 0o644)
        points = archive.read(f"{info}/entry_points.txt").decode()
    rows = [_write(site, f"{info}/INSTALLER", b"mvm\n", 0o644)]
    rows += [
        _write(site, os.path.relpath(environment / "bin" / name, site), text.encode(), 0o755)
        for name, text in commands(points, environment / "bin" / "python").items()
    ]
    with open(site / info / "RECORD", "a", encoding="utf-8") as record:
        record.writelines(f"{row}\n" for row in rows)


def commands(points: str, python: Path) -> dict[str, str]:
    """name -> script, of an entry_points.txt."""
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.read_string(points)
    made = {}
    for name, target in parser["console_scripts"].items():
        module, _, function = target.partition(":")
        made[name] = _COMMAND.format(python=python, module=module, function=function)
    return made


def _write(site: Path, name: str, data: bytes, mode: int) -> str:
    """Write a file; its row for RECORD."""
    path = site / name
    path.write_bytes(data)
    path.chmod(mode)
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


if __name__ == "__main__":
    install(Path(sys.argv[1]), Path(sys.argv[2]))
