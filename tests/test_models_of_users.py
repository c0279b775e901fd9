"""Models that send batches on unusual ways are compressed as their plain twins, or a note says what was left out."""

import copy
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import spectrim
from spectrim import batches as batching
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.refit.factors import refit
from spectrim.statistics.batchnorm import reestimate
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing

FEATURES, CLASSES = 12, 5


def labelled(count: int = 4, size: int = 16, features: int = FEATURES) -> list[tuple[Any, Tensor]]:
    return [(torch.randn(size, features), torch.randint(CLASSES, (size,))) for _ in range(count)]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, CLASSES)
    ).eval()


class Experts(nn.Module):
    """Sends each sample to one of two experts by its first feature. No sample of these batches reaches ``rare``."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.often, self.rare = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.body(x))
        rare = x[:, 0] > 100
        out = torch.zeros_like(y)
        out[rare], out[~rare] = self.rare(y[rare]), self.often(y[~rare])
        return self.head(F.relu(out))


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_an_expert_that_no_sample_reaches_counts_nothing_however_layers_are_grouped(at_once: int | None) -> None:
    torch.manual_seed(0)
    model, data = Experts().eval(), labelled()
    result = spectrim.compress(
        model, calibration=data, algorithm=spectrim.Joint(params_kept=0.8, refit=0), layers_at_once=at_once
    )
    assert result.params_kept <= 0.8 and "rare" not in result.plan
    assert any(note.startswith("rare: left dense") for note in result.notes)
    report = spectrim.compress(model, calibration=data, algorithm=spectrim.Lossless(), layers_at_once=at_once).report
    assert report.set_index("layer")["predicted_change"]["rare"] == 0


class Siamese(nn.Module):
    """Passes both halves of its input through one BatchNorm, and a head of its own through another that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(FEATURES // 2, 16), nn.BatchNorm1d(16)
        self.unused = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.norm(self.body(half)) for half in x.chunk(2, 1))
        return self.head(F.relu(first - second))


def trained_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_statistics_of_a_batch_norm_that_is_called_twice_follow_both_calls() -> None:
    dense = trained_statistics(Siamese())
    same = trained_statistics(Siamese())
    same.load_state_dict(dense.state_dict())
    objective = Objective(F.cross_entropy, {"calibration": labelled()})
    reestimate(same, dense, objective, samples=64)
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(same.state_dict()[key], value, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # both halves are shifted alike, so the correction undoes it
        same.body.bias.add_(3.0)
    reestimate(same, dense, objective, samples=64)
    x = labelled()[0][0]
    torch.testing.assert_close(same(x), dense(x), atol=1e-4, rtol=1e-4)


def test_a_refit_leaves_a_batch_norm_of_two_layers_as_it_is() -> None:
    dense = trained_statistics(Siamese())
    spectrum = SVD().spectrum(dense.body)
    cut = replacing.apply(dense, RankPlan.of({"body": spectrum.kept(2)}), {"body": spectrum})
    before = cut.norm.running_mean.clone()
    notes = refit(cut, dense, Objective(F.cross_entropy, {"calibration": labelled()}), 64)
    assert torch.equal(cut.norm.running_mean, before)
    assert notes == ["body: not refitted: it is not called once on every batch"]


def test_a_packed_sequence_is_sampled_by_its_sequences() -> None:
    padded, lengths = torch.arange(24.0).reshape(4, 3, 2), torch.tensor([3, 1, 2, 3])
    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    one = batching.of_one_sample(packed)
    assert batching.batch_size(one) == 4
    again, of = nn.utils.rnn.pad_packed_sequence(one, batch_first=True)
    assert of.tolist() == [3] * 4 and all(torch.equal(row, padded[0]) for row in again)


@pytest.mark.parametrize("wrap", [lambda images: (images,), lambda images: {"images": images}])
def test_a_list_of_images_is_sampled_by_its_images(wrap: Any) -> None:
    images = [torch.randn(3, side, side) for side in (4, 5, 6, 7)]
    one = batching.of_one_sample(wrap(images))
    found = one["images"] if isinstance(one, Mapping) else one[0]
    assert len(found) == 4 and all(torch.equal(image, images[0]) for image in found)


class Named(nn.Module):
    """Gives its scores in a mapping, as models of detection do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.net(x), "hidden": self.net[0](x)}


def test_a_loss_that_reads_an_output_by_name_verifies_as_the_plain_one() -> None:
    data, held = labelled(), labelled()
    algorithm = spectrim.Joint(max_loss_increase=0.02, refit=0)
    ours = spectrim.compress(
        Named().eval(),
        calibration=data,
        verification=held,
        algorithm=algorithm,
        loss=lambda outputs, targets: F.cross_entropy(outputs["scores"], targets),
    )
    twin = spectrim.compress(plain(), calibration=data, verification=held, algorithm=algorithm, loss=F.cross_entropy)
    assert (
        ours.plan
        and {name.removeprefix("net."): kept.rank for name, kept in ours.plan.items()}.keys() == twin.plan.keys()
    )


class WithHidden(nn.Module):
    """Gives its output and the values that it is made of, on which the loss does not depend."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.net[:-1](x)
        return self.net[-1](hidden), hidden


def test_outputs_that_depend_on_one_another_give_the_plan_of_the_output_alone() -> None:
    data = [(torch.randn(16, FEATURES), torch.randn(16, CLASSES)) for _ in range(3)]
    algorithm = spectrim.Joint(params_kept=0.6, refit=0)
    ours = spectrim.compress(
        WithHidden().eval(), calibration=data, algorithm=algorithm, loss=lambda o, t: F.mse_loss(o[0], t)
    )
    twin = spectrim.compress(plain(), calibration=data, algorithm=algorithm, loss=F.mse_loss)
    assert {name.removeprefix("net."): kept for name, kept in ours.plan.items()} == dict(twin.plan)


class ByKeyword(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(input=x)
        return x


def test_layers_that_are_called_by_keyword_are_whitened_and_refitted_as_others() -> None:
    data, algorithm = labelled(), spectrim.Joint(params_kept=0.6, refit=64)
    ours = spectrim.compress(ByKeyword().eval(), calibration=data, algorithm=algorithm)
    twin = spectrim.compress(plain(), calibration=data, algorithm=algorithm)
    assert {name.removeprefix("net."): kept for name, kept in ours.plan.items()} == dict(twin.plan)
    x = data[0][0]
    torch.testing.assert_close(ours.model(x), twin.model(x))


class OnNodes(nn.Module):
    """A net on the rows of ``x``, which each take a sum over other rows, a scale, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Any, edges: Tensor | None = None, scale: Any = 1.0) -> Tensor:
        if isinstance(x, list):
            x = torch.stack(x)
        return self.net((x if edges is None else torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])) * scale)


Scaled = namedtuple("Scaled", ["x", "edges", "scale"])
GRAPH = torch.randint(0, 8, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: (x, GRAPH),
        lambda x: {"x": x, "scale": torch.tensor(0.5)},
        lambda x: Scaled(x, None, 2.0),
        lambda x: (list(x),),
    ],
    ids=["graph", "a number as a tensor", "named tuple", "list of samples"],
)
@pytest.mark.parametrize("algorithm", [spectrim.Truncation(params_kept=0.7), spectrim.Joint(params_kept=0.7, refit=8)])
def test_inputs_of_every_structure_are_taken_whole(inputs: Any, algorithm: Any) -> None:
    torch.manual_seed(0)
    model, x = OnNodes(), torch.randn(8, 12)
    data = [(inputs(x), torch.randint(5, (8,)))]
    result = spectrim.compress(model, calibration=data, algorithm=algorithm)
    assert result.plan and result.params_kept <= 0.7 and not result.notes


def test_a_model_with_its_channels_last_is_compressed_as_its_twin() -> None:
    """Torch computes some grouped convolutions wrongly there if the strides of a kernel are unusual."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.Conv2d(32, 16, 1)]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)]
    first = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), *ends).eval()
    twin = copy.deepcopy(first).to(memory_format=torch.channels_last)
    data = [(torch.randn(20, 3, 8, 8), torch.randint(CLASSES, (20,))) for _ in range(2)]
    one, other = (spectrim.compress(model, calibration=data, params_kept=0.6) for model in (first, twin))
    assert one.plan == other.plan and len(one.plan) == 4
    x = data[0][0]
    with torch.no_grad():
        ours, theirs = one.model(x), other.model(x.to(memory_format=torch.channels_last))
    assert (ours - theirs).norm() < 1e-2 * ours.norm()  # rounding moves where a search for the factors ends


