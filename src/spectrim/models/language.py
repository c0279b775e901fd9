"""Any language model of transformers by its name: SmolLM2 and MiniLM from packages, a folder, or a name of the hub."""

import torch
from torch import nn

from spectrim import pretrained
from spectrim.errors import UserError


def causal_lm(name: str = "smollm2") -> nn.Module:
    """The decoder ``name``, float32; its output holds logits of shape (N, T, vocabulary).

    ``smollm2``: SmolLM2-135M-Instruct (arXiv 2502.02737) as a package has it, quantised to 4 bits and back.

    Raises ``UserError`` where there is no such model, the extra ``language`` is not installed, or a download fails.
    """
    settings = {"dtype": torch.float32, "use_safetensors": True}
    return pretrained.opened("AutoModelForCausalLM", name, **settings).eval()


def classifier(name: str = "minilm", num_classes: int = 2) -> nn.Module:
    """The encoder (or decoder) ``name`` with a head of ``num_classes``, float32; its output holds logits (N, classes).

    Where the weights of ``name`` have no such head, as those of ``minilm`` (all-MiniLM-L6-v2, 6 layers), it is drawn at
    random: to be trained.

    Raises ``UserError`` where there is no such model, its head is of other classes, the extra ``language`` is not
    installed, or a download fails.
    """
    settings = {"dtype": torch.float32, "use_safetensors": True, "num_labels": num_classes}
    try:
        return pretrained.opened("AutoModelForSequenceClassification", name, **settings).eval()
    except RuntimeError as error:  # of shapes that differ
        raise UserError(f"{name} has a head of other than {num_classes} classes") from error
