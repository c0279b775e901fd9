"""One file holds every size: what is loaded for a budget is what a compression to that budget makes."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.batches import Batches, evaluating
from spectrim.checkpoints import single_file
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.fetch import pretrained
from spectrim.surgery.reopening import factored_layers, kept_in
from spectrim.tools import safetensors_stream
from spectrim.tools.safetensors_stream import Shard

SIZES = (0.9, 0.7, 0.5, 0.3)
PLAIN = spectrim.WhitenedSVD()
PIVOTED = spectrim.BestView(spectrim.WhitenedSVD(factors="pivoted"))
BOTH_SIDES = spectrim.TwoSidedSVD(factors="pivoted")


class Attention(nn.Module):
    """A text classifier whose embedding is factored, with attention of torch, which packs its matrices, and a GRU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(40, width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.memory, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.memory(x)[0].mean(1))


def random_net(seed: int) -> nn.Sequential:
    """A convolutional net of random widths, kernels and groups."""
    draw = random.Random(seed)
    widths, groups = [draw.choice((8, 12, 16)) for _ in range(3)], draw.choice((1, 2))
    return nn.Sequential(
        nn.Conv2d(3, widths[0], draw.choice((1, 3)), padding=1, bias=draw.random() < 0.5),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
        nn.Conv2d(widths[0], widths[1], (3, draw.choice((1, 3))), stride=2, groups=groups),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(widths[1] * 9, widths[2]),
        nn.ReLU(),
        nn.Linear(widths[2], 5),
    )


def images(count: int) -> Batches:
    return [(torch.randn(count, 3, 9, 9), torch.randint(5, (count,))) for _ in range(2)]


def texts(count: int) -> Batches:
    return [(torch.randint(40, (count, 7)), torch.randint(5, (count,))) for _ in range(2)]


def blank(model: nn.Module) -> nn.Module:
    """The same architecture with other numbers."""
    fresh = copy.deepcopy(model)
    for value in [*fresh.parameters(), *fresh.buffers()]:
        with torch.no_grad():
            value.copy_(torch.rand_like(value.double()))
    return fresh


def plan_of(model: nn.Module) -> dict[str, Any]:
    """Rank and form of each factored layer. Which components it has only its outputs tell."""
    return {name: (kept_in(layer).rank, kept_in(layer).form) for name, layer in factored_layers(model).items()}


