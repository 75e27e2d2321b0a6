"""Where Debian's packages come from: what this machine's own apt is configured to use, and nothing else.

`apt-get indextargets` lists what apt has verified and fetched, so the parsing of source lists stays apt's. Only
sources whose release file says `Origin: Debian` are used: a third party's package has no place in a node.
"""

from __future__ import annotations

import os
import re
from typing import Final

import msgspec

from mvm.core.errors import CommandFailed, InvalidInput, MissingPrerequisite
from mvm.linux.process import run

KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR_SUITE: Final = "bookworm"
_QUERY_S: Final = 60.0
_URL: Final = re.compile(r"(https?|file|copy|mirror(\+\w+)?)://?[!-~]{1,500}")


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """One suite of one archive."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str


def parse_targets(text: str) -> tuple[Source, ...]:
    """Debian's own sources in the output of `apt-get indextargets`, each suite once."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", stanza, re.MULTILINE))
        if fields.get("Origin") != "Debian" or fields.get("Created-By", "Packages") != "Packages":
            continue
        uri, suite, component = fields.get("Repo-URI"), fields.get("Release"), fields.get("Component")
        if uri and suite and component:
            found.setdefault((uri, suite, fields.get("Signed-By") or KEYRING), set()).add(component)
    return tuple(
        Source(uri, suite, tuple(sorted(components)), key)
        for (uri, suite, key), components in sorted(found.items())
    )


def main_suite(sources: tuple[Source, ...]) -> str:
    """The release that the others (updates, security) add to: the shortest name. Raises ValueError without any."""
    return min((source.suite for source in sources), key=lambda name: (len(name), name))


def render(sources: tuple[Source, ...]) -> str:
    """As a deb822 file, which is what mmdebstrap reads from its standard input."""
    return "\n".join(
        f"Types: deb\nURIs: {s.uri}\nSuites: {s.suite}\n"
        f"Components: {' '.join(s.components)}\nSigned-By: {s.signed_by}\n"
        for s in sources
    )


def from_mirror(url: str) -> tuple[Source, ...]:
    """The one suite of a mirror that the operator named. Raises InvalidInput."""
    if not _URL.fullmatch(url):
        raise InvalidInput(
            f"{url[:80]!a} is not the address of a mirror",
            resolution="name one as https://HOST/debian",
        )
    return (Source(url, MIRROR_SUITE, ("main",), KEYRING),)


def of_this_machine() -> tuple[Source, ...]:
    """What apt uses here. MissingPrerequisite if that is not Debian, or apt has not fetched its lists."""
    try:
        text = run(["apt-get", "indextargets", "Created-By: Packages"], timeout=_QUERY_S).stdout
    except CommandFailed as error:
        raise MissingPrerequisite(
            "this machine's apt does not say where packages come from",
            details=error.details,
            resolution="run: apt-get update",
        ) from error
    sources = parse_targets(text.decode("utf-8", "replace"))
    if not sources:
        raise MissingPrerequisite(
            "this machine has no Debian package source",
            details="None of the lists that apt has fetched says Origin: Debian.",
            resolution="on Debian, run: apt-get update. Elsewhere, install debian-archive-keyring and name a mirror:"
            " mvm start --mirror URL",
        )
    return sources


def check_keyrings(sources: tuple[Source, ...]) -> None:
    """MissingPrerequisite where a key that must sign the packages is not there."""
    for source in sources:
        if source.signed_by.startswith("/") and not os.path.exists(source.signed_by):
            raise MissingPrerequisite(
                "Debian's archive keys are not installed",
                details=f"There is no {source.signed_by}.",
                resolution="install them: apt-get install debian-archive-keyring",
            )
