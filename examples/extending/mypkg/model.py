"""A convolution and two linear layers."""

import torch
from torch import Tensor, nn


class TwoLayers(nn.Module):
    """``forward`` maps images (N, in_channels, image_size, image_size) to logits (N, num_classes)."""

    def __init__(self, width: int, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.hidden = nn.Linear(16 * image_size**2, width)
        self.last = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.last(torch.relu(self.hidden(x)))
