"""Two records side by side: only what differs."""

from pathlib import Path

import pytest

from spectrim.cli.differences import differences, found
from spectrim.errors import UserError


def test_only_what_differs_is_named_with_its_place() -> None:
    first = {"seed": 0, "config": {"algorithm": {"ratio": 0.2, "x": None}}, "layers": [{"layer": "fc", "rank": 3}]}
    second = {"seed": 0, "config": {"algorithm": {"ratio": 0.4}}, "layers": [{"layer": "fc", "rank": 5}]}
    assert differences(first, first) == []
    assert differences(first, second) == [
        ("config.algorithm.ratio", "0.2", "0.4"),
        ("config.algorithm.x", "null", "-"),
        ("layers[fc].rank", "3", "5"),
    ]


def test_a_long_log_is_one_line() -> None:
    log = [{"step": step, "loss": 0.5} for step in range(100)]
    assert differences({"log": log}, {"log": log[:-1]}) == [("log", "100 entries", "99 entries")]
    ((_, text, _),) = differences({"notes": "x" * 100}, {"notes": ""})
    assert text == '"' + "x" * 59 + "…"


def test_a_record_is_found_by_its_file_or_by_the_begin_of_its_signature(tmp_path: Path) -> None:
    for name in ("abc1.json", "abc2.json", "abd1.failed.json"):
        (tmp_path / name).touch()
    assert found(str(tmp_path / "abc1.json"), Path("nowhere")) == tmp_path / "abc1.json"
    assert found("abc2", tmp_path) == tmp_path / "abc2.json"
    with pytest.raises(UserError, match="^abc is no file; below .* it may be .*abc1.json, .*abc2.json$"):
        found("abc", tmp_path)
    with pytest.raises(UserError, match="^abd is no file; below .* no signature begins so$"):
        found("abd", tmp_path)
