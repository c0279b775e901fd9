"""A file gives the same model back bit for bit, or is refused and nothing is changed."""

import copy
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import spectrim
from spectrim.batches import evaluating
from spectrim.checkpoints import single_file
from spectrim.decomposers.spectrum import spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.surgery import find_layers, replacing


def small(model: nn.Module, view: Any = "channel") -> tuple[nn.Module, RankPlan]:
    plan = RankPlan.of(
        {"0": Kept(3, PlainForm(view)), "3": Kept((0, 2), PlainForm(view)), "6": Kept(5, PlainForm("linear"))}
    )
    spectra = {name: spectrum_of(model.get_submodule(name), SVD(view)) for name in plan}
    return replacing.apply(model, plan, spectra), plan


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        return model(x)


class Tied(nn.Module):
    """A language model in small: the embedding's weight is that of the head, unless ``tie`` is false."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


@pytest.fixture
def saved(net: nn.Sequential, tmp_path: Path) -> tuple[Path, nn.Module]:
    compressed, plan = small(net)
    path = tmp_path / "deep" / "small.safetensors"
    single_file.save(path, compressed, plan, {"model": "net"})
    return path, compressed


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_saved_and_loaded_gives_the_same_logits_bit_for_bit(net: nn.Sequential, tmp_path: Path, view: str) -> None:
    compressed, plan = small(net, view)
    single_file.save(tmp_path / "x.safetensors", compressed, plan)
    fresh = copy.deepcopy(net)
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    loaded = single_file.load(tmp_path / "x.safetensors", fresh)
    x = torch.randn(9, 3, 8, 8)
    assert loaded is fresh and torch.equal(logits(loaded, x), logits(compressed, x))
    assert single_file.verified(tmp_path / "x.safetensors").metadata["plan"] == plan.to_json()


SAVED = """
import sys, torch
from spectrim.checkpoints import single_file
from spectrim.factored.plan import RankPlan
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2).half())
single_file.save(sys.argv[1], model, RankPlan(), {"model": "mlp", "data": "digits", "class": "Sequential"})
"""


def test_the_same_model_gives_the_same_bytes_in_every_process(
    net: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(4)]
    for seed, path in enumerate(paths):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        subprocess.run([sys.executable, "-c", SAVED, str(path)], check=True)
    assert len({path.read_bytes() for path in paths}) == 1
    compressed, plan = small(net)
    for _ in range(20):
        single_file.save(tmp_path / "x.safetensors", compressed, plan, {"b": "2", "a": "1"})
        paths.append((tmp_path / "x.safetensors").rename(tmp_path / f"{len(paths)}.safetensors"))
    assert len({path.read_bytes() for path in paths[4:]}) == 1


def test_float16_halves_the_file_and_rounds_once(net: nn.Sequential, saved: Any, tmp_path: Path) -> None:
    path, compressed = saved
    _, plan = small(net)
    half = tmp_path / "half.safetensors"
    single_file.save(half, compressed, plan, dtype=torch.float16)
    assert {v.dtype for v in load_file(half).values()} == {torch.float16, torch.int64}  # batches BatchNorm has seen
    assert sum(v.nbytes for v in load_file(half).values()) < 0.51 * sum(v.nbytes for v in load_file(path).values())
    loaded = single_file.load(half, net).state_dict()
    for name, value in compressed.state_dict().items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value.half().to(value.dtype))


def test_a_number_too_large_for_float16_is_named_and_no_file_written(net: nn.Sequential, tmp_path: Path) -> None:
    compressed, plan = small(net)
    with torch.no_grad():
        compressed[0].second.weight[0] = 1e5
    with pytest.raises(UserError, match="^0.second.weight cannot be saved: a number is NaN or too large for float16"):
        single_file.save(tmp_path / "half.safetensors", compressed, plan, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_channels_last_weights_are_saved_whole(net: nn.Sequential, tmp_path: Path) -> None:
    twin = copy.deepcopy(net)
    single_file.save(tmp_path / "x.safetensors", twin.to(memory_format=torch.channels_last), RankPlan())
    with torch.no_grad():
        net[0].weight.zero_()
    single_file.load(tmp_path / "x.safetensors", net)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in net.state_dict().items())


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model, path = Tied(), tmp_path / "tied.safetensors"
    layers, left = find_layers.factorable(model, torch.zeros(1, 2, dtype=torch.long))
    assert "head" in left and "body" in layers
    plan = RankPlan.of({"body": Kept(2, PlainForm("linear"))})
    compressed = replacing.apply(model, plan, {"body": spectrum_of(model.body, SVD())})
    single_file.save(path, compressed, plan)
    assert "head.weight" not in load_file(path)
    loaded, tokens = single_file.load(path, Tied()), torch.arange(11)
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(logits(loaded, tokens), logits(compressed, tokens))


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_model_is_not_an_untied_one(tmp_path: Path, tie: bool) -> None:
    single_file.save(tmp_path / "x.safetensors", Tied(tie), RankPlan())
    with pytest.raises(UserError, match="another architecture"):
        single_file.load(tmp_path / "x.safetensors", Tied(not tie))


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(net: nn.Sequential, saved: Any, part: float) -> None:
    path, _ = saved
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    refuses_and_leaves_alone(path, net, "cut short")


def test_an_altered_file_is_refused_wherever_it_was_altered(net: nn.Sequential, saved: Any) -> None:
    path, compressed = saved
    whole, x = path.read_bytes(), torch.randn(2, 3, 8, 8)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(8, header, 5), *range(header, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            loaded = single_file.load(path, copy.deepcopy(net))
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # a note of the writer was altered: nothing that is computed from
            assert place < header and torch.equal(logits(loaded, x), logits(compressed, x))


def test_altered_numbers_are_told_by_the_digest(net: nn.Sequential, saved: Any) -> None:
    path, _ = saved
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refuses_and_leaves_alone(path, net, "was altered")


@pytest.mark.parametrize("change", ["wider", "deeper", "fewer classes", "other kind"])
def test_another_architecture_is_refused(net: nn.Sequential, saved: Any, change: str) -> None:
    path, _ = saved
    if change == "wider":
        net[0] = nn.Conv2d(3, 14, 3)
    elif change == "deeper":
        net.append(nn.Linear(5, 5))
    elif change == "fewer classes":
        net[8] = nn.Linear(24, 4)
    else:
        net[6] = nn.ReLU()
    refuses_and_leaves_alone(path, net, "another architecture")


@pytest.mark.parametrize("change", ["missing", "renamed", "reshaped", "added"])
def test_tensors_that_are_not_those_of_the_plan_are_refused_and_nothing_is_changed(
    net: nn.Sequential, saved: Any, change: str
) -> None:
    """The digest has no key: whoever alters a file can write a matching one."""
    path, _ = saved
    header, tensors, name = single_file.verified(path).metadata, load_file(path), "6.first.weight"
    if change in ("missing", "renamed"):
        value = tensors.pop(name)
        tensors |= {"6.first.other": value} if change == "renamed" else {}
    else:
        tensors[name if change == "reshaped" else "7.more"] = torch.ones(2, 2)
    save_file(tensors, path, header | {"digest": single_file._digest(sorted(tensors.items()), header)})
    before = [(key, type(module)) for key, module in net.named_modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError, match=r"is of another architecture: .*(6\.first|7\.more)"):
        single_file.load(path, net)
    assert [(key, type(module)) for key, module in net.named_modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_another_format_and_no_file_are_refused(net: nn.Sequential, tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "foreign.safetensors")
    refuses_and_leaves_alone(tmp_path / "foreign.safetensors", net, "not a spectrim checkpoint")
    refuses_and_leaves_alone(tmp_path / "none.safetensors", net, "there is no checkpoint")


@pytest.mark.parametrize("newer", ["spectrim-2", "spectrim-every-size-2"])
def test_a_newer_format_is_refused_by_the_name_of_the_file(net: nn.Sequential, tmp_path: Path, newer: str) -> None:
    path = tmp_path / "newer.safetensors"
    single_file.write(path, single_file.stored(net), {"format": newer, "plan": "{}", "architecture": ""})
    refuses_and_leaves_alone(path, net, rf"newer\.safetensors has the format {newer}, .*update spectrim")


def test_a_form_that_a_newer_version_added_is_refused_by_the_name_of_the_file(
    net: nn.Sequential, tmp_path: Path
) -> None:
    path, header = tmp_path / "newer.safetensors", {"format": single_file.FORMAT, "architecture": ""}
    plan = '{"6": {"rank": 5, "form": "tensor train"}}'
    single_file.write(path, single_file.stored(net), {**header, "plan": plan})
    refuses_and_leaves_alone(path, net, r"newer\.safetensors: .*'tensor train' is no form .*update spectrim")


def refuses_and_leaves_alone(path: Path, net: nn.Sequential, message: str) -> None:
    before, layers = copy.deepcopy(net.state_dict()), str(net)
    with pytest.raises(UserError, match=message):
        single_file.load(path, net)
    assert str(net) == layers
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, compressed = saved
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        single_file.save(path, compressed, RankPlan())
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_said_in_one_line(net: nn.Sequential, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write .*: Not a directory"):
        single_file.save(tmp_path / "file" / "x.safetensors", net, RankPlan())


def test_a_file_is_as_readable_for_others_as_any_new_file_of_the_user(
    saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.touch()
    assert saved[0].stat().st_mode == other.stat().st_mode


class Scaled(nn.Module):
    """Multiplies by a number that is part of its extra state, as a number or as a tensor."""

    def __init__(self, by: float, as_tensor: bool) -> None:
        super().__init__()
        self.inner, self.by, self.as_tensor = nn.Linear(12, 12), by, as_tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.by * self.inner(x)

    def get_extra_state(self) -> Any:
        return torch.tensor(self.by) if self.as_tensor else {"by": self.by}

    def set_extra_state(self, state: Any) -> None:
        self.by = float(state if self.as_tensor else state["by"])


def test_extra_state_comes_back_or_is_asked_for(tmp_path: Path) -> None:
    x, path = torch.randn(4, 12), tmp_path / "scaled.safetensors"
    for as_tensor in (True, False):
        model = nn.Sequential(Scaled(3.0, as_tensor))
        result = spectrim.compress(model, algorithm=spectrim.Truncation(rank=2))
        result.save(path)
        same, other = (nn.Sequential(Scaled(by, as_tensor)) for by in (3.0, 1.0))
        assert torch.equal(spectrim.load(path, into=same)(x), result.model(x))
        if as_tensor:
            assert torch.equal(spectrim.load(path, into=other)(x), result.model(x))
            continue
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(UserError, match="does not hold the extra state of its model"):
            spectrim.load(path, into=other)
        assert type(other[0].inner) is nn.Linear
        assert torch.equal(other.state_dict()["0.inner.weight"], before["0.inner.weight"])
