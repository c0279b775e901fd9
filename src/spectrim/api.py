"""The one-call interface: any module, any iterable of batches, any algorithm."""

from pathlib import Path

import torch.nn.functional as F
from torch import nn

from spectrim.algorithms.lossless import Lossless
from spectrim.algorithms.shared.workbench import Algorithm, Compressed
from spectrim.batches import Batches
from spectrim.checkpoints import sharded, single_file
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.svd import SVD
from spectrim.losses import Loss
from spectrim.statistics.batchnorm import BatchNorm, require
from spectrim.statistics.objective import Objective


def compress(
    model: nn.Module,
    *,
    calibration: Batches,
    verification: Batches | None = None,
    train: Batches | None = None,
    loss: Loss = F.cross_entropy,
    algorithm: Algorithm | None = None,
    decomposer: Decomposer | None = None,
    batch_norm: BatchNorm = "keep",
    layers_at_once: int | None = None,
) -> Compressed:
    """Compress ``model``, without training it unless the algorithm is one that trains.

    ``calibration``: held-out batches (inputs, targets), iterable again and again; inputs are a tensor, a tuple of
    positional or a mapping of keyword arguments. ``verification``: other batches, for algorithms that measure what
    they chose: a loss measured on the set that was chosen on is too good. ``train``: batches for algorithms that train,
    with a length. ``loss(model_output, targets)``: a scalar, the mean over its batch.
    ``algorithm``: ``Lossless()`` if not given; ``decomposer``: ``SVD()``, the channel view, if not given.
    ``batch_norm="follow"``: once the algorithm is done, the statistics of every BatchNorm are shifted by what
    compression changed on calibration batches, without labels (``batchnorm.reestimate``); ``"keep"``: they stay.
    ``layers_at_once``: hold the gradients of so many layers at a time, for more passes over the calibration batches
    (``objective.Objective``); all of them if not given.

    ``model`` is left as it was, its mode and device too; the result holds the compressed copy on the same device.
    Raises ``UserError`` in one line for anything that cannot be compressed as asked.
    """
    require(batch_norm)
    further = {"verification": verification, "train": train}
    splits = {name: batches for name, batches in further.items() if batches is not None}
    objective = Objective(loss, {"calibration": calibration, **splits}, layers_at_once)
    compressed = (algorithm or Lossless()).compress(model, decomposer or SVD(), objective)
    return compressed.settle(batch_norm, objective)


def load(path: str | Path, *, into: nn.Module) -> nn.Module:
    """The model saved at ``path``: ``into``, built dense as before compression, factored by the plan and filled.

    ``path``: a file that ``Compressed.save`` wrote, or a folder that ``compress_checkpoint`` did.
    Raises ``UserError`` where the file is missing, cut short, altered, or of another architecture.
    """
    return sharded.load(path, into) if Path(path).is_dir() else single_file.load(path, into)
