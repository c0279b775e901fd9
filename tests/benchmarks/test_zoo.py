"""The zoo tells what works from what is refused, wrong or broken, and goes on where it stopped."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "zoo"))

import trial  # noqa: E402
import zoo  # noqa: E402
from given import CLASSES, SAMPLES, Architecture, Given  # noqa: E402
from trial import CRASHES, REFUSED, WORKS, WRONG, tried  # noqa: E402


def small() -> Given:
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, CLASSES)).eval()
    return Given(model, [(torch.randn(SAMPLES, 16), torch.randint(0, CLASSES, (SAMPLES,))) for _ in range(2)])


SMALL = Architecture("torch", "small", small)


@pytest.fixture(autouse=True)
def only_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "FORMS", ("loads",))


def test_a_net_that_is_compressed_rightly_works() -> None:
    row = tried(SMALL)
    assert row.cells["truncation"] == row.cells["joint"] == row.cells["loads"] == WORKS and not row.reasons
    weights = 16 * 48 + 48 * CLASSES + 48 + CLASSES
    assert row.params == weights and row.dense_share == pytest.approx(0, abs=0.1)


def test_a_refusal_is_told_in_its_line_and_another_error_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, algorithm: Any, **__: Any) -> None:
        if isinstance(algorithm, spectrim.Truncation):
            raise UserError("no layer can be factored")
        raise KeyError("q_proj")

    monkeypatch.setattr(spectrim, "compress", refuse)
    row = tried(SMALL)
    assert (row.cells["truncation"], row.cells["joint"]) == (REFUSED, CRASHES)
    assert row.reasons["truncation"] == "no layer can be factored" and row.reasons["joint"].startswith("KeyError: ")


def other_outputs(model: nn.Module, result: Any) -> None:
    result.model[2].bias.data += 1
    result.model[2].register_forward_hook(lambda _, __, output: output * 2)


def changed_model(model: nn.Module, result: Any) -> None:
    model[0].bias.data += 1  # type: ignore[index, operator, union-attr]


def no_number(model: nn.Module, result: Any) -> None:
    result.model[2].bias.data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (other_outputs, "gives other outputs"),
        (changed_model, "the given model has changed: 0.bias"),
        (no_number, "not finite"),
    ],
)
def test_a_wrong_result_is_called_so(spoil: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compress = spectrim.compress

    def spoiled(model: nn.Module, **settings: Any) -> Any:
        result = compress(model, **settings)
        spoil(model, result)
        return result

    monkeypatch.setattr(spectrim, "compress", spoiled)
    row = tried(SMALL)
    assert row.cells["truncation"] == WRONG and reason in row.reasons["truncation"]


def test_what_kills_the_process_is_a_row_and_so_is_a_net_that_cannot_be_made() -> None:
    def broken() -> Given:
        raise ImportError("no such net")

    for make, reason in ((lambda: os._exit(3), "the process ended with 3"), (broken, "ImportError: no such net")):
        row = zoo.in_process(Architecture("torch", "broken", make), 600)
        assert set(row.cells.values()) == {CRASHES} and set(row.reasons.values()) == {reason}


def test_a_finished_row_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo, "in_process", lambda architecture, patience: tried(architecture))
    assert zoo.found(SMALL, tmp_path) is None
    first = zoo.run(SMALL, tmp_path, 600)
    assert zoo.found(SMALL, tmp_path) == first
    monkeypatch.setattr(zoo, "version", lambda name: "2.0")
    assert zoo.found(SMALL, tmp_path) is None


def test_a_run_that_is_out_of_time_writes_what_is_finished_and_goes_on_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Architecture("torch", "other", small)
    monkeypatch.setattr(zoo, "everything", lambda: [SMALL, other])
    monkeypatch.setattr(zoo, "in_process", lambda architecture, patience: tried(architecture))
    zoo.run(SMALL, tmp_path / "rows", 600)
    folders = ["--rows", str(tmp_path / "rows"), "--out", str(tmp_path)]
    assert zoo.main(["--minutes", "0", *folders]) == 0
    assert "1 of 2 architectures" in capsys.readouterr().out
    assert zoo.main(folders) == 0
    assert "2 architectures" in (tmp_path / "zoo.md").read_text() and (tmp_path / "zoo.csv").exists()


def test_a_package_that_is_missing_is_a_row(tmp_path: Path) -> None:
    row = zoo.run(Architecture("no-such-package", "net", small), tmp_path, 600)
    assert set(row.cells.values()) == {"not installed"}


def test_the_table_tells_each_reason_once(tmp_path: Path) -> None:
    rows = [zoo.broken(Architecture("torch", name, small), "boom") for name in ("a", "b")]
    text = zoo.table_of(rows, 2).markdown()
    assert text.count("crashes: boom") == 1 and "a (truncation), a (joint)" in text and "b (compact)" in text
    assert zoo.table_of(rows, 2).csv().count("truncation: boom; joint: boom") == 2


def test_no_architecture_is_listed_twice() -> None:
    names = [zoo.label(one) for one in zoo.everything()]
    assert len(set(names)) == len(names) >= 60
