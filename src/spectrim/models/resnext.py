"""ResNeXt for 32x32 images: bottlenecks with grouped convolutions (Xie et al., arXiv 1611.05431, section 5.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.errors import UserError


class Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions with a shortcut, which is a projection if the shape changes."""

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNeXt(nn.Module):
    """A ResNeXt of 9n+2 layers.

    ``depth``: number of layers, 9n+2.
    ``cardinality``: number of groups.
    ``group_width``: channels per group in the first stage.

    ``forward`` maps images of shape (N, in_channels, H, W) to logits of shape (N, num_classes).
    """

    def __init__(
        self,
        depth: int,
        cardinality: int,
        group_width: int,
        expansion: int = 2,
        stem: int = 16,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise UserError(f"depth of a CIFAR ResNeXt is 9n+2 (11, 20, 29), got {depth}")
        blocks = (depth - 2) // 9
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        channels, stages = stem, []
        for stage in range(3):
            inner = cardinality * group_width * 2**stage
            layers = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, inner, expansion * inner, stride, cardinality))
                channels = expansion * inner
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
