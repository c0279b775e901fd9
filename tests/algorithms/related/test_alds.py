"""ALDS: no allocation within the budget has a smaller largest error, and with one subspace it is the threshold."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.algorithms.related.alds import ALDS, Option, front
from spectrim.algorithms.related.global_threshold import GlobalThreshold
from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm
from spectrim.statistics.objective import Objective
from spectrim.surgery.cost import parameters


@pytest.fixture
def wide(net: nn.Sequential) -> nn.Sequential:
    """``net`` with input channels that depend on one another only within each half: made for two subspaces."""
    with torch.no_grad():
        for layer in (net[3], net[6], net[8]):
            half = layer.weight.shape[1] // 2
            for part in (slice(0, half), slice(half, None)):
                block = layer.weight[:, part].flatten(1)
                U, S, Vh = torch.linalg.svd(block, full_matrices=False)
                S[len(S) // 4 :] *= 0.05
                layer.weight[:, part] = (U @ S.diag() @ Vh).reshape(layer.weight[:, part].shape)
    return net


@pytest.mark.parametrize("budget", [{"params_kept": 0.6}, {"params_kept": None, "macs_kept": 0.6}], ids=str)
@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_meets_its_budget_from_below(budget: dict, view: Any, net: nn.Sequential, objective: Objective) -> None:
    result = ALDS(**budget).compress(net, SVD(view), objective)
    assert 0.4 < (result.params_kept if budget["params_kept"] else result.macs_kept) <= 0.6


def test_with_one_subspace_it_is_the_global_threshold(net: nn.Sequential, objective: Objective) -> None:
    one = ALDS(params_kept=0.5, subspaces=(1,)).compress(net, SVD(), objective)
    assert one.plan == GlobalThreshold(params_kept=0.5).compress(net, SVD(), objective).plan


def test_one_subspace_is_the_spectrum_at_hand(
    net: nn.Sequential, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SubspaceSVD, "spectrum", lambda *_: pytest.fail("decomposed again"))
    assert ALDS(params_kept=0.5, subspaces=(1,)).compress(net, SVD(), objective).plan
    with pytest.raises(pytest.fail.Exception):
        ALDS(params_kept=0.5, subspaces=(2,)).compress(net, SVD(), objective)


def test_no_allocation_of_the_budget_has_a_smaller_largest_error(wide: nn.Sequential, objective: Objective) -> None:
    result = ALDS(params_kept=0.4, subspaces=(2, 4)).compress(wide, SVD(), objective)

    def error(name: str, subspaces: int) -> Any:
        spectrum = SubspaceSVD(subspaces).spectrum(wide.get_submodule(name))
        whole = SVD().spectrum(wide.get_submodule(name)).svd.S_R.max()
        return spectrum, [*(spectrum.svd.S_R.amax(0) / whole).tolist(), 0.0]

    forms = {name: kept.form for name, kept in result.plan.items()}
    subspaces = {name: form.subspaces for name, form in forms.items() if isinstance(form, PlainForm)}
    assert subspaces.keys() == forms.keys() and any(parts > 1 for parts in subspaces.values())
    largest = max(error(name, subspaces[name])[1][kept.rank] for name, kept in result.plan.items())
    dense = total = parameters(wide)
    for name in ("0", "3", "6", "8"):  # the cheapest model all of whose errors are smaller
        costs = [wide.get_submodule(name).weight.numel()]  # type: ignore[union-attr, operator]
        for parts in (1, 2, 4):
            spectrum, errors = error(name, parts)
            costs += [spectrum.cost(rank) for rank in range(1, spectrum.break_even + 1) if errors[rank] < largest]
        total -= costs[0] - min(costs)
    assert total > 0.4 * dense


def test_compressed_saved_and_loaded_gives_the_same_logits(wide: nn.Sequential, batches: Any, tmp_path: Path) -> None:
    dense = copy.deepcopy(wide)
    result = spectrim.compress(wide, calibration=batches, algorithm=ALDS(params_kept=0.4))
    result.save(tmp_path / "small.safetensors")
    loaded = spectrim.load(tmp_path / "small.safetensors", into=dense)
    assert torch.equal(loaded.eval()(batches[0][0]), result.model.eval()(batches[0][0]))


def test_a_front_rises_in_cost_and_falls_in_error() -> None:
    costs_and_errors = [(3, 0.5), (1, 0.9), (2, 0.9), (2, 0.7), (5, 0.5), (4, 0.1), (6, 0.0)]
    found = front(Option(cost, error, 1, 1) for cost, error in costs_and_errors)
    assert [(option.cost, option.error) for option in found] == [(1, 0.9), (2, 0.7), (3, 0.5), (4, 0.1), (6, 0.0)]


def test_what_it_cannot_do_is_one_line(net: nn.Sequential, objective: Objective) -> None:
    with pytest.raises(UserError, match="ALDS needs the plain SVD .*, not WhitenedSVD"):
        ALDS().compress(net, WhitenedSVD(), objective)
    with pytest.raises(UserError, match="subspaces must each be at least 1"):
        ALDS(subspaces=(1, 0))
    with pytest.raises(UserError, match="out of reach"):
        ALDS(params_kept=0.01).compress(net, SVD(), objective)
