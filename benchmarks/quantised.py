"""Compare low rank with weights of few bits, and both together: bytes of the file, perplexity, decoding speed."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from measure import Outcome, composed
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.joint import Joint
from spectrim.checkpoints import single_file
from spectrim.decomposers.matrix import Factors
from spectrim.decomposers.two_sided import TwoSidedSVD
from spectrim.factored.plan import RankPlan
from spectrim.fetch import pretrained
from spectrim.language import perplexity
from spectrim.losses import token_loss
from spectrim.report.table import Column, Table
from spectrim.runs import configuration, targets
from spectrim.statistics.objective import Objective
from spectrim.statistics.remembered import MEASUREMENTS
from spectrim.surgery.cost import parameters
from spectrim.surgery.given_model import copied
from spectrim.tools import resume
from spectrim.tools.memo import Memory

RESUME = Path(__file__).resolve().parents[1] / "build" / "benchmarks" / "quantised"
GROUP = 32  # weights that share a scale below 8 bits; at 8 bits a row does
DENSE = {"bfloat16": 16, "8 bits": 8, "6 bits": 6, "4 bits": 4}
COMPRESSED = {"bfloat16": 16, "8 bits": 8, "4 bits": 4}
SIZES: Mapping[Factors, tuple[float, ...]] = {"pivoted": (0.9, 0.8, 0.7), "plain": (0.9, 0.8)}
DRAWS = (0, 1, 2)
CALIBRATION, VERIFICATION, TEST = 64, 16, 8  # blocks of 256 tokens
TIMED = 0.8  # the size that is timed beside the dense model, in the first draw
BATCHES, PROMPT, TOKENS, TURNS = (1, 16), 32, 8, 3
CORPORA = ("imdb_corpus", "sotu")
MEASURED = ("params_kept", "megabytes", "bytes_kept", *CORPORA)
COLUMNS = (
    Column("model", "model"),
    Column("precision", "stored in"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("megabytes", "MB of the file", 1),
    Column("bytes_kept", "bytes, % of dense bfloat16", 1, scale=100),
    Column("imdb_corpus", "perplexity, reviews", 2),
    Column("sotu", "perplexity, speeches", 2),
    Column("batch_1", "ms a token at batch 1, % of dense", 0, scale=100),
    Column("batch_16", "at batch 16", 0, scale=100),
)


class Given(NamedTuple):
    """A decoder, the batches that a selection reads, and the test batches of each corpus."""

    model: nn.Module
    read: Mapping[str, Any]
    tests: Mapping[str, Any]


class Made(NamedTuple):
    """A model of the table by its name, dense or compressed, with its plan."""

    name: str
    model: nn.Module
    plan: RankPlan


def benchmark(quick: bool) -> Outcome:
    """Compress a decoder to each size, store each model in each precision, and measure all of them."""
    with resume.into(None if quick else RESUME):  # what a killed run has measured is kept
        return _measured(quick)


def _measured(quick: bool) -> Outcome:
    draws, sizes = (DRAWS[:1], dict.fromkeys(SIZES, (0.8,))) if quick else (DRAWS, SIZES)
    runs, times, digests = list[dict[str, Any]](), dict[str, dict[str, float]](), list[str]()
    for draw in tqdm(draws, desc="quantised", leave=False, disable=None):
        given = _tiny() if quick else _smollm2(draw)
        made = [Made("dense", given.model, RankPlan()), *_compressed(given, sizes)]
        timed = {"dense", *(_name(form, TIMED) for form in sizes)}
        times = times or _times([one for one in made if one.name in timed], quick)
        runs += _rows(made[:1] if draw == draws[0] else [], DENSE, given)
        runs += _rows(made[1:], COMPRESSED, given)
        digests = ["noise"] if quick else [test.digest() for test in given.tests.values()]
    frame = pd.DataFrame(runs)
    frame["bytes_kept"] = frame["megabytes"] / frame["megabytes"].iloc[0]
    data = _averaged(frame, times)
    notes = [
        *_winners(data),
        "Numbers with a deviation (ddof = 1) are means over "
        f"{len(draws)} calibration draws. Weights of 8 bits: one scale a row. Of 6 and 4 bits: one scale for {GROUP} "
        "weights. All are rounded to nearest, symmetric, without calibration, as torchao's IntxWeightOnlyConfig does. "
        "Scales, norms and the embedding, which is also the head, or its factors, are in bfloat16. All computing is in "
        "float32, with the weights as stored. The dense weights come from a file of 4 bits in blocks of another kind.",
        "Joint: joint selection on the spectrum whitened on both sides, the embedding too, from "
        f"{CALIBRATION} + {VERIFICATION} blocks of 256 tokens of reviews; no fine-tuning. "
        f"Perplexity: on {TEST} test blocks a corpus.",
        f"Speed: greedy decoding of {TOKENS} tokens after {PROMPT}, with a cache, eager, in float32; the median of "
        f"{TURNS} turns of all models, on one thread, first draw. Weights of few bits are not timed: without a kernel "
        "of their own they are unpacked at each call.",
    ]
    settings = {"quick": quick, "sizes": sizes, "draws": draws, "precisions": DENSE, "calibration": CALIBRATION}
    caption = "Low rank, weights of few bits, and both, of a decoder"
    return Outcome(Table("quantised", data, COLUMNS, caption, notes, group="model"), [], settings, ", ".join(digests))


def _rows(models: Sequence[Made], precisions: Mapping[str, int], given: Given) -> Iterator[dict[str, Any]]:
    """Yield what is measured of each model in each precision."""
    whole = parameters(given.model)
    for name, model, plan in models:
        for precision, bits in precisions.items():
            about = {"model": name, "precision": precision, "params_kept": parameters(model) / whole}
            yield about | _stored(model, plan, bits, given.tests)


def _averaged(frame: pd.DataFrame, times: Mapping[str, dict[str, float]]) -> pd.DataFrame:
    """Return the mean and the deviation over the draws, by model and precision, with the times of the models."""
    groups = frame.groupby(["model", "precision"], sort=False)[list(MEASURED)]
    data = groups.mean().join(groups.std(ddof=1).add_suffix("_std")).reset_index()
    for key in (f"batch_{batch}" for batch in BATCHES):
        own = data["model"].map({name: seconds[key] for name, seconds in times.items()})
        data[key] = own.where(data["precision"] == next(iter(DENSE)))
    return data


def _smollm2(draw: int) -> Given:
    """Return SmolLM2, one draw of calibration blocks of reviews, and test blocks of each corpus."""
    sizes = [f"data.calibration_size={CALIBRATION}", f"data.verification_size={VERIFICATION}"]
    sizes += [f"data.test_size={TEST}", f"data.calibration_seed={draw}"]
    runs = {name: composed("model=smollm2", f"data={name}", *sizes) for name in CORPORA}
    model = targets.build(configuration.plain(runs[CORPORA[0]].model), "forward").eval()
    splits = {name: targets.build(configuration.plain(cfg.data), "load").load() for name, cfg in runs.items()}
    own = splits[CORPORA[0]]
    read = {"calibration": own.calibration, "verification": own.verification}
    return Given(model, read, {name: each.test for name, each in splits.items()})


def _tiny() -> Given:
    """Return a decoder of two layers with random weights, on noise."""
    library = pretrained.library()
    config = library.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, max_position_embeddings=2 * (PROMPT + TOKENS), bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (8, 16))
    batches = [({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)]
    read = dict.fromkeys(("calibration", "verification"), batches)
    return Given(library.LlamaForCausalLM(config).eval(), read, dict.fromkeys(CORPORA, batches))


def _compressed(given: Given, sizes: Mapping[Factors, Sequence[float]]) -> Iterator[Made]:
    """Yield the model of each form of factors and size."""
    for form, kept in sizes.items():
        memory = Memory(whitened=1, gates=1, **MEASUREMENTS)
        objective = Objective(token_loss, given.read, memory=memory)
        for size in kept:
            chosen = Joint(params_kept=size, samples=500, significance=4, refit=0)
            decomposer = TwoSidedSVD("channel", factors=form, embeddings="tied")
            made = chosen.compress(given.model, decomposer, objective)
            yield Made(_name(form, size), made.model, made.plan)


def _name(form: Factors, size: float) -> str:
    return f"joint, {form}, {100 * size:g} %"


def _stored(model: nn.Module, plan: RankPlan, bits: int, tests: Mapping[str, Any]) -> dict[str, float]:
    """Return the bytes of a file with weights of so many bits, and the perplexities of what is read back from it."""
    small: Any = copied(model)
    embedding, tensors = small.get_input_embeddings(), dict[str, Tensor]()
    exact = {own.data_ptr() for own in (*embedding.parameters(), *embedding.buffers())}
    for name, tensor in single_file.stored(small).items():
        if not tensor.is_floating_point():
            tensors[name] = tensor
        elif bits < 16 and tensor.ndim == 2 and tensor.data_ptr() not in exact:
            parts, value = rounded(tensor.detach(), bits)
            tensors |= {f"{name}.{part}": own for part, own in parts.items()}
            tensor.data.copy_(value)
        else:
            tensors[name] = tensor.detach().bfloat16()
            tensor.data.copy_(tensors[name])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        single_file.write(path, tensors, {"plan": plan.to_json()})
        megabytes = path.stat().st_size / 1e6
    return {"megabytes": megabytes} | {name: _perplexity(small, test, name) for name, test in tests.items()}


def _perplexity(model: nn.Module, test: Any, name: str) -> float:
    """Return the perplexity on a test split. It is kept in ``RESUME`` too."""

    def measured() -> dict[str, Tensor]:
        return {"perplexity": torch.tensor(perplexity(model, test), dtype=torch.float64)}

    found = resume.tensors("perplexity", lambda: [name, TEST, *single_file.stored(model).values()], measured)
    return float(found["perplexity"])


def rounded(W_OI: Tensor, bits: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return ``W`` in integers of at most 8 bits, as it is stored, and the weight that they stand for.

    Symmetric rounding to nearest. The largest weight of a row, or of ``GROUP`` neighbours in a row below 8 bits, sets
    the scale. The integers follow one another without gaps between their bits. The last group of a row is filled up
    with zeros.
    """
    columns, largest = W_OI.shape[1], 2 ** (bits - 1) - 1
    group = columns if bits == 8 else GROUP
    W_OGI = F.pad(W_OI, (0, -columns % group)).unflatten(1, (-1, group))
    scale_OG1 = (W_OGI.abs().amax(-1, keepdim=True) / (largest + 0.5)).clamp_min(torch.finfo(torch.float32).tiny)
    scale_OG1 = scale_OG1.bfloat16().to(W_OI.dtype)
    codes = (W_OGI / scale_OG1).round().clamp(-largest - 1, largest)
    value = (codes * scale_OG1).flatten(1)[:, :columns]
    places = torch.arange(bits, dtype=torch.uint8)
    binary = codes.flatten(1).to(torch.int8).view(torch.uint8)[..., None] >> places & 1
    packed = torch.from_numpy(np.packbits(binary.flatten(1).numpy(), axis=1, bitorder="little"))
    return {"codes": packed, "scales": scale_OG1.squeeze(-1).bfloat16()}, value


