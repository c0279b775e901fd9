"""What ``spectrim-compress`` does: open the model, compress it in memory or tensor by tensor, write the folder."""

import dataclasses
import math
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from spectrim import api, language
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.checkpoints import sharded
from spectrim.checkpoints.out_of_core import compress_checkpoint
from spectrim.checkpoints.shard_contents import POSITIONS
from spectrim.checkpoints.sharded import Sharded
from spectrim.cli import given_data, given_model, preprocessing, upload
from spectrim.cli.compress import BUDGETS
from spectrim.cli.given_data import Data
from spectrim.cli.model_card import Card, card_of
from spectrim.errors import MissingInput, UserError
from spectrim.runs.named import named, sized, sizes_of
from spectrim.surgery.cost import Cost
from spectrim.tools import files
from spectrim.tools.device import device_called
from spectrim.tools.profiling import Timed
from spectrim.tools.settings import require_seed

CARD, REPORT, WEIGHTS = "README.md", "report.csv", "model.safetensors"


def run(options: Namespace, arguments: Sequence[str]) -> None:
    """Do what the command line says. Raises ``UserError`` for anything that cannot be done as asked."""
    _require_sizes(options)
    _require_free(options.out)
    _require_names(options)
    hub = None if options.push_to_hub is None else upload.client()
    if given_model.is_factory(options.model):
        _of_factory(options, arguments)
    else:
        _decoder(options, arguments)
    if hub is not None and not options.dry_run:
        upload.push(hub, options.push_to_hub, options.out)


def _require_sizes(options: Namespace) -> None:
    """Refuse numbers that no data, model or random generator can have."""
    for name in ("samples", "context", "image_size", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} is too small; give at least 1")
    if options.memory is not None and not 0 < options.memory < math.inf:
        raise UserError(f"--memory {options.memory} is no size; give GiB, such as 16")
    require_seed("--seed", options.seed)


def _require_names(options: Namespace) -> None:
    """Refuse an unknown algorithm or decomposer, and a budget that it does not take, before anything is read."""
    if options.algorithm:
        _algorithm(options.algorithm, options)
    if options.decomposer:
        named("decomposer", options.decomposer)


def _require_free(out: Path | None, goes_on: bool = True) -> None:
    """Raise ``UserError`` where the folder cannot be made.

    ``goes_on``: whether a checkpoint that was compressed tensor by tensor may be there, which is then completed.
    """
    if out is None:
        return
    if out.exists() and not (goes_on and (out / sharded.MANIFEST).is_file()):
        raise UserError(f"--out {out} is there already; give a new folder")
    if not out.exists():
        files.require_writable(out)


def _decoder(options: Namespace, arguments: Sequence[str]) -> None:
    for name, value in (("--weights", options.weights), ("--with", options.settings)):
        if value:
            raise UserError(f"{name} belongs to package.module:factory; {options.model} brings its own")
    if options.preprocess is not None:
        raise UserError(f"--preprocess is for images, and {options.model} reads text; leave it out")
    folder = given_model.folder_of(options.model)
    memory = given_model.memory_for(given_model.bytes_of(folder), options.memory)
    if memory.streamed:
        _stream(options, arguments, folder)
        return
    _require_free(options.out, goes_on=False)
    model, tokenizer = given_model.decoder(folder, options.model, device_called(options.device))
    context = int(min(options.context, getattr(model.config, "max_position_embeddings", None) or math.inf))
    size = (context, options.samples, options.batch_size or memory.batch_size, options.seed)
    if options.calibration == given_data.OWN_TEXT:
        data = given_data.own_texts(model, *size, dry_run=options.dry_run)
    else:
        data = options.calibration and given_data.texts(options.calibration, tokenizer, *size)

    def save(folder: Path, result: Compressed) -> str:
        language.save(folder, result.model, result.plan, tokenizer)
        where = options.push_to_hub or str(options.out)
        return (
            "import spectrim  # lets transformers read the factors\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{where}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{where}")'
        )

    weights = given_model.digests_of(sorted(folder.glob("*.safetensors")))
    _compress(options, arguments, model, data, options.algorithm or "joint_cut", memory.layers_at_once, weights, save)


def _of_factory(options: Namespace, arguments: Sequence[str]) -> None:
    _require_free(options.out, goes_on=False)
    model = given_model.made(options.model, options.settings, options.weights).to(device_called(options.device))
    memory = given_model.memory_for(sum(own.nbytes for own in model.parameters()), options.memory)
    batch_size = options.batch_size or memory.batch_size
    how = None if options.preprocess is None else preprocessing.asked(options.preprocess)
    size = (options.image_size, options.samples, batch_size, options.seed)
    data = options.calibration and given_data.images(options.calibration, model, options.model, how, *size)
    module, _, factory = options.model.partition(":")
    given = ", ".join(options.settings)

    def save(folder: Path, result: Compressed) -> str:
        result.save(folder / WEIGHTS)
        return (
            f"import spectrim\nfrom {module} import {factory}\n\n"
            f'model = spectrim.load("{options.out / WEIGHTS}", into={factory}({given})).eval()'
        )

    weights = given_model.digests_of([] if options.weights is None else [options.weights])
    _compress(options, arguments, model, data, options.algorithm or "joint", memory.layers_at_once, weights, save)


