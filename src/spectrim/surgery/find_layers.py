"""Find the layers of a model that can be replaced by factored ones, and why each other one cannot."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from spectrim.batches import Inputs, acts_on_mode, cloned, device_of, evaluating, forward, to_device
from spectrim.decomposers.spectrum import Embeddings
from spectrim.errors import UserError
from spectrim.factored.base import OWN_NAMES
from spectrim.factored.dense import attributes_of, dense_kinds, with_article
from spectrim.factored.unpacked.own_kernel import UnpackedOwnKernel
from spectrim.surgery.cost import parameters
from spectrim.surgery.given_model import eager, unchanged
from spectrim.surgery.layer_choice import EVERY_LAYER, LayerChoice
from spectrim.surgery.lora import ADAPTED, adapted_parameters
from spectrim.surgery.tied import tied_layers
from spectrim.surgery.unpacking import SHARED, refusals, uses
from spectrim.surgery.watching import Watch
from spectrim.tools.content import content

UNCALLED = "the model does not call it"
ELSEWHERE = "the model calls it in another thread"
# The methods by which a call of a layer becomes the product with its weight.
STEPS = ("forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")


def factorable(
    model: nn.Module, example: Inputs | None, embeddings: Embeddings = False, choice: LayerChoice = EVERY_LAYER
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find the layers that can be replaced, in the model's order, and the reason why each other one stays dense.

    The model runs once on ``example``, one batch of inputs. A layer stays dense if the model does not call it or reads
    its weight itself, as attention does with its output projection. ``_reason`` lists the other cases. An embedding
    also stays dense if its ids are not among the inputs, as for positions: calibration may not reach all of them.
    Modules of other kinds that hold a matrix are named too, as a Conv1d or an LSTM is that was not ``unpacked``.
    Without an example the model is not run. A layer then stays dense if a module of torch holds it, which may read its
    weight, and so does every embedding.
    Embeddings and linear layers that share one weight are found together, by the name of the first embedding
    (``tied.tied_layers``). They stay dense unless all of them can be replaced.

    ``embeddings``: whether embeddings are replaced too; "tied": only those that share their weight with other layers.
    ``choice``: which layers the user wants to be factored.

    Raises ``UserError`` for a compiled model and for one that ``eager`` refuses. Raises it also for a model that is a
    single layer: it has no parent in which the layer could be replaced.
    """
    if eager(model) is not model:
        raise UserError("the model is compiled; pass the eager one, model._orig_mod")
    kinds = dense_kinds()
    if isinstance(model, kinds):
        raise UserError(f"the model is a single {type(model).__name__}; pass torch.nn.Sequential(model) instead")
    choice.require_known(model)
    ties = [(first, *others) for first, others in tied_layers(model).items()] if embeddings else []
    tied = {name for tie in ties for name in tie}
    shared, packed, adapted = _shared(model, ties), refusals(model), adapted_parameters(model)
    layers, dense = dict[str, nn.Module](), dict[str, str]()
    for name, module in model.named_modules():
        if not isinstance(module, kinds):
            if _holds_a_matrix(module):
                dense[name or type(model).__name__] = packed.get(name, f"{type(module).__name__} is not factored")
        elif isinstance(module, nn.Embedding) and (not embeddings or (embeddings == "tied" and name not in tied)):
            dense[name] = "only a decomposer with embeddings=True factors embeddings"
        elif name in adapted:
            dense[name] = ADAPTED
        elif reason := choice.reason(name) or (SHARED if name in shared else _reason(module)):
            dense[name] = reason
        else:
            layers[name] = module
    _leave(_written_by_modes(model, layers), layers, dense)
    _leave_together(ties, layers, dense)
    unfit = _held_by_torch(model, layers) if example is None else _unfit_for_replacement(model, layers, example)
    _leave(_where_tie_is_used(unfit, ties), layers, dense)
    _leave_together(ties, layers, dense)
    others = {name for _, *own in ties for name in own}
    return {name: layer for name, layer in layers.items() if name not in others}, dense


def _shared(model: nn.Module, ties: Iterable[Sequence[str]]) -> set[str]:
    """Return the layers that lie in several places of ``model``, or whose weight others hold that no tie names."""
    places, owners = uses(model)
    known = {name: len(tie) for tie in ties for name in tie}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, dense_kinds())]
    return {
        name
        for name, module in layers
        if places[module] > 1 or owners[id(module._parameters.get("weight"))] > known.get(name, 1)
    }


