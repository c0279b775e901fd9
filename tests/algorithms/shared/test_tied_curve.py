"""The curve of a weight that a head shares: convex, never above what was measured, and exact at its ends."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.shared.tied_curve import LEAST, _by_component, leaving_unmeasured, measured_changes
from spectrim.algorithms.shared.work import Outlook
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.losses import token_loss
from spectrim.statistics.objective import Objective

IDS, WIDTH = 60, 16
TWO_SIDED = spectrim.TwoSidedSVD(view="channel", embeddings=True, whole=0.4)


class Decoder(nn.Module):
    """Each id is followed by itself, for sure: rare ids have low scores elsewhere, which a softmax feels."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.body, self.head = nn.Embedding(IDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, IDS)
        self.head.weight = self.token.weight
        with torch.no_grad():
            self.token.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(2)
            self.body.weight.copy_(torch.eye(WIDTH) + 0.01 * self.body.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.token(ids)))


@pytest.fixture
def objective() -> Objective:
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.rand(4, 8, 1, generator=generator).pow(3) * IDS).long()
    batches = [(own, own) for own in drawn.expand(-1, -1, 12)]
    return Objective(token_loss, {"calibration": batches[:2], "verification": batches[2:]})


def test_a_dry_run_counts_the_samples_that_it_is_measured_on(objective: Objective) -> None:
    joint = spectrim.Joint(params_kept=0.6, samples=24, refit=0)
    foreseen = joint.work(Outlook({"calibration": 16, "verification": 16}, layers=2, ties=1))
    joint.compress(Decoder().eval(), TWO_SIDED, objective)
    assert foreseen.evaluations == objective.read["verification"] == 9 * 16
    assert joint.work(Outlook({"calibration": 16}, layers=2, ties=1)).evaluations == 0
    less, untouched = replace(joint, params_kept=0.9), replace(TWO_SIDED, embeddings=False, whole=0.0)
    less.compress(Decoder().eval(), untouched, objective)
    assert objective.read["verification"] == 9 * 16


@given(st.lists(st.floats(-1, 50), min_size=1, max_size=9), st.integers(10, 40))
def test_it_is_convex_and_never_above_what_was_measured(rises: list[float], full: int) -> None:
    measured = dict(enumerate(rises, 1))
    falls = _by_component(measured, full)
    curve = falls.flip(0).cumsum(0).flip(0)[1:]  # the change at ranks 1 to full - 1
    assert len(falls) == full and (falls >= LEAST).all() and (falls[1:].diff() < 0).all()
    for rank, rise in measured.items():
        assert curve[rank - 1] <= max(rise, 0.0) + 2 * full * LEAST
    assert float(curve[0]) == pytest.approx(max(rises[0], 0.0), abs=1e-6)


def test_at_rank_one_it_is_the_measured_rise(objective: Objective) -> None:
    bench = Workbench.of(Decoder().eval(), TWO_SIDED, objective)
    changes = measured_changes(bench)["token"]
    cut, dense = (objective.evaluate(one, "verification").loss for one in (bench.trial({"token": 1}), bench.model))
    rise = cut - dense
    assert rise > 0.1 and float(changes[1:].sum()) == pytest.approx(rise, rel=1e-5)


@pytest.mark.parametrize("significance", [None, 4, "auto"])
def test_joint_selection_takes_it_in_place_of_an_expansion(objective: Objective, significance: Any) -> None:
    """Components go from the last one on, and the prediction holds what was measured."""
    model = Decoder().eval()
    cut = spectrim.compress(
        model,
        calibration=objective.given("calibration"),
        verification=objective.given("verification"),
        loss=token_loss,
        algorithm=spectrim.Joint(params_kept=0.6, refit=0, significance=significance),
        decomposer=TWO_SIDED,
        include=["token", "head"],
    )
    rank = cut.plan["token"].rank
    assert cut.plan["token"].keep in (rank, tuple(range(rank)))
    changes = measured_changes(Workbench.of(model, TWO_SIDED, objective))["token"]
    assert cut.log[-1]["predicted"] == pytest.approx(float(changes[rank:].sum()), rel=1e-6)


def test_without_other_texts_the_weight_stays_dense_and_a_note_says_why(objective: Objective) -> None:
    """It is not decomposed either, which would take long, and a dry run says the same."""
    given: Any = {"calibration": objective.given("calibration"), "loss": token_loss, "decomposer": TWO_SIDED}
    given["algorithm"] = spectrim.Joint(params_kept=0.9, refit=0)
    cut, foreseen = (spectrim.compress(Decoder(), **given, dry_run=dry) for dry in (False, True))
    assert "token" not in cut.plan and list(foreseen.layers["layer"]) == ["body"]
    for notes in (cut.notes, foreseen.notes):
        assert any(note.startswith("token: left dense: how the loss depends on its rank") for note in notes)
        assert any(note.startswith("head: left dense: it shares its weight with token") for note in notes)
    alone = objective.on({"calibration": objective.given("calibration")})
    bench = Workbench.of(Decoder(), TWO_SIDED, leaving_unmeasured(Decoder(), alone))
    assert list(bench.spectra) == ["body"]


def test_a_rank_that_the_user_sets_needs_no_measurement(objective: Objective) -> None:
    given: Any = {"calibration": objective.given("calibration"), "loss": token_loss, "decomposer": TWO_SIDED}
    joint = spectrim.Joint(params_kept=0.9, refit=0)
    cut = spectrim.compress(Decoder(), algorithm=joint, overrides={"token": 3}, **given)
    assert cut.plan["token"].rank == 3


def test_a_model_without_a_tied_weight_has_none(objective: Objective) -> None:
    model = Decoder()
    model.head.weight = nn.Parameter(model.token.weight.detach().clone())
    assert measured_changes(Workbench.of(model.eval(), TWO_SIDED, objective)) == {}
