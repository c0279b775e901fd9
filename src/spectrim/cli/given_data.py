"""The calibration data that a command names, in three splits: to select on, to verify on, and to report."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.batches import Batches, device_of, evaluating, forward, to_device
from spectrim.cli import preprocessing
from spectrim.cli.preprocessing import Preprocessing, Transform
from spectrim.data.cifar10 import CIFAR10
from spectrim.data.corpus import Corpus, shuffled
from spectrim.data.digits import Digits
from spectrim.data.fashion_mnist import FashionMNIST
from spectrim.data.hub import HubCorpus, column, rows
from spectrim.data.image_folder import EXTENSIONS, FolderSplit
from spectrim.data.imdb import IMDBCorpus
from spectrim.data.mnist import MNIST
from spectrim.data.own_text import own_text
from spectrim.data.sotu import SOTU
from spectrim.data.text import TextSplit, Tokens, blocks, identity_of, without_padding
from spectrim.errors import UserError
from spectrim.losses import Loss, logits_of, token_loss

LEAST = 4  # samples in all: two to select on, one to verify on, one to report
OWN_TEXT = "own-text"  # names the text that a decoder writes itself
CORPORA: dict[str, type[Corpus]] = {"sotu": SOTU, "wikitext": HubCorpus, "imdb_corpus": IMDBCorpus}
IMAGES: dict[str, type[CIFAR10] | type[MNIST] | type[FashionMNIST] | type[Digits]] = {
    "cifar10": CIFAR10,
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "digits": Digits,
}
T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Batches of three splits, their loss, and what they are, in words.

    ``digest``: sha256 of the content.
    ``labelled``: whether the targets are given labels; otherwise they are the dense model's own answers.
    ``preprocessing``: what was done to images, in words.
    ``assumed``: whether nothing says that the network expects this preprocessing.
    """

    calibration: Batches
    verification: Batches
    test: Batches
    loss: Loss
    description: str
    digest: str
    labelled: bool = True
    preprocessing: str = ""
    assumed: bool = False


def texts(source: str, tokenizer: Any, context: int, samples: int, batch_size: int, seed: int) -> Data:
    """Return blocks of ``context`` tokens: ``samples`` to select on and half as many in each other split.

    Documents are shuffled by ``seed``. Where they hold fewer blocks, all are used. Raises ``UserError`` for a source
    that cannot be read or holds too little.
    """
    documents = shuffled([text for text in _documents(source) if text.strip()], seed)
    try:
        tokens, used = blocks(tokenizer, documents, context, 2 * samples)
    except UserError:  # there are fewer
        tokens, used = blocks(tokenizer, documents, context)
    count = len(tokens.labels)
    if count < LEAST:
        raise UserError(
            f"--calibration {source} holds {count} blocks of {context} tokens, of which {LEAST} are needed; give more "
            "text or a smaller --context"
        )
    return _in_three(tokens, identity_of(tokenizer, context, documents[:used], [count]), batch_size, source)


def own_texts(model: nn.Module, context: int, samples: int, batch_size: int, seed: int, dry_run: bool = False) -> Data:
    """Return blocks of text that ``model`` writes itself (``own_text.own_text``), as many as ``texts`` returns.

    ``dry_run``: write ``LEAST`` of them and repeat these. To tell times and sizes, no others are needed.
    """
    count = max(LEAST, 2 * samples)
    written = own_text(model, LEAST if dry_run else count, context, seed)
    ids = written.tokens.ids.repeat(math.ceil(count / len(written.labels)), 1)[:count]
    return _in_three(without_padding(ids), written.identity, batch_size, "text that the model wrote itself")


def _in_three(tokens: Tokens, identity: str, batch_size: int, source: str) -> Data:
    """Return the blocks in three splits."""
    parts = _parts(len(tokens.labels))

    def split(part: int) -> TextSplit:
        own = Tokens(tokens.ids[parts[part]], tokens.mask[parts[part]], tokens.labels[parts[part]])
        return TextSplit(lambda: own, f"{identity}{part}", batch_size)

    sizes, context = [part.stop - part.start for part in parts], tokens.ids.shape[1]
    said = f"{source}: {sizes[0]} blocks of {context} tokens to select on, {sizes[1]} to verify, {sizes[2]} to report"
    return Data(split(0), split(1), split(2), token_loss, said, hashlib.sha256(identity.encode()).hexdigest())


