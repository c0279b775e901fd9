"""Sparse tensors are told by their parts, and indexed as dense ones."""

import pytest
import torch

from spectrim.tools.content import content
from spectrim.tools.sparse import plain_parts, rows_at

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")  # of torch: that they are new, and not checked


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_rows_and_content_follow_the_values(layout: torch.layout) -> None:
    dense = torch.randn(6, 5) * (torch.rand(6, 5) < 0.5)
    sparse, chosen = dense.to_sparse(layout=layout), torch.tensor([3, 0, 0])
    assert torch.equal(rows_at(dense, chosen), dense[chosen])
    assert rows_at(sparse, chosen).layout is layout
    assert torch.equal(rows_at(sparse, chosen).to_dense(), dense[chosen])
    assert content([sparse]) == content([sparse.clone()]) != content([2 * sparse])
    plain_parts(sparse)[-1].zero_()  # they are in its memory
    assert not sparse.to_dense().any()
    assert plain_parts(dense)[0] is dense


def test_an_empty_matrix_that_is_too_large_for_memory_has_a_content() -> None:
    large = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**7, 10**7))
    assert content([large]) == content([large.clone()])
