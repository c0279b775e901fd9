"""Networks with ImageNet weights from packages: their architecture, and the conversion of what the packages hold."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectrim.errors import UserError
from spectrim.models import imagenet
from spectrim.models.efficientnet_lite import EfficientNetLite0
from spectrim.surgery.cost import model_cost
from spectrim.tools.imagenet import MEAN, STD


def keras_arrays() -> dict[str, Tensor]:
    """Arrays of a Keras ResNet-50 with the shapes of the package: a kernel is (height, width, inputs, outputs)."""
    found: dict[str, Tensor] = {}

    def layer(name: str, norm: str, size: int, inputs: int, outputs: int) -> None:
        found[f"{name}/kernel"] = torch.randn(size, size, inputs, outputs) / (size * size * inputs) ** 0.5
        found[f"{name}/bias"] = torch.randn(outputs)
        for key in ("gamma", "beta", "moving_mean"):
            found[f"{norm}/{key}"] = torch.randn(outputs)
        found[f"{norm}/moving_variance"] = torch.rand(outputs) + 0.5

    layer("conv1", "bn_conv1", 7, 3, 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 2):
        for block in "abcdef"[:blocks]:
            name, norm = f"res{stage}{block}_branch", f"bn{stage}{block}_branch"
            if block == "a":
                layer(f"{name}1", f"{norm}1", 1, inputs, 4 * width)
            for branch, size, before, after in (("2a", 1, inputs, width), ("2b", 3, width, width)):
                layer(name + branch, norm + branch, size, before, after)
            layer(f"{name}2c", f"{norm}2c", 1, width, 4 * width)
            inputs = 4 * width
    found["fc1000/kernel"], found["fc1000/bias"] = torch.randn(2048, 1000) / 45, torch.randn(1000)
    return found


@pytest.fixture
def resnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    arrays = keras_arrays()
    save_file(arrays, tmp_path / imagenet.WEIGHTS)
    monkeypatch.setattr(imagenet, "unpacked", lambda bundle: tmp_path)
    return imagenet.resnet50(), arrays


def test_resnet50_computes_what_the_keras_model_does(resnet: tuple[nn.Module, dict[str, Tensor]]) -> None:
    """The first layer takes torchvision's images, and a block strides first, as in the definition that Keras gives."""
    model, arrays = resnet
    pixels = torch.rand(2, 3, 64, 64)
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    caffe = 255 * pixels.flip(1) - torch.tensor(imagenet.CAFFE_MEAN).flip(0).view(3, 1, 1)

    def unit(x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        norm = "bn_conv1" if name == "conv1" else name.replace("res", "bn")
        kernel = arrays[f"{name}/kernel"].permute(3, 2, 0, 1)
        x = F.conv2d(x, kernel, arrays[f"{name}/bias"], stride, padding)
        mean, variance, gamma, beta = (
            arrays[f"{norm}/{key}"] for key in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return F.batch_norm(x, mean, variance, gamma, beta, eps=imagenet.EPSILON)

    def block(x: Tensor, name: str, stride: int) -> Tensor:
        y = unit(x, f"{name}2a", stride).relu()
        y = unit(unit(y, f"{name}2b", padding=1).relu(), f"{name}2c")
        return (y + unit(x, f"{name}1", stride)).relu()

    with torch.no_grad():
        wanted, found = unit(caffe, "conv1", 2, 3), model.bn1(model.conv1(images))  # type: ignore[operator]
        inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # The mean is that of Caffe but at the border.
        torch.testing.assert_close(found[inner], wanted[inner], rtol=1e-3, atol=1e-3 * float(wanted.std()))
        for stage, stride in ((1, 1), (2, 2)):
            given = torch.rand(1, (64, 256)[stage - 1], 8, 8)
            own = model.get_submodule(f"layer{stage}.0")(given)
            torch.testing.assert_close(
                own, block(given, f"res{stage + 1}a_branch", stride), rtol=1e-4, atol=1e-4 * float(own.std())
            )


def test_every_number_of_the_keras_model_is_used(resnet: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, _ = resnet
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032  # as in torchvision's documentation
    untouched = [name for name, value in model.state_dict().items() if value.unique().numel() == 1]
    assert all(name.endswith("num_batches_tracked") for name in untouched)


def test_unpacks_arrays_that_are_spread_over_files(tmp_path: Path) -> None:
    numbers = np.arange(10, dtype="<f4")
    weights = [{"name": "a/kernel", "shape": [2, 3]}, {"name": "a/bias", "shape": []}, {"name": "b", "shape": [3]}]
    manifest = [{"paths": ["one.bin", "two.bin"], "weights": weights}]
    content = {
        "model.json": json.dumps({"weightsManifest": manifest}).encode(),
        "one.bin": numbers.tobytes()[:13],  # a file may end within a number
        "two.bin": numbers.tobytes()[13:],
    }
    archive = tmp_path / "any.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(imagenet.KERAS + name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    imagenet._unpack_keras(archive, tmp_path)
    found = load_file(tmp_path / imagenet.WEIGHTS)
    assert {name: value.tolist() for name, value in found.items()} == {
        "a/kernel": [[0, 1, 2], [3, 4, 5]],
        "a/bias": 6,
        "b": [7, 8, 9],
    }


def test_efficientnet_lite0_has_the_size_that_its_authors_state() -> None:
    cost = model_cost(EfficientNetLite0().eval(), torch.zeros(1, 3, 224, 224))
    assert cost.params == 4_652_008
    assert 0.38e9 < cost.macs < 0.41e9  # 407M with BatchNorm and additions in the authors' table


def test_efficientnet_lite0_takes_the_tensors_in_the_order_of_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = EfficientNetLite0()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.1)
    kept = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    save_file({f"{at:04d}": value for at, value in enumerate(kept.values())}, tmp_path / imagenet.WEIGHTS)
    monkeypatch.setattr(imagenet, "unpacked", lambda bundle: tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(imagenet.efficientnet_lite0()(images), source.eval()(images))


def test_efficientnet_lite0_pads_as_tensorflow() -> None:
    """At stride 2 and an even size TensorFlow's padding "same" adds one more on the right and below than before."""
    model = EfficientNetLite0()
    pads = [module.padding for module in model.modules() if isinstance(module, nn.ZeroPad2d)]
    assert pads == [(0, 1, 0, 1), (0, 1, 0, 1), (1, 2, 1, 2), (0, 1, 0, 1), (1, 2, 1, 2)]
    assert model.blocks(model.stem(torch.zeros(1, 3, 64, 96))).shape == (1, 320, 2, 3)


@pytest.mark.parametrize("build", [imagenet.resnet50, imagenet.efficientnet_lite0])
def test_another_number_of_classes_is_refused(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(UserError, match="tell 1000 classes apart, not 10; take data of ImageNet"):
        build(num_classes=10)
