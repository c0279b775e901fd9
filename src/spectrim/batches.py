"""Call a model on the batches of any loader, whatever the structure of its inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from spectrim.errors import UserError, first_line
from spectrim.tools.precision import as_given
from spectrim.tools.sparse import rows_at

Inputs = Any  # a tensor, a tuple of positional or a mapping of keyword arguments
Batches = Iterable[tuple[Inputs, Any]]
FITTING = {  # what to give, by what a failing pass says
    "ndarray": "tensors, such as torch.from_numpy(array)",
    "nference tensor": "torch.no_grad in place of torch.inference_mode in its forward pass",
    "": "a model and inputs that fit each other",
}


def forward(model: nn.Module, inputs: Inputs, copies: bool = True) -> Any:
    """Call ``model`` with the ``arguments`` that ``inputs`` stand for, and return its outputs.

    ``copies``: whether it gets copies of the tensors, because a model may write to its inputs.

    Raises ``UserError`` where the model fails on the inputs; the message names the layer.
    """
    try:
        args, kwargs = arguments(cloned(inputs) if copies else inputs)
        with as_given():
            return model(*args, **kwargs)
    except UserError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        where = next(iter(running(model, error)), "")  # empty: the model itself
        shapes = _shapes(inputs)
        raise UserError(
            f"the model failed on inputs of shape {shapes}{where and f', at layer {where}'}: "
            f"{first_line(error)}; give {next(own for sign, own in FITTING.items() if sign in f'{shapes} {error}')}"
        ) from error


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a mapping is passed by keyword, a tuple or list by position."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
    return tuple(inputs) if several else (inputs,), {}


def running(model: nn.Module, error: BaseException) -> list[str]:
    """Return the names of the modules of ``model`` that were running when ``error`` was raised, the innermost first."""
    places = {id(module): name for name, module in model.named_modules()}
    modules = [id(frame.f_locals.get("self")) for frame, _ in walk_tb(error.__traceback__)]
    return [places[module] for module in reversed(modules) if module in places]


def _shapes(inputs: Inputs) -> str:
    if isinstance(inputs, Mapping):
        return ", ".join(f"{key} {_shapes(value)}" for key, value in inputs.items())
    if isinstance(inputs, tuple | list):
        return ", ".join(_shapes(value) for value in inputs)
    return str(tuple(inputs.shape)) if isinstance(inputs, Tensor) else type(inputs).__name__


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Move every tensor of ``inputs`` to ``device`` and keep the structure."""
    return _mapped(inputs, lambda tensor: tensor.to(device))


