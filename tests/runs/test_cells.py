"""The cells of a grid are those of Hydra's sweeper, with the configurations that Hydra composes."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.runs import cells, configuration
from spectrim.runs.read_once import read_once

GRIDS = [
    "smoke",
    "table1/lenet5/fine_tuning_after_searches",
    "table1/lenet5/svd_training_from_scratch",
    "table3/minilm/truncation",
    "table5/vgg19_half/svd_training_from_scratch",
    "table6/growth_with_images_joint",
    "table9/expansion",
]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """What a run sees of a configuration."""
    return {
        str(key): OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in cfg
        if key != "hydra"
    }


@pytest.mark.parametrize("grid", GRIDS)
def test_the_cells_are_those_of_hydra(compose: Any, grid: str) -> None:
    params = compose(f"experiment={grid}").hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in params.items()])
    (expected,) = BasicSweeper.split_arguments(overrides, None)
    found = {index: (list(chosen), plain(cfg)) for index, chosen, cfg in cells.configurations(grid)}
    assert [found[index][0] for index in range(len(found))] == expected
    assert [list(cell.overrides) for cell in cells.cells(grid)] == expected
    for index in {0, len(expected) // 2, len(expected) - 1}:
        assert plain(compose(f"experiment={grid}", *expected[index])) == found[index][1]


@pytest.mark.parametrize("grid", configuration.experiments())
def test_a_cell_of_every_grid_is_that_of_hydra(compose: Any, grid: str) -> None:
    with read_once():  # The second cell is set where the first one was, unless it has options of its own.
        *_, (chosen, found) = [(chosen, plain(cfg)) for _, chosen, cfg in islice(cells.configurations(grid), 2)]
    assert plain(compose(f"experiment={grid}", *chosen)) == found


def test_a_cell_has_the_signature_of_its_record(compose: Any) -> None:
    for cell in cells.cells("table8/rank_selection"):
        assert cell.checkpoint is not None and cell.experiment == "table8" and cell.signature is not None
        path = Path(__file__).parents[2] / "results" / "records" / "table8" / f"{cell.signature}.json"
        assert records.read(path)["config"]["seed"] == int(cell.overrides[1].removeprefix("seed="))


def test_hydra_composes_once_for_each_choice_of_options(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, composed = cells.compose, []
    monkeypatch.setattr(cells, "compose", lambda *given, **more: composed.append(given) or usual(*given, **more))
    assert len(cells.cells("table2/other_nets/one_shot")) == 90
    assert len(composed) == 1 + 5 * 2  # five models, two algorithms; three draws and three neighbourhoods are set


def test_a_cell_without_its_checkpoint_has_no_signature(
    compose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = cells.cells("table8/bounds")
    assert len(found) == 15 and all(cell.signature is None for cell in found)
    assert found[0].checkpoint == Path("results/checkpoints/table8/bias_free_mlp2-digits-seed0.safetensors")


def test_a_name_stands_for_a_grid_or_for_a_folder_of_grids() -> None:
    assert configuration.grids_called("table9/refit") == ["table9/refit"]
    pivoted = ["table4/truncation_pivoted", "table4/truncation_pivoted_best_view"]
    assert configuration.grids_called("table4/") == ["table4/compact_verified", "table4/truncation", *pivoted]
    assert configuration.grids_called("table4_truncation") == ["table4/truncation"]
    with pytest.raises(UserError, match="^experiment=table4/trunkation is no grid: choose table4/truncation"):
        configuration.grids_called("table4/trunkation")
    with pytest.raises(UserError, match="^experiment=table1/_nets is no grid: "):
        configuration.grids_called("table1/_nets")
