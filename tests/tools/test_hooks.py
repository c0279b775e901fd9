"""Hooks see the calls of their own pass, and are gone after the block."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectrim.tools.hooks import hooked


def elsewhere(call: Any) -> Any:
    """Return what ``call`` returns in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_hooks_get_arguments_and_output_and_another_thread_calls_none() -> None:
    net, x, seen = nn.Linear(2, 3), torch.randn(4, 2), list[Any]()
    expected = net(x)

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    def after(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        seen.append((args, kwargs))
        return 2 * output

    with hooked(before=[(net, before)], after=[(net, after)]):
        assert net(input=x).equal(2 * expected)
        assert elsewhere(lambda: net(x)).equal(expected)
    assert len(seen) == 2 and all(args == () and kwargs["input"] is x for args, kwargs in seen)
    assert net(x).equal(expected)


@pytest.mark.parametrize("fails", ["in the block", "on the way to it"])
def test_no_hook_stays_after_an_error(fails: str) -> None:
    net = nn.Linear(2, 3)

    def modules() -> Any:
        yield net, lambda *_: None
        if fails == "on the way to it":
            raise ValueError(fails)

    with pytest.raises(ValueError, match=fails), hooked(before=modules()):
        raise ValueError(fails)
    assert not net._forward_pre_hooks


def test_a_checkpointed_part_is_repeated_with_its_hooks_in_whatever_thread_goes_back() -> None:
    """On a card it is a thread of torch; here it is one that starts the way back."""
    net, x = nn.Linear(2, 3), torch.randn(4, 2, requires_grad=True)
    with hooked(after=[(net, lambda *given: given[-1].square().sin())]):
        loss = checkpoint(net, x, use_reentrant=False).sum()
        elsewhere(loss.backward)
    y = net(x.detach())
    torch.testing.assert_close(x.grad, (2 * y * y.square().cos()) @ net.weight)
