"""Text that a decoder writes itself: calibration without data, on texts that the model is at home in."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import device_of, evaluating
from spectrim.data.text import TextSplit, without_padding
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.tools.settings import require_seed

AT_ONCE = 32  # blocks written together: a step of a small decoder takes hardly longer for all of them than for one


def own_text(model: nn.Module, blocks: int = 64, context: int = 256, seed: int = 0, batch_size: int = 8) -> TextSplit:
    """Return blocks of text that ``model`` writes, as batches to calibrate on.

    Each block is a sample of the model's own distribution: no temperature, and no token is left out. On such text the
    mean gradient of the loss is zero but for chance. LLM-QAT (arXiv 2305.17888) calibrates quantisation on it.

    ``model``: a decoder of transformers.
    ``blocks``: number of blocks of ``context`` tokens. The first token of each is the one that begins a text.
    ``seed``: seed of the samples. Machines that round otherwise write other texts.

    Raises ``UserError`` where the model writes no text, has no token that begins one, or has too few positions.
    """
    first = _first_token(model, context)
    for name, value in (("blocks", blocks), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
    require_seed("seed", seed)
    made, device = list[Tensor](), device_of(model)
    with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for begun in range(0, blocks, AT_ONCE):
            start_N1 = torch.full((min(AT_ONCE, blocks - begun), 1), first, device=device)
            made.append(_continued(model, start_N1, context))
    ids = torch.cat(made)
    identity = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    return TextSplit(lambda: without_padding(ids), f"own {identity}", batch_size, "own text")


def mixed(first: TextSplit, second: TextSplit, seed: int) -> TextSplit:
    """Return the blocks of two splits in one, in a random order that ``seed`` determines."""
    order = torch.randperm(len(first.labels) + len(second.labels), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([first.tokens.ids, second.tokens.ids])[order]
    identity = f"{first.identity} {second.identity} {seed}"
    return TextSplit(lambda: without_padding(ids), identity, first.batch_size, first.name)


def _first_token(model: nn.Module, context: int) -> int:
    """Return the token that begins a text. Raises ``UserError`` where the model cannot write ``context`` tokens."""
    if not isinstance(model, pretrained.library().GenerationMixin) or model.config.is_encoder_decoder:
        raise UserError(f"a {type(model).__name__} does not write text of its own; calibrate it on texts")
    longest = getattr(model.config, "max_position_embeddings", None)
    if type(context) is not int or context < 2 or (longest is not None and context > longest):
        most = "" if longest is None else f" and at most {longest}, the positions of the model"
        raise UserError(f"context must be a whole number of at least 2{most}; got {context!r}")
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(model.config, name, None)
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    raise UserError("the configuration of the model names no token that begins or ends a text; set its bos_token_id")


def _continued(model: Any, start_N1: Tensor, context: int) -> Tensor:
    """Return ``context`` tokens for each row of ``start_N1``, that token included, on the CPU."""
    kept = model.generation_config  # may prefer some tokens, and stops at the end of a text
    model.generation_config = pretrained.library().GenerationConfig()
    try:
        with torch.no_grad():
            written = model.generate(
                start_N1,
                attention_mask=torch.ones_like(start_N1),
                max_new_tokens=context - 1,
                do_sample=True,
                top_k=0,
                pad_token_id=int(start_N1[0]),
            )
    finally:
        model.generation_config = kept
    return written.cpu()
