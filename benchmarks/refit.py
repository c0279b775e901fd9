"""Time the refit of joint selection beside its gates, on blocks as wide as the last ones of ResNet-18 and ResNet-50."""

import pandas as pd
import torch
import torch.nn.functional as F
from measure import Outcome, Target, clocked, seconds
from torch import nn

from spectrim.algorithms import joint
from spectrim.algorithms.joint import Joint
from spectrim.decomposers.best_view import BestView
from spectrim.decomposers.svd import SVD
from spectrim.refit import factors
from spectrim.report.table import Column, Table
from spectrim.statistics.objective import Objective

COLUMNS = (
    Column("block", "block"),
    Column("layers", "layers fitted", 0),
    Column("read", "samples of the refit", 0),
    Column("gates", "gates, s", 2),
    Column("refit", "refit, s", 2),
    Column("passes", "its passes, s", 2),
    Column("moments", "its moments, s", 2),
    Column("fits", "its fits, s", 2),
    Column("whole", "whole selection, s", 2),
    Column("times", "refit over gates", 2),
)
# Name → (kernel sides and output channels of the convolutions of one block, channels of its input, side of its images).
Block = tuple[list[tuple[int, int]], int, int]
BLOCKS: dict[str, Block] = {
    "ResNet-18, last stage": ([(3, 512), (3, 512)], 512, 7),
    "ResNet-50, last stage": ([(1, 512), (3, 512), (1, 2048)], 2048, 7),
}
SMALL: dict[str, Block] = {"small": ([(3, 16), (3, 16)], 16, 7)}
CLASSES = 10
# The input moments of a 3x3 convolution with 512 channels take a minute to root, and neither gates nor refit need that.
DECOMPOSER = BestView(SVD(factors="pivoted"))


def benchmark(quick: bool) -> Outcome:
    """Select half of the parameters of one block after another. Weights and inputs are random numbers."""
    samples, blocks = (8, SMALL) if quick else (250, BLOCKS)
    runs = [(name, read) for name in blocks for read in (samples, 2 * samples)]
    table = pd.DataFrame([_once(name, blocks[name], samples, read) for name, read in runs])
    targets = [
        Target(f"refit of {name} with {read} samples over its gates", float(times), 1.0, at_least=False)
        for (name, read), times in zip(runs, table["times"], strict=True)
    ]
    notes = [
        *(target.line() for target in targets),
        f"One block, mean pooling and a linear layer; {samples} samples for the gates; pivoted factors without "
        "whitening, one run each. The default reads twice as many samples for the refit. The whole selection has the "
        "decompositions, too.",
        "Why the target cannot be met: let one pass of the dense block cost 1. The gates are a pass and a backward "
        "pass, 3. A refit with as many samples passes both models, 1.5 at half of the parameters. Its moments of a 3x3 "
        "convolution are products with the outputs, 1, and 13 products of shifted inputs, 1.4. That makes 3.9 before "
        "any system is solved. Without moments, each gradient of the factors costs 1.5: one uses up the rest.",
    ]
    caption = "The refit of joint selection against its gates, at the largest widths of ResNet-18 and ResNet-50"
    return Outcome(
        Table("refit", table, COLUMNS, caption, notes), targets, {"quick": quick, "samples": samples}, "random numbers"
    )


def _once(name: str, block: Block, samples: int, read: int) -> dict[str, object]:
    torch.manual_seed(0)
    model, batches = _model(block), _batches(block, samples)
    selector = Joint(params_kept=0.5, samples=samples, refit=read, refit_by="outputs")
    objective = Objective(F.cross_entropy, {"calibration": batches})
    with (
        clocked(joint, "gates_at") as gates,
        clocked(factors, "refit") as refit,
        clocked(factors, "moments_of") as moments,
        clocked(factors, "_fit") as fits,
    ):
        whole = seconds(lambda: selector.compress(model, DECOMPOSER, objective))
    spent = {"gates": sum(gates), "refit": sum(refit), "moments": sum(moments), "fits": sum(fits), "whole": whole}
    passes = spent["refit"] - spent["moments"] - spent["fits"]
    times = spent["refit"] / spent["gates"]
    return {"block": name, "layers": len(fits), "read": read, "passes": passes, "times": times, **spent}


def _model(block: Block) -> nn.Module:
    convolutions, channels, _ = block
    parts: list[nn.Module] = []
    for side, outputs in convolutions:
        own = nn.Conv2d(channels, outputs, side, padding=side // 2, bias=False)
        parts += [own, nn.BatchNorm2d(outputs), nn.ReLU()]
        channels = outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)).eval()


def _batches(block: Block, samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    _, channels, side = block
    size = samples // 2
    return [(torch.randn(size, channels, side, side), torch.randint(CLASSES, (size,))) for _ in range(4)]
