"""The preprocessing of images is the one that was asked for or that the model tells, and it is always said."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from spectrim.cli import given_data, preprocessing
from spectrim.cli.compress import main
from spectrim.cli.preprocessing import Preprocessing, asked, of_model
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.tools.imagenet import MEAN, STD

NETS = """
import torch
from torch import nn

def build(cfg=False):
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 3))
    if cfg:
        net.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return net

def grey_box(image):
    return torch.full((3, 8, 8), image.getpixel((0, 0))[0] / 255)

def uncropped(image):
    return torch.zeros(3, image.height, image.width)

def failing(image):
    raise KeyError("scale")

def a_list(image):
    return [0.0]

constant = 3
"""
LEVEL = 102  # of all pixels: 0.4 of white


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: networks, functions, and uniform images of several heights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "nets_and_steps.py").write_text(NETS)
    (tmp_path / "images").mkdir()
    for n in range(12):
        Image.new("RGB", (20, 20 + n), (LEVEL,) * 3).save(tmp_path / "images" / f"{n}.png")
    return tmp_path


class Classes(nn.Module):
    """Three classes of any image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


def images(
    how: Preprocessing | None, model: nn.Module | None = None, name: str = "a:b", **more: Any
) -> given_data.Data:
    settings: dict[str, Any] = {"source": "images", "size": None, "samples": 6, "batch_size": 2, "seed": 0, **more}
    return given_data.images(model=Classes() if model is None else model, name=name, how=how, **settings)


