"""Architectures of torchvision, with fewer blocks or channels than it releases where the class lets one choose."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from given import CLASSES, SAMPLES, Architecture, Given, Scores, images, rises
from torch import nn

from spectrim.tools.torchvision_shim import prepare


def architectures() -> list[Architecture]:
    """Return one row for each family of classifiers, and for the tasks beside classification."""
    released = {
        "squeezenet1_1": {},
        "mobilenet_v2": {"width_mult": 0.35},
        "mobilenet_v3_small": {"width_mult": 0.5},
        "shufflenet_v2_x0_5": {},
        "mnasnet0_5": {},
    }
    built = [_vgg, _resnet, _resnext, _densenet, _efficientnet, _regnet, _convnext, _vit, _swin, _swin_v2, _maxvit]
    built += [_mvit, _lraspp, _raft_small]
    rows = [_row(name, partial(_named, name, settings)) for name, settings in released.items()]
    return rows + [_row(make.__name__.strip("_"), make) for make in built]


def _row(name: str, make: Callable[[], Given]) -> Architecture:
    return Architecture("torchvision", name, make)


def _models() -> Any:
    prepare()
    from torchvision import models

    return models


def _named(name: str, settings: dict[str, Any]) -> Given:
    return images(getattr(_models(), name)(weights=None, num_classes=CLASSES, **settings), 64)


def _vgg() -> Given:
    models = _models()
    features = models.vgg.make_layers([16, "M", 32, 32, "M", 64, 64, "M"], batch_norm=True)
    model = models.VGG(features, CLASSES)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, CLASSES))
    return images(model, 32)


def _resnet() -> Given:
    models = _models()
    model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], CLASSES)
    # The class has no setting for the width, and the last two stages, with 512 channels, would take minutes.
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, CLASSES)  # type: ignore[assignment]
    return images(model, 32)


def _resnext() -> Given:
    models = _models()
    block = models.resnet.Bottleneck
    return images(models.ResNet(block, [1, 1, 1, 1], CLASSES, groups=8, width_per_group=4), 32)


def _densenet() -> Given:
    return images(_models().DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES), 64)


def _efficientnet() -> Given:
    efficient = _models().efficientnet
    setting, last = efficient._efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.5)
    return images(efficient.EfficientNet(setting, 0.2, num_classes=CLASSES, last_channel=last), 64)


def _regnet() -> Given:
    regnet = _models().regnet
    params = regnet.BlockParams.from_init_params(depth=4, w_0=16, w_a=16.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return images(regnet.RegNet(params, CLASSES), 64)


def _vit() -> Given:
    return images(_models().VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=CLASSES), 32)


def _swin() -> Given:
    model = _models().SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)
    return images(model, 64)


def _swin_v2() -> Given:
    from_v2 = _models().swin_transformer
    model = from_v2.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=CLASSES,
        block=from_v2.SwinTransformerBlockV2, downsample_layer=from_v2.PatchMergingV2,
    )  # fmt: skip
    return images(model, 64)


def _convnext() -> Given:
    block = _models().convnext.CNBlockConfig
    return images(_models().ConvNeXt([block(24, 48, 1), block(48, None, 1)], num_classes=CLASSES), 64)


def _maxvit() -> Given:
    return images(_models().MaxVit((64, 64), 16, 2, [16, 16], [1, 1], 8, 0.0, num_classes=CLASSES), 64)


def _mvit() -> Given:
    video = _models().video.mvit
    blocks = [
        video.MSBlockConfig(1, 24, 48, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        video.MSBlockConfig(2, 48, 48, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    model = video.MViT((16, 16), 4, blocks, *[False] * 4, num_classes=CLASSES)
    videos = [(torch.randn(SAMPLES, 3, 4, 16, 16), torch.randint(0, CLASSES, (SAMPLES,))) for _ in range(2)]
    return Given(model.eval(), videos)


def _pixels(model: nn.Module) -> Given:
    """Return a segmenter, whose outputs hold a score a pixel and a class, with a class a pixel as targets."""
    batches = [(torch.randn(SAMPLES, 3, 32, 32), torch.randint(0, CLASSES, (SAMPLES, 32, 32))) for _ in range(2)]
    return Given(model.eval(), batches, Scores(lambda outputs: outputs["out"]))


def _lraspp() -> Given:
    return _pixels(
        _models().segmentation.lraspp_mobilenet_v3_large(weights=None, num_classes=CLASSES, weights_backbone=None)
    )


def _raft_small() -> Given:
    pairs = [((torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128)), torch.zeros(2)) for _ in range(2)]
    return Given(_models().optical_flow.raft_small(weights=None).eval(), pairs, rises)
