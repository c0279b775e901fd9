"""The path of the ImageNet grid, on a generated image folder and an untrained net."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from spectrim.cli.run import run
from spectrim.models import imagenet
from spectrim.models.efficientnet_lite import EfficientNetLite0
from spectrim.runs import configuration, targets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, six training and two validation images each."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.jpg")
    return tmp_path


@pytest.mark.parametrize("algorithm", ["lossless", "compact_verified"])
def test_a_cell_of_the_grid(compose: Any, folder: Path, tmp_path: Path, algorithm: str) -> None:
    cfg = compose(
        "experiment=imagenet/table2",
        "model.name=resnet18",
        "model.weights=null",
        f"algorithm={algorithm}",
        "algorithm.tries=1",
        f"data.root={folder}",
        "data.held_out=6",
        "data.calibration_size=4",
        "data.verification_size=2",
        "data.resize=40",
        "shape={num_classes: 2, in_channels: 3, image_size: 32}",
        f"records={tmp_path / 'records'}",
    )
    record = run(cfg)
    written = json.loads((tmp_path / "records/imagenet/table2" / f"{record['signature']}.json").read_text())
    assert written["config"]["model"]["name"] == "resnet18"
    assert written["dense"]["test"]["n"] == 4 and written["dense"]["calibration"]["n"] == 4
    assert written["compressed"]["params"] <= written["dense"]["params"]
    assert {layer["layer"] for layer in written["layers"]} >= {"conv1", "layer4.1.conv2", "fc"}


def test_packaged_weights_on_a_folder_with_some_of_the_classes(
    compose: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels are the places in the file of classes, out of the thousand that the weights tell apart."""
    kept = {name: value for name, value in EfficientNetLite0().state_dict().items() if "num_batches" not in name}
    save_file({f"{at:04d}": value for at, value in enumerate(kept.values())}, tmp_path / imagenet.WEIGHTS)
    monkeypatch.setattr(imagenet, "unpacked", lambda bundle: tmp_path)
    names = [f"n{number:08d}" for number in range(998)]
    (tmp_path / "classes.txt").write_text("\n".join([*names, "n01443537", "n01440764"]))
    cfg = compose(
        "experiment=imagenet/table2_packaged",
        "model=efficientnet_lite0",
        "algorithm=lossless",
        f"data.root={folder}",
        f"data.classes={tmp_path / 'classes.txt'}",
        "data.held_out=6",
        "data.calibration_size=4",
        "data.verification_size=2",
        "data.resize=40",
        "shape.image_size=32",
        f"records={tmp_path / 'records'}",
    )
    record = run(cfg)
    assert record["experiment"] == "imagenet/table2_packaged"
    assert record["dense"]["params"] == 4_652_008 and record["dense"]["test"]["n"] == 4
    assert targets.build(configuration.plain(cfg.data), "load").load().test.labels.tolist() == [999, 999, 998, 998]


def test_the_grid_is_that_of_the_papers(compose: Any) -> None:
    params = compose("experiment=imagenet/table2").hydra.sweeper.params
    models = str(OmegaConf.to_container(params)["model.name"]).split(",")
    assert models == [
        "resnet18",
        "resnet50",
        "resnet152",
        "resnext50_32x4d",
        "densenet169",
        "vgg13_bn",
        "vgg19_bn",
    ]
