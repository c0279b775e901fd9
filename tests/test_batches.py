"""A model that does not take its inputs is said in one line, with the layer, whoever called it."""

from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim import api
from spectrim.batches import aliased, batch_size, first_samples, forward, one_sample, repeated, sample_count, tensors_of
from spectrim.cli import run
from spectrim.errors import UserError
from spectrim.losses import label_loss
from spectrim.statistics.objective import Objective
from spectrim.surgery.cost import model_cost
from spectrim.tools.trainable import alone_trainable


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(5, 4)])

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is not None:
            x = x * scale
        return self.blocks[1](self.blocks[0](self.stem(x)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(2, 3), r"failed on inputs of shape \(2, 3\), at layer stem: mat1 and mat2 shapes cannot be mult"),
        (torch.ones(2, 4), r"failed on inputs of shape \(2, 4\), at layer blocks.1: "),
        ((torch.ones(2, 4), torch.ones(2, 3)), r"of shape \(2, 4\), \(2, 3\): The size of tensor a \(4\) must match"),
        ({"x": torch.ones(2, 4), "scael": 1}, r"of shape x \(2, 4\), scael int: .*unexpected keyword argument 'scael'"),
        ([torch.ones(2, 4).long()], "at layer stem: "),
    ],
)
def test_the_failing_layer_and_the_shapes_are_named(inputs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        forward(Deep(), inputs)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith("give a model and inputs that fit each other")


def test_wrong_channels_are_refused_wherever_the_model_is_called(net: nn.Sequential) -> None:
    grey = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))]
    judge = Objective(nn.functional.cross_entropy, {"calibration": grey})
    for call in (
        lambda: api.compress(net, calibration=grey),
        lambda: judge.evaluate(net),
        lambda: judge.loss_within(net, "calibration", 1.0, 4),
        lambda: judge.gradients(net, ["0"]),
        lambda: model_cost(net, grey[0][0]),
    ):
        with pytest.raises(UserError, match="at layer 0: .*to have 3 channels, but got 1 channels instead; give"):
            call()
    assert net.training and net[0].weight.grad is None


def test_what_a_model_says_itself_is_kept_and_its_own_faults_are_not_hidden() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise UserError("this model reads text") if len(x) > 1 else KeyError("fault")

    with pytest.raises(UserError, match="^this model reads text$"):
        forward(Picky(), torch.ones(2))
    with pytest.raises(KeyError):
        forward(Picky(), torch.ones(1))


def test_a_run_on_data_of_other_channels_is_one_line(compose: Any, digits: list[str]) -> None:
    asked = [one for one in digits if not one.startswith("model")]
    with pytest.raises(UserError, match="at layer .*channels, but got 1 channels instead") as refusal:
        run.run(compose(*asked, "model=resnet20", "shape.in_channels=3", "algorithm=truncation"))
    assert "\n" not in str(refusal.value)


def test_only_what_is_named_is_trainable_and_all_is_as_before_afterwards() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in net.parameters()]
    with pytest.raises(RuntimeError, match="stop"), alone_trainable(net, [net[0].bias, net[1].bias]):
        assert [parameter.requires_grad for parameter in net.parameters()] == [False, True, False, True]
        raise RuntimeError("stop")
    assert [parameter.requires_grad for parameter in net.parameters()] == before


TASKS = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
BOXES = [{"boxes": torch.zeros(boxes, 4)} for boxes in (3, 1, 2)]


