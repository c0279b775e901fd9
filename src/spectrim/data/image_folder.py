"""Image files in ImageNet's layout, ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, read from disk on demand."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spectrim.data.images import Batch, Splits
from spectrim.data.splits import ImageData, digest_of, draw_indices
from spectrim.errors import UserError, first_line
from spectrim.tools.imagenet import MEAN, STD
from spectrim.tools.settings import settings
from spectrim.tools.torchvision_shim import prepare

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of torchvision
WORKERS_PER_CORE = 8


@dataclass(frozen=True, eq=False)
class FolderSplit(Dataset[tuple[Tensor, int]]):
    """Labelled image files that can be iterated repeatedly as batches ``(inputs, targets)``.

    The batches follow the order of ``paths``; the last one may be shorter.

    ``paths``: relative to ``root``.
    ``labels``: int64, shape (N,).
    ``transform``: RGB image → float32 (3, H, W).
    ``workers``: number of processes that read images (0: the current process).
    """

    root: Path
    paths: tuple[str, ...]
    labels: Tensor
    transform: Callable[[Image.Image], Tensor]
    batch_size: int
    workers: int = 0
    name: str = "images"

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.paths) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image ``index`` and its label."""
        return self.transform(_read(self.root / self.paths[index])), int(self.labels[index])

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches. Raises ``UserError`` where a file is not a readable image, or a worker process fails."""
        loader = DataLoader(self, self.batch_size, sampler=range(len(self.paths)), num_workers=self.workers)
        try:
            yield from loader
        except UserError as error:  # A worker's error message includes its traceback.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("spectrim.errors.UserError: ")) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that reads images ended ({first_line(error)}); use fewer data.workers"
            ) from None

    def digest(self) -> str:
        """Return the sha256 over path, size in bytes and label of every file. It does not read the images.

        Raises ``UserError`` for a broken link.
        """
        sha = hashlib.sha256()
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            line = f"{path}\0{_size(self.root / path)}\0{label}\n"
            sha.update(line.encode("utf-8", "surrogateescape"))  # a name may hold any bytes
        return sha.hexdigest()


@settings
class ImageFolder(ImageData):
    """An image folder in ImageNet's layout. ``val`` is the test split; ``train`` gives the other splits.

    Each image is scaled so that its shorter side has ``resize`` pixels. Its central square of ``image_size`` pixels is
    then normalised by ImageNet's mean and standard deviation.

    ``root``: folder with ``train`` and ``val``.
    ``classes``: text file with the names of all classes, one a line, in the order of the network's outputs. The folder
        may then hold some of them. Empty: the classes are those of the folder, in alphabetical order.
    ``workers``: number of processes that read images.
    """

    batch_size: int = 50
    root: str = ""
    image_size: int = 224
    resize: int = 256
    workers: int = 0
    classes: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.image_size <= self.resize:
            raise UserError(f"image_size must lie in 1..resize ({self.resize}), got {self.image_size}")
        if self.workers < 0:
            raise UserError(f"workers must be 0 or more, got {self.workers}")

    def load(self) -> Splits:
        """Return the four splits.

        Raises ``UserError`` where a folder is missing or cannot be listed, a class has no images, the classes of
        ``val`` and ``train`` differ or are not in the file ``classes``, or ``workers`` are more than the machine can
        run.
        """
        if not self.root:
            raise UserError("data.root is not set: name a folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg")
        cores = os.cpu_count() or 1
        if self.workers > WORKERS_PER_CORE * cores:
            raise UserError(
                f"data.workers={self.workers} is too many for {cores} cores; give at most {WORKERS_PER_CORE * cores}"
            )
        root = Path(os.path.expanduser(self.root))  # Path.expanduser raises for an unknown user
        train_paths, train_labels, classes = _listing(root, "train")
        test_paths, test_labels, test_classes = _listing(root, "val")
        if test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise UserError(f"{root}: train and val hold different classes ({', '.join(odd[:4])})")
        if self.classes:
            place, classes = _places(Path(os.path.expanduser(self.classes)), classes)
            train_labels, test_labels = place[train_labels], place[test_labels]
        indices = draw_indices(self, len(train_paths), len(test_paths))
        transform = centre_crop(self.resize, self.image_size)

        def split(paths: list[str], labels: Tensor, own: Tensor, name: str) -> FolderSplit:
            chosen = tuple(paths[index] for index in own.tolist())
            return FolderSplit(root, chosen, labels[own], transform, self.batch_size, self.workers, name)

        paths, labels = (test_paths, test_labels) if indices.from_test else (train_paths, train_labels)
        train = split(train_paths, train_labels, indices.train, "image_folder train")
        calibration = split(paths, labels, indices.calibration, "image_folder calibration")
        verification = split(paths, labels, indices.verification, "image_folder verification")
        test = split(test_paths, test_labels, torch.arange(len(test_paths)), "image_folder test")
        return Splits(
            name="image_folder",
            train=train,
            calibration=calibration,
            verification=verification,
            test=test,
            num_classes=len(classes),
            in_channels=3,
            image_size=self.image_size,
            digest=digest_of(train, calibration, verification, test),
        )


def centre_crop(
    resize: int, image_size: int, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Callable[[Image.Image], Tensor]:
    """Return the transform RGB image → float32 (3, H, W), by default that of most weights for ImageNet.

    ``resize``: length of the shorter side before the crop. ``image_size``: side of the crop. Both are in pixels.
    ``mean``, ``std``: one value per channel, or one for all, on the scale [0, 1].
    """
    prepare()
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def _listing(root: Path, part: str) -> tuple[list[str], Tensor, list[str]]:
    """Return relative paths, labels and class names, in torchvision's order.

    Raises ``UserError`` where a folder is missing or cannot be listed, or a class has no images.
    """
    paths: list[str] = []
    labels: list[int] = []
    try:
        classes = sorted(entry.name for entry in os.scandir(root / part) if entry.is_dir())
        for label, name in enumerate(classes):
            found = list(_images(root / part / name))
            if not found:
                raise UserError(f"{root / part / name} has no images ({', '.join(EXTENSIONS)}); add some or remove it")
            paths += [str(path.relative_to(root)) for path in found]
            labels += [label] * len(found)
    except OSError as error:
        raise UserError(
            f"{_shortened(error.filename)} cannot be listed ({error.strerror}); an image folder holds "
            "train/CLASS/*.jpg and val/CLASS/*.jpg"
        ) from None
    if not classes:
        raise UserError(f"{root / part} holds no folders; give each class a folder with its images")
    return paths, torch.tensor(labels, dtype=torch.int64), classes


def _places(path: Path, folders: list[str]) -> tuple[Tensor, list[str]]:
    """Return the place of each folder's class in the file ``path``, int64, and all classes of the file.

    Raises ``UserError`` where the file cannot be read, or does not name a folder once.
    """
    try:
        known = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.classes={path} cannot be read ({first_line(error)}); give a text file") from None
    odd = [name for name in folders if known.count(name) != 1]
    if odd:
        raise UserError(f"data.classes={path} must name each class once, one a line; mend {odd[0]}")
    return torch.tensor([known.index(name) for name in folders], dtype=torch.int64), known


def _images(folder: Path) -> Iterator[Path]:
    """Yield the image files below ``folder``, sorted. Raises ``OSError`` where a folder cannot be listed."""
    for inner, _, files in sorted(os.walk(folder, onerror=_raise, followlinks=True)):
        yield from (Path(inner, file) for file in sorted(files) if file.lower().endswith(EXTENSIONS))


def _raise(error: OSError) -> NoReturn:
    raise error


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable image ({reason}); replace or remove it") from None


def _size(path: Path) -> int:
    """Return the size of a file in bytes. Raises ``UserError`` for a broken link and for what is no file."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); replace or remove it") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a file; replace or remove it")
    return found.st_size


def _shortened(path: object) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:300]}…"
