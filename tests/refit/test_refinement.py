"""A refinement brings a compressed model closer to the dense one on held-out inputs, or leaves it as it was."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim import Joint, compress
from spectrim.algorithms.refitted import Refitted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.truncation import Truncation
from spectrim.batches import evaluating
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.models.resnet import ResNet
from spectrim.refit import held_out, refinement
from spectrim.refit.blocks import block_error, outputs_of, repeated_blocks
from spectrim.refit.refinement import Refinement, refine
from spectrim.statistics.objective import Objective
from spectrim.tools import live, resume

STEPS = Refinement(samples=1280, lr=0.1)


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(32, 3, 8, 8), torch.randint(5, (32,))) for _ in range(5)]


@pytest.fixture
def objective(batches: list[tuple[Tensor, Tensor]]) -> Objective:
    return Objective(F.cross_entropy, {"calibration": batches})


@pytest.fixture
def cut(net: nn.Module, objective: Objective) -> Compressed:
    return Truncation(ratio=0.5).compress(net, SVD(), objective)


def equal(first: nn.Module, second: nn.Module, *parts: str) -> bool:
    theirs = second.state_dict()
    return all(
        torch.equal(own, theirs[name])
        for name, own in first.state_dict().items()
        if not parts or any(part in name for part in parts)
    )


def away(model: nn.Module, dense: nn.Module, batches: Any) -> float:
    """The mean KL divergence on the batches, by its formula."""
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, _ in batches:
            p, q = (own.eval()(inputs).softmax(1) for own in (dense, model))
            total += float((p * (p.log() - q.log())).sum())
            count += len(inputs)
    return total / count


def test_it_comes_closer_on_inputs_that_no_step_reads(
    net: nn.Module, cut: Compressed, objective: Objective, batches: Any
) -> None:
    before = away(cut.model, net, batches[4:])
    done = refine(cut.model, net, objective, STEPS)
    after = away(cut.model, net, batches[4:])
    assert done.entry is not None
    assert done.entry["distance_before"] == pytest.approx(before, rel=1e-4)
    assert done.entry["distance_after"] == pytest.approx(after, rel=1e-4)
    assert after < 0.8 * before
    counted = {key: done.entry[key] for key in ("steps", "inputs", "samples")}
    assert counted == {"steps": 40, "inputs": 128, "samples": 1280}
    assert "40 steps on 128 inputs, 1280 read in all: the KL divergence (nats) on 32 others" in done.notes[0]
    assert objective.read["calibration"] == 1280 + 5 * 32  # and the held-out batch before, and after each quarter


def test_a_listener_is_told_of_every_step(net: nn.Module, cut: Compressed, objective: Objective) -> None:
    heard: list[Any] = []
    with live.heard_by(lambda name, done, total, _: heard.append((name, done, total))):
        refine(cut.model, net, objective, Refinement(samples=96, lr=1e-4))
    assert [step for step in heard if step[0] == "refine"] == [("refine", done, 3) for done in (1, 2, 3)]


def test_only_factors_and_batchnorm_are_trained_and_all_flags_are_restored(
    net: nn.Module, objective: Objective
) -> None:
    result = compress(net, calibration=objective.given("calibration"), exclude=["8"], params_kept=0.3)
    result.model.train()
    result.model.requires_grad_(False)
    before, dense = copy.deepcopy(result.model), copy.deepcopy(net)
    refine(result.model, net, objective, Refinement(samples=640, lr=1e-3))
    assert equal(before, result.model, "8.", "running", "num_batches", "positions") and equal(dense, net)
    assert not equal(before, result.model, "1.weight") and not equal(before, result.model, "6.")
    assert all(module.training for module in result.model.modules())
    assert not any(own.requires_grad or own.grad is not None for own in result.model.parameters())


def test_no_label_is_used(net: nn.Module, cut: Compressed, batches: Any) -> None:
    other = copy.deepcopy(cut.model)
    relabelled = [(inputs, (targets + 1) % 5) for inputs, targets in batches]
    for model, given in ((cut.model, batches), (other, relabelled)):
        refine(model, net, Objective(F.cross_entropy, {"calibration": given}), STEPS)
    assert equal(cut.model, other)


@pytest.mark.parametrize("lr", [30.0, 1e30])
def test_steps_that_destroy_the_model_are_undone(
    net: nn.Module, cut: Compressed, objective: Objective, lr: float
) -> None:
    before = copy.deepcopy(cut.model)
    done = refine(cut.model, net, objective, Refinement(samples=640, lr=lr))
    assert equal(before, cut.model)
    assert done.entry is not None and done.entry["distance_after"] == done.entry["distance_before"]
    if lr > 100:
        assert "the refinement stopped at step 1: the distance became nan; lower lr" in done.notes


def test_a_model_whose_outputs_are_not_finite_stays_as_it_is(net: nn.Module, objective: Objective) -> None:
    model = Truncation(ratio=0.5).compress(net, SVD(), objective).model
    model.register_forward_hook(lambda _, __, outputs: outputs * float("nan"))
    before = copy.deepcopy(model)
    done = refine(model, net, objective, STEPS)
    assert done == (None, ["not refined: the KL divergence (nats) on held-out inputs is nan"])
    assert equal(before, model)


def test_outputs_without_a_gradient_are_said(net: nn.Module, cut: Compressed, objective: Objective) -> None:
    cut.model.register_forward_hook(lambda _, __, outputs: outputs.detach())
    done = refine(cut.model, net, objective, STEPS)
    assert done.notes[-1] == "the refinement stopped at step 0: there is no gradient"


def test_a_dense_model_has_nothing_to_refine(net: nn.Module, objective: Objective) -> None:
    assert refine(copy.deepcopy(net), net, objective, STEPS) == (None, ["not refined: no layer is factored"])


def test_it_is_the_same_for_one_seed_and_the_caller_s_random_numbers_are_left(
    net: nn.Module, cut: Compressed, objective: Objective
) -> None:
    def noisy(inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)

    models, state = [], torch.get_rng_state()
    for seed, augment in ((0, noisy), (0, noisy), (1, noisy), (0, None)):
        model = copy.deepcopy(cut.model)
        refine(model, net, objective, Refinement(samples=320, lr=1e-3, augment=augment, seed=seed))
        models.append(model)
    assert torch.equal(state, torch.get_rng_state())
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2]) and not equal(models[0], models[3])


def test_after_a_kill_it_ends_in_the_same_weights(
    net: nn.Module, cut: Compressed, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "WORTH_SECONDS", 0.0)
    done, whole = refinement._Steps._do, copy.deepcopy(cut.model)
    entry = refine(whole, net, objective, STEPS).entry
    calls: list[range] = []

    def killed(self: Any, steps: range, bar: Any) -> bool:
        calls.append(steps)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return done(self, steps, bar)

    monkeypatch.setattr(refinement._Steps, "_do", killed)
    broken, again = copy.deepcopy(cut.model), copy.deepcopy(cut.model)
    with resume.into(tmp_path):
        with pytest.raises(KeyboardInterrupt):
            refine(broken, net, objective, STEPS)
        found = refine(again, net, objective, STEPS).entry
    assert calls == [range(10), range(10, 20), range(20, 30), range(20, 30), range(30, 40)]
    assert equal(whole, again)
    assert found is not None and entry is not None
    assert {**found, "seconds": 0} == {**entry, "seconds": 0}


@pytest.mark.parametrize("lr", [3e-3, 1e30])
def test_what_is_taken_up_counts_as_read_and_a_stop_is_told_again(
    net: nn.Module, cut: Compressed, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float
) -> None:
    monkeypatch.setattr(resume, "WORTH_SECONDS", 0.0)
    read, notes = list[Any](), list[Any]()
    for _ in range(2):
        objective.start_selection()
        with resume.into(tmp_path):
            notes.append(refine(copy.deepcopy(cut.model), net, objective, Refinement(samples=640, lr=lr)).notes)
        read.append(dict(objective.read))
    assert read[0] == read[1] and notes[0] == notes[1]
    assert any("stopped" in note for note in notes[0]) == (lr > 1)


def test_outputs_that_cannot_be_compared_leave_the_model_as_it_is(net: nn.Module, batches: Any) -> None:
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(1)

    inputs = [own for own, _ in batches]
    result = compress(Labels(), calibration=inputs, algorithm=Refitted(Truncation(ratio=0.5), 64, STEPS))
    said = "the relative squared error of outputs without a floating-point tensor on held-out inputs is nan"
    assert result.notes[-1] == f"not refined: {said}"


def test_other_settings_take_nothing_up(
    net: nn.Module, cut: Compressed, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "WORTH_SECONDS", 0.0)
    alone, after = copy.deepcopy(cut.model), copy.deepcopy(cut.model)
    other = Refinement(samples=1280, lr=1e-3)
    refine(alone, net, objective, other)
    with resume.into(tmp_path):
        refine(copy.deepcopy(cut.model), net, objective, STEPS)
        refine(after, net, objective, other)
    assert equal(alone, after)


def test_joint_and_refitted_refine_and_say_so(net: nn.Module, objective: Objective) -> None:
    for algorithm in (Joint(params_kept=0.2, samples=64, refine=STEPS), Refitted(Truncation(ratio=0.5), 64, STEPS)):
        result = compress(net, calibration=objective.given("calibration"), algorithm=algorithm)
        entry = result.log[-1]
        assert entry["distance_after"] < entry["distance_before"] and entry["seconds"] > 0
        assert result.trained and any(note.startswith("refined by 40 steps") for note in result.notes)


def test_the_train_split_may_be_read_and_calibration_batches_are_held_out(
    net: nn.Module, cut: Compressed, objective: Objective, batches: Any
) -> None:
    train = [(torch.randn(32, 3, 8, 8), torch.randint(5, (32,))) for _ in range(4)]
    chosen = Refinement(samples=256, lr=3e-3, split="train")
    with pytest.raises(UserError, match="^train batches are missing"):
        refine(cut.model, net, objective, chosen)
    both = Objective(F.cross_entropy, {"calibration": batches, "train": train})
    before = away(cut.model, net, batches)
    done = refine(cut.model, net, both, chosen)
    assert done.entry is not None and done.entry["distance_before"] == pytest.approx(before, rel=1e-4)
    assert away(cut.model, net, batches) == pytest.approx(done.entry["distance_after"], rel=1e-4)
    assert dict(both.read) == {"calibration": 5 * 160, "train": 256}


def test_the_last_calibration_batches_are_held_out(
    net: nn.Module, cut: Compressed, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refit has read the first ones, on which the model is closer to the dense one than elsewhere."""
    monkeypatch.setattr(held_out, "HELD_OUT_SAMPLES", 40)
    both = Objective(F.cross_entropy, {"calibration": batches, "train": batches[:1]})
    done = refine(cut.model, net, both, Refinement(samples=32, lr=1e-9, split="train"))
    assert done.entry is not None
    assert done.entry["distance_before"] == pytest.approx(away(cut.model, net, batches[3:]), rel=1e-3)


