"""A refit fits the factors to the dense outputs, as far as their rank lets them, and touches nothing else."""

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim import Truncation
from spectrim.algorithms.refitted import Refitted
from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.tucker2 import Tucker2
from spectrim.errors import UserError
from spectrim.factored.linalg import svd
from spectrim.factored.plan import RankPlan
from spectrim.refit.factors import refit
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.surgery.stand_ins import BY_THREAD
from spectrim.tools.live import heard_by

Make = Callable[[nn.Module], Any]
FORMS: dict[str, Make] = {
    "channel": SVD("channel").spectrum,
    "spatial": SVD("spatial").spectrum,
    "tucker": Tucker2().spectrum,
}


class Net(nn.Module):
    """A convolution that a BatchNorm follows, one without offset at all, and a Linear with a bias."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 8, (3, 1), padding="same", groups=groups, bias=False)
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bare(F.relu(self.norm(self.conv(x))))).mean((2, 3)))


@pytest.fixture
def dense() -> Net:
    net = Net().eval()
    net.norm.running_mean.normal_()  # type: ignore[union-attr]
    return net


def objective(count: int = 3) -> Objective:
    mixing = torch.randn(4, 4)
    batches = []
    for _ in range(count):
        x = torch.einsum("ij,njhw->nihw", mixing, torch.randn(40, 4, 7, 6)) + 0.5
        batches.append((x, torch.zeros(40).long()))
    return Objective(F.cross_entropy, {"calibration": batches})


def cut(net: nn.Module, make: Make, rank: int | None = None) -> nn.Module:
    spectra = {n: make(m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    kept = {n: spectrum.kept(min(rank or spectrum.max_rank, spectrum.max_rank)) for n, spectrum in spectra.items()}
    return replacing.apply(net, RankPlan.of(kept), spectra)


def test_a_layer_that_is_called_again_and_again_is_left_as_it_was_cut() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.step(torch.tanh(self.step(x)))))

    net = Recurrent()
    model, data = cut(net, SVD().spectrum, 2), [(torch.randn(40, 6), torch.zeros(40).long())]
    step, head = (model.get_submodule(f"{name}.first").weight.clone() for name in ("step", "head"))  # type: ignore
    refit(model, net, Objective(F.cross_entropy, {"calibration": data}), 40)
    assert torch.equal(model.step.first.weight, step) and not torch.equal(model.head.first.weight, head)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_composed_is_the_dense_weight_at_full_rank(make: Make, groups: int) -> None:
    net = Net(groups)
    model = cut(net, make)
    for name in ("conv", "bare", "fc"):
        layer: Any = model.get_submodule(name)
        matrix = layer.product([factor.weight for factor in layer.factors])  # type: ignore[misc]
        weight = net.get_submodule(name).weight
        torch.testing.assert_close(matrix.reshape(weight.shape), weight, atol=1e-5, rtol=1e-5)  # type: ignore


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_composed_of_subspaces_is_the_dense_weight_at_full_rank(view: Any) -> None:
    for layer in (nn.Conv2d(8, 6, 3, groups=2), nn.Linear(8, 6)):
        spectrum = SubspaceSVD(2, view).spectrum(layer)
        factored: Any = spectrum.factor(spectrum.max_rank)
        matrix = factored.product([factor.weight for factor in factored.factors])  # type: ignore[misc]
        torch.testing.assert_close(matrix.reshape(layer.weight.shape), layer.weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_a_model_that_lost_nothing_stays_as_it_is(dense: Net, make: Make) -> None:
    data, model = objective(), cut(dense, make)
    x = torch.randn(5, 4, 7, 6)
    refit(model, dense, data, samples=120)
    torch.testing.assert_close(model(x), dense(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_outputs_come_nearer_to_the_dense_ones(dense: Net, make: Make) -> None:
    data, model = objective(), cut(dense, make, rank=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    x = torch.cat([x for x, _ in data.splits["calibration"]])
    before = (model(x) - dense(x)).square().mean()
    refit(model, dense, data, samples=120)
    assert (model(x) - dense(x)).square().mean() < 0.8 * before
    assert all(value.equal(state[name]) for name, value in dense.state_dict().items())
    hooks = [module for module in (*model.modules(), *dense.modules()) if module._forward_hooks]
    assert not hooks and not model.training and data.read["calibration"] == 120


@pytest.mark.parametrize("positions", [1000, 500])
def test_a_part_of_the_positions_of_a_convolution_serves(
    dense: Net, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,440 that 120 images have."""
    data = objective()
    x = torch.cat([x for x, _ in data.splits["calibration"]])
    whole, some = (cut(dense, FORMS["spatial"], rank=2) for _ in range(2))
    before = (whole(x) - dense(x)).square().mean()
    refit(whole, dense, data, samples=120)
    monkeypatch.setattr("spectrim.refit.moments.POSITIONS", positions)
    refit(some, dense, data, samples=120)
    assert not torch.equal(some(x), whole(x))
    assert (some(x) - dense(x)).square().mean() < 0.8 * before


