"""Whatever its layers are, a checkpoint compressed tensor by tensor is the model that is compressed in memory."""

import json
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import spectrim


def write(model: nn.Module, folder: Path, shards: int) -> Path:
    """Write the tensors of ``model`` in turn to as many shards, so that weight and bias of a layer lie apart."""
    folder.mkdir()
    places = {name: f"part{number % shards}.safetensors" for number, name in enumerate(model.state_dict())}
    for file in set(places.values()):
        save_file({name: own for name, own in model.state_dict().items() if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.double()(x)


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(3, 40), min_size=2, max_size=5),
    rule=st.sampled_from(["ratio", "params_kept"]),
    kept=st.floats(0.3, 0.95),
    factors=st.sampled_from(["plain", "pivoted"]),
    shards=st.integers(1, 3),
)
@example(widths=[7, 3, 4], rule="params_kept", kept=0.875, factors="pivoted", shards=1)  # a layer of full rank meets it
def test_it_is_what_truncation_makes_in_memory(
    widths: list[int], rule: str, kept: float, factors: Any, shards: int
) -> None:
    def made() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)))

    torch.manual_seed(sum(widths))
    model, x = made(), torch.randn(5, widths[0], dtype=torch.float64)
    how: dict[str, float] = {rule: kept}
    try:
        inside = spectrim.compress(
            model, algorithm=spectrim.Truncation(**how), decomposer=spectrim.SVD(factors=factors)
        )
    except spectrim.UserError:
        inside = None
    with TemporaryDirectory() as scratch:
        folder, out = write(model, Path(scratch) / "dense", shards), Path(scratch) / "out"
        try:
            plan = spectrim.compress_checkpoint(folder, out, factors=factors, **how)
        except spectrim.UserError:
            assert inside is None
            return
        assert inside is not None and plan == inside.plan
        loaded = spectrim.load(out, into=made())
        torch.testing.assert_close(outputs(loaded, x), outputs(inside.model, x), atol=1e-4, rtol=1e-4)
