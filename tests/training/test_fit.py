"""Training is the same however often it was interrupted, and keeps the last good state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spectrim.data.images import ImageSplit
from spectrim.errors import UserError
from spectrim.tools import safetensors_stream
from spectrim.training import saved_state
from spectrim.training.fit import Recipe, augment, fit

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


def stop_after(epoch: int) -> Any:
    def after_epoch(done: int, model: nn.Module, optimizer: torch.optim.SGD) -> dict:
        if done == epoch:
            raise Interrupted
        return {}

    return after_epoch


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_resumed_training_ends_in_the_weights_of_an_unbroken_one(tmp_path: Path, dropout: float) -> None:
    unbroken, state = network(dropout), tmp_path / "state.safetensors"
    before = torch.get_rng_state()
    whole = fit(unbroken, images(), RECIPE, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(Interrupted):  # in epoch 2: two epochs are on disk
        fit(network(dropout), images(), RECIPE, seed=3, state=state, after_epoch=stop_after(2))
    resumed = network(dropout)
    resumed_curve = fit(resumed, images(), RECIPE, seed=3, state=state)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [point["loss"] for point in resumed_curve] == [point["loss"] for point in whole]
    assert [point["side"] for point in whole] == [4, 8, 8]
    assert list(tmp_path.iterdir()) == [state]


def test_a_state_is_read_into_memory_of_its_own(tmp_path: Path) -> None:
    """A tensor in a mapped file lies wherever the one before it ends, and kernels round otherwise on such memory."""
    path = tmp_path / "state.safetensors"
    safetensors_stream.save(
        path, {name: torch.ones(size) for name, size in (("a", 3), ("b", 5), ("c", 7))}, {"run": "r"}
    )
    assert all(value.data_ptr() % 64 == 0 for value in saved_state.read(path, "r")[0].values())


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    first, second = network(), network()
    curve = fit(first, images(), RECIPE, seed=0, state=state)
    assert fit(second, images(), RECIPE, seed=0, state=state) == curve
    assert torch.equal(first[0].weight, second[0].weight)


def test_the_seed_decides_the_batches() -> None:
    one, same, other = network(), network(), network()
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        fit(model, images(), Recipe(1, precision="float32"), seed=seed)
    assert torch.equal(one[0].weight, same[0].weight) and not torch.equal(one[0].weight, other[0].weight)


def test_training_lowers_the_loss() -> None:
    plain = Recipe(60, lr=0.1, batch_size=24, crop_padding=0, flip=False, precision="float32")
    curve = fit(network(), images(), plain, seed=0)
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]


@pytest.mark.parametrize("changed", [{"seed": 4}, {"recipe": Recipe(epochs=3, lr=0.06, batch_size=16)}])
def test_the_state_of_another_training_is_refused(tmp_path: Path, changed: dict) -> None:
    state = tmp_path / "state.safetensors"
    fit(network(), images(), RECIPE, seed=3, state=state)
    before = state.read_bytes()
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        fit(network(), images(), **({"recipe": RECIPE, "seed": 3, "state": state} | changed))
    assert state.read_bytes() == before


def test_the_state_of_other_images_or_of_another_net_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    fit(network(), images(), RECIPE, seed=3, state=state)
    others = images()
    others.images[0] += 1
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        fit(network(), others, RECIPE, seed=3, state=state)
    wider = network()
    wider[5] = nn.Linear(24, 5)
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        fit(wider, images(), RECIPE, seed=3, state=state)


def test_a_state_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*: Not a directory"):
        fit(network(), images(), RECIPE, seed=3, state=tmp_path / "file" / "state.safetensors")


def test_any_batches_that_have_a_length_will_do() -> None:
    batches = [(images().normalise(images().images[i : i + 24]), images().labels[i : i + 24]) for i in (0, 24, 48)]
    curve = fit(network(), batches, Recipe(20, lr=0.1, precision="float32"), seed=0)
    assert curve[-1]["loss"] < curve[0]["loss"] and "side" not in curve[0]
    with pytest.raises(UserError, match="has no length"):
        fit(network(), (batch for batch in batches), Recipe(1), seed=0)
    with pytest.raises(UserError, match="the train set is empty"):
        fit(network(), [], Recipe(1), seed=0)


def test_a_state_cut_short_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    fit(network(), images(), RECIPE, seed=0, state=state)
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(UserError, match="cut short or not a training's state"):
        fit(network(), images(), RECIPE, seed=0, state=state)


def test_a_loss_that_stops_being_finite_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, good = tmp_path / "state.safetensors", tmp_path / "good.safetensors"
    with pytest.raises(Interrupted):
        fit(network(), images(), RECIPE, seed=0, state=good, after_epoch=stop_after(1))
    usual = augment

    def broken_from_epoch_1(pixels: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
        pixels = usual(pixels, recipe, generator)
        return pixels * float("nan") if generator.initial_seed() >= 1 else pixels

    monkeypatch.setattr("spectrim.training.fit.augment", broken_from_epoch_1)
    with pytest.raises(FloatingPointError, match="became nan in epoch 1, step 0; lower lr"):
        fit(network(), images(), RECIPE, seed=0, state=state)
    kept, expected = (load_file(path) for path in (state, good))
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in kept)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    recipe = Recipe(epochs=10, lr=0.4, warmup=0.25)
    assert recipe.learning_rate(0) == pytest.approx(0.04)
    assert recipe.learning_rate(0.25) == pytest.approx(0.4)
    assert recipe.learning_rate(0.625) == pytest.approx(0.2)
    assert recipe.learning_rate(1) == 0
    assert Recipe(epochs=10, lr=0.4, warmup=0).learning_rate(0) == 0.4


def test_early_epochs_see_smaller_images() -> None:
    recipe = Recipe(epochs=10, image_sizes=((0.3, 16), (0.3, 24)))
    assert [recipe.image_size(epoch, 32) for epoch in range(10)] == [16] * 3 + [24] * 3 + [32] * 4


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"epochs": True},
        {"epochs": 1.5},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"momentum": -1.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"label_smoothing": 2.0},
        {"crop_padding": -1},
        {"image_sizes": [[0.3, 0]]},
        {"lr": "high"},
        {"warmup": 1.0},
        {"image_sizes": [0.3, 16]},
        {"image_sizes": [[0.3]]},
        {"precision": "float8"},
    ],
)
def test_a_recipe_that_cannot_work_is_refused(bad: dict) -> None:
    with pytest.raises(UserError):
        Recipe(**({"epochs": 1} | bad))


def test_augmentation_moves_and_mirrors_but_invents_nothing() -> None:
    pixels = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, -1, -1, -1)
    recipe, generator = Recipe(1, crop_padding=2), torch.Generator().manual_seed(0)
    changed = augment(pixels, recipe, generator)
    assert changed.shape == pixels.shape and changed.dtype == torch.uint8
    padded = nn.functional.pad(pixels[0, 0], (2,) * 4)
    windows = {tuple(w.flatten().tolist()) for image in (padded, padded.flip(1)) for w in every_window(image, 8)}
    assert {tuple(image.flatten().tolist()) for image in changed} <= windows
    assert torch.equal(augment(pixels, Recipe(1, crop_padding=0, flip=False), generator), pixels)


def every_window(image: Tensor, side: int) -> list[Tensor]:
    return [*image.unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side, side)]
