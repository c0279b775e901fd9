"""A yaml alone runs no code: each of these left a mark without the checks, and leaves none with them."""

import gc
import logging
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.initialize import initialize_config_dir

from spectrim.cli import command_line
from spectrim.errors import UserError
from spectrim.records import provenance
from spectrim.runs import composition, configuration

# Each writes the file MARK when Hydra obeys it.
ATTACKS = {
    "callback_pandas": "callbacks: {x: {_target_: pandas.read_pickle, filepath_or_buffer: PICKLE}}",
    "callback_joblib": "callbacks: {x: {_target_: joblib.load, filename: PICKLE}}",
    "callback_handler": "callbacks: {x: {_target_: logging.FileHandler, filename: MARK}}",
    "callback_hidden": "callbacks: {x: '${oc.create:{_target_: builtins.open, file: MARK, mode: w}}'}",
    "callback_nested": "callbacks: {x: {_target_: builtins.dict, y: [{_target_: builtins.open, file: MARK, mode: w}]}}",
    "callback_elsewhere": "callbacks: {x: '${evil}'}",
    "launcher": "_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher\n"
    "x: {_target_: builtins.open, file: MARK, mode: w}",
    "sweeper": "_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper\nmax_batch_size: null\n"
    "params: {x: {_target_: builtins.open, file: MARK, mode: w}}",
    "logging_factory": "job_logging: {handlers: {x: {(): builtins.open, file: MARK, mode: w}}}",
    "logging_class": "job_logging: {handlers: {x: {class: logging.FileHandler, filename: MARK}}}",
    "logging_import": "job_logging: {handlers: {x: {class: logging.StreamHandler, stream: 'ext://leaves_a_mark.x'}}}",
    "hydra_logging": "hydra_logging: {handlers: {x: {class: logging.FileHandler, filename: MARK}}}",
    "environment": "job: {env_set: {GIT_CONFIG_COUNT: '1', GIT_CONFIG_KEY_0: core.fsmonitor, "
    "GIT_CONFIG_VALUE_0: 'touch MARK; false'}}",
}
GROUPS = {"launcher", "sweeper"}  # options of their own, which Hydra builds for a sweep alone


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@hydra.main(version_base="1.3", config_path=configuration.CONF, config_name="config")
def job(cfg: Any) -> None:
    """Do what every run does: ask git for the commit."""
    provenance.git_state()