def test_a_linear_reaches_the_best_of_its_rank() -> None:
    """Reduced-rank regression has a closed form: the SVD of the least-squares fit, in the metric of the inputs."""
    dense = nn.Sequential(nn.Linear(7, 5)).eval()
    x = torch.randn(500, 7) @ torch.randn(7, 7)
    data = Objective(F.mse_loss, {"calibration": [(x, torch.zeros(500, 5))]})
    model = cut(dense, SVD().spectrum, rank=2)
    refit(model, dense, data, samples=500)
    centred = x - x.mean(0)
    values = svd((centred @ dense[0].weight.T).detach().double()).S_R  # type: ignore[operator]
    best = float(values[2:].square().sum())
    reached = float((model(x) - dense(x)).detach().double().square().sum())
    assert best - 1e-3 < reached < 1.01 * best


def test_means_are_kept_by_the_bias_or_by_the_batch_norm_that_follows(dense: Net) -> None:
    data, model = objective(), cut(dense, FORMS["spatial"], rank=1)
    x = torch.cat([x for x, _ in data.splits["calibration"]])
    refit(model, dense, data, samples=120)
    after = [net.norm(net.conv(x)).mean((0, 2, 3)) for net in (model, dense)]  # type: ignore[operator]
    torch.testing.assert_close(*after, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model(x).mean(0), dense(x).mean(0), atol=1e-4, rtol=1e-3)


def test_padding_counts_for_nothing() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 5)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.layer(x) * attention_mask.unsqueeze(-1)).sum(1)

    dense, x, mask = Tokens().eval(), torch.randn(30, 6, 4), torch.ones(30, 6)
    mask[:, 4:] = 0
    fitted = []
    for padding in (0.0, 100.0):
        filled = torch.where(mask.unsqueeze(-1) > 0, x, padding * torch.randn(30, 6, 4))
        batch = ({"x": filled, "attention_mask": mask}, torch.zeros(30).long())
        model = cut(dense, SVD().spectrum, rank=2)
        refit(model, dense, Objective(F.cross_entropy, {"calibration": [batch]}), samples=30)
        fitted.append(model.layer.second.weight @ model.layer.first.weight)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(*fitted)


def test_an_empty_split_is_one_line(dense: Net) -> None:
    model, empty = cut(dense, FORMS["channel"], rank=1), Objective(F.cross_entropy, {"calibration": []})
    with pytest.raises(UserError, match="the calibration split is empty"):
        refit(model, dense, empty, samples=10)


