"""The digest by which spectra and gradients are remembered tells all values apart, extra state among them."""

import warnings
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.decomposers.spectrum import content, spectrum_of
from spectrim.decomposers.svd import SVD

STATES: list[Any] = [
    *({"version": 3}, {"version": 4}, {"scale": torch.ones(2)}, {"scale": torch.zeros(2)}, [torch.ones(2)], b"3", 3),
    *(BytesIO(b"state"), BytesIO(b"other"), None, (1, "two"), torch.eye(2).to_sparse(), torch.eye(3).to_sparse()),
]


def test_every_value_has_a_digest_of_its_own_that_repeats() -> None:
    digests = [content([state]) for state in STATES]
    assert len(set(digests)) == len(STATES) and digests == [content([state]) for state in STATES]


def test_quantised_values_are_told_apart() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once in a process that such values are deprecated
        one, other = (torch.quantize_per_tensor(torch.full((2,), x), 0.1, 0, torch.qint8) for x in (0.0, 1.0))
    assert content([one]) == content([one.clone()]) != content([other])


class WithState(nn.Module):
    """A module with extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.version = nn.Linear(16, 24), nn.Linear(24, 4), 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x)))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": self.version}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.version = state["version"]


@pytest.mark.parametrize("decomposer", [SVD(), spectrim.WhitenedSVD(samples=8)], ids=str)
@pytest.mark.parametrize("algorithm", [spectrim.Truncation(ratio=0.5), spectrim.Joint(params_kept=0.6, samples=8)])
def test_a_model_with_extra_state_is_saved_and_loaded(algorithm: Any, decomposer: Any, tmp_path: Any) -> None:
    data: Any = [(torch.randn(8, 16), torch.randint(0, 4, (8,)))]
    model = WithState()
    result = spectrim.compress(model, calibration=data, verification=data, algorithm=algorithm, decomposer=decomposer)
    assert result.plan and result.model.version == 3
    result.save(tmp_path / "small.safetensors")
    loaded = spectrim.load(tmp_path / "small.safetensors", into=WithState())
    assert torch.equal(loaded(data[0][0]), result.model(data[0][0]))


def test_a_spectrum_is_remembered_while_weight_and_bias_stay() -> None:
    layer = nn.Linear(6, 4)
    first = spectrum_of(layer, SVD())
    assert spectrum_of(layer, SVD()) is first
    layer.weight.data[0, 0] += 1
    assert spectrum_of(layer, SVD()) is not first