def test_blocks_that_a_model_repeats_are_brought_closer_too() -> None:
    net = ResNet(14, width=4).eval()
    batches = [(torch.randn(16, 3, 16, 16), torch.randint(10, (16,))) for _ in range(4)]
    objective = Objective(F.cross_entropy, {"calibration": batches})
    model = Truncation(ratio=0.5).compress(net, SVD(), objective).model
    blocks = repeated_blocks(model, net)

    def error() -> float:
        with evaluating(model), torch.no_grad(), outputs_of(model, blocks) as ours, outputs_of(net, blocks) as theirs:
            net(batches[-1][0]), model(batches[-1][0])
        found = block_error(ours, theirs)
        assert found is not None
        return float(found)

    before = error()
    refine(model, net, objective, Refinement(samples=1280, lr=3e-2))
    assert len(blocks) == 6 and error() < 0.8 * before


def test_inputs_alone_are_enough_without_class_scores(net: nn.Module, batches: Any) -> None:
    inputs = [own for own, _ in batches]
    result = compress(net, calibration=inputs, algorithm=Refitted(Truncation(ratio=0.5), 64, STEPS))
    assert "the relative squared error on 32 others" in result.notes[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "^samples of a refinement must be at least 1, got 0$"),
        ({"lr": 0.0}, "^lr of a refinement must be a finite number above 0, got 0.0$"),
        ({"lr": float("inf")}, "^lr of a refinement must be a finite number above 0, got inf$"),
        ({"split": "test"}, "split='test' is none of: 'calibration', 'train'"),
        ({"seed": -1}, "seed=-1 is not a whole number"),
        ({"augment": "flip"}, "augment='flip' is none of: Callable"),
    ],
)
def test_settings_that_cannot_be_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Refinement(**change)


