"""EfficientNet-lite0: EfficientNet-B0 without squeeze-and-excitation, with ReLU6 (Tan & Le, arXiv 1905.11946)."""

import torch
from torch import Tensor, nn

from spectrim.tools.imagenet import MEAN, STD

# Of each stage: kernel, stride, expansion, channels, blocks.
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4))
LAST_STAGE = (3, 1, 6, 320, 1)
STEM, HEAD = 32, 1280
EPSILON = 1e-3


def _unit(channels: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True) -> nn.Module:
    """Return a convolution with BatchNorm, padded as TensorFlow pads: at stride 2 more on the right and below."""
    padding = kernel // 2 if stride == 1 else 0
    before = (kernel - stride) // 2
    pads = [] if stride == 1 else [nn.ZeroPad2d((before, kernel - stride - before) * 2)]
    convolution = nn.Conv2d(channels, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(
        *pads, convolution, nn.BatchNorm2d(outputs, eps=EPSILON), *([nn.ReLU6(inplace=True)] if active else [])
    )


class Block(nn.Module):
    """An inverted residual block: expansion, depthwise convolution and projection."""

    def __init__(self, channels: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = _unit(channels, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _unit(inner, inner, kernel, stride, groups=inner)
        self.project = _unit(inner, outputs, 1, active=False)
        self.residual = stride == 1 and channels == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0.

    ``forward`` maps images of shape (N, 3, H, W), with H and W multiples of 32, to logits of shape (N, num_classes).
    The images are normalised as torchvision does for ImageNet. The network was trained on images in [-1, 1], so it
    rescales them first.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        self.register_buffer("scale", std * 255 / 128, persistent=False)
        self.register_buffer("shift", (mean * 255 - 127) / 128, persistent=False)
        self.stem = _unit(3, STEM, 3, stride=2)
        blocks, channels = [], STEM
        for kernel, stride, expansion, outputs, count in (*STAGES, LAST_STAGE):
            for index in range(count):
                blocks.append(Block(channels, outputs, kernel, 1 if index else stride, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _unit(channels, HEAD, 1)
        self.fc = nn.Linear(HEAD, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x * self.scale + self.shift)))
        return self.fc(x.mean((2, 3)))
