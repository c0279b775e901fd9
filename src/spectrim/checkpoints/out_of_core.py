"""Compress a checkpoint that is larger than memory: one tensor at a time, from shards to shards."""

import json
import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from spectrim.checkpoints.shard_contents import FORMS, contents, entries
from spectrim.checkpoints.sharded import BESIDE, INDEX, MANIFEST, PICKLES, Manifest, Sharded
from spectrim.decomposers.matrix import Factors
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.plan import Kept, RankPlan
from spectrim.fetch.by_configuration import CONFIG
from spectrim.tools import digests, files, safetensors_stream
from spectrim.tools.safetensors_stream import FLOATS, Entry

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
    *("spiece.model", "sentencepiece.bpe.model"),
)
TEMPLATES = "additional_chat_templates"  # the folder of a tokenizer with several


def compress_checkpoint(
    folder: str | Path,
    out: str | Path,
    *,
    plan: RankPlan | None = None,
    ratio: float | None = None,
    params_kept: float | None = None,
    factors: Factors = "pivoted",
    dense: Sequence[str] = EMBEDDINGS,
    transposed: Sequence[str] | None = None,
) -> RankPlan:
    """Truncate the linear layers of a checkpoint by SVD, one at a time, and return what was kept.

    A layer is a tensor ``NAME.weight`` of shape (outputs, inputs), as in ``nn.Linear``. Its factors are named as in
    ``FactoredLinear`` and have its precision. A layer stays dense where its rank would not make it smaller. All other
    tensors are copied byte by byte; configuration and tokenizer of transformers go to ``out/pretrained``.

    Memory: at most three times the largest layer in float32, and some tens of MB (``large.truncated``). Pivoted factors
    of more than half of a layer's parameters take up to six times the layer (``pivoting.pivoted``).

    Each shard is written atomically, and ``out/spectrim.json`` then records its digest. The same call after a kill goes
    on with the next shard. Load the result with ``spectrim.load(out, into=model)``, or without a model with
    ``spectrim.language.load(out)``.

    ``folder``: holds ``model.safetensors``, or shards and their ``model.safetensors.index.json``.
    ``out``: a new or empty folder, which gets the same files.
    ``plan``: rank of each layer, by its name in the file.
    ``ratio``: share in (0, 1) of its parameters that each layer keeps, as in ``Truncation``.
    ``params_kept``: share in (0, 1) of all numbers in the checkpoint that is kept, by the largest common ratio that
        fits. Give exactly one of these three.
    ``factors``: what is stored without ``plan``. ``pivoted`` has a higher rank in as many parameters than ``plain``
        (``decomposers.SVD``). A plan says the form of each layer.
    ``dense``: without ``plan``, patterns of the names of layers that stay dense.
    ``transposed``: patterns of the names of layers whose weight is stored as (inputs, outputs). By default those of
        GPT-2 and its kin, where ``config.json`` names such a model.

    Raises ``UserError`` for a checkpoint that is incomplete or pickled, and for a weight that holds NaN or infinity.
    Raises it also for a plan of other layers, a size out of reach, an ``out`` that holds anything else, and a full
    disk.
    """
    sizes = {"plan": plan, "ratio": ratio, "params_kept": params_kept}
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"give exactly one of plan, ratio and params_kept; got {', '.join(given) or 'none'}")
    if factors not in FORMS:
        raise UserError(f"factors must be one of {', '.join(FORMS)}, got {factors!r}")
    source, out = Sharded.at(folder), Path(out)
    if (source.folder / MANIFEST).exists():
        raise UserError(f"{folder} is compressed already ({MANIFEST}); give the dense checkpoint")
    if out.resolve() == source.folder.resolve():
        raise UserError(f"out is the folder of the checkpoint itself, {folder}; give another one")
    if plan is not None:
        wanted = _of_plan(source.entries, plan)
    elif ratio is not None:
        wanted = _of_ratio(source.entries, ratio, dense, factors)
    else:
        wanted = _of_params(source.entries, params_kept, dense, factors)
    patterns = _transposed(source.folder) if transposed is None else transposed
    flipped = {name for name in wanted if any(fnmatch(name, pattern) for pattern in patterns)}
    begun = Manifest.begun(out, wanted)  # Refuse a foreign folder before a lock is made in it.
    results = {name: entries(shard, wanted, flipped) for name, shard in source.shards.items()}
    missing = sum(e.nbytes for name in results.keys() - begun.finished.keys() for e in results[name].values())
    files.require_writable(out / MANIFEST, out / BESIDE / CONFIG, nbytes=missing)
    with _alone_in(out):
        _write_all(source, Manifest.begun(out, wanted), results, flipped)
    return wanted


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Make the folder, and keep other processes out of it inside the block. Raises ``UserError`` where that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            try:
                yield
            finally:
                files.discard(out / ".lock")
    except Timeout:
        raise UserError(f"another process is writing to {out}; wait for it or give another folder") from None
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; give a writable folder") from None


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