def test_what_cannot_be_refined_is_refused_before_the_selection(net: nn.Module, batches: Any) -> None:
    def refuse(given: Any, model: nn.Module, message: str) -> None:
        for algorithm in (Joint(params_kept=0.5, refine=STEPS), Refitted(Truncation(ratio=0.5), 64, STEPS)):
            with pytest.raises(UserError, match=message):
                compress(model, calibration=given, algorithm=algorithm)

    refuse(None, net, "^calibration batches are missing")
    refuse(batches, copy.deepcopy(net).bfloat16(), "^refine needs float32 weights, and 0.weight is 16 bit")
    refuse(batches[:1], net, "^refine needs two calibration batches or more")


def test_fewer_samples_than_a_batch_take_one_step(net: nn.Module, cut: Compressed, objective: Objective) -> None:
    entry = refine(cut.model, net, objective, Refinement(samples=1, lr=1e-4)).entry
    assert entry is not None and (entry["steps"], entry["inputs"]) == (1, 32)


@pytest.mark.parametrize("seed", range(6))
def test_a_model_that_computes_the_same_is_refined_without_a_fault(seed: int) -> None:
    """The divergence of equal scores is 0 but for rounding, which may be below 0."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 40))
    nn.init.zeros_(net[0].weight)
    data = [(torch.randn(8, 6), torch.randint(40, (8,))) for _ in range(3)]
    joint = Joint(params_kept=0.9, samples=8, refine=Refinement(samples=16))
    result = compress(net, calibration=data, algorithm=joint)
    assert 0 <= result.log[-1]["distance_after"] <= result.log[-1]["distance_before"]