@pytest.mark.parametrize(
    ("how", "mean", "std"),
    [
        ("none", (0.0,) * 3, (1.0,) * 3),
        ("imagenet", MEAN, STD),
        ("0.5/0.25", (0.5,) * 3, (0.25,) * 3),
        ("0.1,0.2,0.3/1,0.5,0.25", (0.1, 0.2, 0.3), (1.0, 0.5, 0.25)),
    ],
)
def test_pixels_are_normalised_as_asked(place: Path, how: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    data = images(asked(how), size=16)
    inputs, _ = next(iter(data.calibration))
    expected = [(LEVEL / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    assert inputs.shape == (2, 3, 16, 16)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.tensor(expected))
    assert f"(--preprocess {how})" in data.preprocessing and "central 16 x 16 pixels" in data.preprocessing
    assert not data.assumed


def test_a_function_takes_the_place_of_all_steps(place: Path) -> None:
    data = images(asked("nets_and_steps:grey_box"))
    inputs, _ = next(iter(data.calibration))
    assert inputs.shape == (2, 3, 8, 8) and torch.all(inputs == LEVEL / 255)
    assert data.preprocessing == "prepared by --preprocess nets_and_steps:grey_box"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("0.5", "none of imagenet, none, MEAN/STD such as 0.5/0.5, and package.module:function"),
        ("0.5,0.5/0.5", "none of imagenet"),
        ("a/b", "none of imagenet"),
        ("123.7,116.3,103.5/58.4,57.1,57.4", "not on the scale [0, 1] of pixels; divide by 255"),
        ("0.5/0", "give deviations above 0"),
        ("nan/nan", "not on the scale"),
        ("nets_and_steps.py:grey_box", "names a file; name its module: nets_and_steps:grey_box"),
        ("nets_and_steps:nothing", "cannot be imported: AttributeError"),
        ("nets_and_steps:constant", "is a int; name a function of one image"),
    ],
)
def test_what_is_no_preprocessing_is_said(place: Path, how: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        asked(how)
    assert str(raised.value).startswith(f"--preprocess {how} ") and said in str(raised.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("failing", "failed on an image: KeyError: 'scale'"),
        ("a_list", "returns a list; return the tensor of one image"),
        ("uncropped", "crop images to one size"),
    ],
)
def test_a_function_that_cannot_be_used_is_said_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    options = ["--calibration", "images", "--params-kept", "0.6", "--out", "small"]
    assert main(["nets_and_steps:build", *options, "--preprocess", f"nets_and_steps:{name}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"spectrim-compress: --preprocess nets_and_steps:{name} ") and said in error
    assert error.count("\n") == 1


def test_a_model_of_timm_tells() -> None:
    model = Classes()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": [0.25, 0.25, 0.25]}  # type: ignore[assignment]
    assert of_model(model, "a:b") == Preprocessing("the model's pretrained_cfg", (0.5,) * 3, (0.25,) * 3)


def test_torchvision_tells() -> None:
    found = of_model(Classes(), "torchvision.models:efficientnet_v2_l")
    assert (found.mean, found.std, found.assumed) == ((0.5,) * 3, (0.5,) * 3, False)
    assert found.source == "torchvision's transforms of efficientnet_v2_l"
    assert of_model(Classes(), "torchvision.models:resnet18").mean == MEAN
    assert of_model(Classes(), "torchvision.models:ResNet").assumed


@pytest.mark.parametrize(
    ("settings", "mean", "assumed"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, (0.5,) * 3, False),
        ({"do_normalize": False}, (0.0,), False),
        ({"rescale_factor": 1 / 127.5}, MEAN, True),  # pixels in [0, 2], which is not what we make
    ],
)
def test_an_image_processor_of_transformers_tells(
    tmp_path: Path, settings: dict[str, Any], mean: tuple[float, ...], assumed: bool
) -> None:
    pytest.importorskip("transformers")
    pretrained.library().ViTImageProcessor(**settings).save_pretrained(tmp_path)
    model = Classes()
    model.config = SimpleNamespace(_name_or_path=str(tmp_path))  # type: ignore[assignment]
    found = of_model(model, "a:b")
    assert found.mean == mean and found.assumed is assumed


def test_a_folder_without_an_image_processor_tells_nothing(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = Classes()
    model.config = SimpleNamespace(_name_or_path=str(tmp_path))  # type: ignore[assignment]
    assert of_model(model, "a:b").assumed


def test_a_data_set_keeps_its_own_normalisation_unless_another_is_asked_for() -> None:
    own = images(None, source="digits")
    assert own.preprocessing == "normalised by mean 0.3055 and deviation 0.3756 (as digits is)" and not own.assumed
    other = images(asked("0.5/0.5"), source="digits")
    (before, _), (after, _) = next(iter(own.test)), next(iter(other.test))
    torch.testing.assert_close((after * 0.5 + 0.5), before * 0.3756 + 0.3055)
    with pytest.raises(UserError, match="--preprocess has 3 values; digits has 1 channel"):
        images(asked("imagenet"), source="digits")
    with pytest.raises(UserError, match="grey_box is for image files; digits takes imagenet, none or MEAN/STD"):
        images(Preprocessing("grey_box", function=preprocessing.centre_crop(8, 8)), source="digits")


def test_the_command_says_what_was_done_and_what_was_assumed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calibration", "images", "--image-size", "16", "--params-kept", "0.7", "--out"]
    assumed = "the images were normalised as for ImageNet, because the model does not tell how"
    for out, more, said, is_assumed in (
        ("first", [], "(as for ImageNet)", True),
        (
            "second",
            ["--with", "cfg=True"],
            "mean 0.5, 0.5, 0.5 and deviation 0.25, 0.25, 0.25 (the model's pretr",
            False,
        ),
        ("third", ["--preprocess", "0.1/0.2"], "mean 0.1 and deviation 0.2 (--preprocess 0.1/0.2)", False),
    ):
        assert main(["nets_and_steps:build", *options, out, *more]) == 0
        printed, card = capsys.readouterr().out, (place / out / "README.md").read_text()
        line = printed.splitlines()[0].removeprefix("images: ")
        assert said in line and f"- preprocessing: {line}\n" in card
        assert (f"note: {assumed}" in printed) is is_assumed and (f"- {assumed}" in card) is is_assumed
    assert main(["nets_and_steps:build", *options[:-1], "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("images: shorter side scaled to 18, central 16 x 16 pixels, normalised")
