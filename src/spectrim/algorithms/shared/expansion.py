"""Expand the loss of a partly compressed model in a gate on each component."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from spectrim.algorithms.shared.workbench import Workbench
from spectrim.factored.plan import RankPlan
from spectrim.statistics.fisher import Gates, gate_gradients
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.tools import malloc
from spectrim.tools.content import content, state_of


def gates_at(
    bench: Workbench,
    kept_R: Mapping[str, Tensor],
    samples: int,
    seed: int,
    first_order: bool,
    without: Collection[str] = (),
) -> Gates:
    """Return the gate gradients of ``samples`` calibration samples at the model that keeps ``kept_R`` of each layer.

    They do not depend on a budget, so they are remembered. With ``layers_at_once`` only one block of layers at a time
    is factored at full rank. Factors of full rank take more memory than a dense layer.

    ``kept_R``: the indices of the components kept of each layer.
    ``seed``: seed of the random directions from which the Fisher information is estimated.
    ``first_order``: whether to take the slopes too.
    ``without``: layers that have no gates.
    """
    kept = {name: bench.spectra[name].kept(tuple(own.tolist())) for name, own in kept_R.items()}
    plain = {name: spectrum.plain() for name, spectrum in bench.spectra.items()}
    smaller = {name for name, own in kept_R.items() if len(own) < bench.spectra[name].max_rank}

    def gates_of(block: Sequence[str], seen: Objective) -> Gates:
        plan = RankPlan.of({name: own for name, own in kept.items() if name in smaller or name in block})
        factored = replacing.apply(bench.model, plan, plain, shared=True)
        found = gate_gradients(factored, block, seen, samples, seed=seed, first_order=first_order)
        malloc.give_back()  # what the passes through the model have left
        return found

    def gates() -> Gates:
        blocks, seen = bench.objective.blocks([name for name in kept if name not in without]), bench.objective
        if len(blocks) > 1:  # rows of two layers are compared, so they must come from the same samples
            seen = seen.held("calibration", samples)
        found = [gates_of(block, seen) for block in blocks if block] or [Gates({}, {})]
        return Gates(*(dict(item for own in part for item in own.items()) for part in zip(*found, strict=True)))

    here = [*kept_R.values(), *state_of(bench.model).values()]
    key = (tuple(kept_R), tuple(without), samples, seed, bench.decomposer, first_order)
    return bench.objective.remembered(bench.model, "gates", lambda: (*key, content(here)), gates)


def together(gates: Gates, name: str, count: int, interaction: float) -> Tensor | None:
    """Return the rows by which the ``count`` components of a layer act on others; None where ``interaction`` is 0.

    Those of a layer without gates are zero. ``interaction``: as in ``Joint``.
    """
    if not interaction:
        return None
    if name in gates.rows:
        return interaction**0.5 * gates.rows[name].fisher.double()
    return torch.zeros(max((len(row.fisher) for row in gates.rows.values()), default=1), count).double()
