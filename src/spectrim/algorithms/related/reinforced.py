"""Choose a rank ratio for each layer by reinforcement learning (Cheng et al.).

Cheng et al., ICASSP 2020: an agent visits the layers. The state holds a layer's shape, cost and index. The
action is its rank ratio, and the reward is the accuracy less ``strength`` times the parameters kept.

What differs here:

- The layers are matrices or Tucker-2, where the paper has tensor rings.
- The agent is REINFORCE (Williams 1992), where the paper has DDPG with a critic. A ratio is the sigmoid of a normal
  number whose mean is linear in the state. After every ``batch`` episodes Adam moves mean and spread towards the
  actions that were rewarded above the batch's mean.
- Ratios in (0, 1) stand for the ranks 1, 2, ... up to break-even. Above it the layer is dense.
- The reward is measured on calibration samples, without training the network that results. Without class scores the
  negative loss takes the place of the accuracy.
- With a budget, one factor on all ratios meets it from below, and the reward is the accuracy alone.
- The state of a layer does not hold the actions before it.

The best network of all ``evaluations`` is returned.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.algorithms.rank_selection import on_subset
from spectrim.algorithms.shared.budget import Costs, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.measured import Measurements, search_identity
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.live import Bar
from spectrim.tools.settings import settings

Ranks = dict[str, int]


@settings
class Reinforced:
    """Let an agent choose a rank ratio for each layer, and learn from the accuracy of the cut network.

    ``evaluations``: at least 1; the number of networks that are measured.
    ``strength``: at least 0; the weight in the reward of the parameters kept. The accuracy lies in [0, 1].
    ``params_kept``: in (0, 1); the part of the whole model's parameters to keep. None: ``strength`` decides.
    ``batch``: at least 2; the number of evaluations from one update of the agent to the next.
    ``lr``: above 0; the learning rate of the agent.
    ``subset``: at least 1; the number of calibration samples for the reward, from the first. None: all of them.
    ``state``: the file from which an interrupted search is resumed. None: the search starts anew.
    """

    evaluations: int = 200
    strength: float = 1.0
    params_kept: float | None = None
    batch: int = 10
    lr: float = 0.2
    subset: int | None = None
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.batch < 2:
            raise UserError(f"expected evaluations >= 1 and batch >= 2; got {self.evaluations} and {self.batch}")
        if not (0 <= self.strength < math.inf and 0 < self.lr < math.inf):
            raise UserError(f"expected strength >= 0 and lr > 0, both finite; got {self.strength} and {self.lr}")
        if self.params_kept is not None and not 0 < self.params_kept < 1:
            raise UserError(f"params_kept must lie in (0, 1), got {self.params_kept}")
        if self.subset is not None and self.subset < 1:
            raise UserError(f"subset must be at least 1 sample (or null, for all), got {self.subset}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Search and cut. The log holds every evaluation: ranks, params_kept, loss, accuracy and reward.

        Raises ``UserError`` for a budget out of reach, and for the state of another search.
        """
        bench = Workbench.of(model, decomposer, objective)
        costs, judged = costs_of(bench, "params"), on_subset(objective, "calibration", self.subset)
        if self.params_kept is not None:
            costs.require(self.params_kept)
        agent = Agent(states_of(bench), self.lr, self.seed)
        identity = search_identity(self, bench)
        log: list[dict] = []
        episodes: list[tuple[Tensor, float]] = []
        with (
            Measurements.opened(self.state, identity, objective.read) as measured,
            Bar(range(self.evaluations), "reinforced", unit="evaluation", leave=False) as bar,
        ):
            for _ in bar:
                action = agent.act()
                ranks = self._ranks(bench, costs, action.sigmoid().tolist())
                loss, accuracy = measured.next([*ranks.values()], partial(_measure, bench, judged, ranks))
                log.append(self._rewarded(ranks, costs.achieved(ranks), loss, accuracy))
                episodes.append((action, log[-1]["reward"]))
                if len(episodes) == self.batch:
                    agent.learn(torch.stack([action for action, _ in episodes]), [reward for _, reward in episodes])
                    episodes = []
                best = max(entry["reward"] for entry in log)
                bar.set_postfix(best=f"{best:.4f}")
                bar.tell({**log[-1], "best": best})
        return bench.finish(max(log, key=lambda entry: entry["reward"])["ranks"], log)

    def _rewarded(self, ranks: Ranks, params_kept: float, loss: float, accuracy: float) -> dict[str, Any]:
        scored = not math.isnan(accuracy)
        reward = accuracy if scored else -loss
        if self.params_kept is None:
            reward -= self.strength * params_kept
        values = {"loss": loss, "accuracy": accuracy if scored else None, "reward": reward}
        return {"ranks": ranks, "params_kept": params_kept, **values}

    def _ranks(self, bench: Workbench, costs: Costs, ratios: Sequence[float]) -> Ranks:
        """Return the ranks of the ratios, which a budget scales."""

        def ranks_at(factor: float) -> Ranks:
            return {
                name: 1 + math.floor(min(1.0, factor * ratio) * spectrum.break_even)
                for (name, spectrum), ratio in zip(bench.spectra.items(), ratios, strict=True)
            }

        if self.params_kept is None:
            return ranks_at(1.0)
        return costs.meet(self.params_kept, ranks_at, low=0.0, high=1 / max(min(ratios), 1e-9))


