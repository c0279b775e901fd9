"""A search by optuna: trials are records, the best one is told, and the same command goes on."""

import re
from pathlib import Path
from typing import Any

import pytest

from spectrim.cli import run, search
from spectrim.errors import UserError


@pytest.fixture
def words(digits: list[str]) -> list[str]:
    return [*digits, "algorithm=truncation"]


def test_the_best_trial_is_told_and_the_same_command_runs_nothing_again(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*words, "algorithm.ratio=interval(0.2,0.9)", "--trials", "4"]
    assert search.main(asked) == 0
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"verification loss (\S+),", out)]
    *_, best = out.splitlines()
    assert len(losses) == 4 and len(list(tmp_path.glob("search/*.json"))) == 4
    tried = re.findall(r"(algorithm.ratio=\S+): ", out)[losses.index(min(losses))]
    assert best.startswith("best: spectrim name=search data=digits ") and best.endswith(f" returns=loss {tried}")
    monkeypatch.setattr(run, "_measured", pytest.fail)  # nothing is run again
    assert search.main(asked) == 0
    assert capsys.readouterr().out.splitlines()[-1] == best


def test_accuracy_is_maximised_over_choices(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main([*words, "algorithm.ratio=0.2,0.9", "--trials", "3", "--metric", "accuracy"]) == 0
    out = capsys.readouterr().out
    values = [float(value) for value in re.findall(r"verification accuracy (\S+),", out)]
    assert re.findall(r"best (\S+)$", out, re.MULTILINE)[-1] == f"{max(values):.4f}"


def test_a_trial_that_fails_is_left_out_and_all_of_them_are_an_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main([*words, "algorithm.ratio=0.5,2", "--trials", "6"]) == 0
    assert "ratio must lie in (0, 1], got 2" in capsys.readouterr().err
    assert search.main([*words, "algorithm.ratio=2,3", "--trials", "2"]) == 1
    assert "every trial failed, the last one so: ratio must lie in (0, 1]" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--trials", "0"), ("--trials", "-2"), ("--seed", "-1")])
def test_a_number_that_cannot_be_is_refused_in_one_line(
    words: list[str], option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main([*words, "algorithm.ratio=0.2,0.9", option, value]) == 1
    said = capsys.readouterr().err
    assert option in said and value in said and said.count("\n") == 1


def test_intervals_are_read_in_the_grammar_of_hydra() -> None:
    given = ["a=interval(0.1,0.9)", "b=int(interval(1,8))", "c=tag(log,interval(0.001,1.0))", "d=x,y", "e=3"]
    fixed, searched = search.space(given)
    assert fixed == ["e=3"]
    kinds = {key: type(one).__name__ for key, one in searched.items()}
    assert kinds["a"] == kinds["c"] == "FloatDistribution" and kinds["b"] == "IntDistribution"
    assert searched["c"].log and not searched["a"].log and searched["d"].choices == ("x", "y")


@pytest.mark.parametrize(
    ("given", "said"), [(["a=1"], "no setting is searched"), (["a=tag(log,interval(-1.0,1.0))"], "a=tag")]
)
def test_a_space_that_cannot_be_searched_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        search.space(given)


def test_a_job_returns_the_metric_of_the_verification_split(compose: Any, words: list[str]) -> None:
    record = run.run(compose(*words, "returns=loss"))
    assert run.returned(record, "loss") == record["verification"]["loss"] != record["compressed"]["test"]["loss"]
    assert record["verification"]["n"] == record["config"]["data"]["verification_size"]
    assert run.returned(record, None) is None


def test_a_record_without_the_metric_is_refused(compose: Any, words: list[str]) -> None:
    record = run.run(compose(*words))
    assert "verification" not in record
    with pytest.raises(UserError, match=r"was made without returns=loss; give the search a folder of its own by name="):
        run.returned(record, "loss")
    with pytest.raises(UserError, match="returns=f1 is not loss, accuracy or null"):
        run.run(compose(*words, "returns=f1"))
