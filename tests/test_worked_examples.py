"""The worked examples of the page on extensions, each at the path that it names: they run as a user would run them."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.initialize import initialize_config_dir
from safetensors.torch import save_file

import spectrim
from spectrim.cli import run, train
from spectrim.data.sources import Arrays
from spectrim.runs import configuration

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = {
    path: code
    for code in re.findall(r"^```(?:python|yaml)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for path in re.findall(r"^# ((?:src|conf|experiments)/[\w/]+\.\w+)", code, re.MULTILINE)
}

Composed = Callable[..., Any]


def imported(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of this name made of ``code``, as if it lay in its folder."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, own = name.rpartition(".")
    if parent:
        monkeypatch.setattr(import_module(parent), own, module, raising=False)
    exec(compile(code, name, "exec"), module.__dict__)
    return module


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Composed]:
    """``composed("algorithm=mine", …)``: the configuration, with the files of the page beside the committed ones."""
    from hydra import compose

    conf = tmp_path / "conf"
    shutil.copytree(configuration.CONF, conf)
    for path, code in FILES.items():
        if path.startswith("conf/"):
            assert not (tmp_path / path).exists()
            (tmp_path / path).write_text(code, encoding="utf-8")
        elif path.startswith("src/"):
            imported(path.removeprefix("src/").removesuffix(".py").replace("/", "."), code, monkeypatch)

    def made(*overrides: str, name: str = "config") -> Any:
        kept = [f"records={tmp_path}/records"] if name == "config" else []
        cfg = compose(name, overrides=[*overrides, *kept, f"unfinished={tmp_path}/state"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return cfg

    with initialize_config_dir(str(conf), version_base="1.3"):
        yield made
    HydraConfig.instance().cfg = None


def test_the_page_has_an_example_of_each_extension() -> None:
    python = {path for path in FILES if path.endswith(".py")}
    folders = ("algorithms", "decomposers", "models", "data")
    assert python == {*(f"src/spectrim/{folder}/mine.py" for folder in folders), "experiments/mine.py"}
    groups = ("algorithm", "decomposer", "model", "recipe", "data", "experiment")
    assert set(FILES) - python == {f"conf/{group}/mine.yaml" for group in groups}


@pytest.mark.parametrize("path", [path for path in FILES if path.endswith(".yaml")])
def test_an_example_keeps_the_rule_that_a_yaml_says_what_it_is(path: str) -> None:
    lines = FILES[path].splitlines()
    assert len(lines[lines[0].startswith("# @package")].split()) > 5


def test_the_algorithm_and_the_decomposer(composed: Composed, digits: list[str]) -> None:
    record = run.run(composed(*digits[:-2], "algorithm=mine", "algorithm.error=0.6", "decomposer=mine"))
    cut = [layer for layer in record["layers"] if layer["rank"] is not None]
    assert cut and all(layer["relative_error"] <= 0.6 for layer in cut)
    assert record["names"]["algorithm"] == record["names"]["decomposer"] == "mine"
    with pytest.raises(spectrim.UserError, match=r"error must lie in \(0, 1\), got 2"):
        run.run(composed(*digits[:-2], "algorithm=mine", "algorithm.error=2"))


def test_the_decomposer_takes_the_view_by_the_kernel(composed: Composed) -> None:
    made = import_module("spectrim.decomposers.mine").ViewBySide(side=3)
    large, small = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(4, 6, 1)
    assert made.spectrum(large).max_rank == 12  # 6 x 3 outputs by 4 x 3 inputs
    assert made.spectrum(small).max_rank == 4


def test_the_model_is_trained_by_its_recipe_and_compressed(composed: Composed, tmp_path: Path) -> None:
    settings = ["model=mine", "data=digits", f"checkpoints={tmp_path}/checkpoints"]
    assert train.train(composed(*settings, name="train")).name == "mine-digits-seed0.safetensors"
    record = run.run(composed(*settings, "algorithm=truncation"))
    assert record["dense"]["test"]["accuracy"] > 0.8
    assert record["compressed"]["params"] < record["dense"]["params"]


def test_the_data_set_is_loaded_and_a_missing_file_said(composed: Composed, tmp_path: Path) -> None:
    images = {f"{part}_images": torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8) for part in ("train", "test")}
    labels = {f"{part}_labels": torch.arange(40) % 10 for part in ("train", "test")}
    save_file(images | labels, tmp_path / "images.safetensors")
    assert set(images | labels) == set(Arrays.__dataclass_fields__)
    sizes = ["data.calibration_size=8", "data.verification_size=4", "data.held_out=12", "shape.image_size=8"]
    given = ["data=mine", *sizes, "model=mlp", "checkpoint=null", "algorithm=truncation"]
    record = run.run(composed(*given, f"data.path={tmp_path}/images.safetensors"))
    assert record["names"]["data"] == "mine" and 0 < record["compressed"]["params"] < record["dense"]["params"]
    with pytest.raises(spectrim.UserError, match="elsewhere.safetensors holds no data set"):
        run.run(composed(*given, "data.path=elsewhere.safetensors"))


def test_the_table_is_built_from_the_records_of_its_grid(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = composed("experiment=mine").hydra.sweeper.params
    swept = [[f"{key}={value}" for value in str(values).split(",")] for key, values in grid.items()]
    for cell in product(*swept):
        run.run(composed("experiment=mine", *cell, f"checkpoints={ROOT}/results/checkpoints"))
    script = imported("mine", FILES["experiments/mine.py"], monkeypatch)
    assert script.main(["--records", f"{tmp_path}/records", "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "tables" / "mine.csv")
    assert len(table) == 1 + 3 and table["params_kept"].is_monotonic_decreasing
    assert (tmp_path / "tables" / "mine.md").is_file()