def differ(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    """The largest difference of the outputs, as a part of the largest output."""
    with evaluating(one), evaluating(other), torch.no_grad():
        ours, theirs = one(inputs), other(inputs)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compressed(model: nn.Module, batches: Batches, size: float, decomposer: Any = PIVOTED, **more: Any) -> Any:
    joint = spectrim.Joint(params_kept=size, samples=40, **{"refit": 0} | more)
    return spectrim.compress(model, calibration=batches, algorithm=joint, decomposer=decomposer)


@pytest.mark.parametrize("decomposer", [PLAIN, PIVOTED, BOTH_SIDES, spectrim.SVD("spatial")], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_size_from_the_file_is_the_model_made_for_it(tmp_path: Path, decomposer: Decomposer, seed: int) -> None:
    torch.manual_seed(seed)
    net, batches, draw = random_net(seed), images(30), random.Random(seed)
    compressed(net, batches, 0.6, decomposer).save(tmp_path / "all", every_size=True)
    for size in [draw.uniform(0.25, 0.95) for _ in range(6)]:
        made = compressed(net, batches, size, decomposer)
        loaded = spectrim.load(tmp_path / "all", into=blank(net), params_kept=size)
        assert plan_of(loaded) == plan_of(made.model) and made.plan
        assert differ(loaded, made.model, batches[0][0]) < 1e-4
        assert sum(map(Tensor.numel, loaded.parameters())) == sum(map(Tensor.numel, made.model.parameters()))


@pytest.mark.parametrize(
    "decomposer",
    [
        spectrim.WhitenedSVD(embeddings=True, factors="pivoted"),
        spectrim.WhitenedSVD(embeddings=True, whole=0.3),
        spectrim.WhitenedSVD(embeddings=True, whole=0.3, factors="pivoted"),
        spectrim.SubspaceSVD(2),
    ],
    ids=str,
)
def test_packed_layers_embeddings_and_subspaces_come_back_too(tmp_path: Path, decomposer: Decomposer) -> None:
    net, batches = Attention(12), texts(30)
    compressed(net, batches, 0.6, decomposer).save(tmp_path / "all", every_size=True)
    for size in (0.9, 0.7, 0.5):
        made = compressed(net, batches, size, decomposer)
        loaded = spectrim.load(tmp_path / "all", into=blank(net), params_kept=size)
        assert plan_of(loaded) == plan_of(made.model) and differ(loaded, made.model, batches[0][0]) < 1e-4
        assert list(loaded.state_dict()) == list(made.model.state_dict())
    dense = spectrim.load(tmp_path / "all", into=blank(net), params_kept=1)
    assert list(dense.state_dict()) == list(net.state_dict()) and differ(dense, net, batches[0][0]) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_with_tied_embeddings_comes_back(tiny: Any, token_batches: Any, tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    compressed(model, token_batches, 0.8).save(tmp_path / "all", every_size=True)
    ids = token_batches[0][0]["input_ids"]
    for size in (0.85, 0.75, 1):
        made = model if size == 1 else compressed(model, token_batches, size).model
        loaded = spectrim.load(tmp_path / "all", into=tiny(kind), params_kept=size)
        assert plan_of(loaded) == plan_of(made)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight  # type: ignore[operator]
        with torch.no_grad():
            assert torch.allclose(loaded(ids).logits, made(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("by", ["loss", "outputs"])
def test_calibration_batches_refit_the_factors_as_the_compression_does(
    net: nn.Sequential, tmp_path: Path, by: str
) -> None:
    batches: Batches = [(torch.randn(60, 3, 8, 8), torch.randint(5, (60,)))]
    unlabelled: Batches = [(batches[0][0], None)]
    compressed(net, batches, 0.6, refit=60, refit_by=by).save(tmp_path / "all", every_size=True)

    def loaded(size: float, calibration: Batches | None = None) -> nn.Module:
        return spectrim.load(tmp_path / "all", into=blank(net), params_kept=size, calibration=calibration)

    for size in (0.7, 0.4):
        made, cut = (compressed(net, batches, size, refit=refit, refit_by=by).model for refit in (60, 0))
        x = batches[0][0]
        fitted = loaded(size, batches if by == "loss" else unlabelled)
        assert differ(fitted, made, x) < 1e-2 * differ(cut, made, x)
        assert differ(loaded(size), cut, x) < 1e-4
    if by == "loss":
        with pytest.raises(UserError, match="the calibration batches have no targets, which the loss needs"):
            loaded(0.4, unlabelled)


def test_what_the_user_fixed_is_kept_and_what_was_left_dense_stays_so(net: nn.Sequential, tmp_path: Path) -> None:
    batches = [(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))]

    def made(size: float) -> Any:
        joint = spectrim.Joint(params_kept=size, samples=40, refit=0)
        more: dict[str, Any] = {"overrides": {"3": 2}, "exclude": ["0"]}
        return spectrim.compress(net, calibration=batches, algorithm=joint, **more)

    made(0.5).save(tmp_path / "all", every_size=True)
    for size in (0.8, 0.5, 0.2):
        loaded = spectrim.load(tmp_path / "all", into=blank(net), params_kept=size)
        assert plan_of(loaded) == plan_of(made(size).model) and plan_of(loaded)["3"][0] == 2
        assert differ(loaded, made(size).model, batches[0][0]) < 1e-4


@pytest.mark.parametrize(
    "joint",
    [
        spectrim.Joint(macs_kept=0.5, samples=40),
        spectrim.Joint(max_loss_increase=0.1, samples=40),
        spectrim.Joint(params_kept=0.8, samples=40, significance=1.0),
    ],
    ids=["macs", "tolerance", "slopes"],
)
def test_any_budget_of_the_first_size_leaves_the_same_file(net: nn.Sequential, tmp_path: Path, joint: Any) -> None:
    batches = [(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))]
    result = spectrim.compress(net, calibration=batches, verification=batches, algorithm=joint)
    result.save(tmp_path / "all", every_size=True)
    loaded = spectrim.load(tmp_path / "all", into=blank(net), params_kept=0.6)
    assert plan_of(loaded) == plan_of(compressed(net, batches, 0.6, significance=joint.significance).model)


def test_the_file_takes_no_more_than_the_dense_weights_and_a_square_for_each_matrix(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5))
    compressed(net, [(torch.randn(40, 64), torch.randint(5, (40,)))], 0.6).save(tmp_path / "all", every_size=True)
    numbers = sum(map(Tensor.numel, net.parameters())) + 64**2 + 16**2 + 5**2
    components = 64 + 16 + 5
    assert (tmp_path / "all").stat().st_size < 4 * numbers + (8 + 4) * components + 4096


def test_half_precision_and_the_meta_device(net: nn.Sequential, tmp_path: Path) -> None:
    batches: Batches = [(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))]
    compressed(net, batches, 0.6).save(tmp_path / "all", every_size=True)
    made = compressed(net, batches, 0.5).model
    with torch.device("meta"):
        empty = copy.deepcopy(net).to("meta")
    loaded = spectrim.load(tmp_path / "all", into=empty, params_kept=0.5)
    assert differ(loaded, made, batches[0][0]) < 1e-4
    half = spectrim.load(tmp_path / "all", into=blank(net).bfloat16(), params_kept=0.5)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16} and plan_of(half) == plan_of(made)
    assert differ(half.float(), made, batches[0][0]) < 0.1


