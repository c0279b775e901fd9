"""A checkpoint larger than the memory allowed, and one whose compression is killed on the way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectrim
from spectrim.tools import safetensors_stream
from spectrim.tools.safetensors_stream import Entry

MB = 1 << 20
# Beside three times the largest layer: blocks that are copied or multiplied, and buffers of the libraries.
CONSTANT = 24 * MB
# glibc keeps what was freed of tensors below a threshold that grows to 32 MB: those here, but none that matters.
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(MB), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SQUARE, TALL = (1448, 1448), (8192, 256)  # 8 MB each; a square one has the largest Gram matrix for its size

# On a first small layer numpy, scipy and torch get the buffers that they keep for good; then the limit is set.
LIMITED = """
import resource, sys, torch, spectrim

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
small, dense, out, allowed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
spectrim.compress_checkpoint(small, out + "-small", ratio=0.9, factors=sys.argv[5])
limit = status("VmData") + allowed
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
open("/proc/self/clear_refs", "w").write("5")  # the highest mark begins anew; that of getrusage is the parent's too
before = status("VmRSS")
plan = spectrim.compress_checkpoint(dense, out, ratio=0.9, factors=sys.argv[5])
print(len(plan), status("VmHWM") - before)
"""

KILLED = """
import os, signal, sys, torch, spectrim
from spectrim.tools import safetensors_stream
torch.set_num_threads(1)
dense, out, begun = sys.argv[1], sys.argv[2], []
write = safetensors_stream.write

def until_the_second(path, entries, contents, metadata):
    begun.append(path)
    def cut_off():
        for count, piece in enumerate(contents):
            yield piece
            if len(begun) == 2 and count == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    return write(path, entries, cut_off(), metadata)

safetensors_stream.write = until_the_second
spectrim.compress_checkpoint(dense, out, ratio=0.5)
"""


def make(folder: Path, *layers: list[tuple[int, int]]) -> Path:
    """A checkpoint of random linear layers, a list of shapes a shard, one layer in memory at a time."""
    places = {}
    for number, shapes in enumerate(layers):
        file = f"model-{number + 1:05}-of-{len(layers):05}.safetensors"
        names = {f"layers.{number}.{i}.weight": shape for i, shape in enumerate(shapes)}
        contents = (safetensors_stream.raw(torch.randn(shape)) for shape in shapes)
        safetensors_stream.write(
            folder / file, {name: Entry.of("F32", *shape) for name, shape in names.items()}, contents, {}
        )
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | SETTINGS)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit and the count of memory are those of Linux")
@pytest.mark.parametrize(("factors", "layers"), [("plain", 3), ("pivoted", 6)])
def test_memory_is_a_few_times_the_largest_layer_whatever_the_checkpoint(
    tmp_path: Path, factors: str, layers: int
) -> None:
    largest = 4 * SQUARE[0] * SQUARE[1]
    dense = make(tmp_path / "dense", [TALL, SQUARE, *6 * [TALL]], 6 * [TALL], 6 * [TALL])
    small, allowed = make(tmp_path / "small", [(600, 500)]), layers * largest + CONSTANT
    assert sum(path.stat().st_size for path in dense.iterdir()) > 2 * allowed
    done = run(LIMITED, small, dense, tmp_path / "out", allowed, factors)
    assert done.returncode == 0, done.stderr
    factored, increase = map(int, done.stdout.split())
    assert factored == 20 and increase <= allowed


def test_killed_and_resumed_is_as_never_killed(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense", [(60, 40)], [(60, 40), (50, 50)], [(40, 60)])
    out, whole = tmp_path / "out", tmp_path / "whole"
    done = run(KILLED, dense, out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    (left,) = out.glob(f".{second}.*.tmp")
    assert {path.name for path in out.iterdir()} == {first, left.name, "spectrim.json", ".lock"}
    made = (out / first).stat().st_ino
    for folder in (out, whole):
        spectrim.compress_checkpoint(dense, folder, ratio=0.5)
    assert (out / first).stat().st_ino == made
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
