"""A factored convolution computes the same whichever way the numbers lie in memory, and passes the way on."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from spectrim.factored.forms import Form

FORMS = ["channel", "channel in 2", "spatial", "vertical", "tucker 3x3", "pivoted channel", "pivoted spatial"]
ORDERS = [torch.contiguous_format, torch.channels_last]


def filled(form: str, dense: nn.Module) -> Any:
    layer: Any = Form.from_text(form).layer_for(dense, 3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 1), (1, 3), (1, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_the_order_in_memory_changes_nothing(form: str, kernel: Any, groups: int, order: Any) -> None:
    dense = nn.Conv2d(24, 32, kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=groups)
    layer = filled(form, dense)
    exact = copy.deepcopy(layer).double()
    ours, theirs = (copy.deepcopy(own).to(memory_format=order) for own in (layer, dense))
    for given in ORDERS:
        x = torch.randn(2, 24, 9, 8).contiguous(memory_format=given)
        with torch.no_grad():
            y = ours(x)
            torch.testing.assert_close(y, exact(x.double()).float(), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.dense_again()(x), y, atol=1e-4, rtol=1e-4)
            assert y.is_contiguous() == theirs(x).is_contiguous()
