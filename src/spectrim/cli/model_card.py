"""The model card of a compressed model: what it is, its sizes and losses, how it was made, and how it is loaded."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.cli.given_data import Data
from spectrim.cli.given_model import is_factory
from spectrim.records.provenance import UNKNOWN, git_state, machine, versions
from spectrim.statistics.evaluation import Evaluation
from spectrim.statistics.objective import Objective
from spectrim.surgery.cost import Cost, parameters

LEFT = re.compile(r"(.+?): (left dense: .+) \((\d+\.\d+)% of the parameters\)")  # as ``find_layers.left_dense`` says it
ASSUMED = (
    "the images were normalised as for ImageNet, because the model does not tell how; if it was trained otherwise, say "
    "so by --preprocess"
)
SLOWER = (
    "there are more multiply-accumulates than before: factors of a convolution may save parameters and no "
    "multiplication; --macs-kept asks for fewer"
)
NAMED = 3  # layers that a note names


@dataclass(frozen=True)
class Card:
    """What a model card says.

    ``name``: the model that was compressed, as the user named it.
    ``arguments``: those of the command.
    ``dense``, ``compressed``: sizes; MACs are NaN where they were not counted.
    ``losses``: of the dense and of the compressed model on samples that chose nothing; None where not measured.
    ``tokens``: whether the model predicts tokens, so that a loss is the mean over them.
    ``data``: the calibration data in words, and their digest; empty where none were used.
    ``preprocessing``: what was done to images, in words; empty where none were used.
    ``method``: algorithm and decomposer.
    ``loading``: lines of Python.
    ``weights``: sha256 of each file of weights that was read.
    ``notes``: what else is worth knowing.
    """

    name: str
    arguments: Sequence[str]
    dense: Cost
    compressed: Cost
    losses: tuple[Evaluation, Evaluation] | None
    tokens: bool
    data: tuple[str, str]
    preprocessing: str
    method: str
    loading: str
    weights: Mapping[str, str]
    notes: Sequence[str]

    @property
    def kept(self) -> float:
        """Parameters of the compressed model over those of the dense one."""
        return self.compressed.params / self.dense.params

    def sizes(self) -> list[tuple[str, str, str, str]]:
        """Return the rows of the table: name, dense, compressed, and the part that is kept."""
        rows = [_row("parameters", self.dense.params, self.compressed.params)]
        if not math.isnan(self.compressed.macs):
            rows.append(_row("multiply-accumulates of one input", self.dense.macs, self.compressed.macs))
        if self.losses is not None:
            before, after = self.losses
            unit = "nats a token" if self.tokens else "nats"
            rows.append((f"loss, {unit}", f"{before.loss:.4f}", f"{after.loss:.4f}", ""))
            if self.tokens:
                rows.append(("perplexity", f"{math.exp(before.loss):.2f}", f"{math.exp(after.loss):.2f}", ""))
            if before.accuracy is not None and after.accuracy is not None:
                shares = f"{100 * before.accuracy:.1f} %", f"{100 * after.accuracy:.1f} %"
                rows.append(("answered as the targets", *shares, ""))
        return rows

    def text(self) -> str:
        """Return the card in Markdown, with the header that the Hugging Face hub reads."""
        base = [f"base_model: {self.name}"] if _is_of_hub(self.name) else []
        tags = ["library_name: transformers"] if self.tokens else []
        header = ["---", *base, *tags, "tags: [spectrim, low-rank, compression, svd]", "---"]
        table = ["| | dense | compressed | kept |", "|---|---|---|---|"]
        table += [f"| {' | '.join(row)} |" for row in self.sizes()]
        losses = "The losses were not measured." if self.losses is None else f"Losses are of {self._held_out()}."
        parts = [
            "\n".join(header),
            f"# {self.name}, {100 * self.kept:.1f} % of the parameters",
            "Weights of the dense model are replaced by products of thinner ones, by spectrim.",
            "\n".join(table),
            losses + " `report.csv` has one row a layer.",
            f"## Load\n\n```python\n{self.loading}\n```",
            f"## How it was made\n\n```\n{shlex.join(['spectrim-compress', *self.arguments])}\n```",
            "\n".join(f"- {line}" for line in self._provenance()),
        ]
        if self.notes:
            parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def _held_out(self) -> str:
        assert self.losses is not None
        unit = "predicted tokens" if self.tokens else "samples"
        return f"{self.losses[0].n:,} {unit} of the calibration data that chose nothing"

    def _provenance(self) -> list[str]:
        commit, dirty = git_state()
        data, digest = self.data
        known, here = versions(), machine()
        lines = [f"method: {self.method}", f"made: {datetime.now(UTC).isoformat(timespec='seconds')}"]
        if data:
            lines.append(f"calibration data: {data} (sha256 {digest})")
        if self.preprocessing:
            lines.append(f"preprocessing: {self.preprocessing}")
        lines += [f"read: {name} (sha256 {sha})" for name, sha in self.weights.items()]
        own = f"spectrim {known.get('spectrim', UNKNOWN)}, commit {commit}{' with changes' if dirty else ''}"
        packages = ", ".join(f"{name} {known[name]}" for name in ("python", "torch", "transformers") if name in known)
        return [*lines, f"software: {own}; {packages}", f"machine: {here['system']}, {here['processor']}"]


def gathered(notes: Sequence[str]) -> list[str]:
    """Return the notes with one for all layers that stay dense for the same reason, with their share."""
    layers: dict[str, list[tuple[str, float]]] = {}
    for note in notes:
        found = LEFT.fullmatch(note)
        name, why, share = found.groups() if found else ("", note, "0")
        layers.setdefault(why, []).append((name, float(share)))
    return [_of_layers(why, own) if own[0][0] else why for why, own in layers.items()]


def _of_layers(why: str, layers: Sequence[tuple[str, float]]) -> str:
    names = ", ".join(name for name, _ in layers[:NAMED])
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return f"{names}{more}: {why} ({sum(share for _, share in layers):.2f}% of the parameters)"


def _row(name: str, dense: float, compressed: float) -> tuple[str, str, str, str]:
    return name, f"{dense:,.0f}", f"{compressed:,.0f}", f"{100 * compressed / dense:.1f} %"


def _is_of_hub(name: str) -> bool:
    shaped = name.count("/") == 1 and not name.startswith((".", "/", "~")) and ":" not in name
    return shaped and not Path(name).exists()


def card_of(
    name: str,
    arguments: Sequence[str],
    result: Compressed,
    data: Data | None,
    method: str,
    weights: Mapping[str, str],
) -> Card:
    """Measure the dense and the compressed model on the test batches. Return their card, without ``loading``."""
    losses = None
    if data is not None:
        test = Objective(data.loss, {"test": data.test})
        losses = test.evaluate(result.dense, "test"), test.evaluate(result.model, "test")
    notes = gathered(result.notes)
    if data is not None and not data.labelled:
        notes.insert(0, "the targets of the losses are the dense model's own answers: the data have no labels for it")
    if data is not None and data.assumed:
        notes.insert(0, ASSUMED)
    before, after = _costs(result)
    if after.macs > before.macs:  # never where they were not counted
        notes.append(SLOWER)
    return Card(
        name=name,
        arguments=arguments,
        dense=before,
        compressed=after,
        losses=losses,
        tokens=not is_factory(name),
        data=("", "") if data is None else (data.description, data.digest),
        preprocessing="" if data is None else data.preprocessing,
        method=method,
        loading="",
        weights=weights,
        notes=notes,
    )


def _costs(result: Compressed) -> tuple[Cost, Cost]:
    """Return the costs of the dense and the compressed model; MACs are NaN without calibration data."""
    if result.example is not None:
        return result.dense_cost, result.cost
    dense, small = (Cost(parameters(model), math.nan) for model in (result.dense, result.model))  # type: ignore[arg-type]
    return dense, small
