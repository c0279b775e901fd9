"""Image classifiers of torchvision by name, untrained or with the weights that torchvision publishes."""

import difflib
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from spectrim.errors import UserError
from spectrim.fetch.download import Unavailable, Url
from spectrim.tools import digests, files
from spectrim.tools.torchvision_shim import prepare


def classifier(name: str, weights: str | None = None, num_classes: int = 1000) -> nn.Module:
    """Return torchvision's classifier ``name`` (``resnet50``, ``vgg19_bn``, …). It takes images of three channels.

    Weights are downloaded into torch's cache at first use and checked against the digest in their file name. Only
    tensors are read from the file: nothing is unpickled.

    ``weights``: name of published weights (``IMAGENET1K_V1``, ``DEFAULT``), or None for an untrained network.

    Raises ``UserError`` where the name or the weights are unknown, the weights have another number of classes, a
    download fails, or a file is damaged.
    """
    prepare()
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier {name!r}{_close(name, known)}")
    chosen = None
    if weights is not None:
        members = models.get_model_weights(name).__members__
        if weights not in members:
            raise UserError(f"{name} has no weights {weights!r}; known: {', '.join(members)}")
        chosen = members[weights]
        classes = len(chosen.meta["categories"])
        if num_classes != classes:
            raise UserError(f"the weights {weights} of {name} tell {classes} classes apart, not {num_classes}")
        largest = math.ceil(1.01 * chosen.meta["_file_size"] * 2**20)  # The published size is in MiB and rounded.
        _fetch(Url(chosen.url, None, largest), f"the weights {weights} of {name}")
    with _tensors_only(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # two old networks warn about slow initialisation
        return models.get_model(name, weights=chosen, num_classes=num_classes)


def _close(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"; did you mean {', '.join(matches)}?" if matches else f"; known: {', '.join(known)}"


def _fetch(url: Url, what: str) -> None:
    """Ensure that torch's cache holds the file of ``url``."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.file
    if path.exists():
        if not _is_as_named(path):
            raise UserError(f"{path} is truncated or altered; delete it and run again")
        return
    try:
        with files.scratch(path.parent) as folder, files.replacing(path) as (made,):
            fetched = url.fetch(folder)
            if not _is_as_named(fetched):
                raise Unavailable(f"{url.file} arrived truncated or altered and was deleted")
            fetched.replace(made)
    except Unavailable as failure:
        raise UserError(f"{what} could not be fetched: {failure}. By hand: put the file at {path}") from None
    except OSError as error:
        reason = "no room on the disk" if error.errno in files.NO_ROOM else error.strerror or error
        raise UserError(f"{what} cannot be kept in {path.parent} ({reason}); TORCH_HOME names another folder") from None


def _is_as_named(path: Path) -> bool:
    """Return whether the sha256 begins with the digits, at least 8, that torchvision publishes in the file's name."""
    digits = re.search(r"-([0-9a-f]{8,})\.", path.name)
    return digits is not None and digests.of_file(path).startswith(digits[1])


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make every ``torch.load`` in the block read tensors only, which torchvision itself does not request."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
