"""A checkpoint that is larger than memory: compressed one tensor at a time, from shards to shards."""

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
from spectrim.factored import linalg
from spectrim.factored.forms import PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.tools import digests, files, safetensors_stream
from spectrim.tools.safetensors_stream import Entry, Shard

FACTORED = ("F64", "F32", "F16", "BF16")
# 2-D weights that are looked up, not multiplied by; nothing but its name tells one from the weight of a linear layer.
EMBEDDINGS = ("*embed*", "*wte", "*wpe", "*shared", "*relative_attention_bias")
# Linear layers that are transformers' Conv1D, whose weight is stored as (inputs, outputs): the model_type of their
# models and their names. Other models have nn.Linear under the same names.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D = ("*c_attn", "*q_attn", "*c_proj", "*c_fc")
# What transformers saves beside the weights, and reads configuration and tokenizer from.
CONFIG = "config.json"
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
    dense: Sequence[str] = EMBEDDINGS,
    transposed: Sequence[str] | None = None,
) -> RankPlan:
    """Truncate the linear layers of the checkpoint in ``folder`` by SVD, one at a time, and return what was kept.

    ``folder`` holds ``model.safetensors``, or shards and their ``model.safetensors.index.json``; ``out`` gets the same
    files. Exactly one of ``ratio``, in (0, 1): every factored layer keeps this part of its parameters, as in
    ``Truncation``; and ``plan``: the rank of each layer, by its name in the model. A layer is a tensor ``NAME.weight``
    of shape (outputs, inputs), as in nn.Linear; its factors are called as in ``FactoredLinear`` and have its precision.
    A layer whose rank would not make it smaller stays dense, and with ``ratio`` also one whose name matches a pattern
    of ``dense``. One whose name matches a pattern of ``transposed`` is stored as (inputs, outputs); None: those of the
    models that ``config.json`` tells to have such layers, GPT-2 and its kin. Everything else is copied byte by byte,
    configuration and tokenizer of transformers into ``out/pretrained``.

    Memory: at most three times the largest layer in float32, and some tens of MB (``linalg.truncated``). Each shard is
    written whole or not at all and recorded in ``out/spectrim.json`` with its digest. The same call after a kill goes
    on where it stopped; the index comes last. ``spectrim.load(out, into=model)`` reads the result, or without a model
    ``spectrim.language.load(out)``.

    Raises ``UserError`` for a checkpoint that is incomplete or pickled, a weight that holds NaN or infinity, a plan of
    other layers, an ``out`` that holds anything else, or a full disk.
    """
    if (plan is None) == (ratio is None):
        raise UserError("give exactly one of plan and ratio")
    source, out = Sharded.at(folder), Path(out)
    if (source.folder / MANIFEST).exists():
        raise UserError(f"{folder} is compressed already ({MANIFEST}); give the dense checkpoint")
    if out.resolve() == source.folder.resolve():
        raise UserError(f"out is the folder of the checkpoint itself, {folder}; give another one")
    wanted = (
        _of_ratio(source.entries, ratio, dense) if ratio is not None else _of_plan(source.entries, plan or RankPlan())
    )
    patterns = _transposed(source.folder) if transposed is None else transposed
    flipped = {name for name in wanted if any(fnmatch(name, pattern) for pattern in patterns)}
    Manifest.begun(out, wanted)  # before a lock is left in a folder that is not ours
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            _write_all(source, Manifest.begun(out, wanted), flipped)
    except Timeout:
        raise UserError(f"another process is writing to {out}; wait for it or give another folder") from None
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; give a writable folder") from None
    return wanted


def _transposed(folder: Path) -> Sequence[str]:
    """The patterns of the layers that ``config.json`` says are stored transposed; without that file there are none."""
    path = folder / CONFIG
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return CONV1D if known.get("model_type") in CONV1D_MODELS else ()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no configuration of a model ({error}); fetch it again") from None


def _linear(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The weights that may be those of linear layers, by the layer's name."""
    named = {name.removesuffix(".weight"): entry for name, entry in entries.items() if name.endswith(".weight")}
    return {name: entry for name, entry in named.items() if len(entry.shape) == 2 and entry.dtype in FACTORED}


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


def _write_all(source: Sharded, manifest: Manifest, flipped: Collection[str]) -> None:
    """The shards that are missing, what lies beside them, and then the index, which several shards are nothing without.

    ``flipped``: the layers whose weight is stored transposed.
    """
    manifest.write()
    places: dict[str, str] = {}
    total = sum(entry.nbytes for entry in source.entries.values())
    with tqdm(desc="compress", total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for name, shard in source.shards.items():
            entries = {
                new: e for old in _ordered(shard) for new, e in _entries(old, shard, manifest.plan, flipped).items()
            }
            if manifest.has(name, shard.path):
                bar.update(sum(entry.nbytes for entry in shard.entries.values()))
            else:
                digest = digests.of_file(shard.path)
                contents = _contents(shard, manifest.plan, flipped, bar)
                result = safetensors_stream.write(manifest.folder / name, entries, contents, shard.metadata)
                manifest.finished[name] = {"source": digest, "result": result}
                manifest.write()
            places |= dict.fromkeys(entries, name)
    _copy_companions(source.folder, manifest.folder / BESIDE)
    if source.indexed:
        size = sum(e.nbytes for name in source.shards for e in Shard.at(manifest.folder / name).entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        files.write({manifest.folder / INDEX: (json.dumps(index, indent=2) + "\n").encode()})


def _copy_companions(folder: Path, to: Path) -> None:
    beside = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.suffix not in PICKLES}
    if beside:
        files.write({to / path.name: path.read_bytes() for path in sorted(beside)})


def _ordered(shard: Shard) -> list[str]:
    """Wide numbers first, as the format wants them: each then begins at a multiple of its width."""

    def width(name: str) -> float:
        _, shape, nbytes = shard.entries[name]
        return nbytes / max(1, math.prod(shape))

    return sorted(shard.entries, key=width, reverse=True)


def _entries(name: str, shard: Shard, plan: RankPlan, flipped: Collection[str]) -> dict[str, Entry]:
    """What becomes of one tensor, by name and in the order in which it is written."""
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
                second, first = linalg.truncated(read, plan[layer].rank)
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
