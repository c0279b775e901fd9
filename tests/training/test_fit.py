"""Training is the same however often it was interrupted, and keeps the last good state."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from spectrim.data.images import ImageSplit
from spectrim.errors import UserError
from spectrim.training.fit import Callbacks, Training, fit
from spectrim.training.recipe import Recipe
from spectrim.training.saved_state import StateFile
from spectrim.training.train_batches import augment

RECIPE = Recipe(epochs=3, lr=0.05, batch_size=16, crop_padding=1, precision="float32", image_sizes=((0.3, 4),))


def images() -> ImageSplit:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (72, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSplit(pixels, torch.randint(4, (72,), generator=generator), (0.5,) * 3, (0.25,) * 3)


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Sequential(nn.Flatten(), nn.Dropout(dropout)),
        nn.Linear(24, 4),
    )


class Interrupted(Exception):
    """Stands for a kill."""


def stop_after(epoch: int) -> Callbacks:
    def after_epoch(done: int, model: nn.Module, optimizer: torch.optim.SGD) -> dict:
        if done == epoch:
            raise Interrupted
        return {}

    return Callbacks(after_epoch=after_epoch)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_resumed_training_ends_in_the_weights_of_an_unbroken_one(tmp_path: Path, dropout: float) -> None:
    unbroken, state = network(dropout), tmp_path / "state.safetensors"
    before = torch.get_rng_state()
    whole = fit(unbroken, images(), Training(RECIPE, 3))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(Interrupted):  # in epoch 2: two epochs are on disk
        fit(network(dropout), images(), Training(RECIPE, 3), stop_after(2), StateFile(state))
    resumed = network(dropout)
    resumed_curve = fit(resumed, images(), Training(RECIPE, 3), state=StateFile(state))
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [point["loss"] for point in resumed_curve] == [point["loss"] for point in whole]
    assert [point["side"] for point in whole] == [4, 8, 8]
    assert list(tmp_path.iterdir()) == [state]


def test_a_resumed_training_by_adamw_ends_in_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    recipe, state, calls = replace(RECIPE, optimizer="adamw", lr=0.01), tmp_path / "state.safetensors", 0

    def killed(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 11:  # in epoch 2 of five steps each
            raise Interrupted
        return F.cross_entropy(outputs, targets)

    unbroken, resumed = network(), network()
    fit(unbroken, images(), Training(recipe, 3))
    with pytest.raises(Interrupted):
        fit(network(), images(), Training(recipe, 3, killed), state=StateFile(state))
    curve = fit(resumed, images(), Training(recipe, 3), state=StateFile(state))
    assert len(curve) == 3
    for one, other in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    plain = network()
    fit(plain, images(), Training(RECIPE, 3))
    assert not torch.allclose(plain[0].weight, resumed[0].weight)


def test_a_method_that_selects_while_it_trains_refuses_adamw() -> None:
    with pytest.raises(UserError, match="recipe.optimizer=adamw: .* knows sgd alone"):
        fit(network(), images(), Training(replace(RECIPE, optimizer="adamw"), 3), stop_after(0))


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    first, second = network(), network()
    curve = fit(first, images(), Training(RECIPE, 0), state=StateFile(state))
    assert fit(second, images(), Training(RECIPE, 0), state=StateFile(state)) == curve
    assert torch.equal(first[0].weight, second[0].weight)


def test_the_seed_decides_the_batches() -> None:
    one, same, other = network(), network(), network()
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        fit(model, images(), Training(Recipe(1, precision="float32"), seed))
    assert torch.equal(one[0].weight, same[0].weight) and not torch.equal(one[0].weight, other[0].weight)


def test_training_lowers_the_loss() -> None:
    plain = Recipe(60, lr=0.1, batch_size=24, crop_padding=0, flip=False, precision="float32")
    curve = fit(network(), images(), Training(plain, 0))
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]


@pytest.mark.parametrize("other", [Training(RECIPE, 4), Training(Recipe(epochs=3, lr=0.06, batch_size=16), 3)])
def test_the_state_of_another_training_is_refused(tmp_path: Path, other: Training) -> None:
    state = tmp_path / "state.safetensors"
    fit(network(), images(), Training(RECIPE, 3), state=StateFile(state))
    before = state.read_bytes()
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        fit(network(), images(), other, state=StateFile(state))
    assert state.read_bytes() == before


def test_the_state_of_other_images_or_of_another_net_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    fit(network(), images(), Training(RECIPE, 3), state=StateFile(state))
    others = images()
    others.images[0] += 1
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        fit(network(), others, Training(RECIPE, 3), state=StateFile(state))
    wider = network()
    wider[5] = nn.Linear(24, 5)
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        fit(wider, images(), Training(RECIPE, 3), state=StateFile(state))


def test_a_state_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*: (Not a directory|File exists)"):
        fit(network(), images(), Training(RECIPE, 3), state=StateFile(tmp_path / "file" / "state.safetensors"))


def test_any_batches_that_have_a_length_will_do() -> None:
    batches = [(images().normalise(images().images[i : i + 24]), images().labels[i : i + 24]) for i in (0, 24, 48)]
    curve = fit(network(), batches, Training(Recipe(20, lr=0.1, precision="float32"), 0))
    assert curve[-1]["loss"] < curve[0]["loss"] and "side" not in curve[0]
    with pytest.raises(UserError, match="has no length"):
        fit(network(), (batch for batch in batches), Training(Recipe(1), 0))
    with pytest.raises(UserError, match="the train split is empty"):
        fit(network(), [], Training(Recipe(1), 0))


def test_a_state_cut_short_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    fit(network(), images(), Training(RECIPE, 0), state=StateFile(state))
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(UserError, match="truncated or not a training's state"):
        fit(network(), images(), Training(RECIPE, 0), state=StateFile(state))


def test_a_loss_that_stops_being_finite_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, good = tmp_path / "state.safetensors", tmp_path / "good.safetensors"
    with pytest.raises(Interrupted):
        fit(network(), images(), Training(RECIPE, 0), callbacks=stop_after(1), state=StateFile(good))
    usual = augment

    def broken_from_epoch_1(pixels: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
        pixels = usual(pixels, recipe, generator)
        return pixels * float("nan") if generator.initial_seed() >= 1 else pixels

    monkeypatch.setattr("spectrim.training.train_batches.augment", broken_from_epoch_1)
    with pytest.raises(FloatingPointError, match="became nan in epoch 1, step 0; lower lr"):
        fit(network(), images(), Training(RECIPE, 0), state=StateFile(state))
    kept, expected = (load_file(path) for path in (state, good))
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in kept)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=r"^seed=.* is not a whole number in 0\.\.4294967295$"):
        Training(RECIPE, seed)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_cannot_be_trained_is_one_line(optimizer: str, precision: str) -> None:
    recipe = Recipe(epochs=1, lr=0.1, optimizer=optimizer, precision=precision)
    words, classes = [(torch.randint(9, (4, 3)), torch.randint(2, (4,)))], nn.Linear(12, 2)
    for kind in (nn.Embedding, nn.EmbeddingBag):
        sparse = nn.Sequential(kind(9, 12, sparse=True), nn.Unflatten(-1, (12,)), nn.Linear(12, 2))
        with pytest.raises(
            UserError, match="^0 has sparse gradients, which no recipe takes; set model.0.sparse = False"
        ):
            fit(sparse, words, Training(recipe, 0))
    frozen = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), classes).requires_grad_(False)
    with pytest.raises(UserError, match="^the training loss has no gradient: all weights are frozen"):
        fit(frozen, words, Training(recipe, 0))
    with pytest.raises(UserError, match="^the training loss has no gradient"):
        fit(frozen.requires_grad_(), words, Training(recipe, 0, loss=lambda y, t: F.cross_entropy(y.detach(), t)))


def test_a_penalty_alone_trains_nothing() -> None:
    """It has a gradient whatever the loss has."""
    model, data = nn.Linear(4, 2), [(torch.randn(8, 4), torch.randint(2, (8,)))]
    penalised = Callbacks(penalties=lambda epoch: {"penalty": model.weight.square().sum()})
    recipe = Recipe(epochs=1, lr=0.1, precision="float32")
    counting = Training(recipe, 0, loss=lambda y, t: (y.argmax(1) != t).float().mean())
    with pytest.raises(UserError, match="^the training loss has no gradient"):
        fit(model, data, counting, penalised)
