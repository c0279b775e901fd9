"""Let transformers save and load compressed models by ``save_pretrained`` and ``from_pretrained``.

It does so for quantised models: ``config.json`` names the method, and a registered class of that name changes layers
before the weights are read. A compressed model is none of lower precision, but it takes the same way. ``spectrim`` is
the name of the method, and the configuration holds the plan.

Without ``import spectrim`` transformers ignores the method, with a warning, and would fill the dense layers at random.
Therefore a file also holds, under the name of each factored weight, a tensor of one number. It has the shape of no
weight, so that reading it into a dense layer fails.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.checkpoints import filling
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.surgery.reopening import factored_layers, kept_in
from spectrim.surgery.tied import tied_layers
from spectrim.surgery.unpacking import unpack_around

METHOD = "spectrim"


def announce(model: nn.Module, plan: RankPlan) -> None:
    """Let ``model.save_pretrained`` write a compressed model of transformers whole. Other models are left alone."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return
    own: Any = model
    if isinstance(getattr(own, "hf_quantizer", None), classes()[1]):  # of an earlier compression
        del own.hf_quantizer, own.config.quantization_config
    if plan:
        config, quantizer = classes()
        own.config.quantization_config = config(plan.as_dict())
        own.hf_quantizer = quantizer(own.config.quantization_config)
    _name_ties(own)


def _tie(model: Any, plan: RankPlan) -> None:
    """Tie the weights of the layers in the plan. Otherwise transformers ties weights only after they are read."""
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, []).append(target)
    for source, targets in groups.items():
        if any(f"{layer}.weight" in (source, *targets) for layer in plan):
            for target in targets:
                layer, _, part = target.rpartition(".")
                setattr(model.get_submodule(layer), part, model.get_parameter(source))


def _name_ties(model: Any) -> None:
    """Tell transformers which factors are shared, in place of weights that are no more, so that it saves each once."""
    layers = factored_layers(model)
    ties = {name: others for name, others in tied_layers(model).items() if name in layers}
    if not ties:
        return
    pairs, places = dict[str, str](), set[str]()
    for name, others in ties.items():
        places |= {name, *others}
        first = {id(own): key for key, own in layers[name].named_parameters(name)}
        for other in others:
            named = model.get_submodule(other).named_parameters(other)
            pairs |= {key: first[id(own)] for key, own in named if id(own) in first}

    def is_gone(key: str) -> bool:  # or of an earlier compression
        return any(key.startswith(f"{place}.") and key != f"{place}.bias" for place in places)

    for name, part in model.named_modules():
        known, start = getattr(part, "_tied_weights_keys", None), f"{name}." if name else ""
        if isinstance(known, dict):
            left = {one: other for one, other in known.items() if not is_gone(start + one) | is_gone(start + other)}
            part._tied_weights_keys = left
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **pairs}
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _require_tied(model: Any, plan: RankPlan) -> None:
    """Raise ``UserError`` where the configuration ties a factored layer that the model holds apart."""
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if {one.removesuffix(".weight"), other.removesuffix(".weight")} & plan.keys():
            raise UserError(f"the configuration ties {one} to {other}: set model.config.tie_word_embeddings=False")


def plan_of(config: Any) -> RankPlan | None:
    """Return the plan in a configuration of transformers; None where it has none."""
    found = getattr(config, "quantization_config", None)
    plain = found if isinstance(found, dict) else vars(found) if found is not None else {}
    return RankPlan.from_json(json.dumps(plain.get("plan"))) if plain.get("quant_method") == METHOD else None


def guards(layers: Iterable[str]) -> dict[str, Tensor]:
    """Return a tensor of one number in the place of the weight of each factored layer."""
    return {f"{layer}.weight": torch.zeros(1) for layer in layers}


def register() -> None:
    """Make the method known to transformers."""
    auto = import_module("transformers.quantizers.auto")
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        config, quantizer = classes()
        auto.register_quantization_config(METHOD)(config)
        auto.register_quantizer(METHOD)(quantizer)


@cache
def classes() -> tuple[Any, Any]:
    """Return the classes of the configuration and of the quantizer, whose bases are those of transformers."""
    base: Any = import_module("transformers.quantizers.base")

    class SpectrimConfig(base.QuantizationConfigMixin):
        """The plan of a compressed model, in ``config.json``."""

        def __init__(self, plan: Mapping[str, Any] | None = None, **_: Any) -> None:
            self.quant_method = METHOD
            self.plan = RankPlan.from_json(json.dumps(plan)).as_dict()

    class SpectrimQuantizer(base.HfQuantizer):
        """Factors the layers of the plan before transformers reads the weights, and writes them whole."""

        is_trainable = is_qat_trainable = is_compileable = True

        def is_serializable(self) -> bool:
            return True

        def validate_environment(self, *_: Any, **__: Any) -> None:
            if not self.pre_quantized:
                raise UserError("quantization_config= compresses nothing; call spectrim.compress on the dense model")

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            plan = _plan_in(model, RankPlan.from_json(json.dumps(self.quantization_config.plan)))
            _tie(model, plan)
            with filling.factored(model, plan, "the plan in config.json"):
                known = set(model._keys_to_ignore_on_load_unexpected or ())
                model._keys_to_ignore_on_load_unexpected = known | {f"{re.escape(name)}$" for name in guards(plan)}
                _name_ties(model)
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            held = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}  # meta: offloaded
            filling.require_positions(model, held, held.__getitem__, model.name_or_path)
            model.is_quantized = False  # Its numbers are ordinary ones: it may be trained, and cast like any other.
            return model

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
            filling.require_stored(model)
            plan = {name: kept_in(layer) for name, layer in factored_layers(model).items()}
            _require_tied(model, RankPlan.of(plan))
            self.quantization_config.plan = RankPlan.of(plan).as_dict()  # A merged adapter changes ranks.
            return {**model.state_dict(), **guards(plan)}, {}

    return SpectrimConfig, SpectrimQuantizer


def _plan_in(model: Any, plan: RankPlan) -> RankPlan:
    """Return the part of the plan whose layers ``model`` has, by their names there. Unpack the modules around them.

    A model without a head, or with another one, has the same layers with or without a prefix.
    """
    prefix = f"{model.base_model_prefix}."
    names = {layer: (layer, layer.removeprefix(prefix), prefix + layer) for layer in plan}
    unpack_around(model, [name for own in names.values() for name in own])
    found, modules = {}, dict(model.named_modules())
    for layer, kept in plan.items():
        for name in names[layer]:
            if name in modules:
                found[name] = kept
                break
    if plan and not found:
        raise UserError(f"a {type(model).__name__} has none of the layers of the plan; load the class that was saved")
    return RankPlan.of(found)