def _times(models: Sequence[Made], quick: bool) -> dict[str, dict[str, float]]:
    """Return, for each model, the time of decoding over that of the first one, at each batch size."""
    found: dict[str, dict[str, float]] = {one.name: {} for one in models}
    for batch in BATCHES:
        prompt = torch.randint(3, 60, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        turns = [[_decoding(one.model, prompt) for one in models] for _ in range(1 if quick else TURNS)]
        medians = [median(own) for own in zip(*turns, strict=True)]
        for one, seconds in zip(models, medians, strict=True):
            found[one.name][f"batch_{batch}"] = seconds / medians[0]
    return found


def _decoding(model: Any, prompt: Tensor) -> float:
    """Return the seconds of decoding. The pass over the prompt counts too, as it does for a user."""
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **length)
    return time.perf_counter() - started


def _winners(data: pd.DataFrame) -> list[str]:
    """Return which compressed models, as stored, a smaller file of the dense model is as good as on every corpus."""
    dense, told = data[data["model"] == "dense"], dict[str, list[str]]()
    for _, row in data[data["model"] != "dense"].iterrows():
        smaller = dense[dense["megabytes"] <= row["megabytes"]]
        best = smaller[(smaller[list(CORPORA)] <= row[list(CORPORA)]).all(axis=1)]
        said = "Smaller than every file of the dense model"
        if len(best):
            said = f"Quantisation alone wins: dense in {best['precision'].iloc[0]} ({best['megabytes'].iloc[0]:.1f} MB)"
            said += " is smaller, and its perplexities are not higher, than"
        elif len(smaller):
            said = "No smaller file of the dense model has perplexities as low on both corpora as"
        told.setdefault(said, []).append(f"{row['model']} in {row['precision']} ({row['megabytes']:.1f} MB)")
    return [f"{said}: {'; '.join(models)}." for said, models in told.items()]
