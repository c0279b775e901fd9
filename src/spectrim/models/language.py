"""Language models of transformers by name: SmolLM2 and MiniLM from packages, a folder, or a name on the hub."""

from typing import Any

import torch
from torch import nn

from spectrim.errors import UserError
from spectrim.fetch import pretrained


def causal_lm(name: str = "smollm2") -> nn.Module:
    """Return the decoder ``name`` in float32. Its output holds ``logits`` of shape (N, T, vocabulary).

    ``name``: ``smollm2`` (SmolLM2-135M-Instruct, arXiv 2502.02737), a folder, or a name on the hub. The package of
    ``smollm2`` holds weights quantised to 4 bits, which are converted back to float32.

    Raises ``UserError`` where the model does not exist or lacks weights, the extra ``language`` is not installed, or a
    download fails.
    """
    model, missing = _opened("AutoModelForCausalLM", name)
    _require_none(missing, name)
    return model


def classifier(name: str = "minilm", num_classes: int = 2) -> nn.Module:
    """Return the encoder or decoder ``name`` with a classification head, in float32.

    Its output holds ``logits`` of shape (N, num_classes). If the weights have no such head, it is initialised at random
    and needs training. This is the case for ``minilm`` (all-MiniLM-L6-v2, 6 layers).

    Raises ``UserError`` where the model does not exist or lacks weights, or its head has another number of classes.
    Raises it also where the extra ``language`` is not installed, or a download fails.
    """
    try:
        model, missing = _opened("AutoModelForSequenceClassification", name, num_labels=num_classes)
    except pretrained.OtherShapes as error:
        raise UserError(f"{name} has a head of other than {num_classes} classes") from error
    # The pooler belongs to the head: a checkpoint without a head may lack both.
    encoder = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    _require_none(encoder, name)
    return model


def answerer(name: str = "minilm") -> nn.Module:
    """Return the encoder or decoder ``name`` with a question answering head, in float32.

    Its output holds ``start_logits`` and ``end_logits``, each of shape (N, T). If the weights have no such head, it is
    initialised at random and needs training. Raises ``UserError`` where the model does not exist or lacks weights, the
    extra ``language`` is not installed, or a download fails.
    """
    model, missing = _opened("AutoModelForQuestionAnswering", name)
    _require_none([key for key in missing if not key.startswith("qa_outputs.")], name)
    return model


def _opened(kind: str, name: str, **settings: Any) -> tuple[Any, list[str]]:
    """Return the model in eval mode, and the names of the parameters that are missing and initialised at random."""
    settings |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    model, info = pretrained.opened(kind, name, **settings)
    return model.eval(), sorted(info["missing_keys"])


def _require_none(missing: list[str], name: str) -> None:
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} parameters of its model, {missing[0]} the first: a shard is missing or its "
            "index is of another checkpoint; fetch both again"
        )
