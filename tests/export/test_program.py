"""Traced programs run without spectrim, on batches and texts of other sizes than the example."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

import spectrim

LINES = """
import sys
sys.modules["spectrim"] = sys.modules["transformers"] = None
import torch
from safetensors.torch import load_file, save_file
module = torch.export.load("small.pt2").module()
found = {}
for name, value in load_file("inputs.safetensors").items():
    with torch.no_grad():
        found[name] = CALL
save_file(found, "outputs.safetensors")
"""


def run_alone(folder: Path, inputs: dict[str, Tensor], call: str) -> dict[str, Tensor]:
    """Run ``small.pt2`` on each of ``inputs`` in a process that can import neither spectrim nor transformers."""
    save_file(inputs, folder / "inputs.safetensors")
    code = LINES.replace("CALL", call)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "outputs.safetensors")


@pytest.fixture
def result(net: nn.Module, batches: Any) -> Any:
    return spectrim.compress(net, calibration=batches, algorithm=spectrim.Truncation(ratio=0.5))


@pytest.fixture
def decoder(tiny: Any, token_batches: Any) -> Any:
    model = tiny("llama", tie_word_embeddings=False)
    return spectrim.compress(model, calibration=token_batches, algorithm=spectrim.Truncation(rank=4))


def ids_of(*shape: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_pt2_takes_any_number_of_samples(result: Any, tmp_path: Path) -> None:
    result.export("pt2", tmp_path / "small.pt2")
    inputs = {str(count): torch.randn(count, 3, 8, 8) for count in (1, 2, 5, 16)}
    for name, found in run_alone(tmp_path, inputs, "module(value)").items():
        torch.testing.assert_close(found, result.model.eval()(inputs[name]), atol=1e-5, rtol=1e-4)


def test_pt2_of_a_decoder_takes_any_number_of_texts_and_tokens(decoder: Any, tmp_path: Path) -> None:
    decoder.export("pt2", tmp_path / "small.pt2")
    inputs = {f"{count}x{length}": ids_of(count, length)["input_ids"] for count, length in ((1, 7), (3, 12), (2, 30))}
    call = "module(input_ids=value, attention_mask=torch.ones_like(value))['logits']"
    for name, found in run_alone(tmp_path, inputs, call).items():
        torch.testing.assert_close(found, decoder.model(input_ids=inputs[name]).logits, atol=1e-5, rtol=1e-4)


class OfPackedMatrices(nn.Module):
    """An LSTM, attention with a mask for each head, and an encoder whose padded positions count in a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.recurrent(x)
        x, _ = self.attention(x, x, x, attn_mask=x.new_zeros(4 * x.shape[0], x.shape[1], x.shape[1]))
        padded = (torch.arange(x.shape[1]) > 3).expand(x.shape[:2])
        return self.encoder(x, src_key_padding_mask=padded).mean(1)


