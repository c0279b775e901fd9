"""A compressed model as one traced program: a ``.pt2`` file of torch.export, or an ONNX file."""

import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import (
    Inputs,
    arguments,
    batch_size,
    device_of,
    evaluating,
    forward,
    repeated,
    tensors_of,
    to_device,
)
from spectrim.errors import UserError, first_line
from spectrim.export.same_outputs import require_same
from spectrim.surgery.given_model import copied
from spectrim.tools import extras, files

LARGEST_PROTOBUF = 2**31 - 1  # bytes of an ONNX file without a second one
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal
FIXED = "give dynamic=False for inputs of the shapes of the example alone"


def write_pt2(path: Path, model: nn.Module, example: Inputs, dynamic: bool) -> None:
    """Write the program of ``model``, which ``torch.export.load(path).module()`` returns as a module.

    ``example``: a batch of inputs. ``dynamic``: whether the sizes of a batch are free, see ``traced``.

    Raises ``UserError`` where the model cannot be traced or its outputs not be stored, or the file cannot be written.
    """
    example = to_device(_at_least_two(example), device_of(model))
    program = traced(model, example, dynamic)
    module = program.module()

    def run(inputs: Inputs) -> Any:
        args, kwargs = arguments(inputs)
        return module(*args, **kwargs)

    _require_same(run, model, example, dynamic, "torch.export")
    file = io.BytesIO()
    try:
        with _quiet():
            torch.export.save(program, file)
    except Exception as error:  # as for outputs of a class of the user
        raise UserError(f"the program of the model cannot be written: {first_line(error)}") from None
    files.write({path: file.getvalue()})


def write_onnx(path: Path, model: nn.Module, example: Inputs, dynamic: bool, opset: int) -> None:
    """Write ``model`` as ONNX, after onnxruntime has run it once.

    ``opset``: version of the operators. ``example``, ``dynamic``: as for ``write_pt2``.

    Raises ``UserError`` where the extra packages are missing, and where the model cannot be traced or converted. Raises
    it also for a file that cannot be written, or that would exceed the 2 GiB that ONNX allows.
    """
    runtime, _ = (extras.imported(package, "export", "ONNX") for package in ("onnxruntime", "onnxscript"))
    example = to_device(_at_least_two(example), torch.device("cpu"))
    program = traced(copied(model).cpu(), example, dynamic)
    try:
        with _quiet():
            names = _names_of_outputs(program)
            made: Any = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, output_names=names)
    except Exception as error:  # The converter raises anything.
        raise UserError(
            f'the model cannot be converted to ONNX, opset {opset}: {_cause(error)}; export as "pt2"'
        ) from None
    if made.model_proto.ByteSize() > LARGEST_PROTOBUF:
        raise UserError('an ONNX file holds at most 2 GiB, and this model is larger; export as "pt2"')
    content = made.model_proto.SerializeToString()
    try:
        session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:
        said = first_line(error)
        raise UserError(
            f"onnxruntime {runtime.__version__} refuses opset {opset}: {said}; give another opset"
        ) from None

    def run(inputs: Inputs) -> list[Tensor]:
        names = [one.name for one in session.get_inputs()]
        by_name = isinstance(inputs, Mapping) and set(names) <= inputs.keys()
        given = [inputs[name] for name in names] if by_name else tensors_of(inputs)
        feed = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    _require_same(run, model, example, dynamic, "onnxruntime")
    files.write({path: content})


def traced(model: nn.Module, inputs: Inputs, dynamic: bool) -> Any:
    """Return the program that torch.export makes of ``model`` in eval mode.

    Outputs of transformers become a dict of their tensors, so that the program needs no class of another package.

    ``inputs``: a batch on the device of the model.
    ``dynamic``: whether the number of samples is free, and with it the number of positions of token ids, where the
    model allows for it.

    Raises ``UserError`` where the model fails on ``inputs``, or cannot be traced.
    """
    args, kwargs = arguments(inputs)
    free = _free_sizes(inputs) if dynamic else {}
    with evaluating(model), torch.no_grad(), _quiet():
        outputs = forward(model, inputs)
        root = _OfTensors(model) if hasattr(outputs, "to_tuple") else model
        try:
            program = torch.export.export(root, args, kwargs, dynamic_shapes=_shapes(root, args, kwargs, free))
        except Exception as error:  # Tracing runs foreign code.
            said = first_line(error)
            raise UserError(
                f"the model cannot be traced by torch.export: {said}" + (f"; {FIXED}" if free else "")
            ) from None
    return program


class _OfTensors(nn.Module):
    """Calls a model of transformers, and returns a dict of the tensors of its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return _tensors(model(*args, **kwargs))

        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
        self.forward = forward  # torch.export reads the names of the arguments here


def _tensors(outputs: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested outputs, each under the names that lead to it, such as ``text_model_output.0``."""
    if isinstance(outputs, Tensor):
        return {name: outputs}
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs if _is_sequence(outputs) else ())
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= _tensors(value, f"{name}.{key}" if name else str(key))
    return found


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _free_sizes(inputs: Inputs) -> dict[Tensor, list[int]]:
    """Return for each tensor the axes that are free: that of the samples, and of the positions of token ids."""
    count, free = batch_size(inputs), {}
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    length = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 else None
    for tensor in tensors_of(inputs):
        axes = [0] if tensor.ndim and len(tensor) == count else []
        if tensor.ndim == 2 and tensor.shape[1] == length:
            axes.append(1)
        if axes:
            free[tensor] = axes
    return free


def _shapes(root: nn.Module, args: tuple, kwargs: dict[str, Any], free: Mapping[Tensor, list[int]]) -> Any:
    """Return the free axes in the structure of the arguments, as torch.export takes them."""

    def of(value: Any) -> Any:
        axes = free.get(value) if isinstance(value, Tensor) else None
        return None if axes is None else dict.fromkeys(axes, torch.export.Dim.AUTO)

    bound = inspect.signature(root.forward).bind(*args, **kwargs)
    return torch.utils._pytree.tree_map(of, bound.arguments) if free else None


def _require_same(run: Callable[[Inputs], Any], model: nn.Module, example: Inputs, dynamic: bool, what: str) -> None:
    """Raise ``UserError`` where ``run`` and ``model`` differ on the example, or, if its size is free, on another."""
    advice = FIXED if dynamic else "keep the model in torch"
    require_same(run, model, example, what, advice)
    if dynamic:
        require_same(run, model, repeated(example, batch_size(example) + 1), f"{what} and one more sample", advice)


def _names_of_outputs(program: Any) -> list[str]:
    """Return the keys of a dict of outputs, ``output`` for a single one, and the names in the graph for others."""
    found = program.graph_signature.user_outputs
    spec = program.call_spec.out_spec
    if spec.type is dict and spec.num_leaves == spec.num_children:
        return list(spec.context)
    return ["output"] if len(found) == 1 else list(found)


def _at_least_two(example: Inputs) -> Inputs:
    """Return the example with two samples or more, because torch.export takes a size of 1 for a constant."""
    return repeated(example, 2) if batch_size(example) == 1 else example


def _cause(error: BaseException) -> str:
    """Return the first line of the error behind ``error``. The converter itself only tells at which step it stopped."""
    while error.__cause__ is not None:
        error = error.__cause__
    return COLOURS.sub("", first_line(error))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter: its warnings, its log, and the graphs that it prints where it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
