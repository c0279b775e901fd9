"""The loss of a language model, and with it perplexity, is the mean over tokens; its Fisher information is too."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim import surgery
from spectrim.decomposers.svd import SVD
from spectrim.gates import gate_gradients
from spectrim.language import perplexity
from spectrim.losses import IGNORED, fisher_direction, logits_of, token_loss
from spectrim.objective import Objective
from spectrim.plan import Kept, RankPlan

WORDS = 5


class Bigram(nn.Module):
    """Logits of the next token from the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(self.embedding(input_ids))}


@pytest.fixture
def batches() -> list[tuple[dict[str, Tensor], Tensor]]:
    made = []
    for lengths in ([4, 4], [4, 2]):
        ids = torch.randint(WORDS, (2, 4))
        mask = (torch.arange(4) < torch.tensor(lengths).unsqueeze(1)).long()
        made.append(({"input_ids": ids, "attention_mask": mask}, torch.where(mask.bool(), ids, IGNORED)))
    return made


def by_hand(model: nn.Module, batches: Any) -> list[float]:
    """The loss of every token that is predicted."""
    losses = []
    for inputs, targets in batches:
        log = model(**inputs)["logits"].detach().log_softmax(-1)
        for row, own in enumerate(targets.tolist()):
            losses += [-float(log[row, t - 1, own[t]]) for t in range(1, len(own)) if own[t] != IGNORED]
    return losses


def test_it_is_the_mean_over_the_tokens_that_follow_another(batches: Any) -> None:
    model = Bigram()
    losses = by_hand(model, batches)
    found = Objective(token_loss, {"calibration": batches}).evaluate(model)
    assert found.n == len(losses) == 3 + 3 + 3 + 1
    assert found.loss == pytest.approx(sum(losses) / len(losses))
    assert found.accuracy is None
    assert perplexity(model, batches) == pytest.approx(math.exp(found.loss))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(batches: Any) -> None:
    model = Bigram()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert perplexity(model, batches) == pytest.approx(WORDS)


def test_its_gradient_is_that_of_the_mean_over_all_tokens(batches: Any) -> None:
    model, objective = Bigram(), Objective(token_loss, {"calibration": batches})
    found = objective.gradients(model, ["layer"])["layer"]
    total = torch.stack(
        [token_loss(model(**inputs), targets) * token_loss.count(targets) for inputs, targets in batches]
    )
    (wanted,) = torch.autograd.grad(total.sum() / 10, [model.layer.weight])
    torch.testing.assert_close(found, wanted)


def test_predictions_leave_out_the_padding_and_the_first(batches: Any) -> None:
    inputs, targets = batches[1]
    outputs = Bigram()(**inputs)
    found = token_loss.predictions(outputs, targets)
    assert found.shape == (token_loss.count(targets), WORDS)
    known = targets[:, 1:][targets[:, 1:] != IGNORED]
    torch.testing.assert_close(F.cross_entropy(found, known), token_loss(outputs, targets))


def test_fisher_directions_have_the_covariance_of_drawn_labels() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]])
    p = logits.softmax(1)[0]
    v = fisher_direction(logits.expand(200_000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(v.T @ v / len(v), torch.diag(p) - torch.outer(p, p), atol=3e-3, rtol=0)
    assert v.sum(1).abs().max() < 1e-5  # nothing along the shift that a softmax does not see


def test_the_fisher_information_of_the_gates_is_that_of_the_mean_token(batches: Any) -> None:
    """Against the sum over all tokens and all words that each might be, by their probability."""
    model, data = Bigram().eval(), batches[:1]
    spectrum = SVD().spectrum(model.layer)
    plan = RankPlan.of({"layer": Kept(spectrum.max_rank, "linear")})
    factored, objective = surgery.apply(model, plan, {"layer": spectrum}), Objective(token_loss, {"calibration": data})
    draws = [gate_gradients(factored, ["layer"], objective, 2, seed=seed)["layer"].drawn for seed in range(800)]
    found = torch.stack([rows.T @ rows / len(rows) for rows in draws]).mean(0)
    # By hand: the derivative of the logits by gate i is U_i * s_i * (V_i . x).
    inputs = data[0][0]["input_ids"][:, :-1].flatten()
    x, logits = model.embedding(inputs).detach(), model.layer(model.embedding(inputs)).detach()
    A, B = factored.layer.first.weight.detach(), factored.layer.second.weight.detach()
    D = (x @ A.T).unsqueeze(1) * B.unsqueeze(0)  # (tokens, words, gates)
    p = logits.softmax(-1)
    covariance = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    wanted = torch.einsum("twi,twv,tvj->ij", D, covariance, D) / len(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.15


def test_cross_entropy_takes_outputs_that_hold_logits() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(x)}

    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    model = Classifier()
    found = Objective(F.cross_entropy, {"calibration": [(x, y)]}).evaluate(model)
    assert found.loss == pytest.approx(F.cross_entropy(logits_of(model(x)), y).item())
    assert found.accuracy is not None
