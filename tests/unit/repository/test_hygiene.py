"""What may not be in the repository. The forbidden words are put together here, so that this file holds none."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "src" / "mvm"

# Not part of the repository: made by tools (.gitignore names the same).
GENERATED = {"__pycache__", "build", "dist", "node_modules"}
CODE = {".py", ".sh", ".nix", ".c", ".js"}
MAX_LINES = 600

# path -> why one file is right here
LONG_FILES: dict[str, str] = {}

FORBIDDEN: dict[str, str] = {
    "a path of one machine": "|".join(
        (
            r"(?<![\w.$}/-])/" + r"work/[\w.]",
            r"(?<![\w.$}/-])/ro" + r"ot/[\w.]",
            r"(?<![\w.$}/-])/home/" + r"(?!user\b|<)\w",
            "/opt/" + "wheels",
            "/tmp/" + r"x\b",
            r"\.py" + "env",
        )
    ),
    "a registry or mirror": "|".join(
        (
            r"py" + r"pi\.org",
            r"python" + r"hosted",
            r"crates" + r"\.io",
            r"npm" + r"js\.(org|com)",
            r"(deb|ftp|security|snapshot|archive)" + r"\.debian\.org",
            r"(archive|security|ports)" + r"\.ubuntu\.com",
            r"proxy" + r"\.golang\.org",
            r"ruby" + r"gems\.org",
            r"cache" + r"\.nixos\.org",
            r"(docker|ghcr|quay|gcr)" + r"\.io\b",
        )
    ),
}
# path -> why the word is meant there
MEANT: dict[str, str] = {}

UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImpl" + r"ementedError)\b")

# Zones of the package -> what they may take from outside of it beside the standard library. None: anything declared.
EFFECT_FREE = {"msgspec", "cryptography"}
CORE_MAY_NOT = {
    "asyncio", "http", "multiprocessing", "os", "random", "secrets", "select", "shutil", "signal", "socket",
    "subprocess", "tempfile", "threading", "time", "urllib", "uuid",
}  # fmt: skip
# The name a distribution is imported by, where it differs from its own.
IMPORT_NAMES: dict[str, str] = {}


def files() -> Iterator[Path]:
    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            name = path.name
            if (
                name in GENERATED
                or name.endswith(".egg-info")
                or name == "result"
                or name.startswith("result-")
            ):
                continue
            if name.startswith(".") and name not in (".ci", ".gitignore", ".importlinter"):
                continue
            if path.is_dir() and not path.is_symlink():
                yield from walk(path)
            elif path.is_file():
                yield path

    return walk(ROOT)


def texts() -> Iterator[tuple[str, str]]:
    for path in files():
        try:
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def hits(pattern: re.Pattern[str], name: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [f"{name}:{n}: {line.strip()[:100]}" for n, line in lines if pattern.search(line)]


def modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) for every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


@pytest.mark.parametrize("what", FORBIDDEN)
def test_names_nothing_of_one_machine(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [hit for name, text in texts() if name not in MEANT for hit in hits(pattern, name, text)]
    assert not found, f"{what}:\n" + "\n".join(found)


def test_the_patterns_bite() -> None:
    machine, registry = (re.compile(p) for p in FORBIDDEN.values())
    # Put together here, because this file is looked through like all others.
    for parts in (("work", "main"), ("root", ".x"), ("home", "me"), ("tmp", "x", "clean")):
        path = "/" + "/".join(parts)
        assert machine.search(path), path
        assert machine.search(f"open('{path}')"), path
    for parts in (
        ("$HOME", "work", "x"),
        ("chroot", "root", "x"),
        ("network", "work", "x"),
        ("", "tmp", "xyz"),
    ):
        assert not machine.search("/".join(parts)), parts
    assert not machine.search("/var/lib/mvm")
    for host in (
        "https://py" + "pi.org/simple",
        "files.python" + "hosted.org",
        "http://deb" + ".debian.org/debian",
    ):
        assert registry.search(host), host
    assert UNFINISHED.search("# TO" + "DO later")
    assert not UNFINISHED.search("mktemp /run/fooXXXXXX")


def test_no_file_is_too_long() -> None:
    long = {n: len(t.splitlines()) for n, t in texts() if Path(n).suffix in CODE or n.startswith("scripts/")}
    assert {n: c for n, c in long.items() if c > MAX_LINES and n not in LONG_FILES} == {}
    assert [n for n in LONG_FILES if long.get(n, 0) <= MAX_LINES] == [], "these need no exception any more"


def test_exceptions_are_explained() -> None:
    for table in (LONG_FILES, MEANT):
        for name, why in table.items():
            assert (ROOT / name).exists(), f"{name} is gone"
            assert len(why.split()) >= 4, f"{name}: say why"


def test_nothing_is_unfinished() -> None:
    assert [h for n, t in texts() if n.startswith("src/") for h in hits(UNFINISHED, n, t)] == []


def test_every_zone_says_what_it_is() -> None:
    zones = [p for p in sorted(PACKAGE.iterdir()) if p.is_dir() and any(p.glob("*.py"))]
    assert zones
    for zone in zones:
        assert (zone / "__init__.py").exists(), f"{zone.name} has no __init__.py"
        said = " ".join((ast.get_docstring(ast.parse((zone / "__init__.py").read_text())) or "").split())
        for phrase in ("Runs as", "Talks to", "May never"):
            assert phrase in said, f"src/mvm/{zone.name}/__init__.py does not say {phrase!r}"


def test_the_guest_needs_the_standard_library_only() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in sorted((PACKAGE / "guest").rglob("*.py"))
        for line, module in modules(path)
        if module.split(".")[0] not in sys.stdlib_module_names and not f"{module}.".startswith("mvm.guest.")
    ]
    assert not found


def test_core_has_no_effects() -> None:
    found = []
    for path in sorted((PACKAGE / "core").rglob("*.py")):
        for line, module in modules(path):
            top = module.split(".")[0]
            outside = top != "mvm" and top not in sys.stdlib_module_names and top not in EFFECT_FREE
            if top in CORE_MAY_NOT or outside:
                found.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert not found


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {Requirement(d).name for d in project["dependencies"]}
    importable = {IMPORT_NAMES.get(name, name) for name in declared} | {"mvm"} | sys.stdlib_module_names
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, module in modules(path)
        if module.split(".")[0] not in importable
    ]
    assert not found, "add to pyproject.toml and run scripts/lock:\n" + "\n".join(found)


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sorted(PACKAGE.rglob("*.py"))
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_every_decision_has_a_number_and_the_headings() -> None:
    numbers = []
    for path in sorted((ROOT / "docs" / "adr").glob("*.md")):
        match = re.fullmatch(r"(\d{4})-[a-z0-9-]+\.md", path.name)
        assert match, f"docs/adr/{path.name}: the name is NNNN-short-title.md"
        numbers.append(int(match[1]))
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {int(match[1])}. "), f"{path.name}: the title begins with its number"
        for heading in ("Status: ", "## Context", "## Decision", "## Consequences"):
            assert f"\n{heading}" in text, f"{path.name} lacks {heading!r}"
    assert numbers == list(range(1, len(numbers) + 1)), "numbers are consecutive and used once"


def test_the_changelog_keeps_its_form() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    for line in versions[1:]:
        assert re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", line), line
    for line in lines:
        if line.startswith("### "):
            assert line[4:] in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"), line
