"""The loss of a language model, and with it perplexity, is the mean over tokens; its Fisher information is too."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.batches import pairs
from spectrim.decomposers.svd import SVD
from spectrim.default_losses import default_loss
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.language import perplexity
from spectrim.losses import (
    IGNORED,
    TokenLoss,
    fisher_direction,
    label_loss,
    logits_of,
    loss_of,
    span_loss,
    token_loss,
)
from spectrim.statistics.fisher import gate_gradients
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing

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
    plan = RankPlan.of({"layer": Kept(spectrum.max_rank, PlainForm("linear"))})
    factored, objective = (
        replacing.apply(model, plan, {"layer": spectrum}),
        Objective(token_loss, {"calibration": data}),
    )
    draws = [gate_gradients(factored, ["layer"], objective, 2, seed=seed).rows["layer"].fisher for seed in range(800)]
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


class Finder(nn.Module):
    """Scores of every place as a beginning and as an end."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        begin, end = self.head(self.body(x).tanh()).unbind(-1)
        return {"start_logits": begin, "end_logits": end}


def test_the_loss_of_an_answer_is_the_mean_over_its_two_ends() -> None:
    outputs, targets = Finder()(torch.randn(5, 7, 6)), torch.randint(7, (5, 2))
    ends = [F.cross_entropy(outputs[f"{end}_logits"], targets[:, i]) for i, end in enumerate(("start", "end"))]
    assert span_loss(outputs, targets).item() == pytest.approx(sum(ends).item() / 2)
    best = torch.stack([outputs["start_logits"].argmax(1), outputs["end_logits"].argmax(1)], 1)
    assert span_loss.right(outputs, best) == 5
    best[0, 1] = (best[0, 1] + 1) % 7
    best[3, 0] = (best[3, 0] + 1) % 7
    objective = Objective(span_loss, {"calibration": [(torch.randn(1, 7, 6), targets[:1])]})
    assert span_loss.right(outputs, best) == 3 and objective.evaluate(Finder()).accuracy in (0.0, 1.0)


def test_the_fisher_information_of_answers_is_that_of_the_mean_over_both_ends() -> None:
    """Against the sum over all places by their probability."""
    net, x = Finder().eval(), torch.randn(1, 4, 6)
    spectrum = SVD().spectrum(net.body)
    model = replacing.apply(net, RankPlan.of({"body": spectrum.kept(6)}), {"body": spectrum})
    many = Objective(span_loss, {"calibration": [(x.expand(6000, -1, -1), torch.zeros(6000, 2, dtype=torch.long))]})
    rows = gate_gradients(model, ["body"], many, samples=6000, seed=1).rows["body"].fisher
    exact = torch.zeros(6, 6)
    for end in ("start_logits", "end_logits"):
        p = model(x)[end].detach().softmax(1)[0]
        for place, chance in enumerate(p):
            targets = torch.tensor([[place, place]])
            one = Objective(
                lambda outputs, t, e=end: F.cross_entropy(outputs[e], t[:, 0]), {"calibration": [(x, targets)]}
            )
            row = gate_gradients(model, ["body"], one, samples=1).rows["body"].given[0]
            exact += chance * torch.outer(row, row) / 2
    found = rows.T @ rows / len(rows)
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0.05 * float(exact.diagonal().max()))


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_labels_of_tokens_lie_as_far_ahead_as_is_said(ahead: int) -> None:
    logits, targets = torch.randn(3, 7, 5), torch.randint(0, 5, (3, 7))
    targets[0, 5:] = -100
    loss, pairs = TokenLoss(ahead=ahead), [(n, t) for n in range(3) for t in range(7 - ahead)]
    wanted = [(logits[n, t], targets[n, t + ahead]) for n, t in pairs if targets[n, t + ahead] != -100]
    expected = torch.stack([F.cross_entropy(row, target) for row, target in wanted]).mean()
    torch.testing.assert_close(loss({"logits": logits}, targets), expected)
    assert loss.count(targets) == len(wanted)
    assert loss.predictions(logits, targets).equal(torch.stack([row for row, _ in wanted]))


@pytest.mark.parametrize(
    ("task", "loss"),
    [
        ("ForCausalLM", token_loss),
        ("ForTokenClassification", label_loss),
        ("ForMaskedLM", label_loss),
        ("ForQuestionAnswering", span_loss),
        ("ForSequenceClassification", F.cross_entropy),
        (None, F.cross_entropy),
    ],
)
def test_a_model_that_names_its_task_has_the_loss_of_it(task: str | None, loss: Any) -> None:
    model = nn.Linear(2, 2)
    model.loss_type = task  # type: ignore[assignment]
    assert default_loss(model) is loss


def test_the_older_names_of_decoders_are_tasks_too() -> None:
    class GPT2LMHeadModel(nn.Linear):
        loss_type = None  # as transformers leaves it

    assert default_loss(GPT2LMHeadModel(2, 2)) is token_loss

    class PeftModel(nn.Sequential):
        def get_base_model(self) -> nn.Module:
            return self[0]

    assert default_loss(PeftModel(GPT2LMHeadModel(2, 2))) is token_loss
    assert default_loss(PeftModel(nn.Linear(2, 2))) is F.cross_entropy


def test_a_loss_module_of_torch_is_given_the_logits() -> None:
    logits, targets = torch.randn(4, 3), torch.arange(4) % 3
    assert loss_of(nn.CrossEntropyLoss(), {"logits": logits}, targets).equal(F.cross_entropy(logits, targets))


def test_batches_of_collators_are_pairs() -> None:
    ids, labels = torch.zeros(4, 6, dtype=torch.int64), torch.arange(4)
    (pair,) = pairs([{"input_ids": ids, "labels": labels}], "calibration")
    assert pair[0].keys() == {"input_ids"} and pair[1] is labels
    ends = {"start_positions": labels, "end_positions": labels + 1}
    (pair,) = pairs([{"input_ids": ids, **ends}], "calibration")
    assert pair[0].keys() == {"input_ids"} and pair[1].tolist() == [[n, n + 1] for n in range(4)]
    assert list(pairs([{"input_ids": ids}], "calibration")) == [({"input_ids": ids}, None)]
    with pytest.raises(UserError, match="a mapping that holds labels"):
        list(pairs([(ids, labels, labels)], "calibration"))


def test_scores_of_more_positions_than_targets_are_refused_with_the_numbers() -> None:
    ids = torch.randint(5, (2, 7))
    assert loss_of(token_loss, {"logits": torch.zeros(2, 7, 5)}, ids).isfinite()
    with pytest.raises(UserError, match="scores 10 positions for 7 targets, as with a prompt of peft .*give loss="):
        loss_of(token_loss, {"logits": torch.zeros(2, 10, 5)}, ids)
