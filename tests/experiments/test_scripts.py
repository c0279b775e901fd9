"""Every script: from records to files, the same each time, and one clear line where it cannot."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from spectrim.records import records

ROOT = Path(__file__).parents[2]
TABLES, FIGURES = (1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 4, 5, 6, 7, 8)
NAMES = (*(f"table{number}" for number in TABLES), *(f"figure{number}" for number in FIGURES))
Script = Callable[[str], ModuleType]


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return ["--records", str(folder), "--out", str(out), *more]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_writes_its_files_with_provenance_and_the_same_twice(
    name: str, script: Script, built: Callable[[str], Path], recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = built(name)
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert out / "tables" / f"{name}.csv" in first
    if name.startswith("figure"):
        assert {out / "figures" / f"{name}.{kind}" for kind in ("png", "svg", "provenance.json")} <= set(first)
    _names_command_and_every_record(out / "tables" / f"{name}.provenance.json", name, recorded)
    capsys.readouterr()
    assert script(name).main(arguments(recorded, out)) == 0
    said = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(said) == sorted(first) and {path: path.read_bytes() for path in said} == first


def _names_command_and_every_record(provenance: Path, name: str, recorded: Path) -> None:
    found = json.loads(provenance.read_text())
    assert found["command"].startswith(f"python experiments/{name}.py --records")
    assert found["runs"]["count"] == len(found["records"]) > 0
    assert found["runs"]["data_digests"] == ["data"] and found["runs"]["machines"] == [{"cores": 2}]
    for run, digest in found["records"].items():
        assert records.digest(records.read(recorded / f"{run}.json")) == digest


@pytest.mark.parametrize("dirty", [False, True])
def test_the_provenance_tells_of_runs_of_uncommitted_code(
    dirty: bool, script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for seed in (0, 1):
        one = factory.make(seed=seed)
        one["provenance"] = one["provenance"] | {"dirty": dirty and seed == 1}
        records.write(tmp_path / "records", one)
    assert script("table2").main(arguments(tmp_path / "records", tmp_path)) == 0
    provenance = json.loads((tmp_path / "tables" / "table2.provenance.json").read_text())
    assert provenance["runs"]["dirty"] is dirty


@pytest.mark.parametrize("name", NAMES)
def test_without_records_a_script_names_the_command_that_makes_them(
    name: str, script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(name).main(arguments(tmp_path / "none", tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert f"make reproduce-{name}" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_records_of_another_kind_are_a_clear_error(
    name: str, script: Script, factory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    algorithm = "truncation" if name in ("table7", "table8") else "probe"
    for experiment in {one["experiment"] for one in factory.everything()}:
        records.write(tmp_path / "records", factory.make(algorithm=algorithm, experiment=experiment))
    assert script(name).main(arguments(tmp_path / "records", tmp_path / "out")) == 1
    assert "hold no run of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["table7", "figure3"])
def test_a_script_runs_as_it_is_typed_and_without_torch(name: str, recorded: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}.py', *{arguments(recorded, tmp_path, '--index', 'none.csv')!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'experiments' / f'{name}.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    sys.exit(end.code or int('torch' in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["table2", "figure1", "figure2", "figure3"])
def test_a_model_without_records_is_left_out_and_named(
    name: str, script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    kept = [one for one in factory.everything() if one["names"]["model"] == "densenet22"]
    for one in kept:
        records.write(tmp_path / "records", one)
    assert script(name).main(arguments(tmp_path / "records", tmp_path)) == 0
    text = (tmp_path / "tables" / f"{name}.md").read_text()
    assert "There are no records of:" in text and "vgg" in text.splitlines()[-1]


def test_a_rerun_is_compared_with_the_committed_records(
    script: Script, factory: ModuleType, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in factory.table2():
        if one["names"]["model"] == "vgg19_half":
            one["compressed"]["test"]["loss"] += 1
        records.write(tmp_path / "fresh", one)
    against = ["--against", str(recorded)]
    assert script("table2").main(arguments(recorded, tmp_path, *against)) == 0
    assert "0 differences" in capsys.readouterr().out
    assert script("table2").main(arguments(tmp_path / "fresh", tmp_path, *against)) == 1
    lines = capsys.readouterr().out.splitlines()
    beyond = [line for line in lines if "test_loss: committed" in line]
    assert beyond and all(line.startswith("vgg19_half") for line in beyond)
    assert f"{len(beyond)} differences" in lines[-1]


def test_nothing_to_compare_with_is_an_error_once_the_table_is_written(
    script: Script, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(recorded, tmp_path / "out", "--against", str(tmp_path / "none"))
    assert script("table2").main(given) == 1
    assert "nothing was compared" in capsys.readouterr().err
    assert (tmp_path / "out" / "tables" / "table2.csv").is_file()


@pytest.mark.parametrize(
    ("experiment", "file"), [("smoke", "smoke-table2.md"), ("imagenet/table2", "imagenet-table2.md")]
)
def test_the_records_of_another_experiment_make_files_of_their_own(
    experiment: str, file: str, script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for one in factory.table2(["mlp"]):
        records.write(tmp_path / "records", one | {"experiment": experiment})
    assert script("table2").main(arguments(tmp_path / "records", tmp_path, "--experiment", experiment)) == 0
    assert (tmp_path / "tables" / file).is_file()