@pytest.fixture
def saved(net: nn.Sequential, tmp_path: Path) -> tuple[nn.Sequential, Path]:
    batches = [(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))]
    compressed(net, batches, 0.6).save(tmp_path / "all", every_size=True)
    return net, tmp_path / "all"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"params_kept": 0.0}, r"^params_kept must lie in \(0, 1\], got 0.0$"),
        ({"params_kept": 1.5}, r"^params_kept must lie in \(0, 1\], got 1.5$"),
        ({"params_kept": True}, r"^params_kept must lie in \(0, 1\], got True$"),
        ({"params_kept": 0.001}, r"^params_kept=0.001 is out of reach: at rank 1 0\.\d+ of them remain"),
        ({}, r"all holds every size; pass params_kept=, one of them$"),
        ({"params_kept": 0.5, "calibration": []}, r"was made without a refit \(refit=0\); leave calibration= out$"),
        ({"params_kept": 0.5, "sha256": "0" * 64}, r"sha256"),
        ({"calibration": []}, r"^calibration= is for a file saved with every_size=True"),
        ({"params_kept": 0.5, "loss": nn.CrossEntropyLoss()}, r"^loss= is for the refit of a size; give calibration="),
    ],
    ids=str,
)
def test_a_size_that_cannot_be_is_refused_in_one_line(saved: Any, given: dict, message: str) -> None:
    net, path = saved
    into = blank(net)
    before = copy.deepcopy(into.state_dict())
    with pytest.raises(UserError, match=message) as refused:
        spectrim.load(path, into=into, **given)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())


def test_another_model_another_file_and_a_folder_are_refused_and_change_nothing(saved: Any, tmp_path: Path) -> None:
    net, path = saved
    other = nn.Sequential(*copy.deepcopy(net)[:-1], nn.Linear(24, 6))
    before = list(other.modules())
    with pytest.raises(UserError, match="all is of another architecture than Sequential as built here"):
        spectrim.load(path, into=other, params_kept=0.5)
    assert list(other.modules()) == before
    single_file.save(tmp_path / "one", net, RankPlan())
    with pytest.raises(UserError, match="one holds one size; leave params_kept out$"):
        spectrim.load(tmp_path / "one", into=net, params_kept=0.5)
    with pytest.raises(UserError, match="^params_kept= is for a file saved with every_size=True"):
        spectrim.load(tmp_path, into=net, params_kept=0.5)


