"""Where a run computes; and that every algorithm and decomposer gives on a GPU what it gives on the processor."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.batches import device_of
from spectrim.cli import run
from spectrim.errors import UserError
from spectrim.runs import configuration, targets
from spectrim.statistics.objective import Objective
from spectrim.tools.device import device_called

ELSEWHERE = {"aimet"}  # runs in an environment of its own
LOOSE = {"bayesian", "pars", "reinforced", "haloc"}  # a last digit sends them another way
ALGORITHMS, DECOMPOSERS = (
    sorted({path.stem for path in (Path(configuration.CONF) / group).glob("*.yaml")} - ELSEWHERE)
    for group in ("algorithm", "decomposer")
)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def test_the_processor_is_a_device() -> None:
    assert device_called("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:x", None, 0, True, "cuda:99", "cuda:-1"])
def test_what_is_no_device_here_is_refused_in_one_line(name: Any) -> None:
    with pytest.raises(UserError, match="^device=[^\n]*(give one of|use device=cpu)[^\n]*$"):
        device_called(name)


def test_a_run_without_its_device_leaves_no_record(compose: Any, digits: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device=cuda:99"):
        run.run(compose(*digits, "algorithm=truncation", "device=cuda:99"))
    assert not list(tmp_path.rglob("*.json"))


def test_a_record_is_that_of_its_settings_wherever_it_was_made(compose: Any, digits: list[str]) -> None:
    here = run.run(compose(*digits, "algorithm=truncation"))
    assert here["provenance"]["device"] == "cpu"
    assert run.run(compose(*digits, "algorithm=truncation", "device=cuda:99")) == here


def _compressed(compose: Any, brief: Any, chosen: str, net: nn.Module, objective: Objective) -> Any:
    cfg = compose(*chosen.split())
    algorithm = brief(targets.build(configuration.plain(cfg.algorithm)))
    return algorithm.compress(net, targets.build(configuration.plain(cfg.decomposer)), objective)


@on_gpu
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_on_a_gpu(compose: Any, brief: Any, net: nn.Module, objective: Objective, name: str) -> None:
    _agree(compose, brief, f"algorithm={name} decomposer=svd_spatial", net, objective, exact=name not in LOOSE)


@on_gpu
@pytest.mark.parametrize("name", DECOMPOSERS)
def test_every_decomposer_on_a_gpu(compose: Any, brief: Any, net: nn.Module, objective: Objective, name: str) -> None:
    _agree(compose, brief, f"algorithm=truncation decomposer={name}", net, objective, exact=True)


def _agree(compose: Any, brief: Any, chosen: str, net: nn.Module, objective: Objective, exact: bool) -> None:
    there = copy.deepcopy(net).to(device_called("cuda"))
    theirs = _compressed(compose, brief, chosen, there, objective)
    ours = _compressed(compose, brief, chosen, net, objective)
    assert {value.device.type for value in theirs.model.state_dict().values()} == {"cuda"}
    losses: list[Tensor | float] = [objective.evaluate(one.model).loss for one in (ours, theirs)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01 if exact else 0.5)
    assert device_of(net).type == "cpu" and theirs.cost.params == pytest.approx(
        ours.cost.params, rel=0.05 if exact else 0.2
    )
