"""Every yaml composes and each of its keys is a parameter of its target; nothing foreign is ever made."""

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from spectrim.algorithms.shared.compressed import decomposer_of
from spectrim.cli import command_line
from spectrim.errors import UserError
from spectrim.runs import configuration, targets
from spectrim.runs.named import decomposer_for, named

TRAINED = ("torchvision", "smollm2", "resnet50", "efficientnet_lite0")  # come with their weights
GROUPS = ("algorithm", "decomposer", "model", "data", "tracking", "recipe", "refinement")


def options(group: str) -> list[str]:
    """The options of a group: its yaml files, also in folders below."""
    folder = Path(configuration.CONF) / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def nodes(node: Any) -> Iterator[dict]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes(value)


def composed(compose: Any, group: str, option: str) -> dict:
    name = "train" if group == "recipe" else "config"
    texts = group == "data" and "${model.name}" in (Path(configuration.CONF) / group / f"{option}.yaml").read_text()
    chosen = f"+{group}={option}" if group == "refinement" else f"{group}={option}"
    node = compose(chosen, *(["model=smollm2"] if texts else []), name=name)
    return configuration.plain(node[group])


def test_no_two_classes_are_signed_alike() -> None:
    """A signature holds the name of a class and its settings: two classes of one name must differ in these."""
    targets_of: dict[tuple, set[str]] = {}
    for group in GROUPS:
        for option in options(group):
            read = OmegaConf.load(Path(configuration.CONF) / group / f"{option}.yaml")
            for node in nodes(OmegaConf.to_container(read, resolve=False)):
                key = node["_target_"].rpartition(".")[2], frozenset(node)
                targets_of.setdefault(key, set()).add(node["_target_"])
    assert len(targets_of) > 50
    assert {key: found for key, found in targets_of.items() if len(found) > 1} == {}


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in options(group)])
def test_every_key_of_every_option_is_a_parameter_of_its_target(compose: Any, group: str, option: str) -> None:
    found = list(nodes(composed(compose, group, option)))
    assert found
    for node in found:
        targets.check_targets(node)
        accepted = inspect.signature(resolve_name(node["_target_"])).parameters
        assert node.keys() - {"_target_", "_partial_"} <= accepted.keys()


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in options(group)])
def test_every_option_says_what_it_is_in_its_first_line(group: str, option: str) -> None:
    lines = (Path(configuration.CONF) / group / f"{option}.yaml").read_text().splitlines()
    first = lines[lines[0].startswith("# @package")]  # Hydra reads that line
    assert first.startswith("# ") and len(first.split()) > 5


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g in ("algorithm", "decomposer", "recipe", "refinement") for o in options(g)]
)
def test_every_choice_of_settings_is_built(compose: Any, group: str, option: str) -> None:
    settings = composed(compose, group, option)
    assert type(targets.build(settings)).__name__ == settings["_target_"].rpartition(".")[2]


@pytest.mark.parametrize("experiment", configuration.experiments())
def test_every_experiment_composes(compose: Any, experiment: str) -> None:
    cfg = compose(f"experiment={experiment}")
    assert cfg.name == (experiment if experiment.startswith("imagenet/") else experiment.partition("/")[0])
    assert cfg.hydra.sweeper.params
    for override in cfg.hydra.sweeper.params:
        group, _, key = override.partition(".")
        assert OmegaConf.select(cfg, f"{group}.{key}" if key else group) is not None or key


@pytest.mark.parametrize("experiment", configuration.experiments())
def test_the_head_of_an_experiment_says_its_table_and_its_time(experiment: str) -> None:
    text = (configuration.EXPERIMENTS / f"{experiment}.yaml").read_text()
    head = text.partition("\ndefaults:")[0].removeprefix("# @package _global_\n")
    (name,) = re.findall(r"(table|figure)(\d)|$", experiment)[:1]
    assert head.startswith(f"# {name[0].capitalize()} {name[1]}" if any(name) else "# ")
    assert re.search(r"\b(seconds?|minutes?|hours?)\b", head)


def test_a_part_of_grids_is_no_grid() -> None:
    names = configuration.experiments()
    assert "table5/lenet5/svd_training" in names and not any("/_" in one for one in names)


@pytest.mark.parametrize("experiment", [one for one in configuration.experiments() if one.startswith("table1/")])
def test_a_grid_of_table1_is_the_same_on_every_net(compose: Any, experiment: str) -> None:
    _, net, grid = experiment.split("/")
    cfg = compose(f"experiment={experiment}")
    params = {key: str(values).split(",")[-1] for key, values in cfg.hydra.sweeper.params.items()}
    last = compose(f"experiment={experiment}", *(f"{key}={value}" for key, value in params.items()))
    assert last.data.calibration_seed == 2
    assert last.names.model == net + "_untrained" * grid.endswith("from_scratch")
    settings = configuration.plain(last.algorithm)
    targets.build(settings)
    assert settings.get("seed", 2) == 2
    assert last.batch_norm == ("keep" if "recipe" in settings else "follow")
    resnet = compose(f"experiment=table1/resnet20/{grid.removesuffix('_from_scratch')}")
    own = {key: values for key, values in cfg.hydra.sweeper.params.items() if "seed" not in key}
    assert own.items() <= resnet.hydra.sweeper.params.items()


