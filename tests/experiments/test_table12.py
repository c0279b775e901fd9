"""Table 12: the paired change over images, agreement elsewhere, and how far each algorithm gets."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture
def rows(built: Callable[[str], Path]) -> pd.DataFrame:
    return pd.read_csv(built("table12") / "tables" / "table12.csv").set_index("method")


def test_the_error_is_that_of_the_mean_over_images(rows: pd.DataFrame) -> None:
    """Of 20 differences, 19 are equal and one is 0.2 higher: its deviation is 0.2 / √20, that of the mean 0.01."""
    assert rows["error"].iloc[1:].tolist() == pytest.approx([0.01] * 5)
    assert rows.loc["lossless, one-shot, gamma 0.9", "lowered"] == 19
    assert rows.loc[rows["variant"].str.startswith("truncation"), "lowered"].item() == 0
    assert pd.isna(rows.loc["dense", ["error", "lowered", "divergence", "same_answer"]]).all()


def test_agreement_is_that_of_the_records(rows: pd.DataFrame) -> None:
    assert rows["divergence"].iloc[1:].tolist() == pytest.approx((1 - rows["params_kept"].iloc[1:]).tolist())
    assert rows["same_answer"].iloc[1:].tolist() == pytest.approx(rows["params_kept"].iloc[1:].tolist())


def test_verdicts_are_those_of_the_mean_change(rows: pd.DataFrame) -> None:
    judged = rows.drop("dense")
    assert ((judged["change_test_loss"] <= 0) == (judged["verdict"] == "holds")).all()


def test_how_far_each_algorithm_gets(built: Callable[[str], Path]) -> None:
    reach = pd.read_csv(built("table12") / "tables" / "table12_reach.csv").set_index("selector")
    assert reach.index.tolist() == ["lossless, one-shot", "compact, verified", "uniform truncation", "joint, ours"]
    one_shot = reach.loc["lossless, one-shot"]
    assert one_shot["lowest"] == "+2.0000 ± 0.0100 at a drop of 60.0 % (lossless, one-shot, gamma 0.4)"
    assert one_shot["furthest"] == "−0.0500 ± 0.0100 at a drop of 10.0 % (lossless, one-shot, gamma 0.9)"
    assert reach.loc["compact, verified", "lowest"] == "none"
    assert reach.loc["joint, ours", "lowest"].startswith("+0.5000 ± 0.0100 at a drop of 56.0 %")
    assert reach.loc["joint, ours", "furthest"] == "none"


def test_each_network_has_an_excerpt(built: Callable[[str], Path]) -> None:
    text = (built("table12") / "tables" / "table12_paper_resnet50.md").read_text()
    assert text.startswith("**resnet50: ImageNet weights") and "joint" in text