@pytest.mark.parametrize(
    ("targets", "inputs", "count"),
    [
        (torch.zeros(6), torch.zeros(6, 2), 6),
        (torch.tensor(1.0), torch.zeros(1, 2), 1),
        (None, torch.zeros(6, 2), 6),
        (TASKS, torch.zeros(6, 2), 6),
        (TASKS, None, 6),
        (list(TASKS), {"x": torch.zeros(6, 2)}, 6),
        ([torch.zeros(5), torch.zeros(5), torch.zeros(5)], torch.zeros(3, 2), 3),  # a sequence a sample
        ([torch.zeros(4), torch.zeros(5)], torch.zeros(2, 2), 2),
        (tuple(BOXES), [torch.zeros(3, 8, 8)] * 3, 3),
        ({"a": TASKS[0], "b": TASKS[1]}, torch.zeros(6, 2), 6),
        (torch.zeros(24), torch.zeros(4, 6), 4),
        (torch.zeros(24, 3), torch.zeros(4, 6, 2), 4),
        (torch.zeros(20), torch.zeros(4, 6), 4),
        (torch.zeros(8), torch.zeros(4, 8, 3), 8),
        (torch.zeros(3), torch.zeros(10, 4), 3),
    ],
    ids=[
        "tensor",
        "scalar",
        "none",
        "tasks",
        "tasks alone",
        "list of tasks",
        "sequences",
        "ragged",
        "boxes",
        "mapping",
        "flattened tokens",
        "flattened rows",
        "flattened and shifted tokens",
        "steps first",
        "graphs of nodes",
    ],
)
def test_samples_of_a_batch_are_counted_whatever_the_targets(targets: Any, inputs: Any, count: int) -> None:
    assert sample_count(targets, inputs) == count


def test_structured_targets_give_the_same_mean_loss_in_any_batches() -> None:
    net, x = nn.Linear(4, 3), torch.randn(10, 4)
    y, z = torch.randint(0, 3, (10,)), torch.randint(0, 3, (10,))

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        first, second = targets.values() if isinstance(targets, dict) else targets
        return nn.functional.cross_entropy(outputs, first) + 2 * nn.functional.cross_entropy(outputs, second)

    def mean(pack: Any, sizes: list[int]) -> float:
        parts = zip(x.split(sizes), y.split(sizes), z.split(sizes), strict=True)
        return Objective(loss, {"calibration": [(own, pack(a, b)) for own, a, b in parts]}).evaluate(net).loss

    expected = loss(net(x), (y, z)).item()
    for pack in (lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}):
        for sizes in ([10], [7, 3], [2, 8], [1] * 10):
            assert mean(pack, sizes) == pytest.approx(expected, rel=1e-5)


def test_samples_are_taken_from_what_has_them_and_the_rest_stays() -> None:
    mask, Pair = torch.ones(4, 4), namedtuple("Pair", "x t")
    inputs = Pair({"x": torch.arange(6), "mask": mask, "scale": torch.tensor(0.5)}, BOXES + BOXES)
    taken = first_samples(inputs, 2, 6)
    assert isinstance(taken, Pair) and taken.x["x"].tolist() == [0, 1] and taken.x["mask"] is mask
    assert taken.t == BOXES[:2] and taken.x["scale"].item() == 0.5
    assert first_samples(torch.arange(3), 5, 3).tolist() == [0, 1, 2]
    assert one_sample((torch.arange(3), torch.arange(6).view(3, 2)), 2, 3)[1].tolist() == [[4, 5]]
    assert repeated(torch.arange(3), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_packed_sequence_is_one_argument() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 5, 4), [5, 3, 2], batch_first=True)
    assert batch_size(packed) == 3
    assert forward(nn.LSTM(4, 6, batch_first=True), packed)[1][0].shape == (1, 3, 6)


@dataclass
class Output:
    scores: Tensor
    features: dict[str, Tensor]
    about: str = "text"
    count: int = field(init=False, default=0)


@dataclass(frozen=True)
class Frozen:
    inner: Output
    names: tuple[str, ...]


def test_the_tensors_of_a_dataclass_are_found_and_changed() -> None:
    scores, features = torch.randn(3, 2), torch.randn(3, 4)
    given = Frozen(Output(scores, {"a": features}), ("x",))
    assert [id(own) for own in tensors_of(given)] == [id(scores), id(features)]
    changed = aliased(given)
    assert isinstance(changed, Frozen) and isinstance(changed.inner, Output) and changed.names == ("x",)
    assert changed.inner.scores is not scores and torch.equal(changed.inner.scores, scores)
    assert torch.equal(one_sample(given, 1, 3).inner.features["a"], features[1:2])
    kept = Output(scores, {}, "other")
    assert first_samples(kept, 2, 3).about == "other" and tensors_of(Output) == []