def altered(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Rewrite the file with other tensors or another header, and the digest that goes with them."""
    shard = Shard.at(path)
    tensors, header = {name: shard.read(name) for name in shard.entries}, dict(shard.metadata)
    change(tensors, header)
    single_file.write(path, tensors, header)


def without_costs(tensors: dict, header: dict) -> None:
    del tensors["0.costs"]


def of_two_lengths(tensors: dict, header: dict) -> None:
    tensors["0.costs"] = tensors["0.costs"][:-1]


def without_components(tensors: dict, header: dict) -> None:
    tensors["0.first.weight"] = tensors["0.first.weight"][:2].clone()


def of_other_layers(tensors: dict, header: dict) -> None:
    header["plan"] = header["plan"].replace('"0"', '"1"')


def without_sizes(tensors: dict, header: dict) -> None:
    header["sizes"] = json.dumps([1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_costs, "its sizes cannot be read"),
        (of_two_lengths, "costs and changes are not of one length"),
        (of_other_layers, "they are of other layers than the components"),
        (without_sizes, "its sizes cannot be read"),
        (without_components, "layer '0': 0.first.weight is not there in the shape"),
    ],
)
def test_a_file_that_somebody_wrote_by_hand_is_refused(saved: Any, change: Any, message: str) -> None:
    net, path = saved
    altered(path, change)
    with pytest.raises(UserError, match=message):
        spectrim.load(path, into=blank(net), params_kept=0.5)


def test_sizes_are_under_the_digest(saved: Any) -> None:
    net, path = saved
    shard = Shard.at(path)
    sizes = shard.metadata["sizes"].replace('"refit": 0', '"refit": 9')
    assert sizes != shard.metadata["sizes"]
    safetensors_stream.save(path, {name: shard.read(name) for name in shard.entries}, shard.metadata | {"sizes": sizes})
    with pytest.raises(UserError, match="was altered: its content does not match its digest"):
        spectrim.load(path, into=net, params_kept=0.5)


def test_a_damaged_file_is_refused_whatever_is_damaged(saved: Any) -> None:
    net, path = saved
    whole, draw = path.read_bytes(), random.Random(0)
    header = int.from_bytes(whole[:8], "little")
    for trial in range(60):
        damaged, place = bytearray(whole), draw.randrange(header if trial % 2 else len(whole))
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged if trial % 5 else damaged[:place])
        with pytest.raises(UserError):
            spectrim.load(path, into=net, params_kept=0.5)
    assert not factored_layers(net)


@pytest.mark.parametrize(
    "algorithm",
    [
        spectrim.Truncation(params_kept=0.5),
        spectrim.Joint(params_kept=0.5, samples=40, step=0.25),
        spectrim.Joint(params_kept=0.5, samples=40, ranks="greedy"),
    ],
    ids=["truncation", "steps", "greedy"],
)
def test_an_algorithm_without_one_order_writes_no_file(net: nn.Sequential, tmp_path: Path, algorithm: Any) -> None:
    batches = [(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))]
    result = spectrim.compress(net, calibration=batches, algorithm=algorithm)
    with pytest.raises(UserError, match="^every_size=True needs algorithm=Joint"):
        result.save(tmp_path / "all", every_size=True)
    assert not (tmp_path / "all").exists()


def test_a_given_model_that_is_not_dense_or_has_changed_is_refused(net: nn.Sequential, tmp_path: Path) -> None:
    batches = [(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))]
    result = compressed(net, batches, 0.6)
    again = compressed(result.model, batches, 0.7)
    with pytest.raises(UserError, match="^a file of every size is made from a dense model"):
        again.save(tmp_path / "all", every_size=True)
    with torch.no_grad():
        net[0].weight.zero_()
    with pytest.raises(UserError, match="^the given model has changed since it was compressed"):
        result.save(tmp_path / "all", every_size=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv1d(3, 16, 3), nn.ReLU(), nn.Conv1d(16, 16, 3), nn.Flatten(), nn.Linear(80, 5)),
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(176, 5)),
    ],
    ids=["conv1d", "transposed"],
)
def test_packed_layers_are_refitted_from_a_file_too(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    net, batches = make(), [(torch.randn(40, 3, 9), torch.randint(5, (40,))) for _ in range(2)]
    compressed(net, batches, 0.6, refit=80).save(tmp_path / "all", every_size=True)
    made, cut = (compressed(net, batches, 0.7, refit=refit).model for refit in (80, 0))
    fitted = spectrim.load(tmp_path / "all", into=blank(net), params_kept=0.7, calibration=batches)
    assert differ(fitted, made, batches[0][0]) < 1e-1 * differ(cut, made, batches[0][0])


def test_attention_and_a_recurrent_layer_are_refitted_from_a_file_too(tmp_path: Path) -> None:
    net, batches = Attention(12), texts(30)
    compressed(net, batches, 0.6, refit=60).save(tmp_path / "all", every_size=True)
    made, cut = (compressed(net, batches, 0.7, refit=refit).model for refit in (60, 0))
    fitted = spectrim.load(tmp_path / "all", into=blank(net), params_kept=0.7, calibration=batches)
    assert differ(fitted, made, batches[0][0]) < 1e-1 * differ(cut, made, batches[0][0])


def test_labels_of_an_encoder_decoder_make_its_inputs_when_a_file_is_refitted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    library = pretrained.library()
    config = library.T5Config(
        vocab_size=60, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    net = library.T5ForConditionalGeneration(config).eval()
    batches: Any = [
        {"input_ids": torch.randint(5, 60, (6, 8)), "labels": torch.randint(5, 60, (6, 5))} for _ in range(2)
    ]
    compressed(net, batches, 0.8, refit=12).save(tmp_path / "all", every_size=True)
    made = compressed(net, batches, 0.7, refit=12).model
    fitted = spectrim.load(tmp_path / "all", into=blank(net), params_kept=0.7, calibration=batches)
    given = {"input_ids": batches[0]["input_ids"], "decoder_input_ids": batches[0]["labels"]}
    with torch.no_grad():
        torch.testing.assert_close(fitted(**given).logits, made(**given).logits, rtol=1e-2, atol=1e-2)


def test_batches_that_do_not_fit_leave_the_model_as_it_is(net: nn.Sequential, tmp_path: Path) -> None:
    batches: Any = [(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))]
    compressed(net, batches, 0.6, refit=40).save(tmp_path / "all", every_size=True)
    x, y = batches[0]
    for wrong in ([(x[:, :1], y)], [(x, y.float())], [], [(x, y + 9)]):
        into = blank(net)
        before, layers = copy.deepcopy(into.state_dict()), list(into.modules())
        with pytest.raises(UserError):
            spectrim.load(tmp_path / "all", into=into, params_kept=0.5, calibration=wrong)
        assert list(into.modules()) == layers
        assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())
