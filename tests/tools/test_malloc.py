"""Freed memory is kept for the next use where that is asked for, and given back where that is."""

import subprocess
import sys

import pytest

from spectrim.tools import malloc

SCRIPT = """
import resource, torch
from spectrim.tools import malloc
from spectrim.models.resnet import ResNet
torch.set_num_threads(1)
if {kept}:
    malloc.keep()
model, images = ResNet(depth=20).eval(), torch.randn(100, 3, 32, 32)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.no_grad():
        model(images)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(sum(faults() for _ in range(4)))
malloc.give_back()
"""
on_glibc = pytest.mark.skipif(malloc._glibc("mallopt") is None, reason="another C library")


def faults(kept: bool) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(kept=kept)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@on_glibc
def test_large_tensors_are_not_mapped_anew_each_time() -> None:
    assert faults(kept=True) < faults(kept=False) / 4


def test_both_can_be_asked_for_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc, "_glibc", lambda function: None)
    malloc.keep()
    malloc.give_back()
