"""Densely connected networks for 32x32 images (Huang et al., arXiv 1608.06993, section 4), without bottlenecks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.errors import UserError


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution; appends ``growth`` new feature maps to the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution to fewer feature maps, and 2x2 average pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """A DenseNet of 3n+4 layers in three dense blocks.

    ``depth``: number of layers, 3n+4.
    ``growth``: growth rate k, the number of feature maps that each layer adds.
    ``compression``: share of the feature maps that a transition keeps.

    ``forward`` maps images of shape (N, in_channels, H, W) to logits of shape (N, num_classes).
    """

    def __init__(
        self,
        depth: int,
        growth: int = 12,
        compression: float = 0.5,
        stem: int = 16,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 7 or (depth - 4) % 3:
            raise UserError(f"depth of a CIFAR DenseNet is 3n+4 (22, 40, 100), got {depth}")
        if not 0 < compression <= 1:
            raise UserError(f"compression of a DenseNet lies in (0, 1], got {compression}")
        layers = (depth - 4) // 3
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        channels, stages = stem, []
        for block in range(3):
            stage: list[nn.Module] = []
            for _ in range(layers):
                stage.append(DenseLayer(channels, growth))
                channels += growth
            if block < 2:
                kept = int(compression * channels)
                stage.append(Transition(channels, kept))
                channels = kept
            stages.append(nn.Sequential(*stage))
        self.block1, self.block2, self.block3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1), 1))
