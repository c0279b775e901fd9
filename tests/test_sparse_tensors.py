"""Models with sparse buffers or inputs are compressed as their dense twins, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.refitted import Refitted
from spectrim.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")  # of torch: that they are new, and not checked
NODES, FEATURES = 20, 12
LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc]


def adjacency() -> Tensor:
    edges = (torch.rand(NODES, NODES) < 0.2).float() + torch.eye(NODES)
    return edges / edges.sum(1, keepdim=True)


class Convolved(nn.Module):
    """A graph convolution whose adjacency is a buffer, or an input where there is no buffer."""

    def __init__(self, adjacency: Tensor | None = None, persistent: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 16), nn.Linear(16, 5)
        self.register_buffer("adjacency", adjacency, persistent)

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        edges: Any = self.adjacency if adjacency is None else adjacency
        return self.second(edges @ F.relu(self.first(edges @ x)))


def of(dense: nn.Module, like: nn.Module) -> nn.Module:
    """``like`` with the weights of ``dense``."""
    like.load_state_dict({k: v for k, v in dense.state_dict().items() if k != "adjacency"}, strict=False)
    return like.eval()


ALGORITHMS = {
    "lossless": spectrim.Lossless(),
    "truncation": spectrim.Truncation(ratio=0.5),
    "knapsack": "knapsack",
    "refitted": Refitted(spectrim.Truncation(ratio=0.5), samples=40),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_sparse_adjacency_compresses_as_the_dense_one(algorithm: Any, layout: torch.layout) -> None:
    edges, data = adjacency(), [(torch.randn(NODES, FEATURES), torch.randint(5, (NODES,))) for _ in range(2)]
    sparse, size = edges.to_sparse(layout=layout), {"params_kept": 0.7} if isinstance(algorithm, str) else {}
    twin = Convolved(edges).eval()
    expected = spectrim.compress(twin, calibration=data, algorithm=algorithm, **size)
    held = spectrim.compress(of(twin, Convolved(sparse)), calibration=data, algorithm=algorithm, **size)
    given = spectrim.compress(
        of(twin, Convolved()), calibration=[((x, sparse), y) for x, y in data], algorithm=algorithm, **size
    )
    x = torch.randn(NODES, FEATURES)
    for result, inputs in ((held, (x,)), (given, (x, sparse))):
        assert result.plan == expected.plan
        torch.testing.assert_close(result.model(*inputs), expected.model(x), atol=1e-4, rtol=1e-3)
        assert result.report["predicted_change"].notna().all()
        assert result.cost.params == expected.cost.params


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_sparse_buffer_is_made_by_the_model_or_refused_by_name(layout: torch.layout, tmp_path: Path) -> None:
    sparse, x = adjacency().to_sparse(layout=layout), torch.randn(NODES, FEATURES)
    data = [(x, torch.randint(5, (NODES,)))]
    result = spectrim.compress(Convolved(sparse), calibration=data, algorithm=spectrim.Truncation(ratio=0.5))
    with pytest.raises(UserError, match=r"^adjacency has the layout torch.sparse_\w+, which no file holds; [^\n]*$"):
        result.save(tmp_path / "held.safetensors")
    made = Convolved(sparse, persistent=False).eval()
    result = spectrim.compress(made, calibration=data, algorithm=spectrim.Truncation(ratio=0.5))
    result.save(tmp_path / "made.safetensors")
    loaded = spectrim.load(tmp_path / "made.safetensors", into=Convolved(sparse, persistent=False).eval())
    assert torch.equal(loaded(x), result.model(x))
    with pytest.raises(UserError, match="is of another architecture"):
        spectrim.load(tmp_path / "made.safetensors", into=Convolved(sparse))


class OfWords(nn.Module):
    """A net on counts of words, which are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(30, 16) / 5)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x @ self.words)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sparse_samples_give_the_plan_of_dense_ones(layout: torch.layout) -> None:
    rows = [torch.randn(16, 30).relu() * (torch.rand(16, 30) < 0.3) for _ in range(3)]
    data = [(x, torch.randint(5, (16,))) for x in rows]
    model, settings = OfWords().eval(), spectrim.Joint(params_kept=0.75, refit=48)
    sparse = [(x.to_sparse(layout=layout), y) for x, y in data]
    expected, found = (spectrim.compress(model, calibration=own, algorithm=settings) for own in (data, sparse))
    assert found.plan == expected.plan
    torch.testing.assert_close(found.model(rows[0]), expected.model(rows[0]), atol=1e-4, rtol=1e-3)
    assert "parameters" in str(spectrim.compress(model, calibration=sparse, params_kept=0.75, dry_run=True))
