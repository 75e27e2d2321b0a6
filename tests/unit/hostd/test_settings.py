from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.core.errors import InvalidInput
from mvm.hostd import settings


def test_nothing_said() -> None:
    assert settings.parse("") == settings.Settings()


@pytest.mark.req("H2")
@pytest.mark.parametrize(
    "text",
    [
        "groups = 'mvm'",
        "group = ''",
        "group = 'a b'",
        "group = '../x'",
        "operations = 0",
        "operations = 65",
        "operations = '8'",
        "[limits]\nvcpus = 0",
        "[limits]\nmemory = 1",
        "[limits]\nrunning = -1",
        "[limits]\nrunning_mem_mib = 1.5",
        "x = ",
    ],
)
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(InvalidInput):
        settings.parse(text)


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    try:
        settings.parse(text)
    except InvalidInput:
        return