def _written_by_modes(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the layers whose weight ``train`` or ``eval`` of the model writes to, and why they stay dense."""
    if not any(acts_on_mode(module) for module in model.modules()):
        return {}
    with unchanged(model), evaluating(model):
        model.train()
        trained = {name: content(layer.parameters()) for name, layer in layers.items()}
        model.eval()
        written = [name for name, layer in layers.items() if content(layer.parameters()) != trained[name]]
    return dict.fromkeys(written, "its weight depends on the mode of the model, as where an adapter is merged into it")


def _where_tie_is_used(unfit: Mapping[str, str], ties: Iterable[Sequence[str]]) -> dict[str, str]:
    """Return ``unfit`` without the layers that the model does not call, but whose weight it uses in another layer."""
    used = {name for tie in ties if any(unfit.get(name) != UNCALLED for name in tie) for name in tie}
    return {name: reason for name, reason in unfit.items() if name not in used or reason != UNCALLED}


def _leave(reasons: Mapping[str, str], layers: dict[str, nn.Module], dense: dict[str, str]) -> None:
    """Move the layers of ``reasons`` from ``layers`` to ``dense``."""
    for name, reason in reasons.items():
        del layers[name]
        dense[name] = reason


def _leave_together(ties: Iterable[Sequence[str]], layers: dict[str, nn.Module], dense: dict[str, str]) -> None:
    """Move layers from ``layers`` to ``dense`` that share their weight with one that is not among ``layers``."""
    for tie in ties:
        left = [name for name in tie if name not in layers]
        for name in tie:
            if left and layers.pop(name, None) is not None:
                dense[name] = f"it shares its weight with {left[0]}, which stays dense"


def _holds_a_matrix(module: nn.Module) -> bool:
    """Return whether ``module`` itself has a parameter with more than one dimension, as a Conv1d or an LSTM does."""
    # Of the former, the module whose parameter it computes is named instead. Of the latter, a gain may be left.
    if isinstance(module, ParametrizationList | UnpackedOwnKernel):
        return False
    return any(parameter.ndim > 1 for parameter in _own_parameters(module))


def _reason(module: nn.Module) -> str | None:
    """Return why a layer stays dense, whatever the model does with it; None for a layer that can be replaced."""
    kinds = dense_kinds()
    weight = module._parameters.get("weight")  # module.weight might compute it, and that may change the module
    if own := _own_step(module, next(kind for kind in kinds if isinstance(module, kind))):
        return f"{type(module).__name__} has a {own} of its own"
    computed = any(hasattr(type(module), name) for name in ("weight", "bias"))  # as by a property
    if computed or is_parametrized(module) or weight is None:
        return "its weight is computed from other parameters"
    if type(weight) is not nn.Parameter:
        return f"its weight is {with_article(weight)}"
    if not weight.is_floating_point():
        return f"its weight is of {weight.dtype}"
    if not weight.numel():
        return "its weight is empty"
    if module._parameters.keys() - {"weight", "bias"} or module._buffers or module._modules:
        return "it holds more than a weight and a bias"
    if taken := OWN_NAMES & attributes_of(module).keys():
        return f"a factored layer has an attribute {min(taken)} of its own"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        return "it renormalises what it looks up, or has gradients of its own kind"
    return None


def _own_step(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return a step of a call that ``module`` or its class makes in another way than ``kind``; None where all agree.

    Such a step is of the dense layer alone: a factored one in its place would not make it.
    """
    for name in STEPS:
        if getattr(type(module), name, None) is not getattr(kind, name, None) or name in vars(module):
            return name
    return None


def in_one_line(reasons: Mapping[str, str]) -> str:
    """Return the reasons why layers stay dense, each with at most three of its layers by name."""
    return "; ".join(f"{_few(names)}: {reason}" for reason, names in _by_reason(reasons).items())


def left_dense(reasons: Mapping[str, str], model: nn.Module) -> list[str]:
    """Return a note for each layer that stays dense, with its reason and its share of the parameters of ``model``."""
    sizes, total = _sizes(model, reasons), max(1, parameters(model))
    return [
        f"{name}: left dense: {why} ({sum(sizes[name].values()) / total:.2%} of the parameters)"
        for name, why in reasons.items()
    ]


def dense_shares(reasons: Mapping[str, str], model: nn.Module) -> str:
    """Return in one line why parameters of ``model`` stay dense, with the share of each reason, the largest first.

    A parameter that several layers of a reason share counts once.
    """
    by_reason, sizes, total = _by_reason(reasons), _sizes(model, reasons), max(1, parameters(model))
    shares = {
        reason: sum(dict(item for name in names for item in sizes[name].items()).values()) / total
        for reason, names in by_reason.items()
    }
    ordered = sorted(shares, key=lambda reason: -shares[reason])
    return "; ".join(f"{shares[reason]:.2%}: {_few(by_reason[reason])}: {reason}" for reason in ordered)


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of the layers of each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and more" if names[3:] else "")


def _sizes(model: nn.Module, names: Iterable[str]) -> dict[str, dict[int, int]]:
    """Return the size of each parameter, by its id, that a module of ``model`` holds itself, by the module's name."""
    modules = dict(model.named_modules())
    return {name: {id(p): p.numel() for p in _own_parameters(modules.get(name, model))} for name in names}


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that ``module`` holds itself, with those from which a parametrization computes others."""
    own = list(module.parameters(recurse=False))
    return [*own, *module.get_submodule("parametrizations").parameters()] if is_parametrized(module) else own


def _held_by_torch(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the layers that may only be replaced if a run shows that nothing reads their weights or ids, and why."""
    found = {}
    for name, layer in layers.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
        if type(parent).__module__.startswith("torch.") and not isinstance(parent, containers):
            found[name] = f"{with_article(parent)} may read its weight, which a run on calibration= would show"
        elif isinstance(layer, nn.Embedding):
            found[name] = "a run on calibration= would show which ids it looks up"
    return found


def _unfit_for_replacement(model: nn.Module, layers: Mapping[str, nn.Module], example: Inputs) -> dict[str, str]:
    inputs = cloned(to_device(example, device_of(model)))
    restored = {id(own) for module in model.modules() if acts_on_mode(module) for own in module.parameters()}
    written = {name: own for name, own in model.named_parameters() if id(own) not in restored}
    watch = Watch(layers, inputs, written)
    with unchanged(model), evaluating(model), torch.no_grad(), watch.of_modules(), watch:
        forward(model, inputs, copies=False)  # the watch knows these tensors
    uncalled = [name for name in layers if name not in watch.called]
    unfit = {name: ELSEWHERE if name in watch.elsewhere else UNCALLED for name in uncalled}
    unfit |= {name: "the ids that it looks up are not among the inputs" for name in watch.on_others}
    unfit |= {name: "it is called on an image without a dimension of samples" for name in watch.on_one}
    unfit |= {name: "it is called inside of torch.func, where its inputs cannot be kept" for name in watch.transformed}
    return unfit | {name: "the model reads its weight" for name in layers if name in watch.read}
