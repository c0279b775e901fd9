"""What models of transformers are trained by: the loss of their task, and the inputs of their decoder."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.losses import IGNORED, Loss, label_loss, logits_of, span_loss, token_loss

OF_TASKS: dict[str, Loss] = {
    "ForCausalLM": token_loss,
    "ForMaskedLM": label_loss,
    "ForTokenClassification": label_loss,
    "ForQuestionAnswering": span_loss,
}
WRITERS = "ForConditionalGeneration", "ForSpeechToText", "ForTextToText"  # encoder-decoders that write


def default_loss(model: nn.Module) -> Loss:
    """Return the loss that a model of transformers is trained by, as far as it is known; else cross-entropy.

    A model with adapters of PEFT has the loss of the model inside.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    # The older names of decoders, such as GPT2LMHeadModel, tell transformers no task.
    older = type(model).__name__.endswith("LMHeadModel")
    task = "ForCausalLM" if older else str(getattr(model, "loss_type", None))
    if task in ("ForConditionalGeneration", "None") and decoder_inputs_of(model) is not None:
        return label_loss  # an encoder-decoder: the inputs of its decoder are shifted already
    if task == "ForConditionalGeneration" and not _holds_a_decoder_apart(model):
        return token_loss  # a decoder that also reads images or sounds
    if task in ("ForSequenceClassification", "ForImageClassification"):
        return _loss_of_problem(model)
    return OF_TASKS.get(task, F.cross_entropy)


def _holds_a_decoder_apart(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return any(getattr(own, "is_encoder_decoder", True) for own in (config, getattr(config, "text_config", config)))


def decoder_inputs_of(model: nn.Module) -> Callable[..., Tensor] | None:
    """Return what makes ``decoder_input_ids`` of ``labels=`` for a model of transformers; None for other models.

    Where the model has no function of its own, its ``forward`` shifts them to the right by the start token.
    """
    own: Callable[..., Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    config = getattr(model, "config", None)
    start, pad = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if own is not None or start is None or pad is None or not type(model).__name__.endswith(WRITERS):
        return own
    if not getattr(config, "is_encoder_decoder", False):
        return None

    def shifted(labels: Tensor) -> Tensor:
        ids = labels.roll(1, -1)
        ids[..., 0] = start
        return ids.masked_fill(ids == IGNORED, pad)

    return shifted


def regression_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Return the mean squared error of the one number, or the row of numbers, that a model gives for a sample."""
    values = logits_of(outputs).float()
    return F.mse_loss(values.reshape(targets.shape), targets.to(values))


def _loss_of_problem(model: nn.Module) -> Loss:
    """Return the loss of a classifier of transformers, as its configuration names the problem."""
    config: Any = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or (problem is None and getattr(config, "num_labels", 2) == 1):
        return regression_loss
    return nn.BCEWithLogitsLoss() if problem == "multi_label_classification" else F.cross_entropy
