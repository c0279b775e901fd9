"""The folder of a release: an index of what was found, and no release of nothing."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]


def test_the_index_lists_records_and_checkpoints_and_equal_results_give_equal_bytes(
    script: Script, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    for name in ("records/table2/a.json", "records/table2/.a.tracked", "checkpoints/net.safetensors"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(name)
    for out in ("first", "second"):
        assert script("release").main(["--results", str(results), "--out", str(tmp_path / out)]) == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert zipfile.ZipFile(tmp_path / "first" / "records.zip").namelist() == ["table2/a.json"]
    listed = json.loads(made.pop("release.json"))["files"]
    assert listed == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in made.items()
    }


def test_a_folder_without_results_is_refused(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert script("release").main(["--results", str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "neither records nor checkpoints in" in capsys.readouterr().err and not out.exists()