def test_a_batch_may_be_a_dataclass() -> None:
    class Reading(nn.Sequential):
        def forward(self, given: Any) -> Tensor:
            return super().forward(given.scores if isinstance(given, Output) else given)

    torch.manual_seed(0)
    net = Reading(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    data = [(torch.randn(8, 6), torch.randint(5, (8,))) for _ in range(2)]
    joint = spectrim.Joint(params_kept=0.7, samples=16, refit=16)
    plain = spectrim.compress(net, calibration=data, algorithm=joint)
    wrapped = spectrim.compress(net, calibration=[(Output(x, {}), y) for x, y in data], algorithm=joint)
    assert wrapped.plan == plain.plan and wrapped.cost == plain.cost and wrapped.notes == plain.notes
    assert batch_size(Output(data[0][0], {})) == 8
    torch.testing.assert_close(wrapped.model(data[0][0]), plain.model(data[0][0]))


@pytest.mark.parametrize("wrap", [lambda y: Output(y, {}), lambda y: {"scores": y}, lambda y: (y, None)])
def test_a_model_may_return_tensors_in_any_structure(wrap: Any) -> None:
    class Wrapped(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return wrap(super().forward(x))

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(first(outputs), targets)

    def first(outputs: Any) -> Tensor:
        return tensors_of(outputs)[0]

    torch.manual_seed(0)
    net = Wrapped(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    plain = nn.Sequential(*net)
    data = [(torch.randn(8, 6), torch.randint(5, (8,))) for _ in range(3)]
    joint = spectrim.Joint(params_kept=0.7, samples=24, refit=24, refine=spectrim.Refinement(samples=24))
    result = spectrim.compress(net, calibration=data, loss=loss, algorithm=joint)
    same = spectrim.compress(plain, calibration=data, loss=lambda y, t: loss((y,), t), algorithm=joint)
    assert result.plan.keys() == same.plan.keys() and "distance_after" in result.log[-1]


def test_outputs_without_tensors_are_one_line() -> None:
    class Hidden:
        def __init__(self, scores: Tensor) -> None:
            self.scores = scores

    class Hiding(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return Hidden(super().forward(x))

    net = Hiding(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    data = [(torch.randn(8, 6), torch.randint(5, (8,)))]
    with pytest.raises(UserError, match="^the outputs are a Hidden in which no tensor is found; let the model return"):
        spectrim.compress(
            net,
            calibration=data,
            loss=lambda outputs, targets: nn.functional.cross_entropy(outputs.scores, targets),
            algorithm=spectrim.Joint(params_kept=0.7, samples=8),
        )


class Tagger(nn.Module):
    """A recurrent network that scores each step, perhaps with the steps of all samples in one dimension."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head, self.flat = nn.GRU(6, 12, batch_first=True), nn.Linear(12, 9), flat

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.inner(x)[0])
        return scores.flatten(0, 1) if self.flat else scores


def of_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.reshape(-1, 9), targets.flatten())


def of_numbers(outputs: Tensor, targets: Tensor) -> Tensor:
    wanted = nn.functional.one_hot(targets.flatten(), 9).float()
    return nn.functional.mse_loss(outputs.reshape(-1, 9).sigmoid(), wanted)


@pytest.mark.parametrize("loss", [of_tokens, of_numbers])
def test_flattened_outputs_and_targets_have_the_gates_of_those_that_are_not(loss: Any) -> None:
    x, y = torch.randn(8, 7, 6), torch.arange(56) % 9
    cases = [(Tagger(False), y.view(8, 7)), (Tagger(False), y), (Tagger(True), y)]
    found = [spectrim.compress(own, calibration=[(x, y)], loss=loss, params_kept=0.7) for own, y in cases]
    assert found[0].plan == found[1].plan and found[0].notes == found[1].notes == found[2].notes
    if loss is of_numbers:  # scores in rows have random directions, as below
        assert found[2].plan == found[0].plan


def test_flattened_scores_have_the_gates_of_tokens() -> None:
    x, y = torch.randn(8, 7, 6), torch.arange(56) % 9
    tokens = spectrim.compress(Tagger(False), calibration=[(x, y.view(8, 7))], loss=label_loss, params_kept=0.7)
    flat = spectrim.compress(Tagger(True), calibration=[(x, y)], params_kept=0.7)
    assert tokens.plan == flat.plan and tokens.notes == flat.notes
