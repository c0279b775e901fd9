"""The rows of a layer go to the samples that they belong to, wherever the model holds its batch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim import Joint, compress
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.losses import fisher_direction
from spectrim.statistics import directions
from spectrim.statistics.fisher import Gates, gate_gradients
from spectrim.statistics.gate_rows import MIXED, OUTSIDE
from spectrim.statistics.objective import Objective
from spectrim.statistics.sample_rows import ENOUGH, Layout, RowOwners, sample_weights, scattered
from spectrim.surgery import replacing

COUNT, TOKENS, WIDTH = 8, 16, 12  # twice as many tokens as samples: a layout taken for another raises nothing


class Net(nn.Module):
    """Two layers and a head; ``inside`` says how the tokens (N, T, C) are laid out between them."""

    def __init__(self, inside: str = "batch first") -> None:
        super().__init__()
        self.inside = inside
        self.first, self.second, self.head = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH), nn.Linear(WIDTH, 5)
        self.routes, self.register_positions = nn.Linear(WIDTH, 1), nn.Parameter(torch.randn(TOKENS, WIDTH))

    def body(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        if self.inside == "sequence first":
            y = self.body(x.transpose(0, 1)).transpose(0, 1)
        elif self.inside == "(N, H, W, C)":
            y = self.body(x.view(n, 4, t // 4, c)).reshape(n, t, c)
        elif self.inside == "windows in the batch":
            y = self.body(x.reshape(n * 4, t // 4, c)).reshape(n, t, c)
        elif self.inside == "two views, one after the other":
            y = self.body(torch.cat([x, x.flip(1)])).view(2, n, t, c).mean(0)
        elif self.inside == "windows before the batch":
            y = self.body(x.view(n, 4, t // 4, c).permute(1, 2, 0, 3)).permute(2, 0, 1, 3).reshape(n, t, c)
        elif self.inside == "experts":
            flat = x.flatten(0, 1)
            chosen = (flat[:, 0] > 0).nonzero().flatten()
            y = flat.index_add(0, chosen, self.body(flat[chosen])).view(n, t, c)
        else:
            y = self.body(x)
        return self.head(y.mean(1))


LAYOUTS = [
    "batch first",
    "sequence first",
    "(N, H, W, C)",
    "windows in the batch",
    "two views, one after the other",
    "windows before the batch",
    "experts",
]


def gates_of(
    net: nn.Module, batches: list, layers: tuple[str, ...] = ("first", "second", "head"), loss: Any = F.cross_entropy
) -> Gates:
    spectra = {name: SVD().spectrum(net.get_submodule(name)) for name in layers}
    plan = RankPlan.of({name: spectrum.kept(spectrum.max_rank) for name, spectrum in spectra.items()})
    objective = Objective(loss, {"calibration": batches})
    return gate_gradients(replacing.apply(net.eval(), plan, spectra), layers, objective, samples=10**6)


def batch(count: int = COUNT, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, TOKENS, WIDTH, generator=generator)
    return x, torch.randint(0, 5, (count,), generator=generator)


def split(x: Tensor, y: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("inside", LAYOUTS)
@pytest.mark.parametrize("sizes", [[8], [5, 3], [2, 2, 2, 2], [1, 7]], ids=str)
def test_rows_are_those_of_each_sample_alone(inside: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    net, (x, y) = Net(inside), batch()
    together, apart = gates_of(net, split(x, y, sizes)), gates_of(net, split(x, y, [1] * COUNT))
    assert not together.left
    for name, own in together.rows.items():
        torch.testing.assert_close(own.given, apart.rows[name].given, atol=1e-6, rtol=1e-4)


def test_a_layer_whose_rows_all_samples_share_is_left_out_and_the_others_are_right() -> None:
    class Learned(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.body(self.register_positions)).mean(1))

    net, (x, y) = Learned(), batch()
    gates = gates_of(net, [(x, y)])
    assert gates.left == {"first": MIXED, "second": MIXED}
    apart = gates_of(net, split(x, y, [1] * COUNT), layers=("head",))
    torch.testing.assert_close(gates.rows["head"].given, apart.rows["head"].given, atol=1e-6, rtol=1e-4)
    result = compress(net, calibration=[(x, y)], algorithm=Joint(params_kept=0.97, samples=COUNT))
    assert set(result.plan) == {"head"}
    assert any(note.startswith(f"first: left dense: {MIXED} (") for note in result.notes)


@pytest.mark.parametrize("beside", [True, False], ids=["scores too", "alone"])
def test_a_loss_that_the_model_computes_is_refused_unless_a_batch_is_one_sample(beside: bool) -> None:
    class Own(Net):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            scores = super().forward(x)
            loss = F.cross_entropy(scores, y)
            return (scores, loss) if beside else (loss,)

        def plain(self) -> Net:
            same = Net()
            same.load_state_dict(self.state_dict())
            return same

    def own_loss(outputs: Any, _: Any) -> Tensor:
        return outputs[-1]

    torch.manual_seed(0)
    net, (x, y) = Own(), batch()
    with pytest.raises(UserError, match=r"belongs to the whole batch.*give loss=, a function of the scores"):
        compress(net, calibration=[((x, y), None)], loss=own_loss, algorithm=Joint(params_kept=0.8, samples=COUNT))
    apart = gates_of(net, [((x[i : i + 1], y[i : i + 1]), None) for i in range(COUNT)], loss=own_loss)
    outside = gates_of(net.plain(), [(x, y)])
    torch.testing.assert_close(apart.rows["first"].given, outside.rows["first"].given, atol=1e-6, rtol=1e-4)


def test_a_layer_outside_the_loss_is_left_out_and_one_that_a_batch_does_not_reach_counts_zero_there() -> None:
    class Routed(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.kept_aside = self.second(torch.tanh(self.first(x))).sum()
            expert = self.body(x) if float(x.detach().sum()) > 0 else 0
            return self.head((x + expert).mean(1)) if self.inside == "expert" else self.head(x.mean(1))

    x, y = batch()
    assert gates_of(Routed(), [(x, y)]).left == {"first": OUTSIDE, "second": OUTSIDE}
    reached, other = x - x.mean() + 1, x - x.mean() - 1
    gates = gates_of(Routed("expert"), [(reached, y), (other, y)])
    assert not gates.left
    assert gates.rows["first"].fisher[:COUNT].any() and not gates.rows["first"].fisher[COUNT:].any()


def test_a_loss_of_other_outputs_than_scores_tells_its_samples_too() -> None:
    net, (x, _) = Net("sequence first"), batch()
    spectra = {"first": SVD().spectrum(net.first)}
    model = replacing.apply(net.eval(), RankPlan.of({"first": Kept(WIDTH, PlainForm("linear"))}), spectra)
    target = torch.randn(COUNT, 5)

    def rows(batches: list) -> Tensor:
        return (
            gate_gradients(model, ["first"], Objective(F.mse_loss, {"calibration": batches}), 100).rows["first"].given
        )

    together = rows([(x, target)])
    torch.testing.assert_close(together, rows(split(x, target, [1] * COUNT)), atol=1e-6, rtol=1e-4)


def fixed_direction(logits: Tensor, _: torch.Generator) -> Tensor:
    """A direction that depends on the row alone, so that the order of the samples changes nothing."""
    orders = [int("".join(map(str, row.argsort().tolist()))) for row in logits.detach()]  # proof against rounding
    generators = [torch.Generator().manual_seed(order) for order in orders]
    rows = zip(logits, generators, strict=True)
    return torch.cat([fisher_direction(row.unsqueeze(0), generator) for row, generator in rows])


def plan_of(net: nn.Module, batches: list) -> dict:
    return compress(net, calibration=batches, algorithm=Joint(params_kept=0.6, samples=COUNT, refit=0)).plan.as_dict()


@pytest.mark.parametrize("inside", LAYOUTS)
def test_the_plan_depends_neither_on_the_order_of_the_samples_nor_on_their_batches(
    inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "fisher_direction", fixed_direction)
    torch.manual_seed(0)
    net, (x, y) = Net(inside), batch()
    plan, order = plan_of(net, [(x, y)]), torch.randperm(COUNT)
    assert plan_of(net, [(x[order], y[order])]) == plan
    assert plan_of(net, split(x, y, [5, 3])) == plan


@pytest.mark.parametrize("inside", [layout for layout in LAYOUTS if "views" not in layout and layout != "experts"])
def test_the_plan_of_a_transposed_twin_is_the_same(inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "fisher_direction", fixed_direction)
    torch.manual_seed(0)
    net, twin, data = Net("batch first"), Net(inside), [batch()]
    twin.load_state_dict(net.state_dict())
    assert plan_of(twin, data) == plan_of(net, data)


def test_a_budget_that_the_layers_left_out_put_out_of_reach_is_one_line() -> None:
    class Mixing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x - x.mean(0, keepdim=True)).mean(1) - self.body(x).mean((0, 1)))

    with pytest.raises(UserError, match=r"out of reach.*first, second: its rows do not belong to one sample"):
        plan_of(Mixing(), [batch()])


@pytest.mark.parametrize("layout", [Layout(axis, outer) for axis in range(3) for outer in (True, False)], ids=str)
def test_a_layout_is_found_and_trusted_after_enough_samples(layout: Layout) -> None:
    count, known, sizes = 6, RowOwners(), [10, 7, 5]
    sizes[layout.axis] = 12
    owners = layout.owners(torch.Size(sizes), count)
    assert owners is not None and owners.unique().tolist() == list(range(count))
    for seen in range(0, ENOUGH, count):
        assert known.trusted(torch.Size(sizes), count) is None, seen
        weights, plain = sample_weights(count, 0), torch.randn(*sizes, 4)
        found = known.settle(plain, plain * weights[owners].unsqueeze(-1), weights)
        assert found is not None and found.owners(torch.Size(sizes), count).equal(owners)
    assert known.trusted(torch.Size(sizes), count) == found
    sizes[layout.axis] = 6
    assert known.trusted(torch.Size(sizes), count) is None  # other rows a sample are looked at anew


def test_scattered_rows_find_their_samples_and_shared_ones_do_not() -> None:
    count, rows = 9, 50
    owners, plain = torch.randint(0, count, (rows,)), torch.randn(rows, 3)
    weights = [sample_weights(count, draw) for draw in range(2)]
    found = scattered(plain, [plain * own[owners].unsqueeze(-1) for own in weights], weights)
    assert found is not None and found.equal(owners)
    other = torch.randn(rows, 3)
    shared = [plain * own[owners].unsqueeze(-1) + other * own[(owners + 1) % count].unsqueeze(-1) for own in weights]
    assert scattered(plain + other, shared, weights) is None
