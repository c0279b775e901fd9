"""VGG with BatchNorm and one linear classifier for 32x32 images (Simonyan & Zisserman, arXiv 1409.1556, table 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.errors import UserError

STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """VGG-11 or VGG-19 with BatchNorm.

    ``depth``: 11 or 19.
    ``width``: factor on every number of channels.

    ``forward`` maps images of shape (N, in_channels, H, W) to logits of shape (N, num_classes).
    """

    def __init__(self, depth: int, width: float = 1.0, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth not in STAGES:
            raise UserError(f"depth of a VGG is one of {sorted(STAGES)}, got {depth}")
        if not 0 < width <= 4:
            raise UserError(f"width of a VGG lies in (0, 4], got {width}")
        layers: list[nn.Module] = []
        channels = in_channels
        for number, stage in enumerate(STAGES[depth]):
            if number:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for base in stage:
                out_channels = max(1, round(base * width))
                layers.append(nn.Conv2d(channels, out_channels, 3, 1, 1, bias=False))
                layers += [nn.BatchNorm2d(out_channels), nn.ReLU()]
                channels = out_channels
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))
