"""How images become inputs of the network: as the user says, as the model tells, or as for ImageNet."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor, nn

from spectrim.cli import given_model
from spectrim.data.image_folder import centre_crop
from spectrim.errors import UserError, first_line
from spectrim.fetch import pretrained
from spectrim.tools.imagenet import MEAN, STD
from spectrim.tools.torchvision_shim import prepare

IMAGENET, NONE = "imagenet", "none"
SIZE = 224  # pixels a side
Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """Scaling and a crop, then a normalisation; or a function of the user's in place of all.

    ``source``: who says so, in words.
    ``mean``, ``std``: one value per channel, or one for all, on the scale [0, 1].
    ``function``: RGB image → tensor.
    ``assumed``: whether neither the user nor the model says how.
    """

    source: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    function: Transform | None = None
    assumed: bool = False

    @property
    def normalisation(self) -> str:
        """What is done to the pixels, in words."""
        return f"normalised by mean {_joined(self.mean)} and deviation {_joined(self.std)} ({self.source})"

    def of_files(self, size: int | None) -> tuple[Transform, str]:
        """Return the transform of an image file, and what it does, in words.

        ``size``: pixels a side; None: 224. Raises ``UserError`` for a size beside a function.
        """
        if self.function is not None:
            if size is not None:
                raise UserError(f"--image-size is none of {self.source}, which scales images itself; leave it out")
            return self.function, f"prepared by {self.source}"
        side = size or SIZE
        resize = round(side * 256 / 224)
        said = f"shorter side scaled to {resize}, central {side} x {side} pixels, {self.normalisation}"
        return centre_crop(resize, side, self.mean, self.std), said

    def of_set(self, name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation for each channel of a data set. Raises ``UserError`` where they do not fit it."""
        if self.function is not None:
            raise UserError(f"{self.source} is for image files; {name} takes imagenet, none or MEAN/STD")
        for values in (self.mean, self.std):
            if len(values) not in (1, channels):
                raise UserError(f"--preprocess has {len(values)} values; {name} has {channels} channel(s)")
        return tuple(self.mean * channels)[:channels], tuple(self.std * channels)[:channels]


@dataclass(frozen=True)
class _Function:
    """The user's function, whose mistakes are told in one line."""

    name: str
    call: Callable[[Image.Image], Any]
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def __call__(self, image: Image.Image) -> Tensor:
        try:
            made = self.call(image)
        except Exception as error:  # foreign code raises anything
            raise UserError(f"{self.name} failed on an image: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(made, Tensor):
            raise UserError(f"{self.name} returns a {type(made).__name__}; return the tensor of one image")
        self.shapes.add(tuple(made.shape))
        if len(self.shapes) > 1:
            raise UserError(f"{self.name} returns tensors of shapes {sorted(self.shapes)}; crop images to one size")
        return made


def asked(how: str) -> Preprocessing:
    """Return what ``--preprocess`` asks for: imagenet, none, MEAN/STD or package.module:function.

    Raises ``UserError`` for anything else, or where the function cannot be imported.
    """
    option = f"--preprocess {how}"
    if how == IMAGENET:
        return Preprocessing(option, MEAN, STD)
    if how == NONE:
        return Preprocessing(option, (0.0,), (1.0,))
    if given_model.is_factory(how):
        found = given_model.imported(how, option)
        if not callable(found):
            raise UserError(f"{option} is a {type(found).__name__}; name a function of one image")
        return Preprocessing(option, function=_Function(option, found))
    mean, slash, std = how.partition("/")
    values = _numbers(mean), _numbers(std)
    if not slash or not all(values):
        raise UserError(f"{option} is none of imagenet, none, MEAN/STD such as 0.5/0.5, and package.module:function")
    if not all(0 <= one <= 1 for one in values[0]) or not all(0 < one <= 1 for one in values[1]):
        raise UserError(f"{option} is not on the scale [0, 1] of pixels; divide by 255, and give deviations above 0")
    return Preprocessing(option, *values)


def of_model(model: nn.Module, name: str) -> Preprocessing:
    """Return what the model tells, or else ImageNet's normalisation, as ``assumed``.

    A model of timm holds its ``pretrained_cfg``, one of transformers names the folder of its image processor, and
    torchvision publishes transforms with its weights. ``name``: package.module:factory.
    """
    told = _of_timm(model) or _of_transformers(model) or _of_torchvision(name)
    if told is None:
        return Preprocessing("as for ImageNet", MEAN, STD, assumed=True)
    source, mean, std = told
    return Preprocessing(source, tuple(mean), tuple(std))


def _of_timm(model: nn.Module) -> tuple[str, Any, Any] | None:
    told = getattr(model, "pretrained_cfg", None)
    if not isinstance(told, Mapping) or not told.get("mean") or not told.get("std"):
        return None
    return "the model's pretrained_cfg", told["mean"], told["std"]


def _of_transformers(model: nn.Module) -> tuple[str, Any, Any] | None:
    where = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(where, str) or not where:
        return None
    with suppress(UserError):  # it has no image processor, or none that can be had
        told = pretrained.opened("AutoImageProcessor", where)
        if not told.do_rescale or not math.isclose(told.rescale_factor, 1 / 255, rel_tol=1e-3):
            return None
        source = f"the image processor of {where}"
        return (source, told.image_mean, told.image_std) if told.do_normalize else (source, (0.0,), (1.0,))
    return None


def _of_torchvision(name: str) -> tuple[str, Any, Any] | None:
    module, _, factory = name.partition(":")
    if not module.startswith("torchvision."):
        return None
    prepare()
    from torchvision import models

    with suppress(ValueError):  # no model of that name, such as the class that makes it
        told = models.get_model_weights(factory).DEFAULT.transforms()
        if getattr(told, "mean", None) and getattr(told, "std", None):
            return f"torchvision's transforms of {factory}", told.mean, told.std
    return None


def _numbers(text: str) -> tuple[float, ...]:
    """Return one number or three, separated by commas; none where it is something else."""
    try:
        found = tuple(float(one) for one in text.split(","))
    except ValueError:
        return ()
    return found if len(found) in (1, 3) else ()


def _joined(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
