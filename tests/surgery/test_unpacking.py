"""Modules are unpacked on a copy, refused where that would be wrong, and unpacked by a plan as they were for it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spectrim
from spectrim.errors import UserError
from spectrim.surgery import unpacking


class Reader(nn.Module):
    """A recurrent net over the output of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.over, self.head = nn.GRU(16, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.over(self.attention(x, x, x)[0])[0].mean(1))


class Gated(nn.LSTM):
    """An LSTM that does something else."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(input)[0]


def batches(*shape: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, *shape), torch.randint(5, (8,))) for _ in range(2)]


def test_a_model_with_nothing_to_unpack_is_not_copied(net: nn.Sequential) -> None:
    assert unpacking.unpacked(net) is net


def test_the_given_model_keeps_its_modules_and_parameters() -> None:
    model = Reader()
    before, names = dict(model.named_parameters()), [type(module) for module in model.modules()]
    unpacking.unpacked(model)
    assert [type(module) for module in model.modules()] == names
    assert all(own is before[name] for name, own in model.named_parameters())


def patched() -> nn.Module:
    module = nn.Conv1d(4, 4, 3)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.MultiheadAttention(16, 2, add_bias_kv=True), "attention with add_bias_kv or add_zero_attn is not factored"),
        (
            nn.MultiheadAttention(16, 2, add_zero_attn=True),
            "attention with add_bias_kv or add_zero_attn is not factored",
        ),
        (patched(), "Conv1d has a forward of its own"),
        (nn.Conv1d(4, 4, 3, dtype=torch.complex64), "its weight is of torch.complex64"),
    ],
)
def test_what_would_be_wrong_is_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    model = nn.Sequential(module)
    assert unpacking.unpacked(model) is model and unpacking.refusals(model) == {"0": reason}


@pytest.mark.parametrize("module", [Gated(16, 16), parametrizations.weight_norm(nn.Conv1d(4, 4, 3))])
def test_a_subclass_may_compute_something_else_and_stays(module: nn.Module) -> None:
    model = nn.Sequential(module)
    assert unpacking.unpacked(model) is model


def test_shared_modules_and_parameters_stay_and_are_noted() -> None:
    twice = nn.Conv1d(4, 4, 3)
    model = nn.ModuleList([twice, twice, nn.LSTM(16, 16), nn.LSTM(16, 16), nn.LSTM(16, 16)])
    model[3].weight_hh_l0 = model[2].weight_hh_l0
    assert unpacking.refusals(model) == dict.fromkeys(["0", "2", "3"], "its weight is shared with another layer")
    unpacked = unpacking.unpacked(model)
    assert unpacked[2].weight_hh_l0 is unpacked[3].weight_hh_l0 is model[3].weight_hh_l0
    assert "hh_l0" in dict(unpacked[4].named_children())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1), (6, 16)),
        (lambda: nn.Conv1d(12, 12, 3), (12, 9)),
    ],
)
def test_a_model_that_is_one_module_is_compressed_and_loads(make: Any, shape: tuple[int, ...], tmp_path: Any) -> None:
    model, x = make(), [torch.randn(4, *shape)]
    result = spectrim.compress(model, calibration=x, algorithm=spectrim.Truncation(ratio=0.5))
    result.save(tmp_path / "x.safetensors")
    loaded = spectrim.load(tmp_path / "x.safetensors", into=make())
    assert torch.equal(loaded.eval()(x[0]), result.model.eval()(x[0])) and result.params_kept < 0.7


def test_only_modules_in_which_a_layer_is_factored_stay_unpacked(tmp_path: Any) -> None:
    model = Reader()
    chosen = spectrim.compress(model, calibration=batches(4, 16), plan={"over.ih_l0": 3, "attention.out_proj": 2})
    assert type(chosen.model.attention).__name__ == "UnpackedAttention"
    only = spectrim.compress(model, calibration=batches(4, 16), plan={"over.ih_l0": 3})
    assert type(only.model.attention) is nn.MultiheadAttention and type(only.model.over) is not nn.GRU
    only.save(tmp_path / "x.safetensors")
    loaded = spectrim.load(tmp_path / "x.safetensors", into=Reader())
    assert type(loaded.attention) is nn.MultiheadAttention
    x = torch.randn(3, 4, 16)
    assert torch.equal(loaded(x), only.model(x))


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Any) -> None:
    result = spectrim.compress(Reader(), calibration=batches(4, 16), algorithm=spectrim.Truncation(ratio=0.5))
    result.save(tmp_path / "x.safetensors")
    other = Reader()
    other.head = nn.Linear(24, 7)
    before, parameters = copy.deepcopy(other), dict(other.named_parameters())
    with pytest.raises(UserError, match="another architecture"):
        spectrim.load(tmp_path / "x.safetensors", into=other)
    assert [type(own) for own in other.modules()] == [type(own) for own in before.modules()]
    assert all(own is parameters[name] for name, own in other.named_parameters())
    x = torch.randn(3, 4, 16)
    assert torch.equal(other(x), before(x))


def test_on_the_meta_device_it_is_filled_from_the_file(tmp_path: Any) -> None:
    result = spectrim.compress(Reader(), calibration=batches(4, 16), algorithm=spectrim.Truncation(ratio=0.5))
    result.save(tmp_path / "x.safetensors")
    with torch.device("meta"):
        model = Reader()
    loaded, x = spectrim.load(tmp_path / "x.safetensors", into=model), torch.randn(3, 4, 16)
    assert torch.equal(loaded(x), result.model(x))


def test_compressed_again_it_gets_smaller_and_the_file_loads(tmp_path: Any) -> None:
    first = spectrim.compress(Reader(), calibration=batches(4, 16), algorithm=spectrim.Truncation(params_kept=0.7))
    again = spectrim.compress(first.model, calibration=batches(4, 16), algorithm=spectrim.Truncation(params_kept=0.6))
    assert again.params_kept <= 0.6
    again.save(tmp_path / "x.safetensors")
    loaded, x = spectrim.load(tmp_path / "x.safetensors", into=Reader()), torch.randn(3, 4, 16)
    assert torch.equal(loaded(x), again.model(x))


def test_hooks_stay_on_the_module_and_what_a_model_reads_is_there() -> None:
    class Reads(Reader):
        def forward(self, x: Tensor) -> Tensor:
            self.over.flatten_parameters()
            size = self.over.hidden_size + self.attention.embed_dim
            return super().forward(x) + size * self.over.weight_hh_l0.norm() + self.attention.in_proj_weight.norm()

    model, seen = Reads(), list[str]()
    model.over.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    result = spectrim.compress(model, calibration=batches(4, 16), algorithm=spectrim.Truncation(ratio=0.5))
    seen.clear()
    result.model(torch.randn(3, 4, 16))
    assert seen == ["UnpackedGRU"] and result.model.over.weight_hh_l0.shape == (72, 24)
