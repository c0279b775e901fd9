"""A compact convolutional transformer for small images (Hassani et al., arXiv 2104.05704, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.errors import UserError


class Attention(nn.Module):
    """Multi-head self-attention over tokens of shape (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        # Spelled out: with so few tokens a step takes less time on a CPU than with torch's fused attention.
        weights = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(3)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class CCT(nn.Module):
    """A compact convolutional transformer: two convolutions make the tokens, attention pools them.

    ``depth``: number of transformer blocks.
    ``width``: entries of a token.
    ``heads``: attention heads; they divide ``width``.
    ``hidden``: width of the perceptron in a block.
    ``side``: tokens per side of the learned positions. For images of another size they are interpolated.

    ``forward`` maps images of shape (N, in_channels, H, W) to logits of shape (N, num_classes).
    """

    def __init__(
        self,
        depth: int = 2,
        width: int = 128,
        heads: int = 2,
        hidden: int = 128,
        side: int = 8,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 1 or heads < 1 or width % heads:
            raise UserError(f"a CCT needs depth >= 1 and heads that divide width, got {depth}, {heads}, {width}")
        self.conv1 = nn.Conv2d(in_channels, width // 2, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(width // 2, width, 3, 1, 1, bias=False)
        self.positions = nn.Parameter(torch.empty(1, width, side, side))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, 1)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in (self.conv1, self.conv2):
            x = F.relu(F.max_pool2d(convolution(x), 3, 2, 1))
        positions: Tensor = self.positions
        if positions.shape[2:] != x.shape[2:]:
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic", align_corners=False)
        tokens = self.norm(self.blocks((x + positions).flatten(2).transpose(1, 2)))
        weights = self.pool(tokens).softmax(1)  # (N, T, 1)
        return self.fc((weights.transpose(1, 2) @ tokens).squeeze(1))
