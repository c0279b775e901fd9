"""Small networks: LeNet-5 as in the compression literature, and multilayer perceptrons."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.errors import UserError


class LeNet5(nn.Module):
    """LeNet-5 in the 20-50-500-10 variant of Caffe and the compression papers (431k parameters on 28x28 images).

    ``forward`` maps images of shape (N, in_channels, image_size, image_size) to logits of shape (N, num_classes).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise UserError(f"LeNet-5 needs images of at least 16x16, got {image_size}x{image_size}")
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * side * side, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class MLP(nn.Module):
    """Fully connected layers with ReLU between them, on flattened inputs of ``in_channels * image_size**2`` values."""

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128),
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise UserError(f"an MLP needs at least one hidden layer of positive width, got {tuple(hidden)}")
        sizes = [in_channels * image_size * image_size, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        layers.append(nn.Linear(sizes[-1], num_classes))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class BiasFreeMLP(nn.Sequential):
    """A multilayer perceptron without biases, as in Theorems 1 to 3 of S2.

    It applies ``depth`` linear layers with ReLU between them to flattened inputs of ``in_channels * image_size**2``
    values. Each layer but the last has ``width`` units.
    """

    def __init__(
        self, depth: int = 3, width: int = 64, num_classes: int = 10, in_channels: int = 1, image_size: int = 28
    ) -> None:
        if depth < 1 or width < 1:
            raise UserError(f"an MLP needs at least one layer and one unit, got depth {depth} and width {width}")
        sizes = [in_channels * image_size * image_size, *[width] * (depth - 1), num_classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, bias=False), nn.ReLU()]
        super().__init__(*layers[:-1])
