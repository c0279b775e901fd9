"""One module of every kind that can be unpacked, with arguments, for the tests that hold for all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

PADDING = torch.tensor([[False] * 5, [False, False, False, True, True], [False, False, False, False, True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 5, 16)))


def attention(**settings: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(16, 4, **{"batch_first": True, **settings})
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def attended(module: nn.MultiheadAttention, *shape: int, **given: Any) -> Case:
    x = rows(*shape)
    return module, (x, x, x), given


def layer(**settings: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 4, 32, **{"batch_first": True, "dropout": 0.0, **settings})


def encoder(**settings: Any) -> nn.TransformerEncoder:
    nested = not settings.get("norm_first")  # as torch decides itself, with a warning
    return nn.TransformerEncoder(layer(**settings), 2, norm=nn.LayerNorm(16), enable_nested_tensor=nested)


def sequences() -> PackedSequence:
    return pack_sequence([rows(n, 16) for n in (2, 5, 3)], enforce_sorted=False)


def hidden(count: int, samples: int, *sizes: int) -> Any:
    parts = tuple(rows(count, samples, size) for size in sizes)
    return parts if len(parts) > 1 else parts[0]


BOTH: dict[str, Any] = {"num_layers": 2, "bidirectional": True}

CASES: dict[str, Callable[[], Case]] = {
    "attention": lambda: attended(attention()),
    "attention, sequence first": lambda: attended(attention(batch_first=False), need_weights=False),
    "attention without bias": lambda: attended(attention(bias=False), average_attn_weights=False),
    "attention, unbatched": lambda: attended(attention(), 5, 16, key_padding_mask=PADDING[1], need_weights=False),
    "attention, padded": lambda: attended(attention(), key_padding_mask=PADDING),
    "attention, padded, boolean mask": lambda: attended(attention(), key_padding_mask=PADDING, attn_mask=CAUSAL < 0),
    "attention, mask a head": lambda: attended(attention(), attn_mask=rows(12, 5, 5), need_weights=False),
    "attention, causal": lambda: attended(attention(), attn_mask=CAUSAL, is_causal=True, need_weights=False),
    "attention, causal, weights": lambda: attended(attention(), attn_mask=CAUSAL, is_causal=True),
    "cross-attention": lambda: (attention(kdim=7, vdim=9), (rows(), rows(3, 6, 7), rows(3, 6, 9)), {}),
    "encoder layer": lambda: (layer(), (rows(),), {}),
    "encoder layer, norm first": lambda: (layer(norm_first=True), (rows(),), {"src_key_padding_mask": PADDING}),
    "encoder": lambda: (encoder(), (rows(),), {}),
    "encoder, padded at the end": lambda: (encoder(), (rows(),), {"src_key_padding_mask": PADDING}),
    "encoder, padded before": lambda: (encoder(), (rows(),), {"src_key_padding_mask": PADDING.flip(1)}),
    "encoder, causal": lambda: (encoder(norm_first=True), (rows(),), {"mask": CAUSAL, "is_causal": True}),
    "transformer": lambda: (nn.Transformer(16, 4, 1, 2, 32, 0.0, batch_first=True), (rows(), rows(3, 4, 16)), {}),
    "lstm": lambda: (nn.LSTM(16, 6), (rows(),), {}),
    "lstm, both ways, packed": lambda: (nn.LSTM(16, 6, **BOTH), (sequences(), hidden(4, 3, 6, 6)), {}),
    "lstm, projected": lambda: (nn.LSTM(16, 6, proj_size=3, **BOTH), (rows(), hidden(4, 5, 3, 6)), {}),
    "lstm, unbatched": lambda: (nn.LSTM(16, 6, batch_first=True, bias=False), (rows(5, 16),), {}),
    "gru": lambda: (nn.GRU(16, 6, batch_first=True), (rows(), hidden(1, 3, 6)), {}),
    "gru, both ways, packed": lambda: (nn.GRU(16, 6, **BOTH), (sequences(),), {}),
    "rnn": lambda: (nn.RNN(16, 6), (rows(),), {}),
    "rnn, rectified, packed": lambda: (nn.RNN(16, 6, nonlinearity="relu"), (sequences(),), {}),
    "lstm cell": lambda: (nn.LSTMCell(16, 6), (rows(3, 16), (rows(3, 6), rows(3, 6))), {}),
    "gru cell": lambda: (nn.GRUCell(16, 6, bias=False), (rows(3, 16), rows(3, 6)), {}),
    "rnn cell": lambda: (nn.RNNCell(16, 6), (rows(16),), {}),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3), (rows(2, 4, 11),), {}),
    "conv1d, grouped": lambda: (nn.Conv1d(4, 6, 3, 2, 1, 2, 2, bias=False), (rows(2, 4, 11),), {}),
    "conv1d, circular": lambda: (nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (rows(4, 11),), {}),
    "conv3d": lambda: (nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 2)), (rows(2, 4, 5, 6, 7),), {}),
    "conv3d, grouped": lambda: (nn.Conv3d(4, 6, 3, 2, 2, 2, 2, padding_mode="reflect"), (rows(2, 4, 6, 6, 6),), {}),
    "conv3d, same": lambda: (nn.Conv3d(4, 6, (2, 3, 4), padding="same", bias=False), (rows(4, 5, 6, 7),), {}),
    "transposed1d": lambda: (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), (rows(2, 4, 5),), {}),
    "transposed2d": lambda: (nn.ConvTranspose2d(4, 6, (3, 4), (2, 1), (1, 0)), (rows(2, 4, 5, 4),), {}),
    "transposed2d, sized": lambda: (nn.ConvTranspose2d(4, 6, 3, 2, 1), (rows(4, 5, 4), [10, 7]), {}),
    "transposed3d": lambda: (nn.ConvTranspose3d(4, 6, 2, 3, dilation=2, bias=False), (rows(2, 4, 3, 2, 3),), {}),
    "bilinear": lambda: (nn.Bilinear(5, 6, 7), (rows(3, 2, 5), rows(3, 2, 6)), {}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """A module of each kind with arguments: ``module(*args, **kwargs)``."""
    return CASES[request.param]()
