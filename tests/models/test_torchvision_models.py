"""torchvision's classifiers by name."""

import errno
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spectrim.errors import UserError
from spectrim.models import torchvision_models
from spectrim.models.torchvision_models import classifier
from spectrim.tools.torchvision_shim import prepare

NAME = "squeezenet1_1"  # the smallest that has weights: 1.2M parameters


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


Publish = Callable[[object], str]


@pytest.fixture
def publish(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Have torchvision believe that a file with this content is where the network's weights are published."""
    prepare()
    from torchvision.models import SqueezeNet1_1_Weights

    def published(content: object) -> str:
        path = tmp_path / "content"
        torch.save(content, path)
        digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        named = path.rename(tmp_path / f"{NAME}-{digits}.pth")
        monkeypatch.setattr(SqueezeNet1_1_Weights, "url", property(lambda _: named.as_uri()))
        return named.name

    return published


def test_untrained_with_any_number_of_classes() -> None:
    with torch.no_grad():
        assert classifier(NAME, num_classes=5).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_unknown_name_with_close_matches() -> None:
    with pytest.raises(UserError, match=r"no classifier 'resnet51'; did you mean .*resnet50"):
        classifier("resnet51")
    with pytest.raises(UserError, match=r"no classifier 'zzzz'; known: alexnet, "):
        classifier("zzzz")


def test_segmentation_is_no_classifier() -> None:
    with pytest.raises(UserError, match="no classifier"):
        classifier("deeplabv3_resnet50")


def test_unknown_weights_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="resnet50 has no weights 'V3'; known: IMAGENET1K_V1, IMAGENET1K_V2"):
        classifier("resnet50", weights="V3")


def test_weights_of_another_number_of_classes() -> None:
    with pytest.raises(UserError, match="tell 1000 classes apart, not 10"):
        classifier(NAME, weights="IMAGENET1K_V1", num_classes=10)


def test_weights_are_fetched_once_and_loaded(publish: Publish, hub: Path, tmp_path: Path) -> None:
    state = classifier(NAME).state_dict()
    file = publish(state)
    for _ in range(2):
        loaded = classifier(NAME, weights="DEFAULT").state_dict()
        assert all(loaded[name].equal(value) for name, value in state.items())
        assert [path.name for path in hub.iterdir()] == [file]
        (tmp_path / file).unlink(missing_ok=True)


def test_no_network_says_where_to_put_the_file(publish: Publish, hub: Path, tmp_path: Path) -> None:
    file = publish({})
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=rf"could not be fetched: .* put the file at {hub / file}$"):
        classifier(NAME, weights="DEFAULT")
    assert not list(hub.iterdir())


def test_altered_weights(publish: Publish, hub: Path, tmp_path: Path) -> None:
    file = publish({})
    (tmp_path / file).write_bytes(b"short")
    with pytest.raises(UserError, match=r"truncated or altered and was deleted"):
        classifier(NAME, weights="DEFAULT")
    assert not list(hub.iterdir())
    (hub / file).write_bytes(b"short")
    with pytest.raises(UserError, match="is truncated or altered; delete it and run again"):
        classifier(NAME, weights="DEFAULT")


def test_no_room_on_the_disk(publish: Publish, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish({})

    def full(_url: object, _folder: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torchvision_models.Url, "fetch", full)
    with pytest.raises(UserError, match=r"no room on the disk.*TORCH_HOME"):
        classifier(NAME, weights="DEFAULT")
    assert not list(hub.iterdir())


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_is_unpickled(publish: Publish) -> None:
    publish(Trap())
    with pytest.raises(pickle.UnpicklingError):
        classifier(NAME, weights="DEFAULT")
