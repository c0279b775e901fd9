"""A checkpoint in a folder of safetensors files: its shards, the record of its compression, and loading."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from tqdm import tqdm

from spectrim.checkpoints.filling import fill
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.tools import digests, files
from spectrim.tools.safetensors_stream import Entry, Shard

FORMAT = "spectrim-shards-1"
MANIFEST = "spectrim.json"
# The folder for the configuration and the tokenizer of transformers. With the configuration beside the factors,
# from_pretrained would take them for a dense model and initialise its missing layers at random.
BESIDE = "pretrained"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Sharded:
    """A checkpoint in a folder: ``model.safetensors``, or several files and their index.

    ``indexed``: whether there is an index.
    """

    folder: Path
    shards: dict[str, Shard]
    indexed: bool

    @classmethod
    def at(cls, folder: str | Path) -> "Sharded":
        """Read the headers of the checkpoint in ``folder``.

        Raises ``UserError`` where files, index and tensors do not agree, and where the folder holds only pickles.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            if not (folder / SINGLE).is_file():
                raise UserError(_nothing_in(folder))
            return cls(folder, {SINGLE: Shard.at(folder / SINGLE)}, False)
        places = _weight_map(folder / INDEX)
        names = sorted(set(places.values()))
        there = {path.name for path in files.listed(folder) if path.match("model*.safetensors")}
        for name in sorted(there - set(names)):
            raise UserError(f"{folder / name} is not in {INDEX}: the two are not of one checkpoint; fetch both again")
        found = {name: Shard.at(folder / name) for name in names}
        for name, shard in found.items():
            listed = {tensor for tensor, file in places.items() if file == name}
            for tensor in sorted(listed ^ shard.entries.keys()):
                raise UserError(f"{folder / name} and {INDEX} do not agree on {tensor}; fetch both again")
        return cls(folder, found, True)

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors of all shards."""
        return {name: entry for shard in self.shards.values() for name, entry in shard.entries.items()}


def _nothing_in(folder: Path) -> str:
    """Return why ``folder`` holds no checkpoint."""
    if not folder.exists():
        return f"there is no folder {folder}; give the one that holds {SINGLE} or {INDEX}"
    for path in files.listed(folder) if folder.is_dir() else [folder]:
        if path.suffix in PICKLES:
            return f"{path} may be a pickle, which can run any code and is never read; convert it to safetensors"
    return f"{folder} holds neither {SINGLE} nor {INDEX}; give a folder that does, or save the model anew"


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    try:
        places = files.read_json(index)["weight_map"]
        if not places or any(Path(file).name != file for file in places.values()):
            raise ValueError("a shard is a file beside its index")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of shards ({error}); fetch it again") from None
    return places


@dataclass
class Manifest:
    """The record of a compression in its folder.

    ``finished``: the sha256 of ``source`` and ``result`` of each finished shard.
    """

    folder: Path
    plan: RankPlan
    finished: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest in ``folder``. Raises ``UserError`` where there is none, or it cannot be read."""
        try:
            plain = files.read_json(folder / MANIFEST)
            if plain["format"] != FORMAT:
                raise ValueError(f"format {plain['format']}; this version reads {FORMAT}, a newer one may read it")
            finished = {
                str(name): {k: str(made[k]) for k in ("source", "result")} for name, made in plain["shards"].items()
            }
            return cls(folder, RankPlan.from_json(json.dumps(plain["plan"])), finished)
        except FileNotFoundError:
            raise UserError(f"{folder} is not a compressed checkpoint: it holds no {MANIFEST}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{folder / MANIFEST} cannot be read ({error}); compress into an empty folder") from None

    @classmethod
    def begun(cls, folder: Path, plan: RankPlan) -> "Manifest":
        """Return the manifest that a run with the same plan left in ``folder``, or a new one. It writes nothing.

        Raises ``UserError`` where the folder holds anything else.
        """
        if (folder / MANIFEST).exists():
            found = cls.read(folder)
            if found.plan != plan:
                raise UserError(f"{folder} was begun with another plan or ratio; give that again, or another folder")
            return found
        if folder.is_dir() and any(not path.name.startswith(".") for path in files.listed(folder)):
            raise UserError(f"{folder} holds other files; give a new folder or an empty one")
        return cls(folder, plan)

    def write(self) -> None:
        plain = {"format": FORMAT, "plan": self.plan.as_dict(), "shards": self.finished}
        files.write({self.folder / MANIFEST: (json.dumps(plain, indent=1) + "\n").encode()})

    def has(self, name: str, source: Path) -> bool:
        """Return whether the shard was made from the file ``source`` and is unchanged since.

        Raises ``UserError`` where it was made from another file of that name.
        """
        made = self.finished.get(name)
        if made and made["source"] != digests.of_file(source):
            raise UserError(f"{self.folder} was begun from another checkpoint than {source}; give another folder")
        return bool(made) and self.intact(name)

    def intact(self, name: str) -> bool:
        """Return whether the shard is as it was written."""
        path = self.folder / name
        return name in self.finished and path.is_file() and digests.of_file(path) == self.finished[name]["result"]


def load(folder: str | Path, into: nn.Module, sha256: str | None = None) -> nn.Module:
    """Factor ``into`` by the plan of a folder from ``compress_checkpoint``, fill it, and return it.

    One tensor at a time is held in addition to the model.

    ``into``: the model, built dense. It decides precision and device; on the meta device, the weights go to the CPU.
    ``sha256``: digest that the folder's ``spectrim.json`` must have, if given. That file holds those of the shards.

    Raises ``UserError`` where the folder is unfinished, altered or of another architecture; ``into`` is then unchanged.
    """
    plan, shards = verified(Path(folder), sha256)
    return fill(into, plan, shards, folder)


def verified(folder: Path, sha256: str | None = None) -> tuple[RankPlan, list[Shard]]:
    """Return the plan and the shards of a compressed checkpoint.

    ``sha256``: as for ``load``.

    Raises ``UserError`` where the folder is unfinished or altered.
    """
    if sha256 is not None:
        digests.require(folder / MANIFEST, sha256)
    manifest = Manifest.read(folder)
    source = Sharded.at(folder)
    for name in tqdm(source.shards, "verify", unit="shard", leave=False, disable=None):
        if not manifest.intact(name):
            raise UserError(f"{source.folder / name} was altered or is unfinished: compress the checkpoint again")
    return manifest.plan, list(source.shards.values())