def cloned(values: Any) -> Any:
    """Return ``values`` with a copy of every tensor, without its history."""
    return with_tensors(values, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


def first_samples(values: Any, samples: int, count: int) -> Any:
    """Return inputs or targets of the first ``samples`` of a batch of ``count``."""
    return _sampled(values, torch.arange(min(samples, count)), count)


def one_sample(values: Any, index: int, count: int) -> Any:
    """Return outputs or targets of sample ``index`` of a batch of ``count``, as a batch of one."""
    return _sampled(values, torch.tensor([index]), count)


def repeated(inputs: Inputs, samples: int) -> Inputs:
    """Return a batch of exactly ``samples``: those of ``inputs``, repeated cyclically if there are fewer."""
    count = batch_size(inputs)
    return _sampled(inputs, torch.arange(samples) % count, count)


def of_one_sample(inputs: Inputs) -> Inputs:
    """Return a batch of the same shape that repeats the first sample of ``inputs``."""
    count = batch_size(inputs)
    return _sampled(inputs, torch.zeros(count, dtype=torch.int64), count)


def aliased(outputs: Any) -> Any:
    """Return outputs of equal values that depend on the given ones, and not on one another."""
    return with_tensors(outputs, lambda tensor: tensor.view_as(tensor))


def with_tensors(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor, also the one inside of a packed sequence."""
    return _mapped(
        values, lambda own: own._replace(data=change(own.data)) if isinstance(own, PackedSequence) else change(own)
    )


def _sampled(values: Any, chosen: Tensor, count: int, inside: bool = False) -> Any:
    """Take the ``chosen`` samples. Values whose first dimension is not ``count`` belong to all samples and stay."""
    if isinstance(values, PackedSequence):
        padded, lengths = pad_packed_sequence(values, batch_first=True)
        taken = padded[chosen.to(padded.device)]
        return pack_padded_sequence(taken, lengths[chosen], batch_first=True, enforce_sorted=False)
    if isinstance(values, Tensor):
        return rows_at(values, chosen.to(values.device)) if values.ndim and len(values) == count else values
    if isinstance(values, tuple | list) and are_samples(values, count, inside):
        return _rebuilt(values, [values[index] for index in chosen.tolist()])
    if (parts := _parts(values)) is not None:
        return _renamed(values, {key: _sampled(value, chosen, count, inside=True) for key, value in parts.items()})
    if isinstance(values, tuple | list):
        return _rebuilt(values, [_sampled(value, chosen, count, inside=True) for value in values])
    return values


def are_samples(values: Sequence[Any], count: int, inside: bool = False) -> bool:
    """Return whether a sequence holds one item for each of ``count`` samples, rather than one an argument or a task.

    ``inside``: whether it lies in a sequence or mapping of several arguments.
    """
    batched = [isinstance(value, Tensor) and value.ndim > 0 and len(value) == count for value in values]
    if isinstance(values, list):  # among several arguments a list holds samples, as ``batch_size`` reads it
        return len(values) == count and (inside or not all(batched))
    return len(values) == count and not any(batched)


def _rebuilt(values: Any, items: list[Any]) -> Any:
    """Return ``items`` in a sequence of the kind of ``values``, a namedtuple among them."""
    return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)


def _parts(values: Any) -> Mapping[str, Any] | None:
    """Return the parts of a mapping or of a dataclass by name; None for anything else."""
    if isinstance(values, Mapping):
        return values
    if isinstance(values, type) or not is_dataclass(values):
        return None
    return {own.name: getattr(values, own.name) for own in fields(values) if own.init}


def _renamed(values: Any, items: dict[str, Any]) -> Any:
    """Return ``items`` in a dataclass where ``values`` are one, as outputs of transformers are; in a dict otherwise."""
    if is_dataclass(values) and all(getattr(values, name) is item for name, item in items.items()):
        return values
    return replace(values, **items) if is_dataclass(values) else items  # type: ignore[type-var]


def _mapped(inputs: Inputs, change: Callable[[Any], Any]) -> Inputs:
    if isinstance(inputs, Tensor | PackedSequence):
        return change(inputs)
    if (parts := _parts(inputs)) is not None:
        return _renamed(inputs, {key: _mapped(value, change) for key, value in parts.items()})
    if isinstance(inputs, tuple | list):
        return _rebuilt(inputs, [_mapped(value, change) for value in inputs])
    return inputs


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a layer is called on, whether by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


def pairs(batches: Batches, split: str) -> Iterator[tuple[Inputs, Any]]:
    """Yield the batches as pairs ``(inputs, targets)``. A tensor, a mapping or a sequence of one is inputs alone.

    A mapping that holds ``labels``, or ``start_positions`` and ``end_positions``, is a batch as the collators of
    transformers make it: these become the targets. A batch that was made inside of torch.inference_mode, which allows
    no gradient, is copied. Raises ``UserError`` for any other batch.
    """
    for batch in batches:
        pair = _pair(batch, split)
        yield cloned(pair) if any(tensor.is_inference() for tensor in tensors_of(pair)) else pair


def _pair(batch: Any, split: str) -> tuple[Inputs, Any]:
    if isinstance(batch, Mapping) and batch and not tensors_of(batch):
        raise UserError(
            f"a batch of the {split} split is a mapping without a tensor ({', '.join(map(str, batch))}): give a "
            "DataLoader, or pass the dataset with collator=, a function from a list of samples to a batch"
        )
    if isinstance(batch, Mapping):
        return _from_collator(batch) or (batch, None)
    if isinstance(batch, Tensor | PackedSequence):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):  # a TensorDataset of inputs gives one
        return batch[0], batch[1] if len(batch) == 2 else None
    raise UserError(
        f"a batch of the {split} split is a {type(batch).__name__}, not a pair: give (inputs, targets), "
        "several inputs as a tuple or a mapping of their own; or a mapping that holds labels"
    )


def _from_collator(batch: Mapping[str, Any]) -> tuple[Inputs, Any] | None:
    for names in (("labels",), ("start_positions", "end_positions")):
        if all(name in batch for name in names):
            inputs = {name: value for name, value in batch.items() if name not in names}
            return inputs, batch[names[0]] if len(names) == 1 else torch.stack([batch[name] for name in names], 1)
    return None


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Return every tensor in ``inputs``."""
    found: list[Tensor] = []

    def noted(tensor: Any) -> Any:
        found.append(tensor.data if isinstance(tensor, PackedSequence) else tensor)
        return tensor

    _mapped(inputs, noted)
    return found


def sample_count(targets: Any, inputs: Inputs) -> int:
    """Return the number of samples of a batch: that of ``target_count``, or of ``inputs`` for flattened targets.

    Targets are flattened where they are one tensor with an entry a token, for inputs that hold sequences of tokens.
    """
    count, samples = target_count(targets, inputs), batch_size(inputs)
    first = next((tensor for tensor in tensors_of(inputs) if tensor.ndim), None)
    if not isinstance(targets, Tensor) or first is None or first.ndim < 2 or count <= samples or count % samples:
        return count
    per_sample, positions = count // samples, first.shape[1]  # one fewer where the first token is not predicted
    return samples if count != positions and per_sample in (positions, positions - 1) else count


def target_count(targets: Any, inputs: Inputs) -> int:
    """Return the number of targets of a batch, which is that of its samples unless targets are flattened.

    ``targets``: a tensor or a mapping of tensors, whose first dimension is the number of samples; a sequence with one
    tensor per task or one item per sample; or None. ``inputs`` decide where this is ambiguous.
    """
    if targets is None:
        return batch_size(inputs)
    if isinstance(targets, Tensor):
        return len(targets) if targets.ndim else 1
    if isinstance(targets, Mapping):
        return target_count(next(iter(targets.values()), None), inputs)
    if isinstance(targets, tuple | list) and targets and all(isinstance(own, Tensor) and own.ndim for own in targets):
        sizes = {len(own) for own in targets}
        expected = None if inputs is None else batch_size(inputs)
        if len(sizes) == 1 and (expected in sizes or (expected != len(targets) and isinstance(targets, tuple))):
            return sizes.pop()
    return len(targets)


def batch_size(inputs: Inputs) -> int:
    """Return the first dimension of the first tensor of ``inputs``, or the length of a list of samples; else 1."""
    if isinstance(inputs, PackedSequence):
        return int(inputs.batch_sizes[0])
    if isinstance(inputs, Tensor):
        return len(inputs) if inputs.ndim else 1
    values = inputs if (parts := _parts(inputs)) is None else list(parts.values())
    if isinstance(values, tuple | list):
        for value in values:
            if isinstance(value, list):  # of samples
                return len(value)
            if any(tensor.ndim for tensor in tensors_of(value)):
                return batch_size(value)
    return 1


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter, or the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the block, then restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if acts_on_mode(module):
                module.train(training)
        for module, training in modes:
            module.training = training


def acts_on_mode(module: nn.Module) -> bool:
    """Return whether ``module`` has a ``train`` of its own, which may write weights. Those of torch do not."""
    return getattr(type(module).train, "__module__", "").partition(".")[0] not in ("torch", "transformers")
