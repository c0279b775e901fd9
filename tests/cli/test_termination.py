"""SIGTERM stops a training or a grid in one line, and the same command goes on from there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectrim.cli import train
from spectrim.cli.termination import Terminated, terminable, uncovered
from spectrim.runs import configuration

SOURCE = str(Path(configuration.__file__).parents[2])
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]


def terminated(command: list[str], folder: Path, when: Callable[[], bool]) -> tuple[int, list[str]]:
    """Exit status and lines on stderr of ``python -m COMMAND``, which gets SIGTERM once ``when()``."""
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not when() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    return process.returncode, [line for line in said.splitlines() if not line.endswith("done already")]


def test_a_training_that_gets_sigterm_goes_on_to_the_weights_of_an_unbroken_one(compose: Any, tmp_path: Path) -> None:
    def training(folder: Path) -> list[str]:
        net = ["data=digits", "model=mlp", "model.hidden=[16,16]", "recipe=mlp", "recipe.epochs=60"]
        return [*net, f"checkpoints={folder}", f"unfinished={folder}/unfinished"]

    stopped, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    state = stopped / "unfinished" / "mlp-digits-seed0.state.safetensors"
    status, said = terminated(["spectrim.cli.train", *training(stopped), *QUIET], tmp_path, state.exists)
    assert (status, said) == (143, ["spectrim: terminated; the same command goes on where it stopped"])
    # An interrupt while a temporary folder is removed may leave it, hidden. The next run removes it.
    assert [path.name for path in state.parent.iterdir() if not path.name.startswith(".")] == [state.name]
    assert not list(stopped.glob("*.safetensors"))
    weights = [load_file(train.train(compose(*training(folder), name="train"))) for folder in (stopped, unbroken)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert not list(state.parent.glob(".*"))


@pytest.mark.parametrize(
    "launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ids=["basic", "joblib"]
)
def test_a_grid_that_gets_sigterm_keeps_the_records_it_has(
    launcher: list[str], digits: list[str], tmp_path: Path
) -> None:
    def recorded() -> int:
        return len(list(tmp_path.glob("runs/*.json")))

    ratios = ",".join(f"{0.2 + 0.02 * cell:.2f}" for cell in range(40))
    cells = [*digits, "model.hidden=[300,300]", "algorithm=truncation", f"algorithm.ratio={ratios}"]
    command = ["spectrim.cli.run", "-m", *cells, *QUIET, *launcher]
    status, said = terminated(command, tmp_path, lambda: recorded() >= 2)
    assert (status, said) == (143, ["spectrim: terminated; the same command goes on where it stopped"])
    assert 2 <= recorded() < 40


def test_only_the_first_sigterm_counts_and_the_usual_handler_comes_back() -> None:
    usual = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) is usual


def test_a_process_that_ignores_sigterm_goes_on_ignoring_it() -> None:
    usual = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, usual)


def hidden_by_the_error_of_a_clean_up() -> None:
    try:
        raise KeyboardInterrupt
    finally:
        try:
            _ = None.half_made  # type: ignore[attr-defined]
        except AttributeError as error:
            raise ValueError from error


@pytest.mark.parametrize("guard", [terminable, uncovered])
def test_an_interrupt_is_told_where_an_error_covers_it(guard: Any) -> None:
    with pytest.raises(KeyboardInterrupt), guard():
        hidden_by_the_error_of_a_clean_up()
    with pytest.raises(ValueError, match="other"), guard():
        try:
            raise TypeError
        except TypeError:
            raise ValueError("another") from None
