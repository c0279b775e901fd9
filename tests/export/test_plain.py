"""The folder of plain layers is read by torch and safetensors alone."""

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import spectrim
from spectrim.decomposers.spectrum import Decomposer
from spectrim.export.plain import plain_model
from spectrim.factored.base import FactoredLayer

NET = """
from torch import nn
model = nn.Sequential(
    nn.Conv2d(3, 12, 3, padding=1, bias=False),
    nn.BatchNorm2d(12),
    nn.ReLU(),
    nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(16 * 4 * 4, 24),
    nn.ReLU(),
    nn.Linear(24, 5),
)
"""
ALONE = "import sys; sys.modules['spectrim'] = None; sys.path.insert(0, '.')"


def run_without_spectrim(code: str, folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run ``code`` where spectrim cannot be imported; it reads ``inputs`` and makes ``outputs``."""
    save_file(inputs, folder / "inputs.safetensors")
    lines = [
        ALONE,
        "import torch",
        "from safetensors.torch import load_file, save_file",
        "inputs = load_file('inputs.safetensors')",
        code,
        "save_file(outputs, 'outputs.safetensors')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "outputs.safetensors")


DECOMPOSERS = [
    spectrim.SVD(),
    spectrim.SVD(view="spatial"),
    spectrim.Tucker2(),
    spectrim.SubspaceSVD(subspaces=2),
]


@pytest.mark.parametrize("decomposer", DECOMPOSERS, ids=repr)
def test_it_loads_where_spectrim_is_not_installed(
    net: nn.Module, batches: Any, decomposer: Decomposer, tmp_path: Path
) -> None:
    truncation = spectrim.Truncation(ratio=0.5)
    result = spectrim.compress(net, calibration=batches, algorithm=truncation, decomposer=decomposer)
    assert result.plan
    result.export("plain", tmp_path / "small")
    code = f"{NET}\nfrom small import load\nwith torch.no_grad(): outputs = {{'y': load(model)(inputs['x'])}}"
    inputs = batches[0][0]
    found = run_without_spectrim(code, tmp_path, {"x": inputs})["y"]
    with torch.no_grad():
        torch.testing.assert_close(found, result.model.eval()(inputs), atol=1e-5, rtol=1e-4)


def test_the_plain_model_is_as_small_and_shares_the_parameters(net: nn.Module) -> None:
    result = spectrim.compress(net, algorithm=spectrim.Truncation(ratio=0.5))
    plain = plain_model(result.model)
    assert not any(isinstance(module, FactoredLayer) for module in plain.modules())
    assert set(map(id, plain.parameters())) == set(map(id, result.model.parameters()))
    assert sum(map(torch.numel, plain.parameters())) < sum(map(torch.numel, net.parameters()))


@pytest.mark.parametrize("whole", [0.0, 0.9])
def test_embeddings_become_plain(tiny: Any, token_batches: Any, tmp_path: Path, whole: float) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    decomposer = spectrim.WhitenedSVD(view="channel", embeddings=True, whole=whole)
    algorithm = spectrim.Truncation(rank=4)
    result = spectrim.compress(model, calibration=token_batches, algorithm=algorithm, decomposer=decomposer)
    assert "model.embed_tokens" in result.plan
    result.export("plain", tmp_path / "small")
    ids = token_batches[0][0]
    with torch.no_grad():
        torch.testing.assert_close(plain_model(result.model)(**ids).logits, result.model(**ids).logits)


def test_tied_weights_stay_tied(tiny: Any, token_batches: Any, tmp_path: Path) -> None:
    result = spectrim.compress(tiny("llama"), calibration=token_batches, algorithm=spectrim.Truncation(rank=4))
    result.export("plain", tmp_path / "small")
    assert "lm_head.weight" not in load_file(tmp_path / "small" / "model.safetensors")
    sys.path.insert(0, str(tmp_path))
    try:
        loaded = __import__("small").load(tiny("llama"))
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["small"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = token_batches[0][0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**ids).logits, result.model(**ids).logits)


class ReadsItsLayer(nn.Module):
    """Computes with the width that a layer says it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / self.layer.in_features


def test_a_model_that_reads_its_layers_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    batches = [(torch.randn(4, 16), torch.randint(16, (4,)))]
    result = spectrim.compress(ReadsItsLayer(), calibration=batches, algorithm=spectrim.Truncation(rank=3))
    with pytest.raises(spectrim.UserError, match='in_features.*export as "pt2"'):
        result.export("plain", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_names_of_layers_are_quoted(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict([("a'), 'b", nn.Linear(16, 16))]))
    result = spectrim.compress(model, algorithm=spectrim.Truncation(rank=3))
    result.export("plain", tmp_path / "small")
    code = (tmp_path / "small" / "__init__.py").read_text()
    given: dict[str, Any] = {"__name__": "small", "__file__": str(tmp_path / "small" / "__init__.py")}
    exec(code, given)
    assert list(given["LAYERS"]) == ["a'), 'b"]


def test_weights_of_another_model_are_refused(net: nn.Module, tmp_path: Path) -> None:
    spectrim.compress(net, algorithm=spectrim.Truncation(ratio=0.5)).export("plain", tmp_path / "small")
    code = (
        "from torch import nn\nfrom small import load\n"
        "try:\n    load(nn.Sequential(*[nn.Linear(3, 3) for _ in range(12)]))\n    outputs = {}\n"
        "except RuntimeError:\n    outputs = {'refused': torch.ones(1)}"
    )
    assert "refused" in run_without_spectrim(code, tmp_path, {"x": torch.ones(1)})


def test_another_kind_is_refused(net: nn.Module, tmp_path: Path) -> None:
    result = spectrim.compress(net, algorithm=spectrim.Truncation(ratio=0.5))
    with pytest.raises(spectrim.UserError, match="plain, pt2, onnx, not 'tflite'"):
        result.export("tflite", tmp_path / "small")  # type: ignore[arg-type]
    with pytest.raises(spectrim.UserError, match="pass example="):
        result.export("pt2", tmp_path / "small.pt2")
    assert not list(tmp_path.iterdir())


def test_a_module_that_torch_has_not_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(24, 5))
    result = spectrim.compress(model, calibration=[torch.randn(4, 8, 5)], algorithm=spectrim.Truncation(ratio=0.5))
    with pytest.raises(spectrim.UserError, match='^0 is now an UnpackedConv1d, which torch has not; export as "pt2"$'):
        result.export("plain", tmp_path / "small")
    assert not list(tmp_path.iterdir())
    result.export("pt2", tmp_path / "small.pt2")
    x = torch.randn(6, 8, 5)
    torch.testing.assert_close(torch.export.load(tmp_path / "small.pt2").module()(x), result.model(x))
