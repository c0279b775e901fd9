"""Save, load and use compressed language models. A folder holds what transformers' ``save_pretrained`` writes."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from spectrim.batches import Batches, device_of, to_device
from spectrim.checkpoints import hub_names, quantizer, sharded, single_file
from spectrim.data.own_text import own_text as own_text
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.fetch import by_configuration, pretrained
from spectrim.losses import token_loss
from spectrim.statistics.objective import Objective
from spectrim.surgery.lora import for_lora as for_lora
from spectrim.tools import files
from spectrim.tools.safetensors_stream import DTYPES, FLOATS, Shard


def save(folder: str | Path, model: nn.Module, plan: RankPlan, tokenizer: Any = None) -> None:
    """Write a compressed model of transformers, its plan, its configuration and its tokenizer. Nothing is pickled.

    ``load`` reads the folder, and so does transformers' ``from_pretrained`` after ``import spectrim``.

    ``model``, ``plan``: those that ``spectrim.compress`` returned.
    ``tokenizer``: None: the folder gets none.

    Raises ``UserError`` where ``model`` is not from transformers or not as ``plan`` says, or the folder cannot be
    written.
    """
    folder, own = Path(folder), cast(Any, model)
    if not isinstance(model, pretrained.library().PreTrainedModel):
        raise UserError(f"a {type(model).__name__} is no model of transformers; use Compressed.save")
    quantizer.announce(model, plan)
    own.config.architectures, own.config.dtype = [type(model).__name__], str(own.dtype).removeprefix("torch.")
    header = {"class": type(model).__name__, "format": single_file.TORCH}
    single_file.save(folder / sharded.SINGLE, model, plan, header, beside=quantizer.guards(plan))
    try:
        with files.scratch(folder) as made:
            for part in (own.config, getattr(model, "generation_config", None), tokenizer):
                if part is not None:
                    part.save_pretrained(made)
            written = [path for path in made.rglob("*") if path.is_file()]  # further chat templates have a folder
            files.write({folder / path.relative_to(made): path.read_bytes() for path in written})
    except OSError as error:
        raise files.refusal(folder / by_configuration.CONFIG, error) from None


def load(folder: str | Path) -> tuple[nn.Module, Any]:
    """Return a compressed model in eval mode, and its tokenizer or None.

    ``folder``: written by ``save``, by ``compress_checkpoint``, or by ``save_pretrained`` of a compressed model.

    The model is built from its configuration without weights, factored by the plan, and filled in the precision of the
    checkpoint. Memory holds the compressed model and one tensor.

    ``compress_checkpoint`` keeps the names of the dense file; transformers' own rules find their place in the model.
    What transformers merges, such as the experts of a mixture, becomes dense again.

    Raises ``UserError`` where the folder does not hold such a model, or one of its files is cut short or altered.
    ``save_pretrained`` stores no digest, so that only missing tensors and other shapes show there.
    """
    folder = beside = Path(folder)
    if (folder / sharded.MANIFEST).is_file():
        beside = folder / sharded.BESIDE
        plan, shards = sharded.verified(folder)
        model = by_configuration.model_without_weights(beside, None, _precision(shards))
        hub_names.fill(model, plan, shards, folder)
    elif any("plan" not in shard.metadata for shard in sharded.Sharded.at(folder).shards.values()):
        model, plan = _of_transformers(folder)
    else:
        shard = single_file.verified(folder / sharded.SINGLE)
        kind, plan = shard.metadata.get("class", ""), single_file.plan_in(shard)
        model = by_configuration.model_without_weights(folder, kind, _precision([shard]))
        stored = {name: name for name in shard.entries.keys() - quantizer.guards(plan).keys()}
        single_file.filled(model, shard.renamed(stored), as_stored=True)
    quantizer.announce(model, plan)
    has_tokenizer = (beside / "tokenizer_config.json").is_file()
    return model.eval(), pretrained.tokenizer(str(beside)) if has_tokenizer else None


def _of_transformers(folder: Path) -> tuple[nn.Module, RankPlan]:
    """Let transformers read what ``save_pretrained`` wrote. Raises ``UserError`` where a tensor is missing."""
    config = pretrained.opened("AutoConfig", str(folder))
    try:
        plan = quantizer.plan_of(config)
    except UserError as error:
        raise UserError(f"{folder / by_configuration.CONFIG}: {error}") from None
    if plan is None:
        raise UserError(f"{folder} holds no compressed model: config.json has no plan; open it with transformers")
    kind = by_configuration.kind_of(config, folder / by_configuration.CONFIG)
    name = "AutoModelForCausalLM" if kind is None else kind.__name__
    model, report = pretrained.opened(name, str(folder), dtype="auto", output_loading_info=True)
    if lacking := sorted(report["missing_keys"]):
        raise UserError(f"{folder} lacks {lacking[0]} and {len(lacking) - 1} more tensors; save the model again")
    return model, plan


def _precision(shards: Sequence[Shard]) -> torch.dtype:
    """Return the precision in which most numbers of a checkpoint are stored."""
    sizes: Counter[str] = Counter()
    for shard in shards:
        for entry in shard.entries.values():
            sizes[entry.dtype] += entry.nbytes
    stored = [DTYPES[name] for name, _ in sizes.most_common() if name in FLOATS]
    return stored[0] if stored else torch.float32


def generate(model: nn.Module, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return ``tokens`` tokens that a decoder writes after ``prompt``, each the most likely, even after an end of text.

    Raises ``UserError`` for a prompt without a token, or with one that the model does not know. Raises it also where
    the model has too few positions.
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
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    written = cast(Any, model).generate(
        **to_device(given, device_of(model)),
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
