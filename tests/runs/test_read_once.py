"""Compositions that share files and parsed interpolations are those that Hydra makes by itself."""

from collections.abc import Iterator
from pathlib import Path

import omegaconf.base
import pytest
from hydra import compose
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.initialize import initialize_config_dir
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from spectrim.runs import configuration
from spectrim.runs.read_once import read_once

WORDS = (
    ["experiment=table2/other_nets/one_shot", "model=resnet56"],
    ["experiment=table1/lenet5/fine_tuning_after_searches"],
    ["experiment=table2/other_nets/one_shot", "model=vgg19_half", "algorithm=compact", "algorithm.gamma=0.1"],
    [
        "algorithm=refitted",
        "algorithm@algorithm.selector=joint",
        "+data@also.clothes=fashion_mnist",
        "hydra/launcher=joblib",
    ],
)


def composed(words: list[str]) -> DictConfig:
    return compose("config", words, return_hydra_config=True)


def whole(cfg: DictConfig) -> tuple[object, object]:
    """All that a composition holds: as it stands, and what a run sees with every interpolation resolved."""
    HydraConfig.instance().set_config(cfg)
    seen = {str(key): cfg[key] for key in cfg if key != "hydra"}
    resolved = {
        key: OmegaConf.to_container(one, resolve=True) if OmegaConf.is_config(one) else one for key, one in seen.items()
    }
    return OmegaConf.to_container(cfg), resolved


@pytest.fixture
def conf(tmp_path: Path) -> Iterator[Path]:
    """A folder with a configuration of one number."""
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "config.yaml").write_text("net: {depth: 1}\n")
    with initialize_config_dir(str(folder), version_base="1.3"):
        yield folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The yaml files that Hydra has read."""
    usual, read = ConfigRepository.load_config, list[str]()

    def load(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        read.append(config_path)
        return usual(self, config_path)

    monkeypatch.setattr(ConfigRepository, "load_config", load)
    return read


def test_the_configurations_are_those_without_it() -> None:
    with initialize_config_dir(configuration.CONF, version_base="1.3"):
        alone = [whole(composed(words)) for words in WORDS]
        with read_once():
            assert [whole(composed(words)) for words in (*WORDS, *WORDS)] == alone * 2
    HydraConfig.instance().cfg = None


def test_what_a_caller_does_to_a_configuration_reaches_no_other(conf: Path) -> None:
    with read_once():
        composed([]).net.depth = 7
        assert composed([]).net.depth == 1


def test_each_file_is_read_once(loads: list[str]) -> None:
    with initialize_config_dir(configuration.CONF, version_base="1.3"), read_once():
        for words in (*WORDS, *WORDS):
            composed(words)
    assert "algorithm/joint" in loads and len(loads) == len(set(loads))


def test_a_file_that_changed_is_read_by_the_next_block(conf: Path) -> None:
    with read_once():
        assert composed([]).net.depth == 1
        (conf / "config.yaml").write_text("net: {depth: 2}\n")
        assert composed([]).net.depth == 1
    assert composed([]).net.depth == 2
    with read_once():
        assert composed([]).net.depth == 2


def test_more_folders_of_one_composition_are_not_those_of_the_next(conf: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name / "option").mkdir(parents=True)
        (tmp_path / name / "option" / "one.yaml").write_text(f"from: {name}\n")
    with read_once():
        for name in ("first", "second", "first"):
            cfg = composed(["+option=one", f"hydra.searchpath=[file://{tmp_path / name}]"])
            assert cfg.option["from"] == name
        assert composed(["+option=one"]).option == "one"  # a plain value, where no folder has such an option


def test_a_default_that_refers_to_another_choice_follows_it(conf: Path) -> None:
    (conf / "config.yaml").write_text("defaults: [_self_, net: small, recipe: '${net}']\n")
    for group in ("net", "recipe"):
        (conf / group).mkdir()
        for option in ("small", "large"):
            (conf / group / f"{option}.yaml").write_text(f"name: {option}\n")
    with read_once():
        for option in ("small", "large", "small"):
            assert composed([f"net={option}"]).recipe.name == option


def test_hydra_is_as_before_after_an_error(conf: Path) -> None:
    loader = GlobalHydra.instance().config_loader()
    before = loader.repository, omegaconf.base.parse, defaults_list._create_interpolation_map
    with pytest.raises(ZeroDivisionError), read_once():
        assert loader.repository is not before[0] and omegaconf.base.parse is not before[1]
        assert defaults_list._create_interpolation_map is not before[2]
        raise ZeroDivisionError
    assert (loader.repository, omegaconf.base.parse, defaults_list._create_interpolation_map) == before
