"""Every option of ``conf/data``."""

import dataclasses
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from spectrim.data.splits import ImageData
from spectrim.errors import UserError

# Of image sets; those of texts, whose tokenizer is the model's, are in test_text.py.
EVERY = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))
FILES = [file for file in EVERY if "tokenizer:" not in file.read_text()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_instantiates_and_states_the_class_s_own_defaults(file: Path) -> None:
    assert file.read_text().startswith("# @package _global_\n")
    config = OmegaConf.load(file)
    data = instantiate(config.data)
    assert isinstance(data, ImageData)
    assert data == type(data)()
    assert {field.name for field in dataclasses.fields(data)} == set(config.data) - {"_target_"}
    with pytest.raises(UserError, match="calibration_size must be at least 1"):
        dataclasses.replace(data, calibration_size=0)
    with pytest.raises(UserError, match=f"^{type(data).__name__}: batch_size=True is not of type int$"):
        dataclasses.replace(data, batch_size=True)
    assert set(config.shape) == {"num_classes", "in_channels", "image_size"}


def test_shape_of_the_digits_is_the_one_they_have() -> None:
    config = OmegaConf.load(next(file for file in FILES if file.stem == "digits"))
    splits = instantiate(config.data).load()
    assert {name: getattr(splits, name) for name in config.shape} == config.shape
