"""Image files in ImageNet's layout."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spectrim.data import image_folder
from spectrim.data.image_folder import ImageFolder
from spectrim.errors import UserError
from spectrim.tools.imagenet import MEAN, STD
from spectrim.tools.torchvision_shim import prepare

COLOURS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("val", 2)):
        for name, colour in COLOURS.items():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40 + number, 30), colour).save(folder / f"{number}.png")
    return tmp_path


def settings(root: Path, **others: int | str) -> ImageFolder:
    sizes: dict = {
        "held_out": 4,
        "calibration_size": 3,
        "verification_size": 0,
        "batch_size": 2,
        "image_size": 16,
        "resize": 20,
    }
    return ImageFolder(root=str(root), **(sizes | others))


def test_split_as_every_training_set_is(root: Path) -> None:
    splits = settings(root).load()
    assert [len(part.labels) for part in (splits.train, splits.calibration, splits.test)] == [6, 3, 4]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert splits.train.labels.tolist() == (order[4:].sort().values >= 5).long().tolist()
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (2, 3, 16)


def test_batches_are_normalised_and_can_be_iterated_again(root: Path) -> None:
    test = settings(root).load().test
    for _ in range(2):
        batches = list(test)
        assert [inputs.shape for inputs, _ in batches] == [(2, 3, 16, 16)] * len(test)
        assert torch.cat([targets for _, targets in batches]).tolist() == test.labels.tolist() == [0, 0, 1, 1]
        red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
        assert torch.allclose(batches[0][0][0, :, 8, 8], red)


def test_calibration_from_the_test_set(root: Path) -> None:
    splits = settings(root, calibration_size=4, calibration_from="test").load()
    assert splits.calibration.digest() == splits.test.digest()


def test_a_folder_may_hold_some_of_the_classes_of_a_network(root: Path, tmp_path: Path) -> None:
    """The labels are the places in the file of names, and the pictures are those of the same folders."""
    names = tmp_path / "names.txt"
    names.write_text("zebra\ndog\nbee\ncat\n")
    plain, placed = settings(root).load(), settings(root, classes=str(names)).load()
    assert placed.num_classes == 4 and plain.num_classes == 2
    for part in ("train", "calibration", "test"):
        before, after = getattr(plain, part), getattr(placed, part)
        assert after.paths == before.paths
        assert after.labels.tolist() == [(3, 1)[label] for label in before.labels.tolist()]
    assert placed.digest != plain.digest
    names.write_text("cat\nbee\n")
    with pytest.raises(UserError, match="must name each class once, one a line; mend dog"):
        settings(root, classes=str(names)).load()
    with pytest.raises(UserError, match="nowhere.txt cannot be read .*; give a text file"):
        settings(root, classes=str(tmp_path / "nowhere.txt")).load()


def test_a_name_of_a_class_may_have_spaces(root: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (root / part / "dog").rename(root / part / "great dane")
    names = tmp_path / "names.txt"
    names.write_text("great white shark\ncat\n\n great dane \n")
    splits = settings(root, classes=str(names)).load()
    assert splits.num_classes == 3 and set(splits.train.labels.tolist()) == {1, 2}


def test_worker_processes_read_the_same(root: Path) -> None:
    plain, parallel = settings(root).load().test, settings(root, workers=1).load().test
    for (first, _), (second, _) in zip(plain, parallel, strict=True):
        assert first.equal(second)


def test_digest_follows_names_sizes_and_labels(root: Path) -> None:
    before = settings(root).load().digest
    assert settings(root).load().digest == before
    Image.new("RGB", (90, 90)).save(root / "val" / "cat" / "0.png")
    assert settings(root).load().digest != before


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_is_no_image(root: Path, workers: int) -> None:
    (root / "val" / "dog" / "1.png").write_bytes(b"nothing to see")
    with pytest.raises(UserError, match=r"^[^\n]*val/dog/1.png is not a readable image[^\n]*$"):
        list(settings(root, workers=workers).load().test)


def test_bad_folders(root: Path) -> None:
    with pytest.raises(UserError, match=r"data.root is not set"):
        ImageFolder().load()
    with pytest.raises(UserError, match="nowhere/train cannot be listed .No such file or directory.; an image folder"):
        settings(root / "nowhere").load()
    (root / "val" / "eel").mkdir()
    with pytest.raises(UserError, match="eel"):
        settings(root).load()
    Image.new("RGB", (20, 20)).save(root / "val" / "eel" / "0.png")
    with pytest.raises(UserError, match=r"train and val hold different classes \(eel\)"):
        settings(root).load()
    with pytest.raises(UserError, match=r"image_size must lie in 1..resize"):
        settings(root, image_size=21)
    with pytest.raises(UserError, match="workers"):
        settings(root, workers=-1)


def test_the_listing_is_that_of_torchvision(root: Path) -> None:
    deep = root / "train" / "cat" / "b" / "c"
    deep.mkdir(parents=True)
    for name in ("Z.JPG", "a.webp", "notes.txt"):
        shutil.copy(root / "train" / "cat" / "0.png", deep / name)
    (root / "train" / "cat" / "a").symlink_to(root / "train" / "dog")
    prepare()
    from torchvision import datasets

    theirs = datasets.ImageFolder(str(root / "train"))
    paths, labels, classes = image_folder._listing(root, "train")
    assert [str(root / path) for path in paths] == [path for path, _ in theirs.samples]
    assert labels.tolist() == theirs.targets and classes == theirs.classes


def bomb(path: Path) -> None:
    """A small file of 400 million pixels."""
    Image.new("1", (20_000, 20_000)).save(path)


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere.png"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (bomb, r"is not a readable image \(Image size \(400000000 pixels\) exceeds limit"),
        (broken_link, r"cannot be read \(No such file or directory\); replace or remove it$"),
        (pipe, "is not a file; replace or remove it$"),
        (cut_short, "is not a readable image"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(root: Path, spoil: Callable[[Path], None], said: str) -> None:
    path = root / "val" / "dog" / "1.png"
    spoil(path)
    with pytest.raises(UserError, match=f"^{path} {said}") as refusal:
        list(settings(root).load().test)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("hidden", ["train", "train/dog", "train/dog/deep"])
def test_a_folder_that_cannot_be_listed_is_named_and_none_of_its_images_are_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    (root / hidden).mkdir(exist_ok=True)
    usual = os.scandir

    def scandir(path: Any) -> Iterator[os.DirEntry]:
        if Path(path) == root / hidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=f"^{root / hidden} cannot be listed .Permission denied.; [^\n]*$"):
        settings(root).load()


def test_a_name_that_no_file_system_takes_ends_in_a_short_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^x{300}… cannot be listed \(File name too long\)") as refusal:
        settings(Path("x" * 5000)).load()
    assert len(str(refusal.value)) < 500


def test_names_may_hold_any_bytes(root: Path) -> None:
    before = settings(root).load().digest
    os.rename(root / "val" / "cat" / "0.png", os.fsencode(root / "val" / "cat") + b"/\xff.png")
    assert settings(root).load().digest != before


def test_a_train_folder_without_classes_is_refused(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    with pytest.raises(UserError, match="train holds no folders; give each class a folder with its images$"):
        settings(root).load()


def test_more_processes_than_the_machine_can_run_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match="^data.workers=100000 is too many for [0-9]+ cores; give at most [0-9]+$"):
        settings(root, workers=100_000).load()


def test_a_process_that_dies_while_it_reads_ends_in_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "_read", lambda path: os._exit(1))
    with pytest.raises(UserError, match="^a process that reads images ended [^\n]*; use fewer data.workers$"):
        list(settings(root, workers=1).load().test)
