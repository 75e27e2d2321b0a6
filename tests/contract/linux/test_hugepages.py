"""A process that may not ask for huge pages: that one question is refused, and no other."""

from __future__ import annotations

import mmap
import os

import pytest

from mvm.linux import hugepages


@pytest.mark.req("S2")
def test_only_the_advice_for_huge_pages_is_refused() -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with mmap.mmap(-1, 4 << 20) as area:
                hugepages._libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
                hugepages.refuse_advice()
                area.madvise(mmap.MADV_WILLNEED)
                area.madvise(mmap.MADV_DONTNEED)
                os.getpid()
                try:
                    area.madvise(mmap.MADV_HUGEPAGE)
                except OSError as error:
                    code = 0 if error.errno == 22 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