def test_the_commands_of_committed_records_name_grids() -> None:
    """Records were made before the grids lay in folders; their commands stay valid."""
    former = 0
    for path in (Path(__file__).parents[1] / "results" / "records").rglob("*.json"):
        words = shlex.split(json.loads(path.read_text())["provenance"]["command"])
        present = configuration.present_names(words)
        named = [word.removeprefix("experiment=") for word in present if word.startswith("experiment=")]
        assert named and set(named) <= set(configuration.experiments())
        assert named[0].startswith(path.parent.name)
        former += present != words
    assert former > 1000


def test_grids_with_committed_records_keep_the_former_defaults_and_others_do_not(compose: Any) -> None:
    """The choice of an option on the command line, as recorded commands make it, does not change that."""

    def chosen(*words: str) -> tuple[str, float]:
        node = compose(*words).algorithm
        node = node if "ranks" in node else node.selector
        return node.ranks, node.step

    assert chosen("algorithm=joint") == chosen("algorithm=joint_cut") == ("knapsack", 1.0)
    assert chosen("experiment=table1/resnet20/selectors", "algorithm=joint") == ("greedy", 0.5)
    tuned = ("experiment=table1/lenet5/fine_tuning", "algorithm@algorithm.selector=joint")
    assert chosen(*tuned) == ("greedy", 0.5)
    assert chosen(*tuned, "algorithm.selector.ranks=knapsack") == ("knapsack", 0.5)
    assert chosen("experiment=smoke", "algorithm=joint") == ("knapsack", 1.0)


@pytest.mark.parametrize("option", [one for one in options("algorithm") if "probe" not in one])
def test_an_algorithm_takes_its_own_decomposer_where_none_is_named(compose: Any, option: str) -> None:
    """The command line and the call from Python choose alike, also for an algorithm within another algorithm."""
    cfg = compose(f"algorithm={option}")
    algorithm = targets.build(configuration.plain(cfg.algorithm))
    own = named("decomposer", "two_sided_tied") if option == "joint_cut" else decomposer_of(algorithm)
    assert targets.build(configuration.plain(cfg.decomposer)) == own
    assert (decomposer_for(option) or decomposer_of(algorithm)) == own
    other = compose(f"algorithm={option}", "decomposer=tucker2")
    assert other.names.decomposer == "tucker2" and other.decomposer._target_.endswith("Tucker2")


def test_joint_selection_takes_pivoted_factors_also_as_an_algorithm(compose: Any) -> None:
    assert compose("algorithm=joint").names.decomposer == "pivoted"
    assert compose("algorithm=refitted", "algorithm@algorithm.selector=joint").names.decomposer == "pivoted"
    assert compose("algorithm=fine_tuning", "algorithm@algorithm.selector=joint").names.decomposer == "pivoted"
    assert compose("algorithm=fine_tuning").names.decomposer == "svd_channel"  # truncation
    whitened = compose("experiment=figure4/resnet20/joint", "algorithm=joint")
    assert whitened.names.decomposer == "whitened_spatial"  # a grid names its own


def test_a_present_name_stays_and_an_unknown_one_is_left_to_hydra() -> None:
    words = ["-m", "experiment=table4/truncation", "experiment=nosuch", "model=table2", "+experiment=table2"]
    assert configuration.present_names(words) == words
    given = ["experiment=[table1_lenet5, table1_own]", "experiment=table2"]
    assert configuration.present_names(given) == [
        "experiment=table1/lenet5/own_sizes",
        "experiment=table2/other_nets/one_shot",
    ]


@pytest.mark.parametrize("option", [o for o in options("model") if o not in TRAINED])
def test_every_model_has_a_recipe_of_its_name(compose: Any, option: str) -> None:
    cfg = compose(f"model={option}", name="train")
    assert cfg.recipe._target_ == "spectrim.training.recipe.Recipe"
    assert cfg.checkpoint == f"results/checkpoints/{option}-cifar10-seed0.safetensors"


@pytest.mark.parametrize("group", ["model", "data", "algorithm", "decomposer"])
def test_an_unknown_option_is_named_with_those_there_are(compose: Any, group: str) -> None:
    with pytest.raises(MissingConfigException, match=f"Could not find '{group}/nosuch'"):
        compose(f"{group}=nosuch")


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "subprocess.Popen", "torchx.Evil", "spectrimmed.Evil", "torch", "", None, 3],
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_target_outside_the_three_packages_is_refused(target: Any, deep: bool) -> None:
    node = {"_target_": target, "command": "true"}
    with pytest.raises(UserError, match="is refused: only spectrim, torch and torchvision"):
        targets.build({"_target_": "torch.nn.Identity", "inner": [{"x": node}]} if deep else node)


