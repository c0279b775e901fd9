"""Compressed language models on disk, as a folder like that of transformers' ``save_pretrained``; and perplexity."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from spectrim.batches import Batches
from spectrim.checkpoints import sharded, single_file
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.fetch import pretrained
from spectrim.losses import token_loss
from spectrim.statistics.objective import Objective

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
    single_file.save(folder / WEIGHTS, model, plan, {"class": type(model).__name__})
    try:
        for part in (model.config, getattr(model, "generation_config", None), tokenizer):
            if part is not None:
                part.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error})") from None


def load(folder: str | Path) -> tuple[nn.Module, Any]:
    """The model that ``save`` or ``compress_checkpoint`` wrote, in eval mode, and its tokenizer (None without one).

    The dense model is built from the configuration, factored as the plan says and filled. Raises ``UserError`` where
    the folder does not hold such a model, or a file of it is cut short or altered.
    """
    folder = Path(folder)
    streamed = (folder / sharded.MANIFEST).is_file()
    beside = folder / sharded.BESIDE if streamed else folder
    model = sharded.load(folder, _dense(beside)) if streamed else single_file.load(folder / WEIGHTS, _saved(folder))
    has_tokenizer = (beside / "tokenizer_config.json").is_file()
    return model.eval(), pretrained.tokenizer(str(beside)) if has_tokenizer else None


def _saved(folder: Path) -> nn.Module:
    """The dense model whose class ``save`` noted, untrained."""
    kind = _kind(single_file.read_metadata(folder / WEIGHTS).get("class", ""), folder / WEIGHTS)
    return kind(pretrained.opened("AutoConfig", str(folder)))


def _dense(folder: Path) -> nn.Module:
    """The model whose configuration lies in ``folder``, untrained: of the class that it names, or else a decoder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no {path.name}; build the model yourself: spectrim.load(…, into=model)")
    config = pretrained.opened("AutoConfig", str(folder))
    for name in getattr(config, "architectures", None) or []:
        return _kind(name, path)(config)
    try:  # a configuration that was saved without its model, as that of smollm2, names none
        return pretrained.library().AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    except ValueError:
        raise UserError(
            f"{path} names no class of transformers under architectures, nor is it that of a decoder"
        ) from None


def _kind(name: str, source: Path) -> Any:
    """The class of transformers of this name, which ``source`` gives."""
    transformers = pretrained.library()
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UserError(f"{source} names {name!r}, which is no model of transformers {transformers.__version__}")
    return kind


def generate(model: nn.Module, tokenizer: Any, prompt: str, tokens: int) -> str:
    """``tokens`` tokens that a decoder writes after ``prompt``, each the likeliest, end of text or not.

    Raises ``UserError`` for a prompt without a token, and for one after which the model has too few positions.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    longest = getattr(model.config, "max_position_embeddings", math.inf)
    if not length:
        raise UserError("the prompt holds no token; give some text")
    if length + tokens > longest:
        raise UserError(f"{length} tokens of prompt and {tokens} more exceed the {longest} positions of the model")
    written = cast(Any, model).generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(written[0, length:])


def perplexity(model: nn.Module, batches: Batches) -> float:
    """``exp`` of the mean loss a token (``losses.TokenLoss``) over batches of (inputs, token ids).

    Raises ``UserError`` where there is nothing to predict.
    """
    return math.exp(Objective(token_loss, {"given": batches}).evaluate(model, "given").loss)