@pytest.fixture
def handlers() -> Iterator[None]:
    """Take back what Hydra did to logging."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(before):
        handler.close()
    root.handlers, root.disabled = before, False
    root.setLevel(level)
    for name in logging.root.manager.loggerDict:
        logging.getLogger(name).disabled = False


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: None) -> Any:
    """``started(attack)``: run a job with an experiment that holds the attack; whether the mark is there."""
    mark, pickled, experiments = tmp_path / "mark", tmp_path / "x.pkl", tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    (tmp_path / "leaves_a_mark.py").write_text(f"open({str(mark)!r}, 'w').close()\nx = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "leaves_a_mark", None)
    monkeypatch.delitem(sys.modules, "leaves_a_mark")

    def run(attack: str) -> bool:
        pickled.write_bytes(pickle.dumps(Touch(mark)))
        node = ATTACKS[attack].replace("MARK", str(mark)).replace("PICKLE", str(pickled))
        # A name that passes as a part of a run, until it is looked up.
        other = f"evil: {{_target_: spectrim.models.torchvision_models.os.mkdir, path: {mark}}}"
        written = f"hydra:\n  {node}"
        if attack in GROUPS:
            option = tmp_path / "conf" / "hydra" / attack / "evil.yaml"
            option.parent.mkdir(parents=True)
            option.write_text(f"{node}\n")
            written = f"defaults: [override /hydra/{attack}: evil]"
        (experiments / "evil.yaml").write_text(f"# @package _global_\n{written}\n{other}\n")
        words = [
            *["-m"] * (attack in GROUPS),
            "--config-dir",
            str(tmp_path / "conf"),
            "experiment=evil",
            "data=digits",
            "model=mlp",
        ]
        monkeypatch.setattr(sys, "argv", ["spectrim", *words])
        try:
            command_line.run(job)
        finally:
            result = mark.exists()
        return result

    return run


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_yaml_that_would_run_code_is_refused(
    attack: str, started: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ending:
        started(attack)
    said = capsys.readouterr().err
    assert ending.value.code == 1 and said.count("\n") == 1 and " is refused: " in said
    assert not (tmp_path / "mark").exists()


@pytest.mark.filterwarnings("ignore")  # what the attacks open, nobody closes
@pytest.mark.parametrize("attack", ATTACKS)
def test_without_the_check_it_runs(attack: str, started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "check", lambda *_: None)
    with suppress(SystemExit, Exception):
        started(attack)
    gc.collect()  # A file that the attack opened is closed here, and not in a later test, which would fail.
    assert (tmp_path / "mark").exists()


def test_the_launchers_of_the_documentation_pass(compose: Any) -> None:
    for launcher in ("basic", "joblib"):
        composition.check(compose("experiment=table4/truncation", f"hydra/launcher={launcher}"))
    for logging_of in ("stdout", "none", "disabled"):
        composition.check(
            compose(f"hydra/job_logging={logging_of}", f"hydra/hydra_logging={logging_of}".replace("stdout", "default"))
        )


def test_a_variable_that_is_copied_from_the_shell_passes(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRIM_TEST", "1")
    assert compose("hydra.job.env_copy=[SPECTRIM_TEST]").hydra.job.env_set == {"SPECTRIM_TEST": "1"}
    with pytest.raises(
        UserError, match="^hydra.job.env_set.SPECTRIM_TEST is refused: set environment variables in the"
    ):
        compose("+hydra.job.env_set.SPECTRIM_TEST=2")


def test_a_target_anywhere_is_refused(compose: Any) -> None:
    for where in ("+evil", "+model.evil", "+also.evil", "+hydra.help.evil", "+hydra.job.evil"):
        with pytest.raises(UserError, match=rf"{where[1:]}\._target_=os.system is refused"):
            compose(f"{where}._target_=os.system")


def test_only_the_command_line_puts_commands_into_the_script_of_slurm(compose: Any, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    given = ["hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load cuda]"]
    assert compose(*given).hydra.launcher.setup == ["module load cuda"]
    (tmp_path / "experiment").mkdir()
    for line, said in {
        "setup: ['touch x']": "setup is refused in a yaml: give it on the command line",
        "additional_parameters: {wrap: 'touch x'}": "additional_parameters is refused in a yaml",
        'comment: "a\\ntouch x"': "comment is refused: it has more than one line",
    }.items():
        head = "# @package _global_\ndefaults: [override /hydra/launcher: submitit_slurm]\n"
        (tmp_path / "experiment" / "evil.yaml").write_text(f"{head}hydra: {{launcher: {{{line}}}}}\n")
        with pytest.raises(UserError, match=f"^hydra.launcher.{said}"):
            compose("experiment=evil", f"hydra.searchpath=[file://{tmp_path}]")


def test_logging_that_cannot_be_checked_is_refused(compose: Any) -> None:
    with pytest.raises(UserError, match="^hydra.job_logging is refused: "):
        compose("hydra/job_logging=default")


ABSURD = [
    (["seed=range(0,1000000000)"], "the sweep has 1000000000 cells, more than 10000: sweep fewer values"),
    (["seed=range(0,200)", "algorithm.gamma=range(0,1,0.01)"], "the sweep has 20000 cells, more than 10000"),
    (["seed=shuffle(range(1000000000))"], "the sweep has 1000000000 cells"),
    (["seed=range(0,1,0)"], "seed=range(0,1,0) has no end: give range(START, STOP, STEP)"),
    (["hydra/launcher=joblib", "hydra.launcher.n_jobs=99999"], "hydra.launcher.n_jobs=99999 is too many for "),
    (
        ["experiment=table4/truncation,table9/refit"],
        "experiment=table4/truncation,table9/refit sweeps no grid: give one",
    ),
    (["experiment=table4/truncation", "seed=range(10000)"], "the sweep has 140000 cells"),
]


@pytest.mark.parametrize(("words", "message"), ABSURD, ids=[words[-1] for words, _ in ABSURD])
def test_what_is_absurd_is_refused_at_once(
    words: list[str],
    message: str,
    tmp_path: Path,
    handlers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spectrim", "-m", *words])
    started = time.monotonic()
    with pytest.raises(SystemExit) as ending:
        command_line.run(job)
    assert time.monotonic() - started < 20  # Hydra alone takes seconds where the machine is busy
    said = capsys.readouterr().err
    assert ending.value.code == 1 and said.startswith(f"spectrim: {message}") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("of_ours", [True, False], ids=["a command of ours", "another application"])
def test_another_application_in_this_process_may_log_to_files(
    of_ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its primary configuration is its own, and it takes options of ours."""
    (tmp_path / "app.yaml").write_text("defaults: [_self_, algorithm: truncation]\n")
    logs_to_files = ["hydra/job_logging=default", "hydra.job.name=app", "hydra.runtime.output_dir=out"]
    given = ["hydra.searchpath=[pkg://spectrim.conf]", "hydra/hydra_logging=default", *logs_to_files]
    if of_ours:
        monkeypatch.setenv(composition.FOLDER, str(tmp_path))  # as while one of our commands runs, with --config-path
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        if of_ours:
            with pytest.raises(UserError, match="FileHandler is refused: use hydra/job_logging=stdout or none$"):
                hydra.compose("app", given, return_hydra_config=True)
        else:
            cfg = hydra.compose("app", given, return_hydra_config=True)
            assert cfg.hydra.job_logging.handlers.file["class"] == "logging.FileHandler" and cfg.algorithm.ratio
