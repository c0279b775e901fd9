"""A model is filled as a whole or left alone: on any device, in its own precision or that of the checkpoint."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.checkpoints import filling, single_file
from spectrim.decomposers.spectrum import spectrum_of
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.surgery import replacing
from spectrim.tools import digests, safetensors_stream
from spectrim.tools.safetensors_stream import Shard

PLAN = RankPlan.of({"body": Kept(2, PlainForm("linear")), "conv": Kept(3, PlainForm("channel"))})


class Net(nn.Module):
    """A tied head, a convolution, BatchNorm with statistics, and a buffer that no checkpoint holds where ``loose``."""

    def __init__(self, loose: bool = False) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.conv, self.norm = nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.BatchNorm1d(8)
        if loose:
            self.register_buffer("angles", torch.arange(3.0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.embedding(tokens))
        return self.head(self.norm(self.conv(x.mT.unsqueeze(2)).squeeze(2)).mT)


@pytest.fixture
def small() -> Net:
    model = Net().train()
    model(torch.randint(11, (5, 7)))
    spectra = {name: spectrum_of(model.get_submodule(name), spectrim.SVD()) for name in PLAN}
    return replacing.apply(model.eval(), PLAN, spectra)  # type: ignore[return-value]


@pytest.fixture
def path(small: Net, tmp_path: Path) -> Path:
    single_file.save(tmp_path / "small.safetensors", small, PLAN)
    return tmp_path / "small.safetensors"


def on_cpu(loose: bool = False) -> Net:
    return Net(loose).eval()


def on_meta(loose: bool = False) -> Net:
    with torch.device("meta"):
        return Net(loose).eval()


@pytest.mark.parametrize("place", [on_cpu, on_meta])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_decides_the_precision_and_from_meta_the_weights_go_to_the_cpu(
    path: Path, small: Net, place: Callable[[], Net], dtype: torch.dtype
) -> None:
    into = place().to(dtype)
    loaded = spectrim.load(path, into=into)
    assert loaded is into and {value.device.type for value in loaded.state_dict().values()} == {"cpu"}
    for name, value in small.state_dict().items():
        wanted = value.to(dtype) if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], wanted) and loaded.state_dict()[name].dtype == wanted.dtype
    assert into.head.weight is into.embedding.weight and into.norm.weight.requires_grad
    if dtype == torch.float32:
        tokens = torch.randint(11, (2, 6))
        assert torch.equal(loaded(tokens), small(tokens))


@pytest.mark.parametrize("place", [on_cpu, on_meta])
def test_as_stored_keeps_the_precision_of_each_tensor(small: Net, tmp_path: Path, place: Callable[[], Net]) -> None:
    small.body.to(torch.bfloat16)
    single_file.save(tmp_path / "mixed.safetensors", small, PLAN)
    into = place()
    loaded = single_file.filled(into, single_file.verified(tmp_path / "mixed.safetensors"), as_stored=True)
    for name, value in small.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype and torch.equal(loaded.state_dict()[name], value)
    assert into.head.weight is into.embedding.weight


def test_a_buffer_that_no_checkpoint_holds_cannot_come_from_meta(path: Path) -> None:
    assert torch.equal(spectrim.load(path, into=Net(loose=True)).get_buffer("angles"), torch.arange(3.0))
    into = on_meta(loose=True)
    with pytest.raises(spectrim.UserError, match="the buffer angles of the model is on the meta device") as refusal:
        spectrim.load(path, into=into)
    assert "\n" not in str(refusal.value) and type(into.body) is nn.Linear


def test_untied_tensors_on_meta_are_not_taken_for_tied_ones(tmp_path: Path) -> None:
    """All tensors on the meta device have the address 0."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    single_file.save(tmp_path / "x.safetensors", model, RankPlan())
    with torch.device("meta"):
        into = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    loaded = spectrim.load(tmp_path / "x.safetensors", into=into)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert len(set(filling.names_of_shared(loaded).values())) == 6


@pytest.mark.parametrize("place", [on_cpu, on_meta])
def test_a_refused_checkpoint_leaves_the_layers_themselves_in_place(
    path: Path, small: Net, place: Callable[[], Net]
) -> None:
    state = {name: value for name, value in small.state_dict().items() if name not in ("norm.bias", "head.weight")}
    into = place().train()
    layers, before = dict(into.named_modules()), {name: value.clone() for name, value in into.state_dict().items()}
    for tensors, message in [
        (state, "it lacks norm.bias"),
        ({**state, "norm.bias": torch.ones(8), "more": torch.ones(1)}, "Net has no more"),
        ({**state, "norm.bias": torch.ones(9)}, r"norm.bias has shape \[9\] there and \[8\] in Net"),
    ]:
        safetensors_stream.save(path, tensors, {})
        with pytest.raises(spectrim.UserError, match=f"is of another architecture: {message}"):
            filling.fill(into, PLAN, [Shard.at(path)], path)
        assert dict(into.named_modules()) == layers and all(module.training for module in into.modules())
        assert all(value.is_meta or torch.equal(value, before[name]) for name, value in into.state_dict().items())
    safetensors_stream.save(path, state, {})
    filling.fill(into, PLAN, [Shard.at(path)], path, filled={"norm.bias"})  # it may lack what is there already