class Agent:
    """Hold a normal policy whose mean is linear in the state.

    ``states``: shape (layers, features); one state per layer.
    """

    def __init__(self, states: Tensor, lr: float, seed: int) -> None:
        self.states, self.generator = states, torch.Generator().manual_seed(seed)
        self.weights = torch.zeros(states.shape[1], requires_grad=True)
        self.log_spread = torch.zeros((), requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weights, self.log_spread], lr)

    def policy(self) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.states @ self.weights, self.log_spread.exp().expand(len(self.states)))

    @torch.no_grad()
    def act(self) -> Tensor:
        """Draw the logit of a ratio for each layer. Shape (layers,)."""
        policy = self.policy()
        return policy.mean + policy.stddev * torch.randn(len(self.states), generator=self.generator)

    def learn(self, actions: Tensor, rewards: Sequence[float]) -> None:
        """Take one step of REINFORCE. The baseline is the mean reward, and the unit is its standard deviation.

        ``actions``: shape (N, layers).
        ``rewards``: one per episode.
        """
        gained = torch.tensor(rewards, dtype=torch.float64)
        advantage = ((gained - gained.mean()) / gained.std().clamp_min(1e-8)).float()
        self.optimizer.zero_grad()
        (-advantage @ self.policy().log_prob(actions).sum(1) / len(rewards)).backward()
        self.optimizer.step()


def states_of(bench: Workbench) -> Tensor:
    """Return the state of each layer. Shape (layers, features).

    It holds the logarithms of the layer's outputs, inputs and cost of one component, each standardised over the layers.
    Its index follows as a one-hot vector.
    """
    rows = []
    for name, spectrum in bench.spectra.items():
        weight = bench.model.get_parameter(f"{name}.weight")
        rows.append([math.log(len(weight)), math.log(weight[0].numel()), math.log(spectrum.cost(1))])
    measures = torch.tensor(rows)
    measures = (measures - measures.mean(0)) / measures.std(0, correction=0).clamp_min(1e-6)
    return torch.cat([measures, torch.eye(len(measures))], 1)


def _measure(bench: Workbench, objective: Objective, ranks: Mapping[str, int]) -> tuple[float, float]:
    """Return the loss and the accuracy of the model cut to ``ranks``; NaN without an accuracy."""
    found = objective.evaluate(bench.trial(ranks))
    return found.loss, math.nan if found.accuracy is None else found.accuracy
