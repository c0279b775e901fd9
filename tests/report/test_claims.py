"""Claims of the papers: judged by loss and by size together, on our own nets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from spectrim.report import claims, compare
from spectrim.report.claims import Claim, judge, lossless_claim

PUBLISHED = Path(__file__).parents[2] / "experiments" / "published.csv"
Rows = Callable[..., Any]


def rows(*given: tuple[float, float], model: str = "resnet20", data: str = "cifar10") -> pd.DataFrame:
    """Return rows from pairs of params kept and mean change of the test loss."""
    return pd.DataFrame(
        [
            {
                "model": model,
                "network": model,
                "data": data,
                "method": f"row {index}",
                "params_kept": kept,
                "change_test_loss": change,
                "test_loss": 1.247 + change,
                "test_accuracy": 0.6925,
            }
            for index, (kept, change) in enumerate(given)
        ],
        columns=["model", "network", "data", "method", "params_kept", "change_test_loss", "test_loss", "test_accuracy"],
    )


@pytest.fixture
def resnet18() -> Claim:
    (found,) = (one for one in claims.claims(compare.read_published(PUBLISHED)) if one.name == "s1b-table4-resnet18")
    return found


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ([(0.3, -0.01)], "holds"),
        ([(0.5, 0.0)], "holds"),
        ([(0.3, 0.01)], "does not hold"),
        ([(0.9, -0.01)], "does not hold"),  # better, but not small enough
        ([(0.9, -0.01), (0.3, 0.01)], "does not hold"),  # one better and one small, no row both
        ([(1.0, 0.0)], "does not hold"),  # nothing was factored
        ([], "not comparable"),
    ],
)
def test_a_claim_needs_one_row_that_is_small_and_no_worse(given: list[tuple[float, float]], word: str) -> None:
    assert lossless_claim(rows(*given), 0.5).word == word


def test_a_claim_that_fails_says_how_far_ours_goes() -> None:
    why = lossless_claim(rows((0.9, -0.01), (0.3, 0.02)), 0.5).why
    assert "+0.0200 at 70.0 % (row 1)" in why and "−0.0100 at 10.0 % (row 0)" in why


def test_a_claim_carries_its_numbers_and_its_words(resnet18: Claim) -> None:
    assert resnet18.source == "S1b Table 4"
    assert resnet18.change == pytest.approx(1.245241 - 1.247314)
    assert resnet18.drop == 0.62
    assert resnet18.said == "ResNet-18, ImageNet: loss 1.2473 → 1.2452 (−0.0021) at a drop of 62 %"


def test_another_net_is_held_to_the_claim_alone(resnet18: Claim) -> None:
    dense = rows((1.0, 0.0)).assign(test_loss=0.3, test_accuracy=0.91)
    assert judge(resnet18, rows((0.3, -0.01)), dense).word == "holds"


def test_the_same_net_is_held_to_the_numbers(resnet18: Claim) -> None:
    def same(*given: tuple[float, float]) -> pd.DataFrame:
        return rows(*given, model="resnet18", data="image_folder")

    dense = same((1.0, 0.0)).assign(test_accuracy=0.6976)
    assert judge(resnet18, same((0.38, -0.002)), dense).word == "holds"
    worse = judge(resnet18, same((0.38, -0.1)), dense)
    assert worse.word == "does not hold" and worse.why.startswith("compressed loss")
    assert judge(resnet18, same((0.38, -0.002)), dense.assign(test_loss=1.5)).why.startswith("original loss")


def test_what_is_no_claim_about_a_compressed_net_is_not_judged() -> None:
    (search,) = claims.claims(compare.read_published(PUBLISHED), ["Table 6"])
    assert judge(search, rows((0.3, -0.1)), rows((1.0, 0.0))).word == "not comparable"
    assert search.said == "selection minutes 8.287, svd search minutes 314.985"
