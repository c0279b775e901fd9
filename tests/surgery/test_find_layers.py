"""Which layers can be replaced, why the others stay dense, and that a model is not changed by being looked at."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import spectrim
from spectrim.errors import UserError
from spectrim.factored.base import OWN_NAMES
from spectrim.factored.dense import attributes_of
from spectrim.factored.forms import Form
from spectrim.surgery import find_layers


class Peculiar(nn.Module):
    """Every way of using a layer that forbids replacing it, beside one (``plain``) that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.read, self.looked_at, self.listed = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.uncalled = nn.Linear(16, 16)
        self.tied, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.other.weight = self.tied.weight
        self.twice = self.again = nn.Linear(16, 16)
        self.parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.pruned = prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)
        self.own = Scaled(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x) + x @ self.read.weight
        if self.looked_at.weight.dtype == torch.float32:
            x = self.looked_at(x)
        x = self.listed(x) + torch.stack(list(self.listed.parameters())[:1]).sum()
        for layer in (self.tied, self.other, self.twice, self.again, self.parametrised, self.pruned, self.own):
            x = layer(x)
        return self.attention(x, x, x)[0].sum(1)


class Scaled(nn.Linear):
    """A linear layer that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_only_what_can_be_replaced_is_factorable() -> None:
    layers, left = find_layers.factorable(Peculiar(), torch.randn(2, 3, 16))
    assert list(layers) == ["plain"]
    assert left == {
        "read": "the model reads its weight",
        "looked_at": "the model reads its weight",
        "listed": "the model reads its weight",
        "uncalled": "the model does not call it",
        "tied": "its weight is shared with another layer",
        "other": "its weight is shared with another layer",
        "twice": "its weight is shared with another layer",
        "parametrised": "its weight is computed from other parameters",
        "pruned": "its weight is computed from other parameters",
        "own": "Scaled has a forward of its own",
        "attention": "MultiheadAttention is not factored",
        "attention.out_proj": "the model reads its weight",
    }


def test_looking_at_a_model_leaves_no_trace(net: nn.Sequential) -> None:
    before, mode = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    patched = (nn.Module.__getattr__, nn.Linear.forward, nn.Conv2d.forward)
    find_layers.factorable(net, torch.randn(2, 3, 8, 8))
    with pytest.raises(UserError, match="at layer 0: "):
        find_layers.factorable(net, torch.randn(2, 4, 8, 8))
    assert (nn.Module.__getattr__, nn.Linear.forward, nn.Conv2d.forward) == patched
    assert [m.training for m in net.modules()] == mode
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("model", [nn.Linear(9, 9), nn.Conv2d(9, 9, 3)])
def test_a_model_that_is_one_layer_is_refused_with_the_way_out(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"pass torch.nn.Sequential\(model\)"):
        find_layers.factorable(model, torch.randn(2, 9, 9, 9))


class WithGain(nn.Linear):
    """A linear layer with a parameter of its own, which its model multiplies by."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.gain = nn.Parameter(torch.ones(16))


def patched() -> nn.Linear:
    """A linear layer whose forward was replaced on the instance, as by libraries that move weights between devices."""
    layer = nn.Linear(16, 16)
    dense = layer.forward
    layer.forward = lambda x: 2 * dense(x)  # type: ignore[method-assign]
    return layer


def ranked() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.rank = 3  # type: ignore[assignment]
    return layer


class Packed(nn.Parameter):
    """A parameter that means something else than its values, as that of a quantised layer."""


def packed() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.weight = Packed(layer.weight.data)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(16, 16, dtype=torch.complex64), "its weight is of torch.complex64"),
        (WithGain(), "it holds more than a weight and a bias"),
        (patched(), "Linear has a forward of its own"),
        (packed(), "its weight is a Packed"),
        (ranked(), "a factored layer has an attribute rank of its own"),
    ],
)
def test_a_layer_of_another_kind_stays_dense_beside_one_that_does_not(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Identity(), layer)
    model[1].forward = lambda x: x.to(layer.weight.dtype)  # type: ignore[assignment, union-attr]
    layers, dense = find_layers.factorable(model, torch.randn(2, 16))
    assert list(layers) == ["0"] and dense == {"2": reason}


@pytest.mark.parametrize("training", [True, False])
def test_a_computed_weight_is_not_computed_by_looking(training: bool) -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(16, 16)), nn.Linear(16, 16)).train(training)
    before = copy.deepcopy(model.state_dict())
    layers, dense = find_layers.factorable(model, torch.randn(2, 16))
    assert list(layers) == ["1"] and dense == {"0": "its weight is computed from other parameters"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_where_no_layer_is_left_the_error_gives_the_reasons() -> None:
    model = nn.Sequential(
        *(Scaled(16, 16) for _ in range(5)), nn.Linear(16, 16, dtype=torch.complex64).requires_grad_()
    )
    model[4].register_forward_hook(lambda _, __, output: output.to(torch.complex64))
    data: Any = [(torch.randn(4, 16), torch.zeros(4).long())]
    with pytest.raises(UserError, match="nothing to factor") as refusal:
        spectrim.compress(model, calibration=data, algorithm=spectrim.Truncation(ratio=0.5))
    reasons = "0, 1, 2 and more: Scaled has a forward of its own; 5: its weight is of torch.complex64"
    assert str(refusal.value).endswith(reasons)


def test_a_model_without_layers_is_refused_with_what_it_has() -> None:
    model = nn.Sequential(Halved(4, 4, 1))
    with pytest.raises(UserError, match="nothing to factor: 0: Halved is not factored"):
        spectrim.compress(model, calibration=[(torch.randn(2, 4, 4), torch.zeros(2, 4).long())])


class Halved(nn.Conv1d):
    """A convolution that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Queries(nn.Module):
    """A model with modules of other kinds, among them itself, for it holds a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 6, 16))
        self.over, self.along, self.norm = nn.Conv1d(6, 6, 1), nn.LSTM(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.along(self.over(x + self.query))[0].mean(1)))


