"""A checkpoint compressed tensor by tensor is the one that would have been compressed in memory."""

import errno
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import spectrim
from spectrim.factored import large, linalg
from spectrim.factored.forms import PivotedForm, PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.tools import safetensors_stream

INDEX = "model.safetensors.index.json"


class Net(nn.Module):
    """An embedding tied to the head, linear layers with and without bias, a convolution, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 16)
        self.wide, self.square, self.tall = nn.Linear(16, 40), nn.Linear(40, 40, bias=False), nn.Linear(40, 16)
        self.conv, self.norm = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tall(self.square(self.wide(self.embed_tokens(tokens)).relu()).relu())
        return self.head(self.norm(self.conv(x.mT)).mT)


PLAN = RankPlan.of(
    {"wide": Kept(5, PlainForm("linear")), "square": Kept(7, PlainForm("linear")), "tall": Kept(1, PlainForm("linear"))}
)
PIVOTED = RankPlan.of({name: Kept(kept.keep, PivotedForm("linear")) for name, kept in PLAN.items()})


def shard_names(count: int) -> list[str]:
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def write_sharded(folder: Path, state: dict[str, Tensor], count: int = 3) -> Path:
    """``state`` spread over shards, the bias of a layer in another than its weight."""
    folder.mkdir()
    files, names = shard_names(count), list(state)
    places = {name: files[i % count] for i, name in enumerate(names)}
    for file in files:
        save_file({n: state[n].contiguous() for n in names if places[n] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name != "head.weight"}


@pytest.fixture
def model() -> Net:
    return Net().eval()


@pytest.fixture
def folder(model: Net, tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "dense", state_of(model))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("plan", [PLAN, PIVOTED], ids=["plain", "pivoted"])
@pytest.mark.parametrize("count", [1, 3])
def test_compressed_saved_and_loaded_is_the_model_cut_in_memory(
    model: Net, tmp_path: Path, count: int, plan: RankPlan
) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    if count == 1:
        dense.mkdir()
        save_file(state_of(model), dense / "model.safetensors")
    else:
        write_sharded(dense, state_of(model), count)
    assert spectrim.compress_checkpoint(dense, out, plan=plan) == plan
    torch.manual_seed(5)
    loaded, tokens = spectrim.load(out, into=Net().eval()), torch.randint(30, (4, 9))
    for name, kept in plan.items():
        layer = model.get_submodule(name)
        layer.load_state_dict({**layer.state_dict(), "weight": cut(layer.weight, kept.rank)})  # type: ignore[arg-type]
        assert loaded.get_submodule(name).rank == kept.rank
        assert loaded.get_submodule(name).pivoted == (plan is PIVOTED)
    torch.testing.assert_close(loaded(tokens), model(tokens), atol=1e-5, rtol=1e-4)
    assert loaded.head.weight is loaded.embed_tokens.weight
    assert (out / INDEX).exists() == (count > 1)
    if count > 1:
        index = json.loads((out / INDEX).read_text())
        assert sorted({*index["weight_map"].values()}) == shard_names(count)
        stored = {n: v for file in shard_names(count) for n, v in load_file(out / file).items()}
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
        assert index["weight_map"].keys() == stored.keys() and "wide.second.bias" in stored


def cut(weight: Tensor, rank: int) -> Tensor:
    U, S, Vh = linalg.svd(weight.detach())
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_a_ratio_cuts_to_the_ranks_of_truncation_and_leaves_embeddings(
    model: Net, folder: Path, tmp_path: Path, factors: Any
) -> None:
    plan = spectrim.compress_checkpoint(folder, tmp_path / "out", ratio=0.5, factors=factors)
    batch = (torch.randint(30, (2, 9)), torch.zeros(2, 9, 30))
    expected = spectrim.compress(
        model,
        calibration=[batch],
        loss=nn.functional.mse_loss,
        algorithm=spectrim.Truncation(ratio=0.5),
        decomposer=spectrim.SVD(factors=factors),
        exclude=["conv"],
    )
    assert plan == expected.plan and set(plan) == {"wide", "square", "tall"}
    assert set(spectrim.compress_checkpoint(folder, tmp_path / "two", ratio=0.5, dense=["wide", "t*", "*_tokens"])) == {
        "square"
    }


def test_precision_is_kept_and_a_layer_above_break_even_stays_dense(tmp_path: Path) -> None:
    state = {
        "a.weight": torch.randn(20, 20).bfloat16(),
        "b.weight": torch.randn(20, 20).half(),
        "b.bias": torch.ones(20),
    }
    plan = RankPlan.of({"a": Kept(9, PlainForm("linear")), "b": Kept(10, PlainForm("linear"))})
    folder, out = write_sharded(tmp_path / "dense", state, 1), tmp_path / "out"
    assert set(spectrim.compress_checkpoint(folder, out, plan=plan)) == {"a"}
    stored = load_file(out / shard_names(1)[0])
    assert stored.keys() == {"a.first.weight", "a.second.weight", "b.weight", "b.bias"}
    assert stored["a.first.weight"].dtype == torch.bfloat16 and torch.equal(stored["b.weight"], state["b.weight"])


def test_a_budget_gives_pivoted_factors_of_higher_ranks_and_is_met(model: Net, folder: Path, tmp_path: Path) -> None:
    total = sum(value.numel() for value in state_of(model).values())
    pivoted = spectrim.compress_checkpoint(folder, tmp_path / "pivoted", params_kept=0.6)
    plain = spectrim.compress_checkpoint(folder, tmp_path / "plain", params_kept=0.6, factors="plain")
    assert {kept.form for kept in pivoted.values()} == {PivotedForm("linear")}
    assert (
        all(pivoted[name].rank >= plain[name].rank for name in plain) and pivoted["square"].rank > plain["square"].rank
    )
    for name in ("pivoted", "plain"):
        read = [load_file(tmp_path / name / file) for file in shard_names(3)]
        kept = sum(value.numel() for one in read for key, value in one.items() if not key.endswith(".positions"))
        assert 0.55 * total < kept <= 0.6 * total


@pytest.mark.parametrize("shape", [(20, 20), (21, 19), (19, 21), (21, 1)])
@pytest.mark.parametrize("bias", [0, 21])
def test_positions_among_sixteen_bit_numbers_begin_at_a_multiple_of_four(
    tmp_path: Path, shape: tuple[int, int], bias: int
) -> None:
    """The numbers before them are odd or even in number; every tensor of the file begins at a multiple of its width."""
    state = {"a.weight": torch.randn(shape).bfloat16(), "b.weight": torch.randn(20, 21).half(), "c": torch.ones(3)}
    state |= {"mask": torch.ones(5, dtype=torch.bool), "b.bias": torch.ones(20).half(), "d": torch.ones(bias).half()}
    folder, out = write_sharded(tmp_path / "dense", state, 1), tmp_path / "out"
    plan = spectrim.compress_checkpoint(folder, out, ratio=0.6, dense=())
    shard = safetensors_stream.Shard.at(out / shard_names(1)[0])
    for name, entry in shard.entries.items():
        assert shard.starts[name] % safetensors_stream.DTYPES[entry.dtype].itemsize == 0, name
    read = load_file(shard.path)
    for name, kept in plan.items():
        coefficients, rows = read[f"{name}.second.others.weight"], read[f"{name}.first.weight"]
        whole = torch.cat([rows, coefficients @ rows])[read[f"{name}.second.positions"]]
        torch.testing.assert_close(whole.float(), cut(state[f"{name}.weight"].float(), kept.rank), atol=0.1, rtol=0.1)
        assert coefficients.dtype == state[f"{name}.weight"].dtype and coefficients.abs().max() <= 2
    assert set(plan) >= {"b"} and read["mask"].all() and torch.equal(read["d"], state["d"])


def test_factors_too_large_for_half_precision_are_named_and_their_shard_not_written(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "dense", {"a.weight": 60_000 * torch.randn(10, 12).sign().half()}, 1)
    plan = RankPlan.of({"a": Kept(5, PivotedForm("linear"))})
    refuses("layer a of .*: a number is NaN or too large for float16", folder, tmp_path / "out", plan=plan)
    assert not (tmp_path / "out" / shard_names(1)[0]).exists()


def test_finished_shards_are_not_made_again_and_altered_ones_are(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spectrim.compress_checkpoint(folder, out, ratio=0.4)
    before = contents(out)
    assert before.keys() == {*shard_names(3), INDEX, "spectrim.json"}  # nothing else is left, not even the lock
    first, second, _ = (out / name for name in shard_names(3))
    changed = second.stat().st_ino
    first.write_bytes(before[first.name][:-1] + b"?")
    spectrim.compress_checkpoint(folder, out, ratio=0.4)
    assert contents(out) == before and second.stat().st_ino == changed


def test_another_setting_or_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spectrim.compress_checkpoint(folder, out, ratio=0.4)
    before = contents(out)
    refuses("begun with another plan or ratio", folder, out, ratio=0.3)
    other = write_sharded(tmp_path / "other", state_of(Net()))
    refuses("was begun from another checkpoint", other, out, ratio=0.4)
    refuses("is compressed already", out, tmp_path / "again", ratio=0.4)
    assert contents(out) == before and not (tmp_path / "again").exists()
    (out / "spectrim.json").write_text("{")
    refuses("spectrim.json cannot be read", folder, out, ratio=0.4)


def test_two_processes_do_not_write_to_one_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        refuses("another process is writing to .*out", folder, tmp_path / "out", ratio=0.5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def refuses(message: str, folder: Path, out: Path, **settings: Any) -> None:
    with pytest.raises(spectrim.UserError, match=message) as refusal:
        spectrim.compress_checkpoint(folder, out, **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of plan, ratio and params_kept"),
        ({"plan": PLAN, "ratio": 0.5}, "exactly one of plan, ratio and params_kept"),
        *[
            ({"ratio": ratio}, "ratio must lie in \\(0, 1\\)")
            for ratio in (0, 1, -0.5, 1.5, float("nan"), True, "half")
        ],
        (
            {"plan": RankPlan.of({"gone": Kept(3, PlainForm("linear"))})},
            "plan names 'gone'; this checkpoint has no 2-D weight",
        ),
        (
            {"plan": RankPlan.of({"conv": Kept(3, PlainForm("linear"))})},
            "plan names 'conv'; this checkpoint has no 2-D weight",
        ),
        ({"plan": RankPlan.of({"wide": Kept((0, 3), PlainForm("linear"))})}, "cuts 'wide' in another way"),
        ({"plan": RankPlan.of({"wide": Kept(3, PlainForm("channel"))})}, "cuts 'wide' in another way"),
        ({"ratio": 0.5, "dense": ["*"]}, "nothing to factor"),
    ],
)
def test_settings_that_mean_nothing_are_refused(folder: Path, tmp_path: Path, settings: Any, message: str) -> None:
    refuses(message, folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    out, (first, second, third) = tmp_path / "out", shard_names(3)
    index = json.loads((folder / INDEX).read_text())

    def damaged(change: Any) -> Path:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        change(Path(shutil.copytree(folder, tmp_path / "bad")))
        return tmp_path / "bad"

    def indexed(change: Any) -> Any:
        return lambda bad: (bad / INDEX).write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))

    without = indexed(lambda places: {tensor: file for tensor, file in places.items() if file != third})
    elsewhere = indexed(lambda places: {**places, "x": "../x.safetensors"})
    lost = indexed(lambda places: {**places, "x": first})
    for change, message in [
        (lambda bad: (bad / second).unlink(), f"cannot read .*{second}: No such file"),
        (without, f"{third} is not in {INDEX}"),
        (lambda bad: (bad / first).write_bytes((bad / first).read_bytes()[:-1]), f"{first} is cut short"),
        (lambda bad: shutil.copy(bad / first, bad / second), f"{first[:6]}.* do not agree on "),
        (lost, "do not agree on x"),
        (elsewhere, "is not an index of shards"),
        (lambda bad: (bad / INDEX).write_text("[]"), "is not an index of shards"),
        (lambda bad: (bad / INDEX).unlink(), "holds neither model.safetensors nor"),
    ]:
        refuses(message, damaged(change), out, ratio=0.5)
    assert not out.exists()
    refuses("there is no folder", tmp_path / "nowhere", out, ratio=0.5)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "old").mkdir()
    torch.save({"a.weight": torch.ones(9, 9)}, tmp_path / "old" / name)
    for given in (tmp_path / "old", tmp_path / "old" / name):
        refuses(f"{name} may be a pickle.* never read; convert it", given, tmp_path / "out", ratio=0.5)


def test_the_folder_itself_and_foreign_folders_are_left_alone(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    refuses("out is the folder of the checkpoint itself", folder, tmp_path / "x" / ".." / "dense", ratio=0.5)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    refuses("other holds other files", folder, other, ratio=0.5)
    refuses("cannot write .*thesis.tex.*: Not a directory", folder, other / "thesis.tex" / "out", ratio=0.5)
    assert contents(folder) == before and [path.name for path in other.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_with_nan_is_named_and_its_shard_not_written(model: Net, tmp_path: Path, bad: float) -> None:
    state = {name: value.clone() for name, value in state_of(model).items()}
    state["square.weight"][3, 4] = bad
    folder, out = write_sharded(tmp_path / "dense", state), tmp_path / "out"
    refuses("layer square of .*: a weight holds NaN or infinity", folder, out, ratio=0.5)
    file = json.loads((folder / INDEX).read_text())["weight_map"]["square.weight"]
    assert not (out / file).exists() and not list(out.glob(".*tmp")) and not (out / INDEX).exists()
    with pytest.raises(spectrim.UserError):
        spectrim.load(out, into=model)


def test_a_disk_that_is_too_small_is_said_before_the_first_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spectrim.compress_checkpoint(folder, tmp_path / "whole", ratio=0.5)
    needed = sum(value.nbytes for file in shard_names(3) for value in load_file(tmp_path / "whole" / file).values())
    usual = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(large, "truncated", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usual._replace(free=needed - 1))
    refuses("do not fit on the disk; free some space", folder, tmp_path / "out", ratio=0.5)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usual._replace(free=needed))
    spectrim.compress_checkpoint(folder, tmp_path / "out", ratio=0.5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usual._replace(free=0))  # all of it is there
    spectrim.compress_checkpoint(folder, tmp_path / "out", ratio=0.5)


def test_a_folder_that_cannot_be_listed_loses_no_tokenizer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in it may be opened all the same, and a pattern would find none of them."""
    (folder / "tokenizer.json").write_text("{}")
    usual = Path.iterdir

    def listed(self: Path) -> Any:
        if self == folder:
            raise PermissionError(errno.EACCES, "Permission denied")
        return usual(self)

    monkeypatch.setattr(Path, "iterdir", listed)
    refuses("cannot list .*dense: Permission denied; make it readable", folder, tmp_path / "out", ratio=0.5)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("content", [DEEP, "null", "5", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', ""])
def test_json_of_nonsense_is_said_in_one_line(folder: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    spectrim.compress_checkpoint(folder, out, plan=PLAN)
    (out / "spectrim.json").write_text(content)
    with pytest.raises(spectrim.UserError, match="spectrim.json cannot be read") as refusal:
        spectrim.load(out, into=Net())
    assert "\n" not in str(refusal.value)
    (folder / "config.json").write_text(content if "weight_map" not in content else "[]")
    refuses("config.json is no configuration of a model", folder, tmp_path / "other", ratio=0.5)
    (folder / INDEX).write_text(content)
    refuses("is not an index of shards", folder, tmp_path / "other", ratio=0.5)


def test_a_full_disk_is_said_in_one_line_and_the_rest_follows_later(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    spectrim.compress_checkpoint(folder, whole, ratio=0.5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # every shard is larger, the manifest is not
    try:
        refuses("cannot write .*: File too large; free some space", folder, out, ratio=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.glob("*.safetensors")) and not list(out.glob(".*tmp"))
    spectrim.compress_checkpoint(folder, out, ratio=0.5)
    assert contents(out) == contents(whole)


def test_what_does_not_fit_is_not_loaded_and_the_model_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spectrim.compress_checkpoint(folder, out, plan=PLAN)

    def refused(into: nn.Module, message: str) -> None:
        layers, before = str(into), {name: value.clone() for name, value in into.state_dict().items()}
        with pytest.raises(spectrim.UserError, match=message) as refusal:
            spectrim.load(out, into=into)
        assert "\n" not in str(refusal.value) and str(into) == layers
        assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())

    for change, message in [
        (lambda net: setattr(net, "wide", nn.Linear(16, 41)), "wide.second.weight has shape \\[40, 5\\] there and"),
        (lambda net: setattr(net, "wide", nn.ReLU()), "another architecture, layer 'wide'"),
        (lambda net: setattr(net, "more", nn.Linear(2, 2)), "it lacks more.weight"),
        (lambda net: delattr(net, "conv"), "Net has no conv.bias"),
        (lambda net: setattr(net.head, "weight", nn.Parameter(torch.ones(30, 16))), "it lacks head.weight"),
    ]:
        net = Net()
        change(net)
        refused(net, message)
    first = out / shard_names(3)[0]
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    refused(Net(), f"{first.name} was altered or is unfinished")
    (out / INDEX).unlink()
    refused(Net(), "holds neither model.safetensors nor")
    (out / "spectrim.json").unlink()
    refused(Net(), "is not a compressed checkpoint: it holds no spectrim.json")
