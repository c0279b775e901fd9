"""Compare low rank with weights of 8 and 4 bits, and both together: bytes of the file, perplexity, decoding speed."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from measure import Outcome
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.joint import Joint
from spectrim.checkpoints import single_file
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
SIZES = (0.8,)
GROUP = 32  # weights that share a scale at 4 bits; at 8 bits a row does
PRECISIONS = {"bfloat16": 16, "8 bits": 8, "4 bits": 4}
FEW_BITS_AT = 0.8  # the compressed model that is stored in 8 bits, too
CALIBRATION, TEST = 32, 8  # blocks of 256 tokens
BATCHES, PROMPT, TOKENS, TURNS = (1, 16), 32, 8, 3
CORPORA = ("imdb_corpus", "sotu")
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


Models = Mapping[str, tuple[nn.Module, RankPlan]]  # by their names in the table


class Given(NamedTuple):
    """A decoder, its calibration batches, and the test batches of each corpus."""

    model: nn.Module
    calibration: Any
    tests: Mapping[str, Any]


def benchmark(quick: bool) -> Outcome:
    """Compress a decoder to each size, store each model in each precision, and measure all of them."""
    with resume.into(None if quick else RESUME):  # what a killed run has measured is kept
        return _measured(quick)


def _measured(quick: bool) -> Outcome:
    given, sizes = (_tiny(), (0.8,)) if quick else (_smollm2(), SIZES)
    models = {"dense": (given.model, RankPlan()), **dict(_compressed(given, sizes))}
    times = _times([model for model, _ in models.values()], quick)
    data = pd.DataFrame(list(_rows(models, times, given)))
    data["bytes_kept"] = data["megabytes"] / data["megabytes"].iloc[0]
    notes = [
        *_winners(data),
        f"Weights of 8 bits: one scale a row. Of 4 bits: one scale for {GROUP} weights. Both rounded to nearest, "
        "symmetric, without calibration, as torchao's IntxWeightOnlyConfig does. Scales, norms and the embedding, "
        "which is also the head, are stored in bfloat16. All computing is in float32, with the weights as stored. The "
        "dense weights come from a file of 4 bits in blocks of another kind.",
        "Joint: joint selection, pivoted factors of the spectrum whitened on both sides, one calibration draw of "
        f"{CALIBRATION} blocks of 256 tokens of reviews; no fine-tuning. Perplexity: on {TEST} test blocks a corpus.",
        f"Speed: greedy decoding of {TOKENS} tokens after {PROMPT}, with a cache, eager, in float32; the median of "
        f"{TURNS} turns of all models, on one thread. Weights of 8 and 4 bits are not timed: without a kernel of "
        "their own they are unpacked at each call.",
    ]
    settings = {"quick": quick, "sizes": list(sizes), "precisions": list(PRECISIONS), "calibration": CALIBRATION}
    caption = "Low rank, weights of few bits, and both, of a decoder"
    digest = "noise" if quick else ", ".join(test.digest() for test in given.tests.values())
    return Outcome(Table("quantised", data, COLUMNS, caption, notes, group="model"), [], settings, digest)


def _rows(models: Models, times: Sequence[dict[str, float]], given: Given) -> Iterator[dict[str, Any]]:
    """Yield a row for each model and precision. Only the dense model and one compressed one have 8 and 4 bits."""
    whole = parameters(given.model)
    with tqdm(desc="quantised", total=len(models), leave=False, disable=None) as bar:
        for (name, (model, plan)), own in zip(models.items(), times, strict=True):
            in_all = name in ("dense", _name(FEW_BITS_AT))
            for precision, bits in list(PRECISIONS.items())[: None if in_all else 1]:
                about = {"model": name, "precision": precision, "params_kept": parameters(model) / whole}
                yield {**about, **_stored(model, plan, bits, given.tests), **(own if bits == 16 else {})}
            bar.update()


def _smollm2() -> Given:
    """Return SmolLM2, calibration blocks of reviews, and test blocks of each corpus."""
    sizes = [f"data.calibration_size={CALIBRATION}", f"data.test_size={TEST}"]
    with initialize_config_dir(configuration.CONF, version_base="1.3"):
        composed = {name: compose("config", ["model=smollm2", f"data={name}", *sizes]) for name in CORPORA}
    model = targets.build(configuration.plain(composed[CORPORA[0]].model), "forward").eval()
    splits = {name: targets.build(configuration.plain(cfg.data), "load").load() for name, cfg in composed.items()}
    return Given(model, splits[CORPORA[0]].calibration, {name: own.test for name, own in splits.items()})


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
    return Given(library.LlamaForCausalLM(config).eval(), batches, dict.fromkeys(CORPORA, batches))


def _compressed(given: Given, sizes: Sequence[float]) -> Iterator[tuple[str, tuple[nn.Module, RankPlan]]]:
    """Yield each compressed model with its plan, by its name in the table."""
    objective = Objective(
        token_loss, {"calibration": given.calibration}, memory=Memory(whitened=1, gates=1, **MEASUREMENTS)
    )
    decomposer = TwoSidedSVD("channel", factors="pivoted")
    for size in sizes:
        chosen = Joint(params_kept=size, samples=500, significance=4, refit=0)
        made = chosen.compress(given.model, decomposer, objective)
        yield _name(size), (made.model, made.plan)


def _name(size: float) -> str:
    return f"joint, {100 * size:g} %"


def _stored(model: nn.Module, plan: RankPlan, bits: int, tests: Mapping[str, Any]) -> dict[str, float]:
    """Return the bytes of a file with weights of so many bits, and the perplexities of what is read back from it."""
    small: Any = copied(model)
    table, tensors = small.get_input_embeddings().weight, dict[str, Tensor]()
    for name, tensor in single_file.stored(small).items():
        if not tensor.is_floating_point():
            tensors[name] = tensor
        elif bits < 16 and tensor.ndim == 2 and tensor.data_ptr() != table.data_ptr():
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
    """Return ``W`` in integers of 8 or 4 bits, as it is stored, and the weight that they stand for.

    Symmetric rounding to nearest. The largest weight of a row, or of ``GROUP`` neighbours in a row at 4 bits, sets the
    scale. Two integers of 4 bits share a byte. The last group of a row is filled up with zeros.
    """
    columns, largest = W_OI.shape[1], 2 ** (bits - 1) - 1
    group = columns if bits == 8 else GROUP
    W_OGI = F.pad(W_OI, (0, -columns % group)).unflatten(1, (-1, group))
    scale_OG1 = (W_OGI.abs().amax(-1, keepdim=True) / (largest + 0.5)).clamp_min(torch.finfo(torch.float32).tiny)
    scale_OG1 = scale_OG1.bfloat16().to(W_OI.dtype)
    codes = (W_OGI / scale_OG1).round().clamp(-largest - 1, largest)
    value = (codes * scale_OG1).flatten(1)[:, :columns]
    stored = codes.flatten(1).to(torch.int8)
    if bits == 4:
        low, high = stored.view(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
        stored = (low & 15) | (high & 15) << 4
    return {"codes": stored, "scales": scale_OG1.squeeze(-1).bfloat16()}, value


def _times(models: Sequence[nn.Module], quick: bool) -> list[dict[str, float]]:
    """Return, for each model, the time of decoding over that of the first one, at each batch size."""
    found: list[dict[str, float]] = [{} for _ in models]
    for batch in BATCHES:
        prompt = torch.randint(3, 60, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        turns = [[_decoding(model, prompt) for model in models] for _ in range(1 if quick else TURNS)]
        medians = [median(own) for own in zip(*turns, strict=True)]
        for row, seconds in zip(found, medians, strict=True):
            row[f"batch_{batch}"] = seconds / medians[0]
    return found


def _decoding(model: Any, prompt: Tensor) -> float:
    """Return the seconds of decoding. The pass over the prompt counts too, as it does for a user."""
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **length)
    return time.perf_counter() - started


def _winners(data: pd.DataFrame) -> list[str]:
    """Return, for each compressed model as stored, whether the dense one at fewer bytes has lower perplexities."""
    dense, lines = data[data["model"] == "dense"], []
    for _, row in data[data["model"] != "dense"].iterrows():
        name = f"{row['model']} in {row['precision']} ({row['megabytes']:.1f} MB)"
        smaller = dense[dense["megabytes"] <= row["megabytes"]]
        best = smaller[(smaller[list(CORPORA)] <= row[list(CORPORA)]).all(axis=1)]
        if len(best):
            other = best.iloc[0]
            told = f"quantisation alone wins: dense in {other['precision']} ({other['megabytes']:.1f} MB) is smaller"
            lines.append(f"{name}: {told}, and its perplexities are not higher.")
        elif len(smaller):
            lines.append(f"{name}: no smaller file of the dense model has perplexities as low on both corpora.")
        else:
            lines.append(f"{name}: smaller than any file of the dense model.")
    return lines