def test_a_layer_that_a_batch_goes_around_is_said(dense: Net) -> None:
    class Around(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.mean() < 50 else x.mean((2, 3))

    net = Around().eval()
    data = objective()
    data.splits["calibration"].append((torch.full((40, 4, 7, 6), 99.0), torch.zeros(40).long()))  # type: ignore
    before = threading.active_count()
    notes = refit(cut(net, FORMS["channel"], rank=1), net, data, samples=1000)
    assert "conv: not refitted: it is not called once on every batch" in notes
    assert threading.active_count() <= before + 1  # the monitor of progress bars may have begun


class Residual(nn.Module):
    """A residual connection that the model keeps as a local value, on itself, or in a list on itself."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.before, self.inside, self.after = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.kept, self.aside, self.stack = kept, None, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.before(x))
        if self.kept == "attribute":
            self.aside = y
        if self.kept == "list":
            self.stack.append(y)
        z = torch.relu(self.inside(y))
        if self.kept == "attribute":
            y = self.aside
        if self.kept == "list":
            y = self.stack.pop()
        return self.after(z + y)


def fitted(net: nn.Module, batches: list) -> nn.Module:
    spectra = {name: SVD().spectrum(net.get_submodule(name)) for name in ("before", "inside", "after")}
    plan = RankPlan.of({name: spectrum.kept(3) for name, spectrum in spectra.items()})
    compressed = replacing.apply(net, plan, spectra)
    refit(compressed, net, Objective(F.mse_loss, {"calibration": batches}), samples=100)
    return compressed


def test_a_model_that_keeps_values_on_itself_is_fitted_as_one_that_does_not() -> None:
    net = Residual("local").eval()
    batches, x = [(torch.randn(16, 8), torch.zeros(16, 8)) for _ in range(4)], torch.randn(32, 8)
    expected = fitted(net, batches)(x)
    for kept in ("attribute", "list"):
        twin = Residual(kept).eval()
        twin.load_state_dict(net.state_dict())
        assert fitted(twin, batches)(x).equal(expected), kept


def test_the_passes_run_under_the_autocast_of_the_caller() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.norm = nn.Linear(8, 16).bfloat16(), nn.LayerNorm(16)
            self.inside, self.after = nn.Linear(16, 16).bfloat16(), nn.Linear(16, 8).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.inside(self.norm(self.before(x))))

    batches = [(torch.randn(16, 8), torch.zeros(16, 8)) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fitted(Mixed().eval(), batches)(batches[0][0]).isfinite().all()


class Scaled(nn.Module):
    """A model that asks a function for a factor in each pass."""

    def __init__(self, factor: Callable[[], float]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.before, self.inside, self.after = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        vars(self)["factor"] = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.inside(torch.relu(self.before(x)) * self.factor())))


def test_what_a_model_reads_of_the_context_of_the_caller_counts_in_the_passes() -> None:
    scale: ContextVar[float] = ContextVar("scale", default=0.1)
    batches, x = [(torch.randn(16, 8), torch.zeros(16, 8)) for _ in range(4)], torch.randn(32, 8)
    token = scale.set(3.0)
    try:
        assert fitted(Scaled(scale.get), batches)(x).equal(fitted(Scaled(lambda: 3.0), batches)(x))
    finally:
        scale.reset(token)


@pytest.mark.parametrize("elsewhere", ["another number", "an error"])
def test_a_model_that_reads_what_is_kept_by_thread_is_noted_and_not_fitted(elsewhere: str) -> None:
    local = threading.local()
    local.scale = 3.0
    net = Scaled(lambda: local.scale if elsewhere == "an error" else getattr(local, "scale", 1.0))
    batches = [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(2)]
    chosen = Refitted(Truncation(ratio=0.5), samples=32)
    result = spectrim.compress(net, calibration=batches, loss=F.mse_loss, algorithm=chosen)
    cut_alone = spectrim.compress(net, algorithm=Truncation(ratio=0.5), decomposer=chosen.decomposer)
    assert [note for note in result.notes if "not refitted" in note] == [f"not refitted: {BY_THREAD}"]
    assert result.model(batches[0][0]).equal(cut_alone.model(batches[0][0]))


@pytest.mark.parametrize("cached", [True, False])
def test_autocast_keeps_no_copy_of_a_weight_that_is_fitted(cached: bool) -> None:
    """A cached copy would be that of the factors before their fit, which the passes then see in later layers."""
    batches = [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(3)]
    net, chosen = Scaled(lambda: 1.0), Refitted(Truncation(ratio=0.5), samples=48)

    def compressed() -> nn.Module:
        return spectrim.compress(net, calibration=batches, loss=F.mse_loss, algorithm=chosen).model

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = compressed().state_dict()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        net(batches[0][0])
        found = compressed().state_dict()
        assert torch.is_autocast_cache_enabled() == cached
    assert all(value.equal(expected[name]) for name, value in found.items())


def test_a_listener_hears_of_each_layer_that_is_fitted(dense: Net) -> None:
    heard: list[float] = []
    with heard_by(lambda name, done, total, numbers: heard.append(done) if name == "refit" else None):
        refit(cut(dense, FORMS["channel"]), dense, objective(), samples=40)
    assert heard == [1, 2, 3]


def test_experts_whose_tokens_depend_on_the_values_are_left_as_cut_with_a_note() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.inside, self.after = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x)
            chosen = (x[:, 0] > 0).nonzero().flatten()
            return self.after(y.index_add(0, chosen, self.inside(y[chosen])) if len(chosen) else y)

    net, x = Experts().eval(), torch.randn(16, 8)
    for batches in ([x], [x, -x.abs()], [x.abs()]):  # with and without a batch that does not reach the expert
        spectra = {name: SVD().spectrum(net.get_submodule(name)) for name in ("before", "inside", "after")}
        compressed = replacing.apply(net, RankPlan.of({name: own.kept(3) for name, own in spectra.items()}), spectra)
        as_cut = compressed.inside.first.weight.clone(), compressed.after.first.weight.clone()
        data = Objective(F.mse_loss, {"calibration": [(own, own) for own in batches]})
        (note,) = refit(compressed, net, data, samples=100) or ["inside"]
        if batches[0] is x:
            assert note.startswith("inside: not refitted: ")
            assert compressed.inside.first.weight.equal(as_cut[0])
        assert not compressed.after.first.weight.equal(as_cut[1])


def test_of_a_model_that_was_compressed_before_the_new_factors_alone_are_fitted() -> None:
    whole = nn.Sequential(nn.Flatten(), nn.Linear(4 * 7 * 6, 24), nn.ReLU(), nn.Linear(24, 6)).eval()
    spectrum = SVD().spectrum(whole[1])
    once = replacing.apply(whole, RankPlan.of({"1": spectrum.kept(12)}), {"1": spectrum})
    inner = SVD().spectrum(once.get_submodule("1.first"))
    again = replacing.apply(once, RankPlan.of({"1.first": inner.kept(6)}), {"1.first": inner})
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    refit(again, once, objective(), samples=100)
    changed = {name for name, tensor in again.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"1.first.first.weight", "1.first.second.weight"}


@pytest.mark.parametrize("scale", [1e-44, 1e-42, 1e-38, 1e-20])
@pytest.mark.parametrize("form", FORMS)
def test_inputs_next_to_nothing_leave_finite_factors(form: str, scale: float) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 42, 6)).eval()
    batches = [(torch.randn(20, 4, 7, 6) * scale, torch.zeros(20).long())]
    compressed = cut(net, FORMS[form], 1)
    refit(compressed, net, Objective(F.cross_entropy, {"calibration": batches}), 20)
    assert all(bool(value.isfinite().all()) for value in compressed.state_dict().values())


@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_hardly_differ_from_their_means_do_not_make_the_weight_explode(form: str) -> None:
    """Rounding leaves their moments indefinite, and the least squares without a minimum."""
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=True), nn.Flatten(), nn.Linear(8 * 20, 6)).eval()
    batches = [(10 + 1e-5 * torch.randn(20, 4, 7, 6), torch.zeros(20).long())]
    compressed = cut(net, FORMS[form], 1)
    before = [layer.weight.norm() for layer in (compressed[0], compressed[2])]
    refit(compressed, net, Objective(F.cross_entropy, {"calibration": batches}), 20)
    assert all(
        layer.weight.norm() < 10 * norm for layer, norm in zip((compressed[0], compressed[2]), before, strict=True)
    )