def _compress(
    options: Namespace,
    arguments: Sequence[str],
    model: nn.Module,
    data: Data | None,
    name: str,
    layers_at_once: int | None,
    weights: dict[str, str],
    save: Any,
) -> None:
    """Compress in memory, and write the folder.

    ``name``: of the algorithm.
    ``weights``: sha256 of the files that were read.
    ``save``: writes the model to a folder and returns how it is loaded.
    """
    algorithm = _algorithm(name, options)
    own = api.own_decomposer(name, algorithm)
    decomposer = named("decomposer", options.decomposer) if options.decomposer else own
    splits = {} if data is None else {"calibration": data.calibration, "verification": data.verification}
    arguments_of_compress: dict[str, Any] = {
        **splits,
        "algorithm": algorithm,
        "decomposer": decomposer,
        "loss": None if data is None else data.loss,
        "include": options.include,
        "exclude": options.exclude,
        "layers_at_once": layers_at_once,
    }
    if data is not None and data.preprocessing:
        print(f"images: {data.preprocessing}")
    if options.dry_run:
        with _naming_calibration(name, data):
            print(api.compress(model, **arguments_of_compress, dry_run=True))
        return
    unfinished = options.out.with_name(f"{options.out.name}.unfinished")
    with Timed() as spent, _naming_calibration(name, data), _kept_for_later(unfinished):
        result = api.compress(model, **arguments_of_compress, resume=unfinished)
    method = f"{algorithm!r} on {decomposer!r}, {spent.seconds:.0f} s"
    card = card_of(options.model, arguments, result, data, method, weights)
    with _folder(options.out) as made:
        card = dataclasses.replace(card, loading=save(made, result))
        result.report.to_csv(made / REPORT, index=False)
        (made / CARD).write_text(card.text(), encoding="utf-8")
    shutil.rmtree(unfinished, ignore_errors=True)
    print(result.report.to_string(index=False, max_rows=24))
    _say(card, options.out)


@contextmanager
def _naming_calibration(algorithm: str, data: Data | None) -> Iterator[None]:
    """Where the user gave no data and the block misses some, name the option that gives them."""
    try:
        yield
    except MissingInput as error:
        if data is not None:
            raise
        raise UserError(f"{algorithm} needs data that the model was not trained on; give --calibration") from error


@contextmanager
def _kept_for_later(unfinished: Path) -> Iterator[None]:
    """After a mistake, remove the folder with the results of the block, unless it was there before.

    After a kill, Ctrl-C or a fault it stays, and the same command goes on.
    """
    old = unfinished.exists()
    try:
        yield
    except UserError:
        if not old:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _algorithm(name: str, options: Namespace) -> Any:
    """Return the algorithm with the budget of the command line. Raises ``UserError`` where it takes no such budget."""
    found = named("algorithm", name)
    budget = {rule: getattr(options, rule) for rule in BUDGETS if getattr(options, rule) is not None}
    ((asked, value),) = budget.items()
    sizes = sizes_of(found)
    if asked not in sizes:
        takes = ", ".join(f"--{own.replace('_', '-')}" for own in sizes if own in BUDGETS) or "none of the budgets"
        raise UserError(f"--algorithm {name} takes no --{asked.replace('_', '-')}; it takes {takes}")
    return sized(found, asked, value)


def _numbers_in(folder: Path) -> int:
    """Return how many numbers a checkpoint holds, without the positions of pivots, which are no parameters."""
    entries = Sharded.at(folder).entries.items()
    return sum(math.prod(entry.shape) for name, entry in entries if not name.endswith(f".{POSITIONS}"))


def _stream(options: Namespace, arguments: Sequence[str], folder: Path) -> None:
    """Compress a checkpoint that does not fit into memory, tensor by tensor and without data."""
    if options.params_kept is None or options.algorithm not in (None, "truncation"):
        raise UserError(
            f"{options.model} does not fit into memory, and only --params-kept by truncation goes tensor by tensor; "
            "give that, or more by --memory"
        )
    if options.include or options.exclude:
        raise UserError(f"{options.model} does not fit into memory; call spectrim.compress_checkpoint with dense=")
    print(f"{options.model} does not fit into memory: it is truncated tensor by tensor, without calibration data")
    if options.dry_run:
        return
    with Timed() as spent:
        plan = compress_checkpoint(folder, options.out, params_kept=options.params_kept)
    sizes = [Cost(_numbers_in(Path(own)), math.nan) for own in (folder, options.out)]  # type: ignore[arg-type]
    card = Card(
        name=options.model,
        arguments=arguments,
        dense=sizes[0],
        compressed=sizes[1],
        losses=None,
        tokens=True,
        data=("", ""),
        preprocessing="",
        method=f"truncation by SVD of {len(plan)} layers, tensor by tensor, {spent.seconds:.0f} s",
        loading=f'from spectrim.language import load\n\nmodel, tokenizer = load("{options.out}")',
        weights=given_model.digests_of(sorted(folder.glob("*.safetensors"))),
        notes=["the model did not fit into memory, so no data chose its ranks: measure it before you use it"],
    )
    files.write({options.out / CARD: card.text().encode()})
    _say(card, options.out)


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``out`` when the block ends without an error."""
    try:
        with files.replacing(out) as (made,):
            made.mkdir()
            yield made
    except OSError as error:
        raise files.refusal(out, error) from None


def _say(card: Card, out: Path) -> None:
    for name, dense, compressed, kept in card.sizes():
        print(f"{name}: {dense} -> {compressed}{f' ({kept})' if kept else ''}")
    for note in card.notes:
        print(f"note: {note}")
    print(f"written to {out}; {out / CARD} says how to load it")
