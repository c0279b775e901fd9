"""Feed every reader of the project with damaged files: it must read them, or refuse them in one line.

A valid file is damaged in its bytes, or in one of the values of its JSON. A reader may take neither much memory nor
much time, and a model that a file is to be loaded into stays as it was where the file is refused.
"""

import json
import random
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import faults
import targets
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import spectrim
from spectrim.checkpoints import sharded
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.records import records
from spectrim.tools import resume
from spectrim.tools.content import content
from spectrim.tools.resume import Result, ResumeFolder
from spectrim.training import saved_state

READ = "files read: "
MEMORY = 3 << 30  # bytes that a reader may add to what the process has
SECONDS = 20.0  # of CPU that it may take for one file, and of the clock, on average: the machine may be busy
EXAMPLES = 50  # files a reader, for each trial of a writer
QUICK_EXAMPLES = 40
RUN = "a training"
NASTY: list[Any] = [
    None, True, "", "\0", "x" * 5000, -1, 0, 2**31, 2**64, 10**400, 1e308, float("inf"), float("nan"), [], {}, [[]],
    [5], {"a": {}}, "../../x", "linear", "spatial", "9" * 5000,
]  # fmt: skip


KEPT = {"measured": torch.arange(24, dtype=torch.float64).reshape(4, 6)}
KEPT_FILE = f"resume/kept-{content(['kept', 'inputs'])}.safetensors"


class Reader(NamedTuple):
    """``read(folder)`` reads what ``make(folder)`` wrote; ``file``: the name of the file that is damaged."""

    name: str
    file: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


def _save(folder: Path) -> None:
    targets.compressed().save(folder / "model.safetensors")


def _load(folder: Path) -> None:
    net = targets.net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        spectrim.load(folder / "model.safetensors", into=net)
    finally:
        same = net.state_dict().keys() == before.keys()
        if not same or not all(value.equal(before[name]) for name, value in net.state_dict().items()):
            raise AssertionError("the model that was given has changed")


def _make_plan(folder: Path) -> None:
    (folder / "plan.json").write_text(targets.compressed().plan.to_json())


def _read_plan(folder: Path) -> None:
    RankPlan.from_json((folder / "plan.json").read_text(encoding="utf-8", errors="replace")).as_dict()


def _make_record(folder: Path) -> None:
    known = next((Path(__file__).parents[2] / "results" / "records" / "table2").glob("*.json"))
    (folder / "record.json").write_bytes(known.read_bytes())


def _make_shards(folder: Path) -> None:
    targets.shards(folder / "given")
    spectrim.compress_checkpoint(folder / "given", folder / "out", ratio=0.5)


def _read_shards(folder: Path) -> None:
    sharded.load(folder / "out", into=targets.net())


def _make_state(folder: Path) -> None:
    saved_state.write(folder / "state.safetensors", KEPT, {"run": RUN, "curve": "[]"})


def _read_state(folder: Path) -> None:
    _require_kept(saved_state.read(folder / "state.safetensors", RUN)[0])


def _kept(folder: Path) -> Result:
    resume.WORTH_SECONDS = 0.0
    return ResumeFolder(folder / "resume").result("kept", lambda: ["inputs"], lambda: Result(KEPT))


def _require_kept(found: dict[str, torch.Tensor]) -> None:
    if found.keys() != KEPT.keys() or not all(found[name].equal(value) for name, value in KEPT.items()):
        raise AssertionError("damaged numbers were taken for good ones")


READERS = (
    Reader("spectrim.load", "model.safetensors", _save, _load),
    Reader("a plan", "plan.json", _make_plan, _read_plan),
    Reader("a record", "record.json", _make_record, lambda folder: records.read(folder / "record.json")),
    Reader("the index of a folder", "out/model.safetensors.index.json", _make_shards, _read_shards),
    Reader("the manifest of a folder", "out/spectrim.json", _make_shards, _read_shards),
    Reader("a shard", "out/model-00001-of-00003.safetensors", _make_shards, _read_shards),
    Reader("the state of a training", "state.safetensors", _make_state, _read_state),
    Reader("a result kept by resume=", KEPT_FILE, _kept, lambda folder: _require_kept(_kept(folder).tensors)),
)


def trials(draw: random.Random, number: int, quick: bool) -> Iterator[tuple[str, str, str | None]]:
    """Yield the reader, the kind of damage, and what went wrong (None: nothing), a trial a damaged file."""
    for reader in READERS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "work"
            folder.mkdir()
            reader.make(folder)
            examples, first = QUICK_EXAMPLES if quick else EXAMPLES * number, draw.randrange(2**32)
            patience = faults.HANGS_AFTER + SECONDS * examples
            end = faults.run(
                lambda place, r=reader, n=examples, s=first: _search(r, place, n, s), folder, faults.NONE, patience
            )
            complaint = None if end.code == faults.DONE else end.message or f"status {end.code}"
            read = re.search(rf"{READ}(\d+)", end.message)  # a search ends at the first file that brings it down
            for _ in range(int(read[1]) - 1 if read else 0):
                yield reader.name, "damaged file", None
            yield reader.name, "damaged file", complaint


def _search(reader: Reader, folder: Path, examples: int, first: int) -> None:
    """Read damaged files until one brings down the reader. Raises what it raised, and says how many it read."""
    path = folder / reader.file
    whole = path.read_bytes()
    if Path("/proc/self/statm").exists():
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    read = 0

    @seed(first)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        nonlocal read
        read += 1
        path.write_bytes(_damaged(whole, data))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with torch.random.fork_rng():
                reader.read(folder)
        except UserError as refused:
            assert len(str(refused).splitlines()) == 1, f"more than one line: {refused}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    signal.signal(signal.SIGPROF, _too_slow)
    try:
        attempt()
    finally:
        print(f"{READ}{read}", file=sys.stderr)


def _too_slow(*_: Any) -> NoReturn:
    raise AssertionError(f"a file takes more than {SECONDS:.0f} seconds of CPU")


def _damaged(whole: bytes, data: st.DataObject) -> bytes:
    start, header = _json_within(whole)
    if data.draw(st.booleans()):
        changed = json.dumps(_changed(header, data)).encode()
        if start:  # the header of a safetensors file, with its length in front
            length = int.from_bytes(whole[:8], "little")
            return len(changed).to_bytes(8, "little") + changed + whole[8 + length :]
        return changed
    place = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(("flip", "cut", "insert", "remove")))
    if kind == "cut":
        return whole[:place]
    if kind == "insert":
        return whole[:place] + data.draw(st.binary(min_size=1, max_size=40)) + whole[place:]
    if kind == "remove":
        return whole[:place] + whole[place + data.draw(st.integers(1, 40)) :]
    return whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]


def _json_within(whole: bytes) -> tuple[int, Any]:
    """Return where the JSON of a file begins, and its value."""
    try:
        return 0, json.loads(whole)
    except ValueError:
        return 8, json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])


def _changed(value: Any, data: st.DataObject) -> Any:
    """Replace, remove or add one value somewhere inside."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if isinstance(value, str) and value.startswith("{") and data.draw(st.booleans()):  # JSON within JSON: the plan
        return json.dumps(_changed(json.loads(value), data))
    if not inner or data.draw(st.integers(0, 3)) == 0:
        return data.draw(st.sampled_from(NASTY))
    key = data.draw(st.sampled_from(inner))
    copy = value.copy()
    kind = data.draw(st.integers(0, 5))
    if kind == 0:
        del copy[key]
    elif kind == 1 and isinstance(copy, dict):
        copy[f"{key}x"] = copy.pop(key)
    else:
        copy[key] = _changed(copy[key], data)
    return copy
