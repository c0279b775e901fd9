"""Our own numbers are exact whatever is set, and settings of torch that change those of a model are told."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from spectrim.batches import forward
from spectrim.tools.hooks import hooked
from spectrim.tools.precision import as_given, exact, wide
from spectrim.tools.precision import settings_of_numbers as told

TOLD = "import torch; from spectrim.tools.precision import settings_of_numbers as told; "


@pytest.mark.parametrize(
    ("set_by", "expected"),
    [
        ("pass", []),
        ("torch.set_default_dtype(torch.float64)", ["default torch.float64"]),
        ("torch.set_float32_matmul_precision('medium')", ["cuda products tf32", "cpu products bf16"]),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", ["cpu products bf16"]),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", ["cuda products tf32"]),
        ("torch.backends.cuda.matmul.allow_tf32 = True", ["cuda products tf32"]),
        ("torch.set_float32_matmul_precision('high'); torch.set_float32_matmul_precision('highest')", []),
        ("torch.set_autocast_enabled('cpu', True)", ["autocast cpu torch.bfloat16"]),
    ],
)
def test_each_setting_that_is_not_the_usual_is_told(set_by: str, expected: list[str]) -> None:
    code = f"{TOLD}{set_by}; print(told())"  # in a process of its own, because some cannot be set back
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)


def multiplied() -> torch.dtype:
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_our_own_numbers_are_exact_and_those_of_a_model_as_the_caller_wants() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with exact():
            assert multiplied() == torch.float32
            with as_given():  # a call of the model
                assert multiplied() == torch.bfloat16
                with exact():  # a hook of ours
                    assert multiplied() == torch.float32
                assert multiplied() == torch.bfloat16
            assert multiplied() == torch.float32 and told() == ["autocast cpu torch.bfloat16"]
        assert multiplied() == torch.bfloat16


def test_a_hook_is_exact_inside_of_a_model_that_enters_autocast() -> None:
    seen: list[torch.dtype] = []

    class Entering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inside(x) @ torch.ones(2, 2)

    net = Entering()
    with exact(), hooked(before=[(net.inside, lambda *_: seen.append(multiplied()))]):
        assert forward(net, torch.ones(1, 2)).dtype == torch.bfloat16 and multiplied() == torch.float32
    assert seen == [torch.float32]


def test_an_error_leaves_autocast_as_it_was() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for block in (exact, as_given):
            with pytest.raises(ValueError), exact(), block():
                raise ValueError
            assert multiplied() == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_wide_numbers_have_32_bits_or_more_and_64_where_products_are_coarse(dtype: torch.dtype) -> None:
    x = torch.ones(2, dtype=dtype)
    assert wide(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (wide(x) is x) == (dtype in (torch.float32, torch.float64))
    torch.set_float32_matmul_precision("medium")
    try:
        assert wide(x).dtype == torch.float64
    finally:
        torch.set_float32_matmul_precision("highest")
