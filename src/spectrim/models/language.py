"""Any language model of transformers by its name: SmolLM2 and MiniLM from packages, a folder, or a name of the hub."""

from typing import Any

import torch
from torch import nn

from spectrim.errors import UserError
from spectrim.fetch import pretrained


def causal_lm(name: str = "smollm2") -> nn.Module:
    """The decoder ``name``, float32; its output holds logits of shape (N, T, vocabulary).

    ``smollm2``: SmolLM2-135M-Instruct (arXiv 2502.02737) as a package has it, quantised to 4 bits and back.

    Raises ``UserError`` where there is no such model or not all of it, the extra ``language`` is not installed, or a
    download fails.
    """
    model, missing = _opened("AutoModelForCausalLM", name)
    _require_none(missing, name)
    return model


def classifier(name: str = "minilm", num_classes: int = 2) -> nn.Module:
    """The encoder (or decoder) ``name`` with a head of ``num_classes``, float32; its output holds logits (N, classes).

    Where the weights of ``name`` have no such head, as those of ``minilm`` (all-MiniLM-L6-v2, 6 layers), it is drawn at
    random: to be trained.

    Raises ``UserError`` where there is no such model or not all of it, its head is of other classes, the extra
    ``language`` is not installed, or a download fails.
    """
    try:
        model, missing = _opened("AutoModelForSequenceClassification", name, num_labels=num_classes)
    except RuntimeError as error:  # of shapes that differ
        raise UserError(f"{name} has a head of other than {num_classes} classes") from error
    # What pools the tokens goes with the head: a model of tokens alone has neither.
    encoder = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    _require_none(encoder, name)
    return model


def answerer(name: str = "minilm") -> nn.Module:
    """The encoder (or decoder) ``name`` that finds answers in texts, float32; its output holds ``start_logits`` and
    ``end_logits`` of shape (N, T) each.

    Where the weights of ``name`` have no head for that, it is drawn at random: to be trained. Raises ``UserError`` as
    ``classifier`` does.
    """
    model, missing = _opened("AutoModelForQuestionAnswering", name)
    _require_none([key for key in missing if not key.startswith("qa_outputs.")], name)
    return model


def _opened(kind: str, name: str, **settings: Any) -> tuple[Any, list[str]]:
    """The model in eval mode, and which of its parameters were not there and are drawn at random."""
    settings |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    model, info = pretrained.opened(kind, name, **settings)
    return model.eval(), sorted(info["missing_keys"])


def _require_none(missing: list[str], name: str) -> None:
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} parameters of its model, {missing[0]} the first: a shard is missing or its "
            "index is of another checkpoint; fetch both again"
        )