def test_only_a_whole_digest_is_taken_and_it_is_that_of_the_file(path: Path) -> None:
    sha256, into = digests.of_file(path), Net()
    layers = dict(into.named_modules())
    for wrong, message in (("0" * 64, "has another sha256"), (sha256[:16], "is not a sha256"), ("", "is not a sha256")):
        with pytest.raises(spectrim.UserError, match=message) as refusal:
            spectrim.load(path, into=into, sha256=wrong)
        assert "\n" not in str(refusal.value) and dict(into.named_modules()) == layers
    assert spectrim.load(path, into=into, sha256=sha256) is into


def test_the_digest_of_a_folder_is_that_of_its_manifest(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 9))
    state: dict[str, Any] = model.state_dict()
    safetensors_stream.save(tmp_path / "dense" / "model.safetensors", state, {})
    spectrim.compress_checkpoint(tmp_path / "dense", tmp_path / "small", ratio=0.5)
    sha256 = digests.of_file(tmp_path / "small" / "spectrim.json")
    assert spectrim.load(tmp_path / "small", into=copy.deepcopy(model), sha256=sha256)
    with pytest.raises(spectrim.UserError, match="spectrim.json has another sha256"):
        spectrim.load(tmp_path / "small", into=model, sha256="0" * 64)


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, and still in use
def test_a_model_of_packed_integers_is_not_saved_without_them(tmp_path: Path) -> None:
    """torch.ao keeps the weights of a quantised layer in a tuple, which a file of tensors would leave out."""
    dense = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    result = spectrim.compress(dense, algorithm=spectrim.Truncation(ratio=0.5))
    small = torch.ao.quantization.quantize_dynamic(result.model, {nn.Linear}, torch.qint8)
    with pytest.raises(UserError, match="which no file holds; save the model before it is quantised$"):
        replace(result, model=small).save(tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sides", [(6, 6), (6, 9)])
def test_a_transposed_view_of_a_weight_is_another_tensor(sides: tuple[int, int], tmp_path: Path) -> None:
    def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
        encode, decode = nn.Linear(*sides, bias=False), nn.Linear(*sides[::-1], bias=False)
        decode.weight = nn.Parameter(encode.weight.detach().t())
        return nn.Sequential(encode, nn.Tanh(), decode).to(dtype)

    given, x = net(), torch.randn(4, sides[0])
    single_file.save(tmp_path / "net", given, RankPlan())
    for into in (net(), net(torch.float64), copy.deepcopy(net()), net().to("meta")):
        loaded = spectrim.load(tmp_path / "net", into=into)
        torch.testing.assert_close(loaded(x.to(loaded[0].weight)).float(), given(x))


class Renaming(nn.Module):
    """Calls its layers ``net.…`` in ``state_dict`` and leaves ``extra`` out, by a hook or by an override."""

    def __init__(self, by_hook: bool) -> None:
        super().__init__()
        self.body, self.extra, self.by_hook = (
            nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 9)),
            nn.Linear(9, 9),
            by_hook,
        )
        if by_hook:
            self._register_state_dict_hook(lambda _, state, *__: self.renamed(state))

    @staticmethod
    def renamed(state: dict[str, Any]) -> dict[str, Any]:
        for name in list(state):
            value = state.pop(name)
            if name.startswith("body."):
                state[name.replace("body.", "net.")] = value
        return state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return state if self.by_hook else self.renamed(state)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(self.body(x))


@pytest.mark.parametrize("by_hook", [True, False])
def test_a_file_holds_every_weight_whatever_the_model_says_its_state_is(by_hook: bool, tmp_path: Path) -> None:
    given, into, x = Renaming(by_hook), Renaming(by_hook), torch.randn(4, 12)
    assert set(given.state_dict()) == {"net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"}
    result = spectrim.compress(given, algorithm=spectrim.Truncation(ratio=0.5))
    assert {"body.0", "extra"} <= set(result.plan)
    result.save(tmp_path / "small.safetensors")
    loaded = spectrim.load(tmp_path / "small.safetensors", into=into)
    assert torch.equal(loaded(x), result.model(x))
