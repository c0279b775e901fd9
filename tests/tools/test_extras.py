"""A feature whose package is missing names the extra that brings it."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim
from spectrim.algorithms.related.bayesian import Bayesian
from spectrim.algorithms.related.pars import PARS
from spectrim.errors import UserError
from spectrim.export.program import write_onnx
from spectrim.runs.tracking.mlflow_runs import MLflow
from spectrim.runs.tracking.session import About
from spectrim.runs.tracking.tensorboard_events import TensorBoard
from spectrim.runs.tracking.wandb_runs import WandB
from spectrim.tools import extras

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]


def use_tucker() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    spectrim.Tucker2().spectrum(model[0])


ABOUT = About("0" * 16, "run", "table2", "lossless")
USES = {
    "wandb": ("tracking", lambda: WandB().start(ABOUT)),
    "tensorboard": ("tensorboard", lambda: TensorBoard().start(ABOUT)),
    "mlflow": ("mlflow", lambda: MLflow().start(ABOUT)),
    "tensorly": ("tucker", use_tucker),
    "optuna": ("search", lambda: Bayesian()),
    "onnxruntime": ("export", lambda: write_onnx(Path("none.onnx"), nn.Linear(2, 2), torch.zeros(1, 2), True, 18)),
}
DEV = next(line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("spectrim[search"))


@pytest.mark.parametrize("package", USES)
def test_a_missing_package_is_an_error_that_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, use = USES[package]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs extra packages .*pip install 'spectrim\[{extra}\]'") as refusal:
        use()
    assert len(str(refusal.value).splitlines()) == 1
    assert str(refusal.value).endswith(", or make install in a checkout") == (extra in DEV)
    assert any(line.startswith(package) for line in PROJECT["optional-dependencies"][extra])
    assert not any(line.startswith(package) for line in PROJECT["dependencies"])


def test_pars_is_refused_before_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="a Bayesian search needs extra packages"):
        PARS()


def test_a_model_is_compressed_without_any_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in USES:
        monkeypatch.setitem(sys.modules, package, None)
    batches = [(torch.randn(8, 6), torch.arange(8) % 3)]
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    result = spectrim.compress(model, calibration=batches, algorithm=spectrim.Truncation(ratio=0.5))
    assert result.params_kept < 1


def test_an_installed_package_is_given() -> None:
    assert extras.imported("json", "search", "a test").loads("1") == 1