def _of_ratio(entries: Mapping[str, Entry], ratio: float, dense: Sequence[str], factors: Factors) -> RankPlan:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(f"ratio must lie in (0, 1), got {ratio!r}")
    return _at_ratio(entries, ratio, dense, factors)


def _at_ratio(entries: Mapping[str, Entry], ratio: float, dense: Sequence[str], factors: Factors) -> RankPlan:
    """Return the plan that keeps ``ratio`` of every layer, in (0, 1]."""
    layers = {n: e for n, e in _linear(entries).items() if not any(fnmatch(n, pattern) for pattern in dense)}
    if not layers:
        raise UserError("this checkpoint has nothing to factor: no 2-D weight but those that stay dense")
    kept = {}
    for name, (_, (outputs, inputs), _) in layers.items():
        if outputs and inputs:
            kept[name] = Kept(max(1, _rank_within(ratio * outputs * inputs, outputs, inputs, factors)), FORMS[factors])
    return _smaller(kept, layers)


def _params(kept: Kept, outputs: int, inputs: int) -> int:
    """Return how many numbers the factors of a layer hold. At full rank they may be plain, as in memory."""
    is_pivoted = kept.form == FORMS["pivoted"] and kept.rank <= linalg.most_pivots(outputs, inputs)
    return kept.rank * (outputs + inputs - kept.rank * is_pivoted)


def _rank_within(params: float, outputs: int, inputs: int, factors: Factors) -> int:
    """Return the largest rank whose factors hold at most ``params`` numbers; 0 if there is none."""
    ranks, form = range(min(outputs, inputs) + 1), FORMS[factors]
    return bisect_right(ranks, params, key=lambda rank: _params(Kept(rank, form), outputs, inputs)) - 1


def _of_params(entries: Mapping[str, Entry], kept: float | None, dense: Sequence[str], factors: Factors) -> RankPlan:
    """Return the plan of the largest ratio at which the whole checkpoint keeps at most the share ``kept``."""
    if isinstance(kept, bool) or not isinstance(kept, int | float) or not 0 < kept < 1:
        raise UserError(f"params_kept must lie in (0, 1), got {kept!r}")
    total = sum(math.prod(entry.shape) for entry in entries.values())

    def left(plan: RankPlan) -> float:
        shapes = {name: entries[f"{name}.weight"].shape for name in plan}
        return 1 - sum(math.prod(own) - _params(plan[name], *own) for name, own in shapes.items()) / total

    found, most = (_at_ratio(entries, ratio, dense, factors) for ratio in (math.ulp(0.0), 1.0))
    if left(most) <= kept:
        return most
    if left(found) > kept:
        raise UserError(f"params_kept={kept} is out of reach: at rank 1 {left(found):.4f} of them remain")
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        tried = _at_ratio(entries, middle, dense, factors)
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
        if kept.form not in FORMS.values() or not isinstance(kept.keep, int):
            raise UserError(f"the plan cuts {name!r} in another way than to the leading components of a linear layer")
    return _smaller(plan, layers)


def _smaller(plan: Mapping[str, Kept], layers: Mapping[str, Entry]) -> RankPlan:
    """Return the part of a plan that makes layers smaller."""

    def most(name: str) -> int:
        outputs, inputs = layers[name].shape
        return linalg.break_even_rank(outputs, inputs, plan[name].form == FORMS["pivoted"])

    return RankPlan.of({name: kept for name, kept in plan.items() if 0 < kept.rank <= most(name)})


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
            made = contents(shard, manifest.plan, flipped, bar)
            result = safetensors_stream.write(manifest.folder / name, results[name], made, shard.metadata)
            manifest.finished[name] = {"source": digest, "result": result}
            manifest.write()
    _copy_companions(source.folder, manifest.folder / BESIDE)
    if source.indexed:
        places = {tensor: name for name, entries in results.items() for tensor in entries}
        size = sum(entry.nbytes for entries in results.values() for entry in entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        files.write({manifest.folder / INDEX: (json.dumps(index, indent=2) + "\n").encode()})


def _copy_companions(folder: Path, to: Path) -> None:
    beside = [path for path in files.listed(folder) if any(fnmatch(path.name, one) for one in COMPANIONS)]
    if (folder / TEMPLATES).is_dir():
        beside += [path for path in files.listed(folder / TEMPLATES) if path.suffix == ".jinja"]
    beside = [path for path in beside if path.suffix not in PICKLES and path.is_file()]
    if beside:
        files.write({to / path.relative_to(folder): path.read_bytes() for path in beside})
