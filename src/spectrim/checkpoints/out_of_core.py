"""Compress a checkpoint that is larger than memory: one tensor at a time, from shards to shards."""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from spectrim.checkpoints.sharded import BESIDE, INDEX, MANIFEST, PICKLES, Manifest, Sharded
from spectrim.errors import UserError
from spectrim.factored import large, linalg
from spectrim.factored.forms import PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.fetch.by_configuration import CONFIG
from spectrim.tools import digests, files, safetensors_stream
from spectrim.tools.safetensors_stream import FLOATS, Entry, Shard

STEPS = 30  # of the bisection for params_kept
# Weights with two dimensions that are looked up, not multiplied by. Only the name tells them from linear layers.
EMBEDDINGS = ("*embed*", "*wte", "*wpe", "*shared", "*relative_attention_bias")
# Layers of transformers' class Conv1D, whose weight is stored as (inputs, outputs): the model types that have them and
# their names. Other models have nn.Linear under the same names.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D = ("*c_attn", "*q_attn", "*c_proj", "*c_fc")
# Files of configuration and tokenizer that transformers saves beside the weights.
COMPANIONS = (
    *(CONFIG, "generation_config.json", "chat_template*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)


def compress_checkpoint(
    folder: str | Path,
    out: str | Path,
    *,
    plan: RankPlan | None = None,
    ratio: float | None = None,
    params_kept: float | None = None,
    dense: Sequence[str] = EMBEDDINGS,
    transposed: Sequence[str] | None = None,
) -> RankPlan:
    """Truncate the linear layers of a checkpoint by SVD, one at a time, and return what was kept.

    A layer is a tensor ``NAME.weight`` of shape (outputs, inputs), as in ``nn.Linear``. Its factors are named as in
    ``FactoredLinear`` and have its precision. A layer stays dense where its rank would not make it smaller. All other
    tensors are copied byte by byte; configuration and tokenizer of transformers go to ``out/pretrained``.

    Memory: at most three times the largest layer in float32, and some tens of MB (``large.truncated``).

    Each shard is written atomically, and ``out/spectrim.json`` then records its digest. The same call after a kill goes
    on with the next shard. Load the result with ``spectrim.load(out, into=model)``, or without a model with
    ``spectrim.language.load(out)``.

    ``folder``: holds ``model.safetensors``, or shards and their ``model.safetensors.index.json``.
    ``out``: a new or empty folder, which gets the same files.
    ``plan``: rank of each layer, by its name in the file.
    ``ratio``: share in (0, 1) of its parameters that each layer keeps, as in ``Truncation``.
    ``params_kept``: share in (0, 1) of all numbers in the checkpoint that is kept, by the largest common ratio that
        fits. Give exactly one of these three.
    ``dense``: without ``plan``, patterns of the names of layers that stay dense.
    ``transposed``: patterns of the names of layers whose weight is stored as (inputs, outputs). By default those of
        GPT-2 and its kin, where ``config.json`` names such a model.

    Raises ``UserError`` for a checkpoint that is incomplete or pickled, a weight that holds NaN or infinity, a plan of
    other layers, a size out of reach, an ``out`` that holds anything else, and a disk that the result does not fit on.
    """
    if [plan, ratio, params_kept].count(None) != 2:
        raise UserError("give exactly one of plan, ratio and params_kept")
    source, out = Sharded.at(folder), Path(out)
    if (source.folder / MANIFEST).exists():
        raise UserError(f"{folder} is compressed already ({MANIFEST}); give the dense checkpoint")
    if out.resolve() == source.folder.resolve():
        raise UserError(f"out is the folder of the checkpoint itself, {folder}; give another one")
    if plan is not None:
        wanted = _of_plan(source.entries, plan)
    elif ratio is not None:
        wanted = _of_ratio(source.entries, ratio, dense)
    else:
        wanted = _of_params(source.entries, params_kept, dense)
    patterns = _transposed(source.folder) if transposed is None else transposed
    flipped = {name for name in wanted if any(fnmatch(name, pattern) for pattern in patterns)}
    begun = Manifest.begun(out, wanted)  # Refuse a foreign folder before a lock is made in it.
    results = {name: _results(shard, wanted, flipped) for name, shard in source.shards.items()}
    missing = sum(e.nbytes for name in results.keys() - begun.finished.keys() for e in results[name].values())
    files.require_writable(out / MANIFEST, out / BESIDE / CONFIG, nbytes=missing)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            try:
                _write_all(source, Manifest.begun(out, wanted), results, flipped)
            finally:
                (out / ".lock").unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process is writing to {out}; wait for it or give another folder") from None
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; give a writable folder") from None
    return wanted


def _transposed(folder: Path) -> Sequence[str]:
    """Return the patterns of layers that are stored transposed in a model of the type that ``config.json`` names."""
    path = folder / CONFIG
    try:
        known = files.read_json(path) if path.is_file() else {}
        return CONV1D if known.get("model_type") in CONV1D_MODELS else ()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no configuration of a model ({error}); fetch it again") from None


def _linear(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the weights that may belong to linear layers, by the layer's name."""
    named = {name.removesuffix(".weight"): entry for name, entry in entries.items() if name.endswith(".weight")}
    return {name: entry for name, entry in named.items() if len(entry.shape) == 2 and entry.dtype in FLOATS}


def _of_ratio(entries: Mapping[str, Entry], ratio: float, dense: Sequence[str]) -> RankPlan:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(f"ratio must lie in (0, 1), got {ratio!r}")
    layers = {n: e for n, e in _linear(entries).items() if not any(fnmatch(n, pattern) for pattern in dense)}
    if not layers:
        raise UserError("this checkpoint has nothing to factor: no 2-D weight but those that stay dense")
    ranks = {}
    for name, (_, (outputs, inputs), _) in layers.items():
        ranks[name] = max(1, int(ratio * (outputs * inputs) / (outputs + inputs))) if outputs and inputs else 0
    return _below_break_even(ranks, layers)


def _of_params(entries: Mapping[str, Entry], kept: float | None, dense: Sequence[str]) -> RankPlan:
    """Return the plan of the largest ratio at which the whole checkpoint keeps at most the share ``kept``."""
    if isinstance(kept, bool) or not isinstance(kept, int | float) or not 0 < kept < 1:
        raise UserError(f"params_kept must lie in (0, 1), got {kept!r}")
    total = sum(math.prod(entry.shape) for entry in entries.values())

    def left(plan: RankPlan) -> float:
        shapes = {name: entries[f"{name}.weight"].shape for name in plan}
        return 1 - sum(math.prod(own) - plan[name].rank * sum(own) for name, own in shapes.items()) / total

    low, high, found = 0.0, 1.0, _of_ratio(entries, math.ulp(0.0), dense)
    if left(found) > kept:
        raise UserError(f"params_kept={kept} is out of reach: at rank 1 {left(found):.4f} of them remain")
    for _ in range(STEPS):
        middle = (low + high) / 2
        tried = _of_ratio(entries, middle, dense)
        if left(tried) <= kept:
            low, found = middle, tried
        else:
            high = middle
    return found


def _of_plan(entries: Mapping[str, Entry], plan: RankPlan) -> RankPlan:
    layers = _linear(entries)
    for name, kept in plan.items():
        if name not in layers:
            raise UserError(f"the plan names {name!r}; this checkpoint has no 2-D weight {name}.weight")
        if kept.form != PlainForm("linear") or not isinstance(kept.keep, int):
            raise UserError(f"the plan cuts {name!r} in another way than to the leading components of a linear layer")
    return _below_break_even({name: kept.rank for name, kept in plan.items()}, layers)


def _below_break_even(ranks: Mapping[str, int], layers: Mapping[str, Entry]) -> RankPlan:
    pays = {name: rank for name, rank in ranks.items() if 0 < rank <= linalg.break_even_rank(*layers[name].shape)}
    return RankPlan.of({name: Kept(rank, PlainForm("linear")) for name, rank in pays.items()})


def _write_all(
    source: Sharded, manifest: Manifest, results: Mapping[str, Mapping[str, Entry]], flipped: Collection[str]
) -> None:
    """Write the missing shards, then configuration and tokenizer, and last the index.

    ``results``: tensors of each compressed shard.
    ``flipped``: layers whose weight is stored transposed.
    """
    manifest.write()
    total = sum(entry.nbytes for entry in source.entries.values())
    with tqdm(desc="compress", total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for name, shard in source.shards.items():
            if manifest.has(name, shard.path):
                bar.update(sum(entry.nbytes for entry in shard.entries.values()))
                continue
            digest = digests.of_file(shard.path)
            contents = _contents(shard, manifest.plan, flipped, bar)
            result = safetensors_stream.write(manifest.folder / name, results[name], contents, shard.metadata)
            manifest.finished[name] = {"source": digest, "result": result}
            manifest.write()
    _copy_companions(source.folder, manifest.folder / BESIDE)
    if source.indexed:
        places = {tensor: name for name, entries in results.items() for tensor in entries}
        size = sum(entry.nbytes for entries in results.values() for entry in entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        files.write({manifest.folder / INDEX: (json.dumps(index, indent=2) + "\n").encode()})


def _copy_companions(folder: Path, to: Path) -> None:
    beside = [
        path
        for path in files.listed(folder)
        if any(fnmatch(path.name, one) for one in COMPANIONS) and path.suffix not in PICKLES and path.is_file()
    ]
    if beside:
        files.write({to / path.name: path.read_bytes() for path in beside})


def _ordered(shard: Shard) -> list[str]:
    """Return the tensors of a shard, wide numbers first, so that each begins at a multiple of its number's width."""

    def width(name: str) -> float:
        _, shape, nbytes = shard.entries[name]
        return nbytes / max(1, math.prod(shape))

    return sorted(shard.entries, key=width, reverse=True)


def _results(shard: Shard, plan: RankPlan, flipped: Collection[str]) -> dict[str, Entry]:
    """Return the tensors of the compressed shard, in the order in which ``_contents`` yields them."""
    return {new: entry for old in _ordered(shard) for new, entry in _entries(old, shard, plan, flipped).items()}


def _entries(name: str, shard: Shard, plan: RankPlan, flipped: Collection[str]) -> dict[str, Entry]:
    """Return what one tensor becomes: two factors of a layer's weight, or the tensor itself."""
    layer, _, part = name.rpartition(".")
    entry = shard.entries[name]
    if layer in plan and part == "weight":
        rank, (outputs, inputs) = plan[layer].rank, entry.shape[::-1] if layer in flipped else entry.shape
        first, second = Entry.of(entry.dtype, rank, inputs), Entry.of(entry.dtype, outputs, rank)
        return {f"{layer}.first.weight": first, f"{layer}.second.weight": second}
    return {f"{layer}.second.bias" if layer in plan and part == "bias" else name: entry}


def _contents(shard: Shard, plan: RankPlan, flipped: Collection[str], bar: "tqdm") -> Iterator[bytes | memoryview]:
    for name in _ordered(shard):
        layer, _, part = name.rpartition(".")
        if layer in plan and part == "weight":
            try:
                read = partial(_weight, shard, name, layer in flipped)
                second, first = large.truncated(read, plan[layer].rank)
            except UserError as error:
                raise UserError(f"layer {layer} of {shard.path}: {error}") from None
            yield safetensors_stream.raw(first)
            yield safetensors_stream.raw(second)
            del first, second
        else:
            yield from shard.pieces(name)
        bar.update(shard.entries[name].nbytes)


def _weight(shard: Shard, name: str, flipped: bool) -> Tensor:
    weight = shard.read(name)
    return weight.T if flipped else weight