@pytest.mark.parametrize("target", ["torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"])
def test_what_would_unpickle_is_refused(target: str) -> None:
    with pytest.raises(UserError, match="nothing is unpickled"):
        targets.build({"_target_": target, "f": "weights.pt"})


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.save",
        "torch.nn",
        "torch.nn.__loader__.set_data",
        "torch.utils.collect_env.run",
        "torch.utils.cpp_extension.load",
        "torch.ops.load_library",
        "torchvision.io.write_file",
        "spectrim.records.provenance._output",
        "spectrim.tools.files.write",
        "spectrim.surgery.replacing.save",
        "spectrim.data.sources._fetch_into",
    ],
)
def test_what_could_run_or_write_anything_is_refused_by_its_name(target: str) -> None:
    with pytest.raises(UserError, match=f"_target_={target} is refused: it is no part of a run; those come from"):
        targets.build({"_target_": "torch.nn.Identity", "inner": [{"_target_": target}]})


@pytest.mark.parametrize(
    "target",
    [
        "spectrim.models.torchvision_models.os.system",
        "spectrim.data.sources.files.write",
        "spectrim.data.cifar10.Package",
        "torch.nn.functional.torch.save",
    ],
)
def test_what_an_allowed_module_imported_is_refused(target: str) -> None:
    with pytest.raises(UserError, match=f"_target_={target} is refused: it belongs to"):
        targets.build({"_target_": target, "command": "true"})
    with pytest.raises(UserError, match=f"_target_={target} is refused: it belongs to"):
        targets.build({"_target_": "torch.nn.Identity", "inner": [{"_target_": target}]})


@pytest.mark.parametrize(
    "target", ["spectrim.models.resnet.ResNett", "spectrim.models.nosuch.Thing", "torch.nn.Nothing"]
)
def test_a_target_that_does_not_exist_is_named(target: str) -> None:
    with pytest.raises(UserError, match=f"_target_={target} cannot be found") as refusal:
        targets.build({"_target_": target})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_target_": "spectrim.algorithms.truncation.Truncation", "rank": 0}, "^rank must be at least 1, got 0$"),
        (
            {"_target_": "spectrim.algorithms.truncation.Truncation", "rank": "abc"},
            "^Truncation: rank='abc' is none of: int, None",
        ),
        ({"_target_": "spectrim.models.resnet.ResNet", "depth": 21}, "depth of a CIFAR ResNet is 6n.2"),
        ({"_target_": "spectrim.models.resnet.ResNet", "deep": 20}, "unexpected keyword argument 'deep'"),
        ({"_target_": "spectrim.training.recipe.Recipe", "epochs": 0}, "needs epochs >= 1"),
    ],
)
def test_what_a_target_refuses_is_said_in_one_line(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        targets.build(settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("change", "made"), [({}, "MLP"), ({"_partial_": True}, "_DeferredTarget")])
def test_what_is_made_but_cannot_do_what_is_asked_of_it_is_refused(change: dict, made: str) -> None:
    with pytest.raises(
        UserError, match=f"^_target_=spectrim.models.small.MLP gives a {made}, which has no method load"
    ):
        targets.build({"_target_": "spectrim.models.small.MLP"} | change, "load")


def test_an_invocation_is_split_by_a_shell_into_the_overrides_it_was_made_of(compose: Any) -> None:
    given = ["model=bias_free_mlp", "names.model='a b$(false)'", "algorithm=truncation", "name='x;y'"]
    compose(*given)
    assert shlex.split(configuration.invocation("spectrim")) == ["spectrim", *given]
    assert configuration.invocation("spectrim").startswith("spectrim model=bias_free_mlp 'names.model=")


def test_build_makes_nested_objects_of_plain_containers() -> None:
    model = targets.build({"_target_": "spectrim.models.small.MLP", "hidden": [8], "image_size": 4})
    assert [layer.out_features for layer in model.layers if hasattr(layer, "out_features")] == [8, 10]


@pytest.mark.parametrize("error", [UserError("say this"), BrokenProcessPool("killed"), KeyboardInterrupt()])
def test_the_command_line_ends_in_one_line_and_a_status(
    error: BaseException, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["spectrim"])  # not the options of pytest

    def job() -> None:
        raise error

    with pytest.raises(SystemExit) as ending:
        command_line.run(job)
    said = capsys.readouterr().err
    assert said.startswith("spectrim: ") and said.count("\n") == 1
    assert ending.value.code == (130 if isinstance(error, KeyboardInterrupt) else 1)


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["spectrim"])
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda: 1 / 0)

    def unreadable() -> None:
        raise BrokenProcessPool("a task cannot be read") from AttributeError("no such function")

    with pytest.raises(BrokenProcessPool):
        command_line.run(unreadable)
