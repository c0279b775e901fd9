"""Two processes that share the calibration batches select what one process selects on all of them."""

import copy
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import spectrim
from spectrim.algorithms.related.layer_threshold import LayerThreshold
from spectrim.decomposers.spectrum import Decomposer, Directions
from spectrim.statistics import fisher, paired_loss
from spectrim.statistics.objective import Objective
from spectrim.statistics.output_moments import output_moments
from spectrim.statistics.processes import ALONE, Processes

WORLD = 2
Batches = list[tuple[Tensor, Tensor]]


def network() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    )
    model(torch.randn(64, 3, 8, 8))
    return model.eval()


def parts() -> list[Batches]:
    """The batches of each process, which differ in number and size."""
    torch.manual_seed(4)
    sizes = ([12, 7], [16, 5, 9])
    return [[(torch.randn(n, 3, 8, 8), torch.randint(5, (n,))) for n in own] for own in sizes]


def one_hot(batches: Batches) -> Batches:
    """Targets that are no classes, so that the Fisher information takes no random direction."""
    return [(inputs, F.one_hot(targets, 5).float()) for inputs, targets in batches]


SELECTIONS: dict[str, tuple[Any, Decomposer, dict[str, Any]]] = {
    "whitened": (spectrim.Truncation(ratio=0.5), spectrim.WhitenedSVD(view="channel"), {}),
    "best view": (spectrim.Truncation(params_kept=0.5), spectrim.BestView(), {"batch_norm": "follow"}),
    "rank selection": (spectrim.RankSelection(epsilon=0.3), spectrim.SVD(), {}),
    "threshold a layer": (LayerThreshold(), spectrim.SVD(), {}),
    "joint": (spectrim.Joint(params_kept=0.4), spectrim.WhitenedSVD(view="channel"), {}),
    "joint, pivoted": (spectrim.Joint(params_kept=0.4), spectrim.Joint.decomposer, {}),
    "joint without scores": (
        spectrim.Joint(params_kept=0.4),
        spectrim.WhitenedSVD(view="channel"),
        {"loss": F.mse_loss},
    ),
    "joint with a tolerance": (spectrim.Joint(max_loss_increase=0.2), spectrim.SVD(), {"loss": F.mse_loss}),
}


def selected(name: str, share: Callable[[Batches], Any], batches: Batches) -> Any:
    algorithm, decomposer, settings = SELECTIONS[name]
    batches = one_hot(batches) if "loss" in settings else batches
    return spectrim.compress(
        network(),
        calibration=share(batches),
        verification=share([(inputs + 1, targets) for inputs, targets in batches]),
        algorithm=algorithm,
        decomposer=decomposer,
        **settings,
    )


def measured(share: Callable[[Batches], Any], batches: Batches) -> dict[str, Any]:
    """What an algorithm measures of a network with factored layers. The loss ignores three targets of each batch."""
    batches = [(inputs, torch.where(torch.arange(len(targets)) < 3, -100, targets)) for inputs, targets in batches]
    cut = spectrim.compress(network(), algorithm=spectrim.Truncation(rank=3)).model
    objective = Objective(F.cross_entropy, {"calibration": share(batches)})
    layers = [name for name, module in cut.named_modules() if hasattr(module, "factors")]
    gates = fisher.gate_gradients(cut, layers, objective, 10**6)
    losses = paired_loss.losses(objective, cut, "calibration")
    evaluation = objective.evaluate(cut)
    return {
        "given": {name: own.given for name, own in gates.rows.items()},
        "fisher": {name: own.fisher for name, own in gates.rows.items()},
        "losses": losses.values,
        "evaluation": evaluation,
        "within": objective.loss_within(cut, "calibration", evaluation.loss, evaluation.n),
        "not within": objective.loss_within(cut, "calibration", evaluation.loss * 0.99, evaluation.n),
        "gradients": objective.gradients(network(), ["0", "3", "6"]),
        "moments": [
            output_moments(network(), {"0": ["spatial"], "6": ["linear"]}, objective, 10**6, directions)
            for directions in (Directions(), Directions(top=3), Directions(labels=True))
        ],
    }


def in_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        share = spectrim.Distributed
        found: dict[str, Any] = {"measured": measured(share, parts()[rank])}
        for name in SELECTIONS:
            result = selected(name, share, parts()[rank])
            found[name] = {
                "plan": result.plan.to_json(),
                "state": copy.deepcopy(result.model.state_dict()),
                "notes": result.notes,
            }
        parallel = DistributedDataParallel(result.model.train())
        inputs, targets = parts()[rank][0]
        F.cross_entropy(parallel(inputs), targets).backward()
        found["gradient"] = next(parallel.parameters()).grad
        try:
            spectrim.compress(network() if rank else nn.Sequential(nn.Linear(4, 4)), calibration=share([]))
        except spectrim.UserError as error:
            found["other model"] = str(error)
        try:
            spectrim.compress(network(), calibration=share(parts()[rank]), resume=folder / "unfinished")
        except spectrim.UserError as error:
            found["resumed"] = str(error)
        torch.save(found, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=in_process, args=(rank, folder)) for rank in range(WORLD)]
    for process in running:
        process.start()
    for process in running:
        process.join(300)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in running] == [0, 0]
    yield [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def whole() -> Batches:
    return [batch for own in parts() for batch in own]


def alone(batches: Batches) -> Batches:
    return batches


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_plan_is_that_of_one_process(found: list[dict[str, Any]], name: str) -> None:
    expected = selected(name, alone, whole())
    assert expected.plan
    for own in found:
        assert json.loads(own[name]["plan"]) == expected.plan.as_dict()
        for key, value in expected.model.state_dict().items():
            torch.testing.assert_close(own[name]["state"][key], value, atol=1e-4, rtol=1e-3)
    for key, value in found[0][name]["state"].items():
        assert torch.equal(value, found[1][name]["state"][key])


def test_gates_losses_gradients_and_moments_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    expected = measured(alone, whole())
    for own in (one["measured"] for one in found):
        for key in ("given", "gradients", "moments"):
            torch.testing.assert_close(own[key], expected[key])
        torch.testing.assert_close(own["losses"], expected["losses"])
        assert own["evaluation"].n == expected["evaluation"].n
        assert own["evaluation"].loss == pytest.approx(expected["evaluation"].loss)
        assert own["evaluation"].accuracy == pytest.approx(expected["evaluation"].accuracy)
        assert own["within"] == pytest.approx(expected["within"]) and own["not within"] is None
        torch.testing.assert_close(own["fisher"], expected["fisher"])  # each sample has the directions of one process


def test_the_result_is_trained_by_several_processes(found: list[dict[str, Any]]) -> None:
    assert torch.equal(found[0]["gradient"], found[1]["gradient"]) and found[0]["gradient"].any()


def test_without_a_process_group_it_is_refused() -> None:
    with pytest.raises(spectrim.UserError, match="init_process_group"):
        spectrim.Distributed([])


def test_other_models_are_refused_in_every_process(found: list[dict[str, Any]]) -> None:
    assert all("models that differ" in own["other model"] for own in found)


def test_to_resume_is_refused_in_every_process(found: list[dict[str, Any]]) -> None:
    said = "resume= serves a selection of one process; leave it out where several share the batches"
    assert [own["resumed"] for own in found] == [said, said]


def test_one_process_changes_nothing() -> None:
    values = torch.randn(3)
    assert ALONE.add_up(values) is values and ALONE.gather(values) is values
    assert Processes.that_share([]) is ALONE and ALONE.share(5) == 5
    assert ALONE.in_any({"b"}, ["a", "b"]) == ["b"]
