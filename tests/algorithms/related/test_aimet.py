"""AIMET is called as it wants to be, and what it returns is measured as it is; a stand-in takes its place here."""

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.algorithms.related.aimet import AIMET
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.surgery.cost import parameters


def split(conv: nn.Conv2d, rank: int) -> nn.Sequential:
    """The spatial SVD as AIMET lays it out: kh x 1, then 1 x kw."""
    O, I, kh, kw = conv.weight.shape  # noqa: E741
    matrix = conv.weight.detach().permute(1, 2, 0, 3).reshape(I * kh, O * kw)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    first = nn.Conv2d(I, rank, (kh, 1), (conv.stride[0], 1), (conv.padding[0], 0), bias=False)  # type: ignore[arg-type]
    second = nn.Conv2d(rank, O, (1, kw), (1, conv.stride[1]), (0, conv.padding[1]), bias=conv.bias is not None)  # type: ignore[arg-type]
    with torch.no_grad():
        first.weight.copy_((U[:, :rank] * S[:rank]).T.reshape(rank, I, kh, 1))
        second.weight.copy_(Vh[:rank].reshape(rank, O, 1, kw).transpose(0, 1))
        if conv.bias is not None and second.bias is not None:
            second.bias.copy_(conv.bias)
    return nn.Sequential(first, second)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stand-in was called with. It splits the first convolution to rank 3 after two evaluations."""
    seen: dict[str, Any] = {}

    class Parameters:
        Mode = SimpleNamespace(auto="auto")

        class AutoModeParams:
            def __init__(self, greedy: Any, modules_to_ignore: list) -> None:
                seen.update(greedy=greedy, ignored=modules_to_ignore)

        def __init__(self, mode: str, params: Any) -> None:
            seen.update(mode=mode)

    def compress_model(model: nn.Module, eval_callback: Any, **rest: Any) -> tuple[nn.Module, None]:
        if seen.get("fails"):
            raise RuntimeError("no such ratio")
        seen.update(rest, scores=[eval_callback(model, None, use_cuda=False) for _ in range(2)])
        model[0] = split(model[0], 3)  # type: ignore[index,operator]
        return model, None

    def greedy(target: float, num_comp_ratio_candidates: int) -> tuple[float, int]:
        return target, num_comp_ratio_candidates

    modules = {
        "aimet_torch": {},
        "aimet_torch.common": {},
        "aimet_torch.common.defs": {
            "CompressionScheme": SimpleNamespace(spatial_svd="spatial"),
            "CostMetric": SimpleNamespace(mac="mac", memory="memory"),
            "GreedySelectionParameters": greedy,
        },
        "aimet_torch.common.utils": {"AimetLogger": SimpleNamespace(set_level_for_all_areas=lambda level: None)},
        "aimet_torch.compress": {"ModelCompressor": SimpleNamespace(compress_model=compress_model)},
        "aimet_torch.defs": {"SpatialSvdParameters": Parameters},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_its_model_is_ours_and_nothing_else_changes(
    called: dict[str, Any], net: nn.Sequential, objective: Objective, tmp_path: Any
) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = AIMET(params_kept=0.5).compress(net, SVD("spatial"), objective)
    assert {name: (kept.rank, kept.form.to_text()) for name, kept in result.plan.items()} == {"0": (3, "vertical")}
    x = objective.example()
    pair = split(net[0], 3)  # type: ignore[arg-type]
    torch.testing.assert_close(result.model.get_submodule("0")(x), pair(x), atol=1e-5, rtol=1e-4)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    report = result.report.set_index("layer")
    saved = (report["params_before"] - report["params_after"]).sum()
    assert parameters(net) - parameters(result.model) == saved
    assert report["predicted_change"].iloc[1:].tolist() == [0] * (len(report) - 1)
    assert 0 < report["relative_error"].iloc[0] < 1 and len(result.log) == 2
    assert called["scores"] == [objective.evaluate(net).accuracy] * 2
    result.save(tmp_path / "small.safetensors")
    loaded = spectrim.load(tmp_path / "small.safetensors", into=net)
    torch.testing.assert_close(loaded(x), result.model(x))


def test_the_budget_is_that_of_the_whole_model(
    called: dict[str, Any], net: nn.Sequential, objective: Objective
) -> None:
    AIMET(params_kept=0.5).compress(net, SVD(), objective)
    counted = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    rest = parameters(net) - counted
    target, candidates = called["greedy"]
    assert math.isclose(target * counted + rest, 0.5 * parameters(net)) and candidates == 10
    assert called["cost_metric"] == "memory" and called["input_shape"][0] == 1
    AIMET(params_kept=None, macs_kept=0.4).compress(net, SVD(), objective)
    assert called["greedy"][0] == 0.4 and called["cost_metric"] == "mac"


def test_a_candidate_is_scored_once_whatever_the_target(
    called: dict[str, Any], net: nn.Sequential, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[nn.Module] = []
    evaluate = objective.evaluate
    monkeypatch.setattr(objective, "evaluate", lambda model, *rest: scored.append(model) or evaluate(model, *rest))
    first = AIMET(params_kept=0.5).compress(net, SVD(), objective)
    count = len(scored)
    second = AIMET(params_kept=0.6).compress(net, SVD(), objective)
    assert first.log == second.log and len(first.log) == 2
    assert len(scored) == count + 1  # whether the model gives class scores at all
    with torch.no_grad():
        next(net.parameters()).mul_(1.1)
    AIMET(params_kept=0.6).compress(net, SVD(), objective)
    assert len(scored) > count + 2


def test_what_cannot_be_is_one_line(called: dict[str, Any], net: nn.Sequential, objective: Objective) -> None:
    called["fails"] = True
    with pytest.raises(UserError, match="^AIMET failed: RuntimeError: no such ratio$"):
        AIMET().compress(net, SVD(), objective)
    with pytest.raises(UserError, match="AIMET needs the plain SVD .*, not WhitenedSVD"):
        AIMET().compress(net, spectrim.WhitenedSVD(), objective)
    for bad in ({"params_kept": 1.0}, {"macs_kept": 0.5}, {"params_kept": None}, {"candidates": 1}):
        with pytest.raises(UserError, match="exactly one of params_kept and macs_kept|at least 2"):
            AIMET(**bad)  # type: ignore[arg-type]


def test_without_aimet_the_line_says_what_to_do(net: nn.Sequential, objective: Objective, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "aimet_torch", None)
    with pytest.raises(UserError, match="run `make rivals`"):
        AIMET().compress(net, SVD(), objective)
