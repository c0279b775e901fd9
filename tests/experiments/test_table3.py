"""Table 3 and Figure 7: perplexities on both corpora, what was published, and whether the aims are met."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from spectrim.records import records

Script = Callable[[str], ModuleType]
JOINT, WHITENED = (f"{name}, 90 % of the parameters" for name in ("joint, ours", "whitened SVD, uniform ratio"))


@pytest.fixture
def rows(built: Callable[[str], Path]) -> pd.DataFrame:
    return pd.read_csv(built("table3") / "tables" / "table3.csv")


@pytest.fixture
def drawn(built: Callable[[str], Path]) -> pd.DataFrame:
    return pd.read_csv(built("figure7") / "tables" / "figure7.csv")


def test_rows_are_dense_then_each_method_by_size_then_what_was_published(rows: pd.DataFrame) -> None:
    own = rows[rows["net"] == "smollm2, imdb_corpus"]
    sizes = ["90 % of the parameters", "80 % of the parameters"]
    assert own["method"].tolist() == [
        "dense",
        *(f"truncation, uniform ratio, {size}" for size in sizes),
        *(f"whitened SVD, uniform ratio, {size}" for size in sizes),
        "lossless, one-shot, gamma 0.008",
        "lossless, one-shot, gamma 0.3",
        "compact, one-shot, gamma 0.008",
        "compact, one-shot, gamma 0.3",
        "rank selection, ε 0.1",
        *(f"joint, ours, {size}" for size in sizes),
    ]
    assert own["n"].tolist() == ["1", "1 × 1", "1 × 1", *9 * ["1 × 3"]]
    assert own["macs_kept"].iloc[0] == 1 and own["macs_kept"].iloc[1:].between(0, 1).all()
    published = rows[rows["net"].str.contains("published")]
    assert published["method"].str.partition(",")[0].tolist() == 2 * ["original", "lossless (S1b)", "plain SVD"]
    assert published["test_accuracy"].tolist() == pytest.approx([0.8049, 0.8042, 0.7904, 0.8277, 0.8278, 0.8169])
    assert published["change_test_loss"].tolist()[1] == pytest.approx(-0.0001)


def test_joint_selections_of_another_expansion_stand_apart(rows: pd.DataFrame) -> None:
    own = rows.loc[rows["net"] == "minilm, imdb", "method"].str.extract(r"joint, ours(?:, (.*))?, (80 %)")[0]
    assert own.dropna().tolist() == ["embedding too", "refitted", "no first order", "interaction"]


def test_rows_with_the_embedding_among_the_layers_stand_apart_and_are_not_drawn(
    rows: pd.DataFrame, drawn: pd.DataFrame
) -> None:
    own = rows[rows["method"].str.contains("embedding too")]
    assert own["method"].str.partition(", 80 %")[0].iloc[[1, 3]].tolist() == [
        "whitened SVD, uniform ratio, embedding too",
        "joint, ours, embedding too",
    ]
    assert set(own["net"]) == {"minilm, imdb"} and set(own["n"]) == {"1 × 3"}
    assert not drawn["panel"].str.contains("embedding").any()


def test_perplexities_are_of_both_corpora_and_rise_by_what_the_loss_does(rows: pd.DataFrame) -> None:
    of = rows[rows["net"] == "smollm2, imdb_corpus"].set_index("method")
    assert of["perplexity"]["dense"] == pytest.approx(math.exp(4)) and math.isnan(of["rise"]["dense"])
    assert of["perplexity_sotu"]["dense"] == pytest.approx(math.exp(3.5))
    row = of.loc["joint, ours, 80 % of the parameters"]
    assert row["rise"] == pytest.approx(sum(100 * math.expm1(0.02 + 0.001 * draw) for draw in range(3)) / 3)
    assert row["rise_sotu"] == pytest.approx(sum(100 * math.expm1(0.04 + 0.002 * draw) for draw in range(3)) / 3)
    encoder = rows[rows["net"] == "minilm, imdb"]
    assert encoder["perplexity"].isna().all() and encoder["test_accuracy"].notna().all()


def test_claims_and_aims_are_judged(rows: pd.DataFrame, built: Callable[[str], Path]) -> None:
    text = (built("table3") / "tables" / "table3.md").read_text()
    assert "Data: imdb_corpus in blocks of 8 tokens (smollm2); predicted: test 24." in text
    assert "smollm2, imdb_corpus: S1b Table 5 (loss not above the original's at a drop of 20 %) holds:" in text
    assert "of whitened SVD at a uniform ratio, is met: 0.20, 0.19 on sotu (joint, ours)." in text
    aimed = ("−0.12", "joint, ours"), ("−0.04", "joint, ours, embedding too"), ("−0.10", "joint, ours, refitted")
    for change, name in aimed:
        assert f"minilm, imdb: the aim, within 0.2 pp of dense at 80 %, is met: {change} pp ({name})." in text
    verdicts = rows[rows["net"] == "smollm2, imdb_corpus"].set_index("method")["verdict"]
    assert verdicts["lossless, one-shot, gamma 0.008"] == "not comparable: nothing was factored"
    assert verdicts["lossless, one-shot, gamma 0.3"] == "holds"
    assert verdicts["compact, one-shot, gamma 0.3"] == "does not hold"


def test_the_figure_follows_every_kind_of_layer_over_the_blocks(drawn: pd.DataFrame) -> None:
    joint = drawn[drawn["panel"] == "smollm2, joint, ours, 80 %"]
    assert joint[["kind", "block"]].to_numpy().tolist() == [["q", 0], ["q", 1], ["down", 0], ["down", 1]]
    assert joint["kept"].tolist() == pytest.approx([0.8] * 4) and set(joint["n"]) == {"1 × 3"}
    assert not drawn["panel"].str.contains("90 %").any()
    dense = drawn[drawn["panel"] == "smollm2, lossless, gamma 0.008"]
    assert set(dense["rank"]) == {64} and set(dense["kept"]) == {1}
    assert set(drawn[drawn["panel"] == "minilm, joint, ours, 80 %"]["kind"]) == {"k", "down"}


def test_an_algorithm_without_a_gamma_says_so_beside_one_with_it(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for gamma in (None, 0.3):
        one = factory.make("smollm2", experiment="table3", settings={"gamma": gamma})
        one["layers"][0]["layer"] = "model.layers.0.self_attn.q_proj"
        records.write(tmp_path / "records", one)
    for name in ("table3", "figure7"):
        assert script(name).main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "tables" / "table3.csv")
    said = rows.loc[rows["method"].str.startswith("lossless, one-shot"), "method"].tolist()
    assert said == ["lossless, one-shot, gamma 0.3, draws: 1", "lossless, one-shot, no gamma, draws: 1"]
    drawn = pd.read_csv(tmp_path / "tables" / "figure7.csv")
    assert drawn["panel"].tolist() == ["smollm2, lossless, gamma 0.3", "smollm2, lossless, no gamma"]


def test_two_settings_are_not_averaged(
    script: Script, factory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epsilon in (0.1, 0.1000001):
        one = factory.make("smollm2", "rank_selection", experiment="table3", settings={"epsilon": epsilon})
        records.write(tmp_path / "records", one)
    assert script("table3").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 1
    assert "2 settings of rank selection, ε 0.1 of smollm2 on cifar10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rival", "draws", "verdict"),
    [
        (
            0.08,
            3,
            "is ahead of knapsack (BALF), pivoted: −0.0800 nats, standard error 0.0003, 3 calibration draws; on ",
        ),
        (
            0.0,
            3,
            "is level with knapsack (BALF), pivoted: 0.0000 nats, standard error 0.0003, 3 calibration draws; on ",
        ),
        (
            -0.01,
            1,
            "is behind knapsack (BALF), pivoted: +0.0100 nats, one calibration draw, so without a standard error; on ",
        ),
    ],
)
def test_pivoted_selections_are_judged_by_the_aim_and_beside_rivals_of_the_same_form(
    script: Script, factory: ModuleType, tmp_path: Path, rival: float, draws: int, verdict: str
) -> None:
    forms = {"joint": "TwoSidedSVD", "knapsack": "WhitenedSVD", "truncation": "WhitenedSVD"}
    for draw in range(draws):
        for algorithm, base in forms.items():
            beside = {"joint": 0.02, "knapsack": 0.02 + rival + 0.0005 * (draw - 1) * (draws > 1), "truncation": 0.5}
            one = factory.make(
                "smollm2", algorithm, experiment="table3", change=beside[algorithm], kept=0.8, calibration_seed=draw,
                settings={"params_kept": 0.8, "ratio": None} if algorithm == "truncation" else {"params_kept": 0.8},
            )  # fmt: skip
            one["config"]["decomposer"] = {"_class_": "BestView", "base": {"_class_": base, "factors": "pivoted"}}
            for net in ("dense", "compressed"):
                one[net]["test"] |= {"loss": 4.0 + (net == "compressed") * beside[algorithm], "accuracy": None}
                one[net]["also"] = {"sotu": {"loss": 3.5 + 2 * (net == "compressed"), "accuracy": None, "n": 24}}
            records.write(tmp_path / "records", one | {"signature": records.signature(one["config"])})
    assert script("table3").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "tables" / "table3.md").read_text()
    ours = "joint, ours, both sides whitened, pivoted"
    assert f"smollm2, cifar10 at 80 %: {ours}, {verdict}" in text
    assert f"smollm2, cifar10 at 80 %: {ours}, is ahead of whitened SVD, uniform ratio, pivoted: −0.4800 nats" in text
    assert "the aim at 80 %, perplexities of at most 62.0 and 45.0, is not met: 55.7 and 244.7 (" in text
    few = "" if draws == 3 else ", draws: 1"
    for method in (ours, "knapsack (BALF), pivoted", "whitened SVD, uniform ratio, pivoted"):
        assert f" {method}, 80 % of the parameters{few} " in text


def test_a_selection_whitened_on_one_side_is_not_called_two_sided(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    """With pivoted factors it has a row of its own, and so has each kind of refit."""
    for refit, refit_by in ((0, "loss"), (250, "loss"), (250, "outputs")):
        settings = {"params_kept": 0.8, "refit": refit, "refit_by": refit_by}
        one = factory.make("minilm", "joint", experiment="table3", kept=0.8, settings=settings)
        one["config"]["decomposer"] = {"_class_": "WhitenedSVD", "embeddings": True, "factors": "pivoted"}
        records.write(tmp_path / "records", one | {"signature": records.signature(one["config"])})
    assert script("table3").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    found = pd.read_csv(tmp_path / "tables" / "table3.csv")["method"].str.partition(", embedding too, 80 %")[0]
    assert found.iloc[1:4].tolist() == [
        "joint, ours, pivoted",
        "joint, ours, pivoted, refitted",
        "joint, ours, pivoted, refitted, by the loss",
    ]


def test_a_selection_on_own_text_too_is_compared_with_the_one_without(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for draw, blocks in product(range(3), (0, 64)):
        settings = {"params_kept": 0.8}
        one = factory.make("smollm2", "joint", experiment="table3", kept=0.8, calibration_seed=draw, settings=settings)
        one["config"]["decomposer"] = {"_class_": "BestView", "base": {"_class_": "TwoSidedSVD", "factors": "pivoted"}}
        one["config"]["data"] |= {"own_text": blocks} if blocks else {}
        for net in ("dense", "compressed"):
            one[net]["test"] |= {"loss": 4.0 + 0.01 * (net == "compressed"), "accuracy": None}
            change = (net == "compressed") * (0.2 - 0.1 * bool(blocks) + 0.001 * draw)
            one[net]["also"] = {"sotu": {"loss": 3.5 + change, "accuracy": None, "n": 24}}
        records.write(tmp_path / "records", one | {"signature": records.signature(one["config"])})
    assert script("table3").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "tables" / "table3.md").read_text()
    without, own = (f"joint, ours, both sides whitened, {more}pivoted" for more in ("", "own text too, "))
    assert f"smollm2, cifar10 at 80 %: {own}, is level with {without}: 0.0000 nats" in text
    assert "; on sotu it is ahead of the rival: −0.1000 nats, standard error 0.0000, 3 calibration draws" in text
    assert text.index(f" {without}, 80 %") < text.index(f" {own}, 80 %")
    assert text.count("the aim at 80 %, perplexities of at most") == 2


def test_figure8_draws_the_perplexities_of_decoders_on_both_corpora(
    run: Callable[..., Any], recorded: Path, tmp_path: Path
) -> None:
    canvas = run("figure8", recorded, tmp_path)["figure8"]
    run("table3", recorded, tmp_path)
    assert [axis.get_title() for axis in canvas.axes] == ["smollm2, imdb_corpus", "smollm2, sotu"]
    assert all(axis.get_yscale() == "log" for axis in canvas.axes)
    table3, rows = (pd.read_csv(tmp_path / "tables" / f"{name}.csv") for name in ("table3", "figure8"))
    of = table3[table3["net"] == "smollm2, imdb_corpus"].set_index("method")
    for panel, column in (("smollm2, imdb_corpus", "perplexity"), ("smollm2, sotu", "perplexity_sotu")):
        own = rows[rows["panel"] == panel].set_index("method")["perplexity"]
        assert own.to_dict() == pytest.approx(of[column][own.index].to_dict()) and own.index[0] == "dense"
        assert {name.partition(", ")[0] for name in own.index} == {"dense", "whitened SVD", "joint"}
    dense, ours, rival = (of["perplexity"][name] for name in ("dense", JOINT, WHITENED))
    said = canvas.get_suptitle().replace("\n", " ").replace("\u00a0", " ")
    assert said.endswith(f"{ours:.1f} by joint selection, {rival:.1f} by its best rival here, {dense:.1f} dense")


def test_figure9_follows_the_perplexity_over_the_text_on_both_corpora(
    run: Callable[..., Any], dosed: Path, tmp_path: Path
) -> None:
    canvas = run("figure9", dosed, tmp_path)["figure9"]
    rows = pd.read_csv(tmp_path / "tables" / "figure9.csv")
    assert [axis.get_title() for axis in canvas.axes] == ["smollm2, imdb_corpus", "smollm2, sotu"]
    of = rows[(rows["panel"] == "smollm2, imdb_corpus") & (rows["requested"] == 0.8)].set_index(["text", "tokens"])
    for blocks, rise in ((16, 0.2), (64, 0.1), (256, 0.05)):
        expected = sum(math.exp(4 + rise + 0.001 * draw) for draw in range(3)) / 3
        assert of["perplexity"]["of the corpus", 256 * blocks] == pytest.approx(expected)
    assert of["perplexity"]["own text too", 256 * 128] == pytest.approx(of["perplexity"]["of the corpus", 256 * 64])
    said = canvas.get_suptitle().replace("\n", " ").replace("\u00a0", " ")
    assert said.startswith("From 4 to 66 thousand tokens, the perplexity at 80 % goes from 66.8 to 57.5 on imdb_corpus")


def test_table3_compares_the_amounts_of_text(run: Callable[..., Any], dosed: Path, tmp_path: Path) -> None:
    run("table3", dosed, tmp_path)
    text = (tmp_path / "tables" / "table3.md").read_text()
    ours = "joint, ours, both sides whitened, {}pivoted"
    for more, verdict in (("a quarter of the text, ", "is behind"), ("four times the text, ", "is ahead of")):
        assert f"smollm2, imdb_corpus at 80 %: {ours.format(more)}, {verdict} {ours.format('')}: " in text
