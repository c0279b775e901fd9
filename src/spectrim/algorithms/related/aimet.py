"""Run AIMET's spatial SVD with its greedy choice of ratios from its own wheel, and measure it like any other algorithm.

``ModelCompressor`` of aimet_torch in automatic mode does all of the selection. It scores every convolution by itself at
each ratio ``i / candidates`` by the calibration accuracy. A bisection on a common score finds the ratios that meet the
target. Its decomposition is a plain SVD into kh x 1, then 1 x kw.

What differs here:

- The target is corrected for the parameters that AIMET does not count (BatchNorm, biases).
- Scores are remembered from one target to the next.
- The factors are put into the factored layers of this package.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.layer_report import reporter
from spectrim.algorithms.shared.trained import plain_svd
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.forms import PlainForm
from spectrim.factored.layers import FactoredConv2d
from spectrim.factored.plan import Kept, RankPlan
from spectrim.statistics.objective import Objective
from spectrim.surgery import find_layers, replacing
from spectrim.surgery.cost import parameters
from spectrim.surgery.given_model import copied
from spectrim.tools import torchvision_shim
from spectrim.tools.content import of_state
from spectrim.tools.live import Bar
from spectrim.tools.settings import settings

MISSING = "AIMET is not installed here: run `make rivals`, then .venv-rivals/bin/spectrim algorithm=aimet"


@settings
class AIMET:
    """Let AIMET choose a ratio for every convolution within a budget.

    The decomposer must be the plain SVD. It is not used, as AIMET has its own.

    ``params_kept``, ``macs_kept``: exactly one; the part of the whole model to keep, in (0, 1).
    ``candidates``: at least 2; the number of ratios at which every layer is scored, the last one uncut.
    """

    params_kept: float | None = 0.5
    macs_kept: float | None = None
    candidates: int = 10

    def __post_init__(self) -> None:
        given = [share for share in (self.params_kept, self.macs_kept) if share is not None]
        if len(given) != 1 or not 0 < given[0] < 1:
            raise UserError(f"set exactly one of params_kept and macs_kept, in (0, 1); got {given or 'none'}")
        if self.candidates < 2:
            raise UserError(f"candidates must be at least 2, got {self.candidates}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Let AIMET select and cut. The log holds the evaluations that it asked for.

        Raises ``UserError`` if AIMET is missing or fails, and for a model that does not give class scores of one
        tensor.
        """
        plain_svd(decomposer, "AIMET")
        if objective.evaluate(model).accuracy is None:
            raise UserError("AIMET searches by accuracy and needs class scores, which this model does not give")
        example = objective.example()
        if not isinstance(example, Tensor):
            raise UserError("AIMET needs a model whose input is one tensor")
        layers, left = find_layers.factorable(model, example, choice=objective.choice)
        log: list[dict] = []
        theirs = self._run(model, layers, tuple(example.shape[1:]), objective, log)
        compressed, kept = _in_our_layers(model, theirs, layers)
        return Compressed(
            model=compressed,
            plan=RankPlan.of(kept),
            reporter=reporter(lambda: (_report(model, compressed, layers, objective), ""), objective),
            dense=model,
            example=example,
            log=log,
            notes=find_layers.left_dense(left, model),
        )

    def _run(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        shape: tuple[int, ...],
        objective: Objective,
        log: list[dict],
    ) -> nn.Module:
        """Return the model that AIMET compressed."""
        torchvision_shim.prepare()  # aimet_torch imports torchvision
        try:
            from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
            from aimet_torch.common.utils import AimetLogger
            from aimet_torch.compress import ModelCompressor
            from aimet_torch.defs import SpatialSvdParameters
        except ImportError:
            raise UserError(MISSING) from None
        AimetLogger.set_level_for_all_areas(logging.WARNING)  # it logs a line for every ratio of every layer
        subject = copied(model).eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        ignored = [subject.get_submodule(n) for n, m in model.named_modules() if _is_conv(m) and n not in layers]
        greedy = GreedySelectionParameters(self._target(model), num_comp_ratio_candidates=self.candidates)
        chosen = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=ignored)
        with Bar(desc="aimet", unit="evaluation", leave=False) as bar, _elsewhere():
            try:
                compressed, _ = ModelCompressor.compress_model(
                    subject,
                    eval_callback=_scoring(model, objective, log, bar),
                    eval_iterations=None,
                    input_shape=(1, *shape),
                    compress_scheme=CompressionScheme.spatial_svd,
                    cost_metric=CostMetric.mac if self.macs_kept else CostMetric.memory,
                    parameters=SpatialSvdParameters(SpatialSvdParameters.Mode.auto, chosen),
                )
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"AIMET failed: {type(error).__name__}: {error}") from error
        return compressed

    def _target(self, model: nn.Module) -> float:
        """Return the target as a share of what AIMET counts: the weights of convolutions and Linear layers."""
        if self.macs_kept is not None:
            return self.macs_kept
        assert self.params_kept is not None
        counted = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        total = parameters(model)
        target = (self.params_kept * total - (total - counted)) / counted
        if target <= 0:
            raise UserError(f"params_kept={self.params_kept} is out of reach: what AIMET cannot cut is more")
        return target


