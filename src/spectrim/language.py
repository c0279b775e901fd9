"""Save, load and use compressed language models. A folder holds what transformers' ``save_pretrained`` writes."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from spectrim.batches import Batches
from spectrim.checkpoints import hub_names, sharded, single_file
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.fetch import by_configuration, pretrained
from spectrim.losses import token_loss
from spectrim.statistics.objective import Objective
from spectrim.tools import files
from spectrim.tools.safetensors_stream import DTYPES, Shard

# Not model.safetensors: from_pretrained would drop the factors and initialise the layers at random.
WEIGHTS = "spectrim.safetensors"


def save(folder: str | Path, model: nn.Module, plan: RankPlan, tokenizer: Any = None) -> None:
    """Write a compressed model of transformers, its plan, its configuration and its tokenizer. Nothing is pickled.

    ``model``, ``plan``: those that ``spectrim.compress`` returned.
    ``tokenizer``: None: the folder gets none.

    Raises ``UserError`` where ``model`` is not from transformers, or the folder cannot be written.
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
        raise files.refusal(folder / "config.json", error) from None


def load(folder: str | Path) -> tuple[nn.Module, Any]:
    """Return the model that ``save`` or ``compress_checkpoint`` wrote, in eval mode, and its tokenizer or None.

    The model is built from its configuration without weights, factored by the plan, and filled in the precision of the
    checkpoint. Memory holds the compressed model and one tensor.

    Names in the checkpoint are those of the file that was compressed; transformers' own rules find their place in the
    model. What transformers merges, such as the experts of a mixture, becomes dense again.

    Raises ``UserError`` where the folder does not hold such a model, or one of its files is cut short or altered.
    """
    folder = Path(folder)
    if (folder / sharded.MANIFEST).is_file():
        beside = folder / sharded.BESIDE
        plan, shards = sharded.verified(folder)
        model = by_configuration.model_without_weights(beside, None, _precision(shards))
        hub_names.fill(model, plan, shards, folder)
    else:
        beside, shard = folder, single_file.verified(folder / WEIGHTS)
        kind = shard.metadata.get("class", "")
        model = by_configuration.model_without_weights(folder, kind, _precision([shard]))
        single_file.filled(model, shard, as_stored=True)
    has_tokenizer = (beside / "tokenizer_config.json").is_file()
    return model.eval(), pretrained.tokenizer(str(beside)) if has_tokenizer else None


def _precision(shards: Sequence[Shard]) -> torch.dtype:
    """Return the precision in which most numbers of a checkpoint are stored."""
    sizes: Counter[str] = Counter()
    for shard in shards:
        for entry in shard.entries.values():
            sizes[entry.dtype] += entry.nbytes
    stored = [DTYPES[name] for name, _ in sizes.most_common() if name in ("F64", "F32", "F16", "BF16")]
    return stored[0] if stored else torch.float32


def generate(model: nn.Module, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return ``tokens`` tokens that a decoder writes after ``prompt``, each the most likely, even after an end of text.

    Raises ``UserError`` for a prompt without a token or with a token that the model does not know, and where the model
    has too few positions.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    longest = getattr(model.config, "max_position_embeddings", math.inf)
    if not length:
        raise UserError("the prompt holds no token; give some text")
    if length + tokens > longest:
        raise UserError(f"{length} tokens of prompt and {tokens} more exceed the {longest} positions of the model")
    known = getattr(cast(Any, model).get_input_embeddings(), "num_embeddings", math.inf)
    largest = int(inputs["input_ids"].max())
    if largest >= known:
        raise UserError(
            f"the tokenizer gives the id {largest}, the model knows {known} ids; take the model's tokenizer"
        )
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
    """Return ``exp`` of the mean loss per token (``losses.TokenLoss``) over batches of (inputs, token ids).

    Raises ``UserError`` where there is nothing to predict.
    """
    return math.exp(Objective(token_loss, {"given": batches}).evaluate(model, "given").loss)
