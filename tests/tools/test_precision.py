"""Settings of torch that change numbers are told, however they are set."""

import subprocess
import sys

import pytest

TOLD = "import torch; from spectrim.tools.precision import settings_of_numbers as told; "


@pytest.mark.parametrize(
    ("set_by", "told"),
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
def test_each_setting_that_is_not_the_usual_is_told(set_by: str, told: list[str]) -> None:
    code = f"{TOLD}{set_by}; print(told())"  # in a process of its own, because some cannot be set back
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(told)
