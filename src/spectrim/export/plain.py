"""A folder that is read without spectrim: the weights, and a few lines of Python that put plain layers in place."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from spectrim.batches import Inputs
from spectrim.checkpoints.filling import names_of_shared, require_stored, tensors_of
from spectrim.errors import UserError
from spectrim.export.same_outputs import require_same
from spectrim.factored.base import FactoredLayer
from spectrim.factored.unpacked.base import Unpacked
from spectrim.surgery.reopening import factored_layers
from spectrim.surgery.replacing import by_id, copied_with, substitutes
from spectrim.tools import files, safetensors_stream

WEIGHTS, CODE = "model.safetensors", "__init__.py"

TEMPLATE = '''"""A model with low-rank layers. Needs torch and safetensors alone.

    from {package} import load

    model = load(model)  # the model as its own code builds it, with any weights
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

# What stands in place of each dense layer.
LAYERS = {{
{layers}}}
# Further names of tensors that are stored once.
SHARED = {{
{shared}}}
# The attributes in which a layer holds its hooks.
HOOKS = ("_forward_", "_backward_", "_is_full_backward_")


def load(model: nn.Module) -> nn.Module:
    """Put the low-rank layers into ``model``, fill it, and return it in eval mode.

    The model decides precision and device. A layer stays the same object, with its hooks, wherever the model holds it.
    """
    for name, make in LAYERS.items():
        layer = model.get_submodule(name)
        own = next(layer.parameters())
        new = make().to(own.device, own.dtype)
        hooks = {{key: value for key, value in vars(layer).items() if key.startswith(HOOKS)}}
        layer.__class__, layer.__dict__ = type(new), vars(new) | hooks
    state = load_file(Path(__file__).with_name("{weights}"))
    state |= {{name: state[first] for name, first in SHARED.items()}}
    missing, unexpected = model.load_state_dict(state, strict=False)
    lacking = [name for name in missing if not name.endswith("_extra_state")]
    if lacking or unexpected:
        raise ValueError(f"the weights are of another model: missing {{lacking}}, unexpected {{unexpected}}")
    return model.eval()
'''


def plain_model(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with modules of torch in place of the factored layers. It shares the parameters."""
    layers = {name: layer.plain_module() for name, layer in factored_layers(model).items()}
    return copied_with(model, substitutes(model, layers), by_id(model.parameters()))


def write(folder: Path, model: nn.Module, example: Inputs | None) -> None:
    """Write ``folder`` with the weights in plain layers and the code that loads them.

    ``example``: inputs on which the plain model must give the outputs of ``model``; None: it is not run.

    Raises ``UserError`` where the model needs more of a factored layer than its output, and where the folder cannot be
    written. Raises it also for a layer of a class that torch has not.
    """
    for name, module in model.named_modules():
        if isinstance(module, Unpacked):
            kind = type(module).__name__
            raise UserError(f'{name or "the model"} is now an {kind}, which torch has not; export as "pt2"')
    require_stored(model)
    plain = plain_model(model)
    replaced = [name for name, module in model.named_modules() if isinstance(module, FactoredLayer)]
    made = {name: code_of(plain.get_submodule(name), name) for name in replaced}
    if example is not None:
        require_same(plain, model, example, "plain layers", 'the model may read their attributes; export as "pt2"')
    first = _shared(plain)
    code = TEMPLATE.format(
        package=folder.name if folder.name.isidentifier() else "FOLDER",
        layers=_entries({name: f"lambda: {text}" for name, text in made.items()}),
        shared=_entries({name: repr(other) for name, other in first.items()}),
        weights=WEIGHTS,
    )
    stored = {name: value for name, value in tensors_of(plain).items() if name not in first}
    try:
        with files.replacing(folder / WEIGHTS, folder / CODE) as (weights, script):
            safetensors_stream.save(weights, stored, {"format": "pt"})
            script.write_text(code, encoding="utf-8")
    except OSError as error:
        raise files.refusal(folder / CODE, error) from None


def code_of(module: nn.Module, layer: str) -> str:
    """Return an expression that builds ``module`` with any weights. Raises ``UserError`` for an unknown class.

    ``layer``: its name in the model, for messages.
    """
    if type(module) is nn.Sequential:
        return f"nn.Sequential({', '.join(code_of(part, layer) for part in module)})"
    if type(module) is nn.Linear:
        return f"nn.Linear({module.in_features}, {module.out_features}, bias={module.bias is not None})"
    if type(module) is nn.Embedding:
        return f"nn.Embedding({module.num_embeddings}, {module.embedding_dim})"
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        settings = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        named = ", ".join(f"{name}={getattr(module, name)!r}" for name in settings)
        sides = f"{module.in_channels}, {module.out_channels}"
        return f"nn.{type(module).__name__}({sides}, {named}, bias={module.bias is not None})"
    raise UserError(f'layer {layer} becomes a {type(module).__name__}, which torch has not; export as "pt2"')


def _shared(model: nn.Module) -> dict[str, str]:
    """Return the first name of every tensor that has several, by each of the others."""
    aliases = names_of_shared(model)
    return {name: names[0] for name, names in aliases.items() if names[0] != name}


def _entries(values: Mapping[str, str]) -> str:
    return "".join(f"    {name!r}: {text},\n" for name, text in values.items())
