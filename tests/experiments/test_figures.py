"""Figures 1-3: the tables of what they show carry the verdict on S1's claim."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from spectrim.records import records

Script = Callable[[str], ModuleType]


def notes(script: Script, name: str, folder: Path, out: Path) -> str:
    assert script(name).main(["--records", str(folder), "--out", str(out)]) == 0
    return (out / "tables" / f"{name}.md").read_text()


def test_figure1_holds_each_selector_against_truncation_of_the_nearest_size(
    script: Script, recorded: Path, tmp_path: Path
) -> None:
    text = notes(script, "figure1", recorded, tmp_path)
    assert "vgg19_half: S1 Figure 1 (loss below that of truncation, at the nearest size run) holds for 3 of 4" in text
    assert "lossless, one-shot +0.342 (80 against 75 % kept)" in text


@pytest.mark.parametrize(("bump", "word"), [(0.0, "does not hold"), (1.0, "holds")])
def test_figure2_asks_whether_the_lowest_error_is_the_lowest_loss(
    bump: float, word: str, script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for ratio in (0.4, 0.6, 0.8, 0.95):
        change = 1 - ratio + (bump if ratio == 0.95 else 0)
        one = factory.make("vgg11", "truncation", experiment="figure2", kept=ratio, change=change, error=1 - ratio)
        records.write(tmp_path / "records", one)
    text = notes(script, "figure2", tmp_path / "records", tmp_path)
    assert f"(the lowest error is not the lowest loss) {word}: error lowest at truncation, ratio 0.95" in text


def test_figure3_says_how_many_selectors_lie_below_the_original(script: Script, recorded: Path, tmp_path: Path) -> None:
    text = notes(script, "figure3", recorded, tmp_path)
    assert "densenet22: S1 Figure 3 (loss below the original's under 0 < rank < break-even) holds for 2 of 4" in text
    assert "truncation is below the original at 0 of 9 ranks" in text


def test_figure3_without_the_runs_of_table2_draws_the_sweep_alone(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for one in factory.figure("figure3", (0.2, 0.5, 0.8), ["densenet22"]):
        records.write(tmp_path / "records", one)
    text = notes(script, "figure3", tmp_path / "records", tmp_path)
    assert "not comparable: no lossless or compact run" in text
