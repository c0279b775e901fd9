"""The compact convolutional transformer."""

import pytest
import torch

from spectrim.api import compress
from spectrim.errors import UserError
from spectrim.models.cct import CCT


@pytest.fixture
def net() -> CCT:
    torch.manual_seed(0)
    return CCT(depth=1, width=16, heads=2, hidden=16).eval()


def test_the_default_has_some_300_000_parameters() -> None:
    assert sum(parameter.numel() for parameter in CCT().parameters()) == 283_723


def test_attention_is_that_of_torch(net: CCT) -> None:
    own = net.blocks[0].attention
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([own.query.weight, own.key.weight, own.value.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(own.out.state_dict())
        x = torch.randn(2, 5, 16)
        torch.testing.assert_close(own(x), theirs(x, x, x)[0])


def test_tokens_know_their_place(net: CCT) -> None:
    image = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(net(image), net(image.flip(3)))
    with torch.no_grad():
        net.positions.zero_()
        net.conv1.weight.copy_(net.conv1.weight.mean((2, 3), keepdim=True).expand_as(net.conv1.weight))
        net.conv2.weight.copy_(net.conv2.weight.mean((2, 3), keepdim=True).expand_as(net.conv2.weight))
        far = torch.zeros(1, 3, 32, 32)
        far[..., 8:12, 8:12] = 1
        torch.testing.assert_close(net(far), net(far.roll(8, 3)))


def test_positions_are_interpolated_for_images_of_another_size(net: CCT) -> None:
    half = CCT(depth=1, width=16, heads=2, hidden=16, side=4).eval()
    half.load_state_dict(net.state_dict() | {"positions": half.positions.detach()})
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert not torch.allclose(net(image), half(image))
        net.positions.fill_(0.5)  # which no interpolation changes
        half.positions.fill_(0.5)
        torch.testing.assert_close(net(image), half(image))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="heads that divide width, got 2, 3, 128"):
        CCT(heads=3)


def test_every_matrix_of_a_block_is_in_reach() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    result = compress(CCT(), calibration=[(images, labels)], params_kept=0.5)
    layers = [f"attention.{name}" for name in ("query", "key", "value", "out")] + ["fc1", "fc2"]
    assert {f"blocks.{block}.{layer}" for block in range(2) for layer in layers} <= dict(result.plan.kept).keys()
    assert sum(parameter.numel() for parameter in result.model.parameters()) <= 283_723 / 2
