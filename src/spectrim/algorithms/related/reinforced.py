"""Rank selection by reinforcement learning (Cheng et al., ICASSP 2020)."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.rank_selection import on_subset
from spectrim.algorithms.shared.budget import Costs, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.measured import Measurements, search_identity
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings

Ranks = dict[str, int]


@settings
class Reinforced:
    """An agent visits the layers, picks a rank ratio for each, is rewarded for the net that results, and learns.

    Cheng et al., ICASSP 2020: the state tells a layer's shape, cost and index, the action is its rank ratio, and the
    reward is accuracy less ``strength`` times the parameters kept. That is the paper's.

    Ours: the layers are matrices or Tucker-2, theirs tensor rings; the agent, theirs DDPG with a critic, is REINFORCE
    (Williams 1992): a ratio is the sigmoid of a normal number whose mean is linear in the state, and after every
    ``batch`` episodes mean and spread move, by Adam at rate ``lr``, towards what was rewarded above the batch's mean. A
    ratio a in (0, 1) is that of the ranks 1, 2, ... up to break-even, and dense above. The reward is taken on the first
    ``subset`` samples of the calibration split, all of them where None, without training the net that results; where
    the outputs are no class scores, minus the loss stands for the accuracy. With ``params_kept`` all ratios are scaled
    by the one factor with which the whole model meets it from below, and the reward is the accuracy alone. The best net
    of all ``evaluations`` is returned. Left out: the actions before it in the state of a layer, and a critic.

    ``state``: a file from which an interrupted search goes on; None: it begins anew.
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
            raise UserError(f"evaluations is at least 1, batch 2; got {self.evaluations} and {self.batch}")
        if not (0 <= self.strength < math.inf and 0 < self.lr < math.inf):
            raise UserError(f"strength is at least 0, lr above 0, both finite; got {self.strength} and {self.lr}")
        if self.params_kept is not None and not 0 < self.params_kept < 1:
            raise UserError(f"params_kept must lie in (0, 1), got {self.params_kept}")
        if self.subset is not None and self.subset < 1:
            raise UserError(f"subset must be at least 1 sample (or null, for all), got {self.subset}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Search and cut. The log has every evaluation: ranks, params_kept, loss, accuracy, reward.

        Raises ``UserError`` for a budget out of reach.
        """
        bench = Workbench.of(model, decomposer, objective)
        costs, judged = costs_of(bench, "params"), on_subset(objective, "calibration", self.subset)
        if self.params_kept is not None:
            costs.require(self.params_kept)
        agent = Agent(states_of(bench), self.lr, self.seed)
        identity = search_identity(self, bench, decomposer)
        log: list[dict] = []
        episodes: list[tuple[Tensor, float]] = []
        with (
            Measurements.opened(self.state, identity, objective.read) as measured,
            tqdm(range(self.evaluations), "reinforced", unit="evaluation", leave=False, disable=None) as bar,
        ):
            for _ in bar:
                action = agent.act()
                ranks = self._ranks(bench, costs, action.sigmoid().tolist())
                loss, accuracy = measured.next([*ranks.values()], partial(_measure, bench, judged, ranks))
                log.append(self._rewarded(ranks, costs.share(ranks), loss, accuracy))
                episodes.append((action, log[-1]["reward"]))
                if len(episodes) == self.batch:
                    agent.learn(torch.stack([action for action, _ in episodes]), [reward for _, reward in episodes])
                    episodes = []
                bar.set_postfix(best=f"{max(entry['reward'] for entry in log):.4f}")
        return bench.finish(max(log, key=lambda entry: entry["reward"])["ranks"], log)

    def _rewarded(self, ranks: Ranks, params_kept: float, loss: float, accuracy: float) -> dict[str, Any]:
        scored = not math.isnan(accuracy)
        reward = accuracy if scored else -loss
        if self.params_kept is None:
            reward -= self.strength * params_kept
        values = {"loss": loss, "accuracy": accuracy if scored else None, "reward": reward}
        return {"ranks": ranks, "params_kept": params_kept, **values}

    def _ranks(self, bench: Workbench, costs: Costs, ratios: Sequence[float]) -> Ranks:
        """Of the ratios as they are, or scaled to the budget."""

        def ranks_at(factor: float) -> Ranks:
            return {
                name: 1 + math.floor(min(1.0, factor * ratio) * spectrum.break_even)
                for (name, spectrum), ratio in zip(bench.spectra.items(), ratios, strict=True)
            }

        if self.params_kept is None:
            return ranks_at(1.0)
        return costs.meet(self.params_kept, ranks_at, low=0.0, high=1 / max(min(ratios), 1e-9))


class Agent:
    """A normal policy whose mean is linear in the state, one state a layer. ``states``: shape (layers, features)."""

    def __init__(self, states: Tensor, lr: float, seed: int) -> None:
        self.states, self.generator = states, torch.Generator().manual_seed(seed)
        self.weights = torch.zeros(states.shape[1], requires_grad=True)
        self.log_spread = torch.zeros((), requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weights, self.log_spread], lr)

    def policy(self) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.states @ self.weights, self.log_spread.exp().expand(len(self.states)))

    @torch.no_grad()
    def act(self) -> Tensor:
        """The logit of a ratio for each layer, drawn. Shape (layers,)."""
        policy = self.policy()
        return policy.mean + policy.stddev * torch.randn(len(self.states), generator=self.generator)

    def learn(self, actions: Tensor, rewards: Sequence[float]) -> None:
        """One step of REINFORCE with the mean as its baseline, in units of the deviation. ``actions``: (N, layers)."""
        gained = torch.tensor(rewards, dtype=torch.float64)
        advantage = ((gained - gained.mean()) / gained.std().clamp_min(1e-8)).float()
        self.optimizer.zero_grad()
        (-advantage @ self.policy().log_prob(actions).sum(1) / len(rewards)).backward()
        self.optimizer.step()


def states_of(bench: Workbench) -> Tensor:
    """Of each layer the logarithms of its outputs, of its inputs and of what one component costs, each standardised
    over the layers, and its index, one-hot. Shape (layers, features)."""
    rows = []
    for name, spectrum in bench.spectra.items():
        weight = bench.model.get_parameter(f"{name}.weight")
        rows.append([math.log(len(weight)), math.log(weight[0].numel()), math.log(spectrum.cost(1))])
    measures = torch.tensor(rows)
    measures = (measures - measures.mean(0)) / measures.std(0, correction=0).clamp_min(1e-6)
    return torch.cat([measures, torch.eye(len(measures))], 1)


def _measure(bench: Workbench, objective: Objective, ranks: Mapping[str, int]) -> tuple[float, float]:
    """Loss and accuracy, NaN where there is none, of the model cut to ``ranks``."""
    found = objective.evaluate(bench.cut(ranks))
    return found.loss, math.nan if found.accuracy is None else found.accuracy