def _parts(count: int) -> list[slice]:
    """Return the parts of ``count`` samples: half to select on, a quarter to verify on, a quarter to report."""
    half = count // 2
    bounds = [0, half, half + (count - half) // 2, count]
    return [slice(*pair) for pair in pairwise(bounds)]


def _documents(source: str) -> Sequence[str]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = [one for one in sorted(path.rglob("*.txt")) if one.is_file()]
        if not found:
            raise UserError(f"--calibration {source} is a folder without .txt files; give one that holds some")
        return [_text(one) for one in found]
    if path.is_file():
        return _lines(path) if path.suffix in (".jsonl", ".json") else [_text(path)]
    if source.count("/") == 1 and not source.startswith(("/", ".", "~")):
        dataset, _, subset = source.partition(":")
        return column(rows(dataset, subset, "train"), "text", str)
    return _known(source, CORPORA, OWN_TEXT)().documents()[0]


def _known(source: str, kinds: Mapping[str, T], *others: str) -> T:
    """Return the data set that has this name. Raises ``UserError`` where there is none.

    ``others``: names that are taken elsewhere, for the message.
    """
    if source not in kinds:
        raise UserError(
            f"--calibration {source} is not there; give a file, a folder, a text set of the hub as owner/name, or one "
            f"of {', '.join([*kinds, *others])}"
        )
    return kinds[source]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8 ({error}); convert it") from None


def _lines(path: Path) -> list[str]:
    """Return the entry ``text`` of each line."""
    found = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            found.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            found.append(None)
        if not isinstance(found[-1], str):
            raise UserError(f'{path}, line {number} is no object with a "text"; give one such object a line')
    return found


def images(
    source: str,
    model: nn.Module,
    name: str,
    how: Preprocessing | None,
    size: int | None,
    samples: int,
    batch_size: int,
    seed: int,
) -> Data:
    """Return images: ``samples`` to select on and half as many in each other split.

    The targets are the class folders, where there are as many as the model has classes. Otherwise they are the classes
    that the dense model answers. Raises ``UserError`` for a source that cannot be read or holds too little.

    ``name``: package.module:factory of the model.
    ``how``: None: as the model tells, or as for ImageNet; for a data set of ``IMAGES``, as it does itself.
    ``size``: pixels a side of the images of a folder; None: 224.
    """
    folder, assumed = Path(source).expanduser(), False
    if folder.is_dir():
        how = how or preprocessing.of_model(model, name)
        transform, done = how.of_files(size)
        splits, digest, classes = _of_folder(folder, transform, samples, batch_size, seed)
        assumed = how.assumed
    else:
        splits, digest, classes, done = _of_set(source, how, size, samples, batch_size, seed)
    counts = [len(getattr(split, "labels", ())) or sum(len(targets) for _, targets in split) for split in splits]
    outputs = _answers(model, next(iter(splits[0]))[0])
    labelled = outputs.shape[1] == classes
    if not labelled:
        splits = [_Answered(split, [_answers(model, inputs).argmax(1) for inputs, _ in split]) for split in splits]
    said = f"{source}: {counts[0]} images to select on, {counts[1]} to verify, {counts[2]} to report"
    return Data(splits[0], splits[1], splits[2], F.cross_entropy, said, digest, labelled, done, assumed)


def _of_set(
    source: str, how: Preprocessing | None, size: int | None, samples: int, batch_size: int, seed: int
) -> tuple[list[Any], str, int, str]:
    """Return three splits of a data set by name, their digest, the number of classes, and how they are normalised."""
    kind = _known(source, IMAGES)
    if size is not None:
        raise UserError(f"--image-size is for a folder of images; {source} has a size of its own, so leave it out")
    loaded = kind(
        calibration_size=samples,
        verification_size=max(1, samples // 2),
        batch_size=batch_size,
        calibration_seed=seed,
    ).load()
    splits: list[Any] = [loaded.calibration, loaded.verification, loaded.test]
    own = Preprocessing(f"as {source} is", splits[0].mean, splits[0].std) if how is None else how
    mean, std = own.of_set(source, loaded.in_channels)
    normalised = [replace(split, mean=mean, std=std) for split in splits]
    test = list(islice(normalised[2], -(-max(1, samples // 2) // batch_size)))
    return [*normalised[:2], test], loaded.digest, loaded.num_classes, own.normalisation


def _of_folder(
    root: Path, transform: Transform, samples: int, batch_size: int, seed: int
) -> tuple[list[Any], str, int]:
    """Return the three splits, their digest, and the number of classes; 0 where images lie outside of class folders."""
    for part in ("val", "train"):  # ImageNet's layout
        root = root / part if (root / part).is_dir() else root
    found = sorted(path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)
    total = samples + 2 * max(1, samples // 2)
    paths = shuffled(found, seed)[:total]
    if len(paths) < LEAST:
        raise UserError(
            f"--calibration {root} holds {len(paths)} images ({', '.join(EXTENSIONS)}); give {LEAST} or more"
        )
    nested = all(len(path.parts) > 1 for path in found)
    classes = sorted({path.parts[0] for path in found}) if nested else []
    labels = torch.tensor([classes.index(path.parts[0]) if nested else 0 for path in paths], dtype=torch.int64)
    splits = [
        FolderSplit(root, tuple(str(path) for path in paths[own]), labels[own], transform, batch_size)
        for own in _parts(len(paths))
    ]
    return splits, hashlib.sha256("".join(split.digest() for split in splits).encode()).hexdigest(), len(classes)


def _answers(model: nn.Module, inputs: Any) -> Tensor:
    """Return the class scores of the model. Raises ``UserError`` where it gives none."""
    with evaluating(model), torch.no_grad():
        scores = logits_of(forward(model, to_device(inputs, device_of(model))))
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise UserError(
            "the model gives no class scores of shape (samples, classes); call spectrim.compress from Python"
        )
    return scores.cpu()


@dataclass(frozen=True)
class _Answered:
    """Batches of images with other targets."""

    images: Any
    targets: Sequence[Tensor]

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for (inputs, _), targets in zip(self.images, self.targets, strict=True):
            yield inputs, targets
