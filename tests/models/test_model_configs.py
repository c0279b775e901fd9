"""Every option of ``conf/model``."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

EVERY = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
# Networks that come with weights have the classes of these, and are in test_language.py and test_imagenet.py.
IMAGES = [file for file in EVERY if not {"language", "imagenet"} & set(file.read_text().split("."))]


def composed(file: Path, num_classes: int, in_channels: int, image_size: int) -> DictConfig:
    shape = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    node = OmegaConf.load(file)
    model = node if "_target_" in node else node.model
    return OmegaConf.create({"shape": shape, "model": model}).model


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_gives_logits_for_the_shape_of_the_data(file: Path) -> None:
    torch.manual_seed(0)
    model = instantiate(composed(file, 7, 3, 32)).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("file", EVERY, ids=lambda file: file.stem)
def test_each_key_is_a_parameter_of_the_target(file: Path) -> None:
    model = composed(file, 7, 3, 32)
    parameters = inspect.signature(get_object(model._target_)).parameters
    assert set(model) - {"_target_"} == set(parameters)


@pytest.mark.parametrize("name", ["resnet20", "resnext20", "densenet22", "vgg11", "mlp"])
def test_works_on_the_digits(name: str) -> None:
    file = next(file for file in EVERY if file.stem == name)
    model = instantiate(composed(file, 10, 1, 8)).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_torchvision_has_no_checkpoint_of_ours() -> None:
    file = next(file for file in EVERY if file.stem == "torchvision")
    assert file.read_text().startswith("# @package _global_\n")
    config = OmegaConf.load(file)
    assert config.checkpoint is None
    assert config.model.weights is None
