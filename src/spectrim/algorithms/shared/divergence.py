"""How far the predictions of a model move when one layer alone is cut."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from spectrim.algorithms.shared.workbench import Workbench
from spectrim.batches import device_of, evaluating, forward, sample_count, to_device
from spectrim.errors import UserError
from spectrim.losses import scores_of
from spectrim.surgery import replacing
from spectrim.surgery.given_model import copied
from spectrim.tools.content import of_state


def divergences(bench: Workbench, ranks: Mapping[str, int], samples: int) -> dict[str, float]:
    """Return the mean KL divergence, in nats, between the dense predictions and those with one layer at its rank.

    No label is read. The result is remembered for other budgets.

    ``ranks``: the rank of each layer to measure.
    ``samples``: number of calibration samples to read, in whole batches.
    Raises ``UserError`` where the outputs are no class scores.
    """

    def key() -> tuple:
        return (bench.decomposer, samples, *ranks.items(), of_state(bench.model))

    return bench.objective.remembered(bench.model, "divergences", key, lambda: _measured(bench, ranks, samples))


def _measured(bench: Workbench, ranks: Mapping[str, int], samples: int) -> dict[str, float]:
    objective, working = bench.objective, copied(bench.model)
    device, names, count = device_of(working), sorted(ranks), 0
    cut = [bench.spectra[name].factor(ranks[name]) for name in names]
    sums = torch.zeros(len(names), dtype=torch.float64)
    with evaluating(working), torch.no_grad():
        for inputs, targets in objective.first("calibration", samples, "measure"):
            inputs, targets = to_device(inputs, device), to_device(targets, device)

            def log_probabilities(inputs: object = inputs, targets: object = targets) -> torch.Tensor:
                scores = scores_of(objective.loss, forward(working, inputs), targets)
                if scores is None:
                    raise UserError(
                        "a divergence of predictions needs class scores; the outputs of this model are none"
                    )
                return scores.log_softmax(-1)

            dense = log_probabilities()
            for i, name in enumerate(names):
                undo = replacing.replace(working, name, cut[i])
                sums[i] += float(F.kl_div(log_probabilities(), dense, reduction="sum", log_target=True))
                undo()
            objective.read["calibration"] += len(names) * sample_count(targets, inputs)
            count += len(dense)
    processes = objective.processes("calibration")
    total = max(int(processes.add_up(torch.tensor(count))), 1)
    return dict(zip(names, (processes.add_up(sums) / total).clamp_min(0).tolist(), strict=True))