class Forces(nn.Module):
    """Gives forces, the gradient of an energy by the inputs, as models of molecules do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.energy = nn.Linear(FEATURES, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.energy(self.body(x).tanh()).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


def test_a_model_that_takes_gradients_is_measured_and_whitened_but_has_no_gates() -> None:
    torch.manual_seed(0)
    data = [(x := torch.randn(8, FEATURES), torch.zeros_like(x)) for _ in range(2)]
    given: dict[str, Any] = {"calibration": data, "verification": data, "loss": nn.functional.mse_loss}
    model = Forces()
    result = spectrim.compress(model, algorithm=spectrim.Compact(verified=True), decomposer="whitened_channel", **given)
    assert result.report["predicted_change"].notna().all()
    assert spectrim.compress(model, algorithm=spectrim.Truncation(params_kept=0.7), **given).macs_kept < 0.9
    with pytest.raises(UserError, match="the model takes gradients in its forward pass"):
        spectrim.compress(model, params_kept=0.6, **given)
    with pytest.raises(UserError, match="the model takes gradients in its forward pass"):
        spectrim.compress(model, algorithm=spectrim.Truncation(ratio=0.5), decomposer=spectrim.TwoSidedSVD(), **given)


@pytest.mark.parametrize(
    ("model", "inputs"), [(OnNodes(), (torch.randn(8, 12), GRAPH)), (Forces(), torch.randn(8, FEATURES))]
)
def test_a_model_that_cannot_be_timed_on_one_sample_is_told_so(model: nn.Module, inputs: Any) -> None:
    """A graph is no row of samples, and a model that takes gradients needs its graph of operations."""
    given = {"calibration": [(inputs, torch.zeros(8, FEATURES))], "loss": lambda outputs, _: outputs.square().mean()}
    with pytest.raises(UserError, match="^a budget in milliseconds runs .* on 1 samples, .* give params_kept= or mac"):
        spectrim.compress(model, algorithm=spectrim.Joint(milliseconds=1.0), **given)
