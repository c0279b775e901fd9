"""Sparse tensors: they have no memory of their own, and torch takes few of their parts by an index."""

import torch
from torch import Tensor

BY_ROWS, BY_COLUMNS = (torch.sparse_csr, torch.sparse_bsr), (torch.sparse_csc, torch.sparse_bsc)


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the indices and the values of a sparse tensor, in its memory and without a history; else the tensor."""
    own = tensor.detach()
    if own.layout is torch.sparse_coo:
        return [own._indices(), own._values()]
    if own.layout in BY_ROWS:
        return [own.crow_indices(), own.col_indices(), own.values()]
    if own.layout in BY_COLUMNS:
        return [own.ccol_indices(), own.row_indices(), own.values()]
    return [tensor]


def rows_at(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Return ``tensor[chosen]``, in the layout of ``tensor``."""
    if tensor.layout is torch.strided:
        return tensor[chosen]
    return tensor.to_sparse_coo().index_select(0, chosen).to_sparse(layout=tensor.layout)
