"""Image files in ImageNet's layout, ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, read from disk on demand."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spectrim.data.images import Batch, Splits
from spectrim.data.splits import ImageData, digest_of, draw
from spectrim.errors import UserError
from spectrim.tools.settings import settings
from spectrim.tools.torchvision_shim import prepare

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training set


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
        """Number of batches."""
        return -(-len(self.paths) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image ``index`` and its label."""
        return self.transform(_read(self.root / self.paths[index])), int(self.labels[index])

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches. Raises ``UserError`` where a file is not a readable image."""
        loader = DataLoader(self, self.batch_size, sampler=range(len(self.paths)), num_workers=self.workers)
        try:
            yield from loader
        except UserError as error:  # A worker's error message includes its traceback.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("spectrim.errors.UserError: ")) from None

    def digest(self) -> str:
        """Return the sha256 over path, size in bytes and label of every file. It does not read the images."""
        sha = hashlib.sha256()
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            sha.update(f"{path}\0{(self.root / path).stat().st_size}\0{label}\n".encode())
        return sha.hexdigest()


@settings
class ImageFolder(ImageData):
    """An image folder in ImageNet's layout. ``val`` is the test split; ``train`` gives the other splits.

    Each image is scaled so that its shorter side has ``resize`` pixels. Its central square of ``image_size`` pixels is
    then normalised by ImageNet's mean and standard deviation.

    ``root``: folder with ``train`` and ``val``.
    ``workers``: number of processes that read images.
    """

    batch_size: int = 50
    root: str = ""
    image_size: int = 224
    resize: int = 256
    workers: int = 0

    def __post_init__(self) -> None:
        self.check()
        if not 0 < self.image_size <= self.resize:
            raise UserError(f"image_size must lie in 1..resize ({self.resize}), got {self.image_size}")
        if self.workers < 0:
            raise UserError(f"workers must be 0 or more, got {self.workers}")

    def load(self) -> Splits:
        """Return the four splits.

        Raises ``UserError`` where the folder does not exist, a class has no images, or the classes of ``val`` and
        ``train`` differ.
        """
        prepare()
        from torchvision import transforms

        if not self.root:
            raise UserError("data.root is not set: name a folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg")
        root = Path(self.root).expanduser()
        train_paths, train_labels, classes = _listing(root, "train")
        test_paths, test_labels, test_classes = _listing(root, "val")
        if test_classes != classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise UserError(f"{root}: train and val hold different classes ({', '.join(odd[:4])})")
        drawn = draw(self, len(train_paths), len(test_paths))
        transform = transforms.Compose(
            [
                transforms.Resize(self.resize),
                transforms.CenterCrop(self.image_size),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

        def split(paths: list[str], labels: Tensor, indices: Tensor, name: str) -> FolderSplit:
            chosen = tuple(paths[index] for index in indices.tolist())
            return FolderSplit(root, chosen, labels[indices], transform, self.batch_size, self.workers, name)

        from_test = drawn.drawn_from == "test set"
        paths, labels = (test_paths, test_labels) if from_test else (train_paths, train_labels)
        train = split(train_paths, train_labels, drawn.train, "image_folder train")
        calibration = split(paths, labels, drawn.calibration, "image_folder calibration")
        verification = split(paths, labels, drawn.verification, "image_folder verification")
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


def _listing(root: Path, part: str) -> tuple[list[str], Tensor, list[str]]:
    """Return relative paths, labels and class names, in torchvision's order."""
    from torchvision import datasets

    folder = root / part
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; an image folder holds train/CLASS/*.jpg and val/CLASS/*.jpg")
    try:
        found = datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from None
    paths = [str(Path(path).relative_to(root)) for path, _ in found.samples]
    return paths, torch.tensor(found.targets, dtype=torch.int64), found.classes


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable image ({reason}); replace or remove it") from None
