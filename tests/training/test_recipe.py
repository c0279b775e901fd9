"""The schedule of a recipe, and the recipes that are refused."""

import pytest

from spectrim.errors import UserError
from spectrim.training.recipe import Recipe


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
        {"optimizer": "adam"},
    ],
)
def test_a_recipe_that_cannot_work_is_refused(bad: dict) -> None:
    with pytest.raises(UserError):
        Recipe(**({"epochs": 1} | bad))