def _scoring(model: nn.Module, objective: Objective, log: list[dict], bar: Bar) -> Callable[..., float]:
    """Return a function that gives the calibration accuracy of a candidate, and adds the evaluation to ``log``."""

    def score(candidate: nn.Module, *_: Any, **__: Any) -> float:
        found = objective.remembered(model, "aimet", lambda: of_state(candidate), lambda: objective.evaluate(candidate))
        log.append({"evaluation": len(log), "accuracy": found.accuracy, "loss": found.loss})
        bar.update()
        assert found.accuracy is not None  # refused before the search
        return found.accuracy

    return score


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Work in a temporary folder, because AIMET leaves a file of its scores in the current one."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _in_our_layers(
    model: nn.Module, theirs: nn.Module, layers: Mapping[str, nn.Module]
) -> tuple[nn.Module, dict[str, Kept]]:
    """Return a copy of ``model`` with the pairs of convolutions that AIMET made, and their ranks."""
    compressed, kept = copied(model), {}
    for name, dense in layers.items():
        pair = theirs.get_submodule(name)
        if not isinstance(pair, nn.Sequential):
            continue
        first, second = pair[0], pair[1]
        assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
        form = PlainForm("vertical")
        layer = form.layer_for(dense, first.out_channels)
        layer.fill([first.weight, second.weight], second.bias)
        replacing.replace(compressed, name, layer)
        kept[name] = Kept(first.out_channels, form)
    return compressed, kept


def _report(
    model: nn.Module, compressed: nn.Module, layers: Mapping[str, nn.Module], objective: Objective
) -> pd.DataFrame:
    """Return one row per layer, with the columns of ``Compressed.report``."""
    gradients = objective.gradients(model, list(layers))
    rows = []
    for name, dense in layers.items():
        weight, ours = dense.get_parameter("weight").detach(), compressed.get_submodule(name)
        change, rank, after = torch.zeros_like(weight), None, weight.numel()
        if isinstance(ours, FactoredConv2d):
            change = ours.weight.detach() - weight
            rank, after = ours.rank, sum(factor.weight.numel() for factor in ours.factors)
        kh, kw = weight.shape[2:] or (1, 1)
        sides = weight.shape[0] * kw, weight.shape[1] * kh
        rows.append(
            {
                "layer": name,
                "shape": tuple(weight.shape),
                "full_rank": min(sides),
                "break_even": linalg.break_even_rank(*sides),
                "rank": rank,
                "params_before": weight.numel(),
                "params_after": after,
                "predicted_change": float((gradients[name] * change).sum()) if name in gradients else 0.0,
                "relative_error": float(change.norm() / weight.norm().clamp_min(1e-30)),
            }
        )
    return pd.DataFrame(rows).astype({"rank": "Int64"})
