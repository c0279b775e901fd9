"""Compressed language models on disk, as a folder like that of transformers' ``save_pretrained``; and perplexity."""

import math
from pathlib import Path
from typing import Any

from torch import nn

from spectrim import pretrained, surgery
from spectrim.errors import UserError
from spectrim.losses import token_loss
from spectrim.objective import Batches, Objective
from spectrim.plan import RankPlan

# Not transformers' own model.safetensors: its from_pretrained would drop the factors and give layers drawn at random.
WEIGHTS = "spectrim.safetensors"


def save(folder: str | Path, model: nn.Module, plan: RankPlan, tokenizer: Any = None) -> None:
    """Write a compressed model of transformers with its plan, its configuration and its tokenizer, where one is given.

    ``model`` and ``plan``: of what ``spectrim.compress`` returns. Nothing in the folder is pickled. Raises
    ``UserError`` where ``model`` is none of transformers, or the folder cannot be written.
    """
    folder = Path(folder)
    if not isinstance(model, pretrained.library().PreTrainedModel):
        raise UserError(f"a {type(model).__name__} is no model of transformers; use Compressed.save")
    surgery.save(folder / WEIGHTS, model, plan, {"class": type(model).__name__})
    try:
        for part in (model.config, getattr(model, "generation_config", None), tokenizer):
            if part is not None:
                part.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error})") from None


def load(folder: str | Path) -> tuple[nn.Module, Any]:
    """The model that ``save`` wrote, in eval mode, and its tokenizer (None where none was given).

    The dense model is built from the configuration, factored as the plan says and filled. Raises ``UserError`` where
    the folder does not hold such a model, or a file of it is cut short or altered.
    """
    folder = Path(folder)
    name = surgery.read_metadata(folder / WEIGHTS).get("class", "")
    transformers = pretrained.library()
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UserError(
            f"{folder / WEIGHTS} names {name!r}, which is no model of transformers {transformers.__version__}"
        )
    config = pretrained.opened("AutoConfig", str(folder))
    model = surgery.load(folder / WEIGHTS, kind(config)).eval()
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return model, pretrained.tokenizer(str(folder)) if has_tokenizer else None


def perplexity(model: nn.Module, batches: Batches) -> float:
    """``exp`` of the mean loss a token (``losses.TokenLoss``) over batches of (inputs, token ids).

    Raises ``UserError`` where there is nothing to predict.
    """
    return math.exp(Objective(token_loss, {"given": batches}).evaluate(model, "given").loss)
