"""On a CPU, memory that one result leaves serves the next one."""

import subprocess
import sys
from dataclasses import replace

import pytest

from flux2_local import heap
from flux2_local.hardware import from_preset, probe

resource = pytest.importorskip("resource")

FAULTS = """
import resource, sys, torch
from flux2_local import heap
if sys.argv[1] == "kept":
    heap.keep()
def work():
    for _ in range(8):
        torch.ones(2**24).add_(1)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(heap.reason_against(probe("cpu")) is not None, reason="another C library")
def test_pages_are_not_mapped_again():
    def faults(how):
        return int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))

    pages = 8 * 2**26 // resource.getpagesize()
    assert faults("returned") > pages / 2 and faults("kept") < pages / 100


@pytest.mark.parametrize(
    ("library", "kept"),
    [(("glibc", "2.36"), True), (("glibc", "2.34"), False), (("musl", "1.2.5"), False), (("", ""), False)],
)
def test_it_takes_a_c_library_that_can(library, kept, monkeypatch):
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: library)
    here = replace(from_preset("cpu-8"), device="cpu")
    assert (heap.reason_against(here) is None) is kept


def test_a_cards_memory_is_torchs():
    assert "device" in heap.reason_against(from_preset("rtx-4090"))
