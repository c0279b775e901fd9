"""spectrim: low-rank compression of neural networks, done so that it can be believed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectrim.tools.import_hook import when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spectrim.algorithms.compact import Compact as Compact
    from spectrim.algorithms.fine_tuning import FineTuning as FineTuning
    from spectrim.algorithms.joint import Joint as Joint
    from spectrim.algorithms.lossless import Lossless as Lossless
    from spectrim.algorithms.rank_selection import RankSelection as RankSelection
    from spectrim.algorithms.shared.compressed import Compressed as Compressed
    from spectrim.algorithms.svd_training import SVDTraining as SVDTraining
    from spectrim.algorithms.truncation import Truncation as Truncation
    from spectrim.api import compress as compress
    from spectrim.api import load as load
    from spectrim.checkpoints.out_of_core import compress_checkpoint as compress_checkpoint
    from spectrim.decomposers.best_view import BestView as BestView
    from spectrim.decomposers.subspaces import SubspaceSVD as SubspaceSVD
    from spectrim.decomposers.svd import SVD as SVD
    from spectrim.decomposers.tucker2 import Tucker2 as Tucker2
    from spectrim.decomposers.two_sided import TwoSidedSVD as TwoSidedSVD
    from spectrim.decomposers.whitened import WhitenedSVD as WhitenedSVD
    from spectrim.errors import UserError as UserError
    from spectrim.factored.plan import RankPlan as RankPlan
    from spectrim.refit.refinement import Refinement as Refinement
    from spectrim.statistics.processes import Distributed as Distributed
    from spectrim.surgery.inference import for_inference as for_inference
    from spectrim.training.recipe import Recipe as Recipe

# Imported at first use, so that reports, which need no torch, do not pay for it.
_HOME = {
    "BestView": "spectrim.decomposers.best_view",
    "Compact": "spectrim.algorithms.compact",
    "Compressed": "spectrim.algorithms.shared.compressed",
    "Distributed": "spectrim.statistics.processes",
    "FineTuning": "spectrim.algorithms.fine_tuning",
    "Joint": "spectrim.algorithms.joint",
    "Lossless": "spectrim.algorithms.lossless",
    "RankPlan": "spectrim.factored.plan",
    "RankSelection": "spectrim.algorithms.rank_selection",
    "Recipe": "spectrim.training.recipe",
    "Refinement": "spectrim.refit.refinement",
    "SVD": "spectrim.decomposers.svd",
    "SVDTraining": "spectrim.algorithms.svd_training",
    "SubspaceSVD": "spectrim.decomposers.subspaces",
    "Truncation": "spectrim.algorithms.truncation",
    "Tucker2": "spectrim.decomposers.tucker2",
    "TwoSidedSVD": "spectrim.decomposers.two_sided",
    "UserError": "spectrim.errors",
    "WhitenedSVD": "spectrim.decomposers.whitened",
    "compress": "spectrim.api",
    "compress_checkpoint": "spectrim.checkpoints.out_of_core",
    "for_inference": "spectrim.surgery.inference",
    "load": "spectrim.api",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "language":  # a module of its own
        return import_module("spectrim.language")
    if name not in _HOME:
        raise AttributeError(f"module 'spectrim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "language"})  # so that the tab key completes what is not imported yet


def _to_transformers() -> None:
    import_module("spectrim.checkpoints.quantizer").register()


def _to_harness() -> None:
    import_module("spectrim.cli.harness").register()


# The names of compressed models, as soon as these libraries are imported: none of them is needed.
when_imported("transformers.quantizers.auto", _to_transformers)
when_imported("lm_eval.models", _to_harness)
