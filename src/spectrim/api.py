"""The one-call interface: any module, any iterable of batches, any algorithm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.algorithms.by_plan import ByPlan
from spectrim.algorithms.forecast import forecast
from spectrim.algorithms.joint import Joint
from spectrim.algorithms.lossless import Lossless
from spectrim.algorithms.shared import every_size
from spectrim.algorithms.shared.compressed import Algorithm, Compressed, decomposer_of
from spectrim.algorithms.shared.measurement import Measurement
from spectrim.batches import Batches
from spectrim.checkpoints import sharded, single_file
from spectrim.decomposers.spectrum import Decomposer
from spectrim.default_losses import default_loss
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.losses import Loss, TokenLoss
from spectrim.statistics.batchnorm import BatchNorm, require
from spectrim.statistics.collated import Collator, collated, with_decoder_inputs
from spectrim.statistics.objective import Objective
from spectrim.statistics.processes import Distributed
from spectrim.surgery.given_model import (
    eager,
    require_default_device,
    require_default_dtype,
    require_gradients,
    unchanged,
)
from spectrim.surgery.layer_choice import LayerChoice
from spectrim.tools import resume as resuming
from spectrim.tools.content import of_state
from spectrim.tools.precision import exact, uncached
from spectrim.tools.spelling import checked

NO_SIZE = "no size is asked for, so Lossless() lowers the predicted loss; give params_kept= for a size"


@checked("spectrim.compress")
def compress(
    model: nn.Module,
    *,
    calibration: Batches | None = None,
    verification: Batches | None = None,
    train: Batches | None = None,
    loss: Loss | None = None,
    params_kept: float | None = None,
    algorithm: Algorithm | str | None = None,
    decomposer: Decomposer | str | None = None,
    plan: RankPlan | Mapping[str, int] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    overrides: Mapping[str, int] | None = None,
    batch_norm: BatchNorm = "keep",
    layers_at_once: int | None = None,
    collator: Collator | None = None,
    batch_size: int = 8,
    resume: str | Path | None = None,
    dry_run: bool = False,
) -> Compressed | Any:  # Any: the Forecast of a dry run, which most calls need not rule out
    """Return a compressed copy of ``model``. No weight is trained unless ``algorithm`` is one that trains.

    ``calibration``: held-out batches that can be iterated again and again. A batch is a pair ``(inputs, targets)``.
        Inputs are a tensor, a tuple of positional arguments or a mapping of keyword arguments. An algorithm that does
        not measure the loss takes batches without targets: ``(inputs, None)``, or a tensor or mapping of inputs alone.
        One that does not run the model, such as ``Truncation``, works without any.
    ``verification``: other held-out batches, for algorithms that measure what they chose. A loss measured on the
        samples that chose the ranks is too low. With them a decoder's embedding is factored too, if its head shares it.
    ``train``: batches with a length, for algorithms that train.
    ``loss``: ``loss(model_output, targets)``, a scalar, the mean over the batch. By default cross-entropy; for a model
        of transformers the one of its task: next tokens, labels of tokens, answers, several classes, or numbers.
    ``params_kept``: the part of the parameters to keep, in (0, 1). Short for ``algorithm=Joint(params_kept=…)``, for a
        model that predicts next tokens with the settings of ``joint_cut``: spectra whitened on both sides, slopes as
        far as they hold, and no refit. With the name of an algorithm it is the size that this one meets.
    ``algorithm``: an instance, or its name on the command line, such as ``"joint"``; ``Lossless()`` by default, and a
        note then says so.
    ``decomposer``: the decomposer, or its name on the command line, such as ``"whitened_channel"``. By default the one
        that the algorithm names: pivoted factors of the whitened weight for ``Joint``, else ``SVD()``.
    ``plan``: what to keep of each layer, in place of an algorithm: the plan of an earlier result, or a rank for each
        layer by name.
    ``include``: the layers that may be factored: names of modules, globs such as ``"layer4.*"``, or ``"re:"`` and a
        regular expression (``LayerChoice``). All by default.
    ``exclude``: the layers that stay dense, likewise.
    ``overrides``: the rank of single layers by name. The algorithm chooses the ranks of the others, and a budget counts
        all layers.
    ``batch_norm``: ``"keep"`` leaves the statistics of every BatchNorm as they are. ``"follow"`` shifts them by what
        compression changed on calibration batches (``batchnorm.reestimate``), without labels.
    ``layers_at_once``: number of layers whose gradients are held in memory at once. Fewer layers take more passes over
        the calibration batches (``objective.Objective``). All layers by default.
    ``collator``: makes a batch of a list of samples. The splits are then datasets of single samples, such as the
        mappings that ``Trainer`` of transformers takes, and are read ``batch_size`` samples at a time.
    ``resume``: a folder for decompositions, gradients and refitted layers as they are computed. The same call after a
        kill takes them up, for the same weights, data and settings only. Delete the folder when you are done.

    ``dry_run``: return only a ``Forecast``: the sizes, seconds and memory to expect, after one batch and some seconds.

    Processes of torch.distributed share ``calibration`` and ``verification`` where each gives its own part of them as
    ``Distributed(batches)``, and the same of everything else. All of them return the same result. ``resume`` is refused
    then: one process could wait for another that took its part from the folder.

    The given model keeps its weights, buffers, attributes, mode and device. The copy lies on the same device. A model
    from ``torch.compile`` is unwrapped, and the copy is not compiled. Layers that an earlier compression factored are
    decomposed again, and stay as they are where no smaller rank is chosen.
    Raises ``UserError`` in one line for anything that cannot be compressed as asked.
    """
    require(batch_norm)
    require_default_device()
    require_default_dtype()
    model = eager(model)
    require_gradients(model)
    if isinstance(loss, type) or not (loss is None or callable(loss)):
        raise UserError(f"loss={_said(loss)} is not loss(outputs, targets); pass a function or an instance of torch.nn")
    loss = loss or default_loss(model)
    chosen, views = _chosen(params_kept, plan, algorithm, loss)
    views = views if decomposer is None else _instance("decomposer", decomposer)
    splits = _splits(
        {"calibration": calibration, "verification": verification, "train": train}, model, collator, batch_size
    )
    choice = LayerChoice.of(include, exclude, overrides or {})
    objective = Objective(loss, splits, layers_at_once, choice=choice)
    if resume is not None and any(objective.processes(name).size > 1 for name in splits):
        raise UserError("resume= serves a selection of one process; leave it out where several share the batches")
    notes = [NO_SIZE] if params_kept is None and plan is None and algorithm is None else []
    if dry_run:
        with unchanged(model), torch.inference_mode(False), uncached(), exact(), torch.random.fork_rng():
            told = forecast(model, chosen, views, objective)
        told.notes.extend(notes)
        return told
    objective.require_same("models", lambda: of_state(model))
    with unchanged(model), torch.inference_mode(False), uncached(), exact(), resuming.into(resume):
        result = chosen.compress(model, views, objective).settle(batch_norm, objective)
    objective.require_same("plans", result.plan.to_json)
    result.notes.extend(notes)
    return result


def _splits(
    given: Mapping[str, Batches | None], model: nn.Module, collator: Collator | None, batch_size: int
) -> dict[str, Batches]:
    """Return the splits that the user gave, as batches that ``model`` takes."""
    splits = {name: batches for name, batches in given.items() if batches is not None}
    if isinstance(splits.get("train"), Distributed):
        raise UserError("train= is no Distributed split; compress first, then train result.model with DDP")
    if collator is not None:
        splits = {name: collated(own, collator, batch_size, model) for name, own in splits.items()}
    return {name: with_decoder_inputs(own, model) for name, own in splits.items()}


def _chosen(
    params_kept: float | None,
    plan: RankPlan | Mapping[str, int] | None,
    algorithm: Algorithm | str | None,
    loss: Loss,
) -> tuple[Algorithm, Decomposer]:
    """Return the algorithm that the user asked for, and the decomposer that it is best with."""
    if params_kept is not None and plan is None and isinstance(algorithm, str):
        chosen = _sized(algorithm, params_kept)
        return chosen, own_decomposer(algorithm, chosen)
    given = {"params_kept": params_kept, "plan": plan, "algorithm": algorithm}
    several = [f"{name}=" for name, value in given.items() if value is not None]
    if len(several) > 1:
        raise UserError(f"{' and '.join(several)} each say what to keep; pass one of them")
    if params_kept is not None and isinstance(loss, TokenLoss) and loss.ahead > 0:  # a decoder
        chosen = _sized("joint_cut", params_kept)
        return chosen, own_decomposer("joint_cut", chosen)
    if params_kept is not None:
        chosen = Joint(params_kept=params_kept)
    elif plan is not None:
        chosen = ByPlan(plan)
    else:
        chosen = Lossless() if algorithm is None else _instance("algorithm", algorithm)
    return chosen, own_decomposer(algorithm, chosen)


def _sized(name: str, params_kept: float) -> Algorithm:
    """Return the algorithm called ``name`` with this budget in place of its own."""
    from spectrim.runs.named import sized, sizes_of

    chosen = _instance("algorithm", name)
    if "params_kept" not in sizes_of(chosen):
        raise UserError(f"algorithm={name!r} meets no size: leave out params_kept=, or take another algorithm")
    made: Algorithm = sized(chosen, "params_kept", params_kept)
    return made


def own_decomposer(name: object, chosen: Algorithm) -> Decomposer:
    """Return the decomposer that an algorithm is best with, by its name on the command line where it was given so."""
    if isinstance(name, str):
        from spectrim.runs.named import decomposer_for

        if (found := decomposer_for(name)) is not None:
            return found
    return decomposer_of(chosen)


def _instance(argument: str, value: Any) -> Any:
    """Return the algorithm or decomposer that the user gave as ``argument``, by name or as an instance."""
    if isinstance(value, str):
        from spectrim.runs.named import named  # hydra takes a second to import, and an instance does not need it

        value = named(argument, value)
    if isinstance(value, type):
        raise UserError(f"{argument}={value.__name__} is a class; pass an instance, {value.__name__}(…)")
    if isinstance(value, Measurement):
        call = f"{type(value).__name__}(…).measure(model, decomposer, objective)"
        raise UserError(f"{argument}={type(value).__name__} measures and compresses nothing; call {call}")
    kind: Any = {"algorithm": Algorithm, "decomposer": Decomposer}[argument]
    if not isinstance(value, kind):
        raise UserError(f"{argument}={_said(value)} is no {argument}; pass an instance or its name")
    return value


def _said(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)[:40]


@checked("spectrim.load")
def load(
    path: str | Path,
    *,
    into: nn.Module,
    sha256: str | None = None,
    params_kept: float | None = None,
    calibration: Batches | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Factor ``into`` by the plan saved at ``path``, fill it with the saved weights, and return it.

    ``path``: a file that ``Compressed.save`` wrote, or a folder that ``compress_checkpoint`` wrote.
    ``into``: the model, built dense as before compression. It decides precision and device of the weights; from the
        meta device they go to the CPU.
    ``sha256``: all 64 hex digits of the digest that the file must have, or the ``spectrim.json`` of a folder. The file
        itself holds a digest too, which shows damage; only a digest that you got elsewhere shows intent.
    ``params_kept``: the part of the parameters to keep, in (0, 1], of a file saved with ``every_size=True``. The plan
        is the one that ``compress`` with the same ``Joint`` makes for it; 1 gives the dense model.
    ``calibration``: batches for the refit of ``Joint`` at this size, with targets unless ``Joint`` had
        ``refit_by="outputs"``. Left out, the factors stay as they are cut, as after ``Joint(…, refit=0)``.
    ``loss``: the one that ``compress`` had, where it was given any; it goes with ``calibration``.

    Raises ``UserError`` where the file is missing, cut short, altered, or of another architecture.
    """
    if loss is not None and calibration is None:
        raise UserError("loss= is for the refit of a size; give calibration=, too, or leave it out")
    into = eager(into, values=False)
    if params_kept is not None and not Path(path).is_dir():
        require_default_dtype()
        return every_size.load(Path(path), into, params_kept, sha256, calibration, loss)
    if params_kept is not None or calibration is not None:
        given = "params_kept=" if params_kept is not None else "calibration="
        raise UserError(f"{given} is for a file saved with every_size=True, and params_kept= goes with it")
    return sharded.load(path, into, sha256) if Path(path).is_dir() else single_file.load(path, into, sha256)
