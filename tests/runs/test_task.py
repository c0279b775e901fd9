"""Other data whose test split is measured beside: in the record, and in nothing that an algorithm sees."""

from typing import Any

import pytest

from spectrim.cli import run
from spectrim.errors import UserError
from spectrim.runs import task

TRUNCATION, JOINT = "algorithm=truncation", "algorithm=joint"


def test_the_test_split_of_other_data_is_measured_too(compose: Any, digits: list[str]) -> None:
    task._cached.cache_clear()  # what another test has measured of the same net need not be read again
    alone = run.run(compose(*digits, TRUNCATION))
    both = run.run(compose(*digits, TRUNCATION, "+data@also.again=digits", "+data@also.more=digits"))
    for net in ("dense", "compressed"):
        assert both[net]["also"] == {name: alone[net]["test"] for name in ("again", "more")}
        assert both[net] | {"also": None} == alone[net] | {"also": None}
    assert "also" not in alone["config"] and "also" not in alone["dense"]
    assert both["config"]["also"]["more"]["_class_"] == "Digits"
    assert both["signature"] != alone["signature"]
    assert both["plan"] == alone["plan"] and both["samples_read"] == alone["samples_read"]
    assert both["provenance"]["data_digest"] != alone["provenance"]["data_digest"]
    assert "also measured: again; also measured: more" in both["notes"][0]


@pytest.mark.parametrize("given", ["also=3", "+also.x=3", "+also.x.y=3", "agreement=3", "+agreement.x=3"])
def test_what_is_no_data_set_is_said_in_one_line(compose: Any, digits: list[str], given: str) -> None:
    with pytest.raises(UserError, match="is no data set; name one as") as refusal:
        run.run(compose(*digits, TRUNCATION, given))
    assert "\n" not in str(refusal.value)


def test_a_record_holds_the_samples_that_its_selection_reads_alone(compose: Any, digits: list[str]) -> None:
    """Neither what ran before in the process nor its order changes the number, which Tables 1 and 6 print."""
    settings = {
        "joint": [JOINT, "algorithm.params_kept=0.6"],
        "smaller": [JOINT, "algorithm.params_kept=0.5"],
        "sensitivity": ["algorithm=sensitivity"],
        "truncation": [TRUNCATION],
    }

    def recorded(names: list[str], folder: str) -> dict[str, Any]:
        common = [*digits, "decomposer=whitened_channel", f"name={folder}", "data.calibration_size=50"]
        runs = {name: run.run(compose(*common, *settings[name])) for name in names}
        return {name: (one["samples_read"], one["reporting"]["samples_read"]) for name, one in runs.items()}

    alone = {}
    for name in settings:
        task._cached.cache_clear()
        alone |= recorded([name], f"alone_{name}")
    task._cached.cache_clear()
    assert recorded(list(settings), "first") == alone
    assert recorded(list(settings)[::-1], "then") == alone
    assert alone["joint"] != alone["truncation"]


def test_a_run_is_compared_with_the_dense_model_sample_by_sample(compose: Any, digits: list[str]) -> None:
    alone = run.run(compose(*digits, TRUNCATION))
    found = run.run(compose(*digits, TRUNCATION, "paired=true", "+data@agreement.again=digits"))
    assert found["signature"] != alone["signature"]
    assert found["dense"] == alone["dense"] and found["compressed"] == alone["compressed"]
    assert "test_losses" not in alone and "agreement" not in alone and "paired" not in alone["config"]
    for net, losses in found["test_losses"].items():
        assert len(losses) == found[net]["test"]["n"]
        assert sum(losses) / len(losses) == pytest.approx(found[net]["test"]["loss"], rel=1e-5)
    (beside,) = found["agreement"].values()
    assert beside["divergence"] > 0 and 0 <= beside["same_answer"] < 1
    assert beside["n"] == found["dense"]["test"]["n"]
    dense = ["algorithm=lossless", "algorithm.gamma=1e-9"]  # no rank is so near
    kept = run.run(compose(*digits, *dense, "paired=true", "+data@agreement.again=digits"))
    assert kept["agreement"]["again"] == beside | {"divergence": 0, "same_answer": 1}


def test_paired_must_be_true_or_false(compose: Any, digits: list[str]) -> None:
    with pytest.raises(UserError, match="paired must be true or false, got 3"):
        run.run(compose(*digits, TRUNCATION, "paired=3"))
