"""Tell which rows inside a model are padding.

A mask names padding by its shape: it is that of every layer with as many rows. Two sequences may be equally long, as
those of an encoder and a decoder, or a text and the patches of an image. Then the model tells: rows of padding change
where its tokens change, and other rows do not see them.
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, first_argument, forward
from spectrim.errors import UserError
from spectrim.tools.hooks import hooked

PREFIXES = {"attention_mask": "", "decoder_attention_mask": "decoder_"}  # of the inputs that a mask belongs to
CHANGED = 1e-6  # of the size of the rows: near-uniform attention hardly sees its query; what is masked moves nothing

Codes = dict[nn.Module, list[Tensor | None]]  # by call: a number for each row of padding; None: of another shape


class Padding:
    """The masks of one batch, 0 at padding, for the calls of layers in a pass over it.

    ``shared``: masks whose padding is not told by their shape: by layer, whether each call has it; None: unknown.
    """

    def __init__(self, masks: Mapping[str, Tensor], shared: Mapping[str, Mapping[nn.Module, list[bool]]]) -> None:
        self.masks, self.shared = masks, shared
        self.calls = Counter[nn.Module]()

    def at_next_call(self, layer: nn.Module, positions: torch.Size) -> Tensor | None:
        """Return the mask of the rows of the next call of ``layer``, of shape ``positions``; None without padding."""
        call = self.calls[layer]
        self.calls[layer] += 1
        for name, mask in self.masks.items():
            told = self.shared.get(name, {}).get(layer, [])
            mask = mask.flatten(0, -2) if mask.ndim == 3 else mask  # as of several choices a sample
            if mask.shape == positions and (call >= len(told) or told[call]):
                return mask
        return None


NO_PADDING = Padding({}, {})


def padding_of(model: nn.Module, layers: Iterable[nn.Module], inputs: Inputs) -> Padding:
    """Return the padding of a batch at ``layers``: linear layers and embeddings of ``model``, which is in eval mode.

    ``model`` runs twice for each mask whose shape does not tell its rows.
    """
    inputs = _named(model, inputs)
    found = {name: mask_of(inputs, name) for name in PREFIXES}
    masks = {name: mask for name, mask in found.items() if mask is not None}
    unclear = [name for name, mask in masks.items() if _is_unclear(inputs, name, mask)]
    if not unclear:
        return Padding(masks, {})
    layers = [layer for layer in dict.fromkeys(layers) if isinstance(layer, nn.Linear | nn.Embedding)]
    shared = {name: _told(model, layers, inputs, name, masks[name]) for name in unclear}
    return Padding(masks, shared)


def _named(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return several inputs by the names that ``forward`` of ``model`` has for them; any others as they are."""
    if isinstance(inputs, Tensor | Mapping) or not isinstance(inputs, tuple | list):
        return inputs
    parameters = inspect.signature(model.forward).parameters.values()
    names = [own.name for own in parameters if own.kind is own.POSITIONAL_OR_KEYWORD]
    return dict(zip(names, inputs, strict=False)) if len(inputs) <= len(names) else inputs


def mask_of(inputs: Inputs, name: str = "attention_mask") -> Tensor | None:
    """Return the mask ``name`` of the inputs, 0 at padding, or None if they have none.

    A mask of numbers to add to scores is 0 elsewhere and below 0 at padding.
    """
    mask = inputs.get(name) if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.is_floating_point() and not (mask > 0).any():
        return mask == 0
    return mask


def _is_unclear(inputs: Mapping[str, Any], name: str, mask: Tensor) -> bool:
    """Return whether rows of the shape of a mask with padding may be those of another input."""
    own = _own(inputs, name, mask)
    others = [value for key, value in inputs.items() if key not in own and key not in PREFIXES]
    tensors = [other for other in others if isinstance(other, Tensor)]
    alike = any(other.shape[:2] == mask.shape or other.ndim > 2 for other in tensors)
    return mask.ndim == 2 and alike and not bool(mask.bool().all())


def _own(inputs: Mapping[str, Any], name: str, mask: Tensor) -> dict[str, Tensor]:
    """Return the inputs that hold the sequence of a mask: ids of its shape, or else numbers."""
    own = {
        key: value
        for key, value in inputs.items()
        if isinstance(value, Tensor) and value.shape[:2] == mask.shape and key not in PREFIXES
        if key.startswith("decoder_") == (PREFIXES[name] == "decoder_")
    }
    return {key: value for key, value in own.items() if not value.is_floating_point()} or own


@torch.no_grad()
def _told(
    model: nn.Module, layers: Iterable[nn.Module], inputs: Mapping[str, Any], name: str, mask: Tensor
) -> dict[nn.Module, list[bool]]:
    """Return, for each call of each layer, whether its rows change with the padding; nothing where it cannot change."""
    own = _own(inputs, name, mask)
    changed = {key: _with_other_padding(value, mask) for key, value in own.items()}
    if all(torch.equal(own[key], value) for key, value in changed.items()):
        return {}
    try:
        before, after = (_codes(model, layers, {**inputs, **values}, mask) for values in ({}, changed))
    except UserError:  # as where the number of some tokens must fit an image
        return {}
    return {
        layer: [_differ(*pair) for pair in zip(codes, after[layer], strict=True)]
        for layer, codes in before.items()
        if len(codes) == len(after.get(layer, []))
    }


def _with_other_padding(values: Tensor, mask: Tensor) -> Tensor:
    """Return ``values`` with those at padding replaced: an id by another of its sample, a number by a larger one."""
    if values.is_floating_point():
        return torch.where(mask.bool().view(*mask.shape, *[1] * (values.ndim - 2)), values, values + 1)
    values = values.clone()
    for row, kept in zip(values, mask.bool(), strict=True):
        others = row[kept][row[kept] != row[~kept][0]] if row.ndim == 1 and not kept.all() else row[:0]
        if len(others):
            row[~kept] = others[0]
    return values


def _codes(model: nn.Module, layers: Iterable[nn.Module], inputs: Mapping[str, Any], mask: Tensor) -> Codes:
    """Return a number for each row at padding, at each call of the layers that has as many rows as the mask."""
    codes: Codes = {}

    def note(layer: nn.Module, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs)
        rows = x if isinstance(layer, nn.Linear) else x.unsqueeze(-1)
        at_padding = rows[~mask.bool()].double() if rows.shape[:-1] == mask.shape else None
        # Norms and sums of normalised rows are all the same.
        weights = None if at_padding is None else torch.arange(1, rows.shape[-1] + 1).to(at_padding).sin()
        codes.setdefault(layer, []).append(None if at_padding is None else at_padding @ weights)

    with hooked(before=[(layer, partial(note, layer)) for layer in layers]):
        forward(model, inputs)
    return codes


def _differ(before: Tensor | None, after: Tensor | None) -> bool:
    return before is None or after is None or bool((before - after).norm() > CHANGED * before.norm())
