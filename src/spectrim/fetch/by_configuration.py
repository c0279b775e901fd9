"""Build a model of transformers from its configuration alone, and find where the tensors of a file belong in it.

Names in a file of the hub may differ from those of the model. transformers renames tensors while it loads them, and
merges some, such as the experts of a mixture. Here its own rules are used, which are not part of its public interface.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.errors import UserError, first_line
from spectrim.fetch import pretrained

CONFIG = "config.json"


class Place(NamedTuple):
    """Where a tensor of a file belongs in a model.

    ``name``: parameter or buffer of the model.
    ``merged``: whether transformers computes it from this tensor and possibly others.
    """

    name: str
    merged: bool


def model_without_weights(folder: Path, name: str | None, dtype: torch.dtype) -> nn.Module:
    """Return the model that ``folder/config.json`` describes, with its parameters on the meta device.

    Its buffers have their values.

    ``name``: class of the model; None: the class that the configuration names, or else a decoder.
    ``dtype``: its precision.

    Raises ``UserError`` where there is no such configuration or class.
    """
    path = folder / CONFIG
    kind = None if name is None else _kind(name, folder)
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG}; build the model yourself: spectrim.load(…, into=model)")
    config = pretrained.opened("AutoConfig", str(folder))
    if kind is None:
        kind = kind_of(config, path)
    try:
        with pretrained.imported("accelerate").init_empty_weights(include_buffers=False), pretrained.quiet():
            if kind is None:
                decoder = pretrained.library().AutoModelForCausalLM
                model = decoder.from_config(config, dtype=dtype, trust_remote_code=False)
            else:
                model = kind._from_config(config, dtype=dtype)
        model.tie_weights()  # Placing its parameters untied them.
    except Exception as error:  # The configuration is foreign, and a wrong number in it raises anything.
        reason = f"describes no model that can be built ({type(error).__name__}: {first_line(error)})"
        if kind is None:
            reason = "names no class of transformers under architectures, nor is it that of a decoder"
        raise UserError(f"{path} {reason}") from None
    return model


def kind_of(config: Any, source: Path) -> Any:
    """Return the class of transformers that a configuration names, or None. ``source``: its file, for messages."""
    named = getattr(config, "architectures", None)
    return _kind(named[0] if isinstance(named, list) else named, source) if named else None


def _kind(name: object, source: Path) -> Any:
    """Return the class of transformers with this name, which ``source`` gives."""
    transformers = pretrained.library()
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UserError(f"{source} names {name!r}, which is no model of transformers {transformers.__version__}")
    return kind


def places(model: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """Return where tensors with these names in a file belong in ``model``. Names that it has no use for are omitted."""
    loading, rules = _rules(model)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", "")
    found = {}
    for name in sorted(names, key=loading.dot_natural_key):
        new, source = loading.rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            new, source = loading.rename_source_key(name, [], [], prefix, state)
        if new in state:
            found[name] = Place(new, source is not None)
    return found


def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Let transformers put dense tensors of a file into ``model``. Return the names of what they fill.

    Raises ``UserError`` where they do not fit.
    """
    loading, rules = _rules(model)
    settings = pretrained.library().modeling_utils.LoadStateDictConfig(weight_mapping=rules)
    with pretrained.quiet():
        report, _ = loading.convert_and_load_state_dict_in_model(model, dict(tensors), settings)
    for name in [*report.conversion_errors, *(name for name, *_ in report.mismatched_keys), *report.unexpected_keys]:
        raise UserError(f"{next(iter(tensors))} and {len(tensors) - 1} more tensors do not make up {name} of the model")
    return set(model.state_dict()) - set(report.missing_keys)


def _rules(model: nn.Module) -> tuple[Any, list[Any]]:
    """Return the module of transformers that loads weights, and its rules for ``model``."""
    loading = pretrained.imported("transformers.core_model_loading")
    mapping = pretrained.imported("transformers.conversion_mapping")
    return loading, mapping.get_model_conversion_mapping(model)