def test_modules_of_other_kinds_that_hold_a_matrix_are_named() -> None:
    layers, dense = find_layers.factorable(Queries(), torch.randn(2, 6, 16))
    assert list(layers) == ["head"] and dense == {
        "Queries": "Queries is not factored",
        "over": "Conv1d is not factored",
        "along": "LSTM is not factored",
    }


def test_what_stays_dense_is_noted_with_its_share_and_explains_a_budget_out_of_reach() -> None:
    model = nn.Sequential(Halved(6, 6, 1), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[3].weight = model[2].weight
    reasons = find_layers.factorable(model, torch.randn(2, 6, 16))[1]
    shared, halved = "its weight is shared with another layer", "Halved is not factored"
    assert reasons == {"0": halved, "2": shared, "3": shared}
    total = 42 + 2 * 272 + 16
    assert find_layers.left_dense(reasons, model) == [
        f"0: left dense: {halved} ({42 / total:.2%} of the parameters)",
        f"2: left dense: {shared} ({272 / total:.2%} of the parameters)",
        f"3: left dense: {shared} ({272 / total:.2%} of the parameters)",
    ]
    said = f"{288 / total:.2%}: 2, 3: {shared}; {42 / total:.2%}: 0: {halved}"
    assert find_layers.dense_shares(reasons, model) == said
    data: Any = [(torch.randn(4, 6, 16), torch.zeros(4, 16).long())]
    with pytest.raises(UserError, match="params_kept=0.2 is out of reach") as refusal:
        spectrim.compress(model, calibration=data, algorithm=spectrim.Truncation(params_kept=0.2))
    assert str(refusal.value).endswith(f" remain; of the parameters stay dense {said}")


def test_a_scripted_part_stays_as_it_is() -> None:
    with pytest.warns(DeprecationWarning):
        part = torch.jit.script(nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(16, 16), part)
    data: Any = [(torch.randn(4, 16), torch.zeros(4).long())]
    result = spectrim.compress(model, calibration=data, algorithm=spectrim.Truncation(ratio=0.5))
    assert list(result.plan) == ["0"] and any(note.startswith("1: left dense") for note in result.notes)


def test_the_names_of_factored_layers_are_reserved() -> None:
    makers = [nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.Embedding(8, 8)]
    forms = {"linear": 0, "spatial": 1, "tucker 2x2": 1, "embedding but 2": 2}
    for text, place in forms.items():
        layer = Form.from_text(text).layer_for(makers[place], 2)
        public = {name for name in (*vars(layer), *layer._modules, *layer._buffers) if not name.startswith("_")}
        assert public - attributes_of(makers[place]).keys() - {"training"} <= OWN_NAMES


def test_a_module_with_a_parametrised_weight_is_noted_with_all_that_it_holds() -> None:
    conv, linear = (parametrizations.weight_norm(own) for own in (nn.Conv1d(4, 6, 3), nn.Linear(9, 16)))
    model = nn.Sequential(conv, linear, nn.Linear(16, 16))
    layers, reasons = find_layers.factorable(model, torch.randn(2, 4, 11))
    computed, other = "its weight is computed from other parameters", "ParametrizedConv1d is not factored"
    assert list(layers) == ["2"] and reasons == {"0": other, "1": computed}
    in_conv, in_linear = 6 * 4 * 3 + 6 + 6, 16 * 9 + 16 + 16  # directions, lengths and bias
    total = in_conv + in_linear + 272
    assert find_layers.left_dense(reasons, model) == [
        f"0: left dense: {other} ({in_conv / total:.2%} of the parameters)",
        f"1: left dense: {computed} ({in_linear / total:.2%} of the parameters)",
    ]


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Conv1d])
def test_a_convolution_of_single_images_stays_dense(kind: Any) -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.single, self.head = kind(3, 12, 3, padding=1), kind(12, 12, 3), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.stack([self.single(own).flatten(1).mean(1) for own in self.whole(x)]))

    shape = (6, 3, 7, 7) if kind is nn.Conv2d else (6, 3, 7)
    data = [(torch.randn(shape), torch.randint(5, (6,))) for _ in range(2)]
    joint = spectrim.Joint(params_kept=0.9, samples=6, refit=6)
    result = spectrim.compress(OneByOne(), calibration=data, algorithm=joint)
    name = {nn.Conv2d: "single", nn.Conv1d: "single.conv"}[kind]
    assert result.plan and name not in result.plan
    assert any("it is called on an image without a dimension of samples" in note for note in result.notes)


def test_a_layer_without_numbers_stays_dense() -> None:
    none, some = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    none.weight, some.weight = nn.Parameter(torch.empty(0, 16)), nn.Parameter(torch.empty(16, 0))
    layers, dense = find_layers.factorable(nn.Sequential(nn.Linear(16, 16), none, some), torch.randn(2, 16))
    assert list(layers) == ["0"] and dense == dict.fromkeys(["1", "2"], "its weight is empty")