def test_pt2_of_modules_that_pack_matrices_takes_any_number_of_samples(tmp_path: Path) -> None:
    batches = [(torch.randn(4, 6, 16), torch.randint(16, (4,)))]
    algorithm = spectrim.Truncation(ratio=0.6)
    result = spectrim.compress(OfPackedMatrices().eval(), calibration=batches, algorithm=algorithm)
    assert {"recurrent.hh_l0", "attention.q_proj", "encoder.layers.0.linear1"} <= set(result.plan)
    result.export("pt2", tmp_path / "small.pt2")
    inputs = {str(count): torch.randn(count, 6, 16) for count in (1, 7)}
    for name, found in run_alone(tmp_path, inputs, "module(value)").items():
        with torch.no_grad():
            torch.testing.assert_close(found, result.model(inputs[name]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_onnx_takes_any_number_of_samples(result: Any, tmp_path: Path, opset: int) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
    result.export("onnx", tmp_path / "small.onnx", opset=opset)
    (stated,) = (one.version for one in onnx.load(tmp_path / "small.onnx").opset_import if one.domain == "")
    assert stated == opset
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    for count in (1, 2, 5, 16):
        inputs = torch.randn(count, 3, 8, 8)
        (found,) = session.run(["output"], {"input": inputs.numpy()})
        np.testing.assert_allclose(found, result.model.eval()(inputs).detach().numpy(), atol=1e-4, rtol=1e-3)


def test_onnx_of_a_decoder_names_its_inputs_and_outputs(decoder: Any, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    decoder.export("onnx", tmp_path / "small.onnx")
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    for shape in ((1, 7), (2, 30)):
        given = ids_of(*shape)
        (found,) = session.run(["logits"], {name: value.numpy() for name, value in given.items()})
        np.testing.assert_allclose(found, decoder.model(**given).logits.detach().numpy(), atol=1e-4, rtol=1e-3)


class OfFourSamples(nn.Module):
    """Reads the size of its batch as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(4, 16)


def test_a_batch_that_is_not_free_is_said(tmp_path: Path) -> None:
    batches = [(torch.randn(4, 16), torch.randint(16, (4,)))]
    result = spectrim.compress(OfFourSamples(), calibration=batches, algorithm=spectrim.Truncation(rank=3))
    with pytest.raises(spectrim.UserError, match="dynamic=False"):
        result.export("pt2", tmp_path / "small.pt2")
    assert not list(tmp_path.iterdir())
    result.export("pt2", tmp_path / "small.pt2", dynamic=False)
    found = run_alone(tmp_path, {"x": batches[0][0]}, "module(value)")
    torch.testing.assert_close(found["x"], result.model(batches[0][0]))


def test_an_example_that_does_not_fit_is_said(result: Any, tmp_path: Path) -> None:
    with pytest.raises(spectrim.UserError, match=r"^the model failed on inputs of shape \(4, 3, 5, 5\), at layer 6"):
        result.export("pt2", tmp_path / "small.pt2", example=torch.randn(4, 3, 5, 5))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_pt2_on_a_gpu_takes_an_example_from_the_processor(result: Any, batches: Any, tmp_path: Path) -> None:
    result.model.cuda()
    result.export("pt2", tmp_path / "small.pt2", example=batches[0][0])
    inputs = torch.randn(5, 3, 8, 8, device="cuda")
    found = torch.export.load(tmp_path / "small.pt2").module()(inputs)
    torch.testing.assert_close(found, result.model.eval()(inputs), atol=1e-4, rtol=1e-3)


def test_onnx_without_its_packages_says_what_to_install(result: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(spectrim.UserError, match=r"spectrim\[export\]"):
        result.export("onnx", tmp_path / "small.onnx")


def test_the_model_is_left_as_it_was(result: Any, tmp_path: Path) -> None:
    result.model.train()
    before = {name: value.clone() for name, value in result.model.state_dict().items()}
    result.export("pt2", tmp_path / "small.pt2")
    assert result.model.training
    assert all(torch.equal(before[name], value) for name, value in result.model.state_dict().items())


class ByValue(nn.Module):
    """Resizes by a number that it reads from its values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        size = 1 + int((self.inside(x) > 0).sum())
        return nn.functional.interpolate(self.inside(x)[:, None, None], size=(size, 2))


def test_a_model_that_cannot_be_traced_is_one_line_and_torch_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = spectrim.compress(ByValue(), calibration=[torch.randn(4, 8)], algorithm=spectrim.Truncation(ratio=0.5))
    with pytest.raises(spectrim.UserError, match=r"^the model cannot be traced by torch.export: ") as refusal:
        result.export("pt2", tmp_path / "x.pt2")
    assert "\n" not in str(refusal.value) and capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_outputs_inside_of_outputs_are_part_of_the_program(tmp_path: Path, tiny: Any) -> None:
    bert = tiny("bert").bert

    class Two(nn.Module):
        """Gives the outputs of an encoder inside of its own, as CLIP does."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = bert

        def forward(self, input_ids: Tensor) -> Any:
            inner = self.encoder(input_ids)
            return type(inner)(pooler_output=inner.pooler_output * 2, hidden_states=(inner,))

    batches = [{"input_ids": torch.randint(3, 50, (3, 6))}]
    result = spectrim.compress(Two(), calibration=batches, algorithm=spectrim.Truncation(ratio=0.5))
    result.export("pt2", tmp_path / "x.pt2")
    found = torch.export.load(tmp_path / "x.pt2").module()(**batches[0])
    assert list(found) == ["pooler_output", "hidden_states.0.last_hidden_state", "hidden_states.0.pooler_output"]
    with torch.no_grad():
        expected = result.model(**batches[0])
    torch.testing.assert_close(found["pooler_output"], expected.pooler_output)
    torch.testing.assert_close(found["hidden_states.0.last_hidden_state"], expected.hidden_states[0].last_hidden_state)


def test_what_the_converter_to_onnx_cannot_do_is_told_without_the_colours_of_a_terminal(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")

    def fails(*_: Any, **__: Any) -> None:
        try:
            raise RuntimeError("\x1b[96mno such\x1b[0m operator\nand more")
        except RuntimeError as cause:
            raise ValueError("it stopped at step 2 of 3. Next steps:") from cause

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(spectrim.UserError, match=r"to ONNX, opset 18: no such operator; export as .pt2.$"):
        result.export("onnx", tmp_path / "x.onnx")


class Holder:
    """Outputs of a class that torch.export may return and not write."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Sampling(nn.Module):
    """Draws a random number in each pass, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.rand(())


class Held(Sampling):
    def forward(self, x: Tensor) -> Any:
        return Holder(self.body(x))


def test_what_no_program_can_be_made_of_is_told_with_its_own_reason(tmp_path: Path) -> None:
    register_pytree_node(Holder, lambda own: ([own.scores], None), lambda parts, _: Holder(next(iter(parts))))
    for model, said in ((Sampling(), "the model gives other outputs at a second pass"), (Held(), "cannot be written")):
        data = [torch.randn(8, 16)]
        result = spectrim.compress(model, calibration=data, algorithm=spectrim.Truncation(rank=4))
        with pytest.raises(spectrim.UserError, match=said):
            result.export("pt2", tmp_path / "small.pt2")
    assert not list(tmp_path.iterdir())
