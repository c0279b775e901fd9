"""Every benchmark runs at its quick size, leaves its three files, and says of each target whether it is met."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KNOWN = "curves, selection, sizes, sweep, latency, pivoted, quantised, refit, ridge, variants, speed, memory, decoders"
NAMES = KNOWN.split(", ")
OTHERS = {"latency": 0, "quantised": 0, "refit": 2, "ridge": 0, "speed": 2, "variants": 2, "sizes": 3, "pivoted": 4}
TARGETS = dict.fromkeys(NAMES, 1) | OTHERS


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    done = _run("--quick", "--folder", str(folder))
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("name", NAMES)
def test_leaves_table_and_provenance(folder: Path, name: str) -> None:
    origin = json.loads((folder / f"{name}.provenance.json").read_text())
    assert origin["command"] == f"python benchmarks/run.py {name} --quick"
    assert origin["settings"]["quick"] and origin["machine"] and len(origin["targets"]) == TARGETS[name]
    text = (folder / f"{name}.md").read_text()
    assert text in (folder / "printed").read_text()
    for target in origin["targets"]:
        kept = target["measured"] >= target["bound"] if target["at_least"] else target["measured"] <= target["bound"]
        assert target["met"] == kept
        assert text.count(f"Target {'met' if kept else 'MISSED'}: {target['what']}: ") == 1
    assert text.count("Target ") == len(origin["targets"])


def test_every_way_gives_the_same_curves(folder: Path) -> None:
    assert all(float(row["largest_difference"]) < 1e-10 for row in _rows(folder, "curves"))


@pytest.mark.parametrize("name", ["selection", "sweep"])
def test_parts_are_disjoint_and_make_the_whole(folder: Path, name: str) -> None:
    seconds = {row["part"]: float(row["seconds"]) for row in _rows(folder, name)}
    assert min(seconds.values()) >= 0
    if name == "sweep":
        whole = seconds.pop("whole sweep")
        assert sum(seconds.values()) == pytest.approx(whole)


def test_a_sweep_decomposes_each_layer_once(folder: Path) -> None:
    calls = {row["part"]: int(row["calls"]) for row in _rows(folder, "sweep")}
    assert calls["decompositions"] == 20  # the layers of ResNet-20
    assert calls["evaluation"] == 2 * (3 + 1)  # two splits, three ranks and once dense


def test_no_layer_is_timed_above_its_share_of_macs(folder: Path) -> None:
    rows = _rows(folder, "latency")
    assert {row["view"] for row in rows} == {"channel", "spatial"}
    assert all(float(row["macs_kept"]) <= 0.5 or row["rank"] == "1" for row in rows)
    assert all((row["verdict"] == "SLOWER") == (float(row["time_ratio"]) > 1) for row in rows)


def test_views_in_the_knapsack_are_those_of_joint_selection_or_predicted_to_be_better(folder: Path) -> None:
    default, inside, refitted = _rows(folder, "variants")
    origin = json.loads((folder / "variants.provenance.json").read_text())
    assert [target["measured"] for target in origin["targets"]] == [0, 0]
    assert float(inside["predicted"]) <= float(default["predicted"]) * 1.001  # the knapsack ends within a thousandth
    assert all(0.49 < float(row["params_kept"]) <= 0.5 for row in (default, inside, refitted))
    assert float(inside["spatial"]) == float(default["spatial"]) == 6  # one plan: so the refit is the same one
    assert float(inside["to_default"]) == pytest.approx(0, abs=1e-6)
    assert refitted["to_default"] and not default["to_default"]


def test_integers_of_few_bits_stand_for_the_weight_to_half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from quantised import GROUP, rounded

    columns = GROUP + 8
    W = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    for bits, group in ((8, columns), (6, GROUP), (4, GROUP)):
        stored, value = rounded(W, bits)
        scales = stored["scales"].float().repeat_interleave(group, 1)[:, :columns]
        edge = 2 ** (bits - 1) - 1  # the largest positive weight of a group is cut by up to half a step more
        assert ((value - W).abs() <= scales * (0.51 + (edge * scales < W))).all()
        whole = columns if bits == 8 else 2 * GROUP  # the second group is filled up
        assert stored["codes"].numel() == W.shape[0] * whole * bits // 8
        binary = np.unpackbits(stored["codes"].numpy(), axis=1, bitorder="little").reshape(5, whole, bits)
        codes = binary.astype(int) @ (1 << np.arange(bits))
        codes = torch.from_numpy(np.where(codes > edge, codes - 2**bits, codes))[:, :columns]
        assert torch.equal(codes * scales, value)  # the packed integers say all


def test_a_missed_target_is_printed_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import Target

    assert (
        Target("a over b", 2.0, 1.5, at_least=False)
        .line()
        .startswith("Target MISSED: a over b: 2.00 times, at most 1.5")
    )
    assert Target("a over b", 60.0, 50, at_least=True).met


def test_an_unknown_name_is_refused_in_one_line() -> None:
    done = _run("curve")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"unknown benchmark 'curve'; known: {KNOWN}")
