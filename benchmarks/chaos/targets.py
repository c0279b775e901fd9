"""The writers that a campaign attacks: each makes files in an empty folder, and says what it made."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from hydra.core.plugins import Plugins
from safetensors.torch import save_file
from torch import nn

import spectrim
from spectrim.cli import commands, compress
from spectrim.tools import files, resume

# What an unbroken run may have otherwise: times, memory, and where and when it ran.
PARTS = ("run", "train", "compress", "compressing")
VARYING = ("content_sha256", "phases", "provenance", "seconds", "cpu_seconds", "reporting", "created", "environment")


@dataclass(frozen=True)
class Target:
    """One writer.

    ``work``: makes its files in the folder given. ``prepare``: makes what ``work`` reads, beside that folder.
    ``costly``: takes a second or more, so that it gets fewer trials.
    """

    name: str
    work: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda folder: None
    costly: bool = False


def preload() -> None:
    """Import what the work needs, so that a forked trial finds it in memory."""
    for name in ("optuna", "sklearn.datasets", "torch._dynamo", *(f"spectrim.cli.{part}" for part in PARTS)):
        import_module(name)
    Plugins.instance()
    compressed()


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below ``folder``, records without what varies from run to run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".json":
                data = json.dumps(_steady(json.loads(data)), sort_keys=True).encode()
            if path.suffix == ".md":
                data = re.sub(rb"(?m)^- (method|made): .*$", b"", data)
            found[str(path.relative_to(folder))] = data
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _steady(own) for key, own in value.items() if key not in VARYING}
    return [_steady(own) for own in value] if isinstance(value, list) else value


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def compressed() -> spectrim.Compressed:
    model = net()
    batches = [(torch.randn(16, 24), torch.arange(16) % 4)]
    return spectrim.compress(model, calibration=batches, algorithm=spectrim.Truncation(ratio=0.5))


def _save(folder: Path) -> None:
    compressed().save(folder / "model.safetensors")


def _resumed(folder: Path, refine: spectrim.Refinement | None = None) -> None:
    """Compress with every result kept in a folder, however little time it took."""
    resume.WORTH_SECONDS = 0.0
    torch.manual_seed(1)
    batches = [(torch.randn(16, 24), torch.arange(16) % 4) for _ in range(2)]
    algorithm = spectrim.Joint(params_kept=0.5, refine=refine)
    result = spectrim.compress(net(), calibration=batches, algorithm=algorithm, resume=folder / "resume")
    result.save(folder / "model.safetensors")


def _user_command(folder: Path) -> None:
    out = folder / "out"
    if out.exists():  # The command is refused once its folder is whole.
        return
    rule = ["--algorithm", "truncation", "--decomposer", "svd_channel", "--params-kept", "0.6"]
    sys.exit(compress.main(["targets:net", *rule, "--out", str(out)]))


def _write_both(folder: Path) -> None:
    files.write({folder / "runs" / "one.json": json.dumps({"loss": 1.0}).encode(), folder / "one.csv": b"loss\n1.0\n"})


def shards(folder: Path) -> None:
    """Make a checkpoint of three shards with an index, as language models have them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    index = {}
    for shard in range(3):
        name = f"model-{shard + 1:05}-of-00003.safetensors"
        tensors = {f"layers.{shard}.{part}.weight": torch.randn(48, 48) for part in ("up", "down")}
        save_file(tensors, folder / name)
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _out_of_core(folder: Path) -> None:
    spectrim.compress_checkpoint(folder.parent / "given", folder / "out", ratio=0.5)


def _command(entry: Callable[[], None], *arguments: str) -> None:
    sys.argv = ["spectrim", *arguments]
    entry()


def _train(folder: Path) -> None:
    _command(
        commands.train,
        "model=mlp",
        "data=digits",
        "threads=1",
        "recipe.epochs=4",
        f"checkpoints={folder}/checkpoints",
        f"unfinished={folder}/unfinished",
        f"hydra.run.dir={folder.parent}/hydra",
    )


def _grid(folder: Path, *more: str) -> None:
    _command(
        commands.compress,
        "-m",
        "model=mlp",
        "data=digits",
        "checkpoint=null",
        f"records={folder}/records",
        f"unfinished={folder}/unfinished",
        f"hydra.sweep.dir={folder.parent}/hydra",
        *more,
    )


CELLS = "algorithm=truncation,lossless", "seed=0,1"
TRAINING = "algorithm=svd_training", "algorithm.recipe.epochs=3", "seed=0"
SEARCH = "algorithm=bayesian", "algorithm.evaluations=5", "seed=0"
TWO_WORKERS = "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
REFINEMENT = spectrim.Refinement(samples=128, lr=0.01)  # eight steps: two in each part that is kept

GRID = Target("a grid, cell by cell", lambda folder: _grid(folder, *CELLS), costly=True)
TRAINING_GRID = Target("a grid that trains", lambda folder: _grid(folder, *TRAINING), costly=True)
SEARCHING_GRID = Target("a grid that searches", lambda folder: _grid(folder, *SEARCH), costly=True)
WORKERS = Target("a grid, two workers", lambda folder: _grid(folder, *CELLS, *TWO_WORKERS), costly=True)
TARGETS = (
    Target("two files written together", _write_both),
    Target("Compressed.save", _save),
    Target("compress_checkpoint", _out_of_core, lambda folder: shards(folder.parent / "given")),
    Target("compress(resume=)", _resumed),
    Target("compress(resume=), refined", partial(_resumed, refine=REFINEMENT)),
    Target("spectrim-compress", _user_command),
    Target("spectrim-train", _train, costly=True),
    GRID,
    TRAINING_GRID,
    SEARCHING_GRID,
)
