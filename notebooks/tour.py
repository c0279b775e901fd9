# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of spectrim
#
# Load a trained network, look at the spectra of its layers, compress it three ways, compare. It needs no network:
# the data are scikit-learn's 8x8 digits, the checkpoint lies in `results/checkpoints`.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch.nn.functional as F

import spectrim
from spectrim.data.digits import Digits
from spectrim.decomposers.spectrum import spectrum_of
from spectrim.models.resnet import ResNet
from spectrim.statistics.objective import Objective

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "pyproject.toml").is_file())
splits = Digits().load()
checkpoint = root / "results/checkpoints/resnet20-digits-seed0.safetensors"
model = spectrim.load(checkpoint, into=ResNet(20, in_channels=1)).eval()
test = Objective(F.cross_entropy, {"test": splits.test})
test.evaluate(model, "test")

# %% [markdown]
# ## Spectra
#
# Each layer is decomposed once; from then on every rank is a cut. A flat curve means that the layer needs its rank.

# %%
decomposer = spectrim.SVD()
figure, axes = plt.subplots(figsize=(6, 3.5))
for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer3.2.conv2"):
    spectrum = spectrum_of(model.get_submodule(name), decomposer)
    error = spectrum.relative_error()
    axes.plot([k / spectrum.max_rank for k in range(len(error))], error, label=name)
axes.set(xlabel="rank / full rank", ylabel=r"$\|W_k - W\|_F \, / \, \|W\|_F$", title="What truncation does to a weight")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## Three ways to compress
#
# The calibration images are held out of the training set, and so are the verification images, on which the verified
# form measures what it chose; the test images are looked at only afterwards. The *predicted* change is the first-order
# one on the calibration images, to be read beside the *measured* one.

# %%
before = test.evaluate(model, "test")
algorithms = {
    "truncation to 70 %": spectrim.Truncation(params_kept=0.7),
    "lossless, one-shot": spectrim.Lossless(gamma=0.1),
    "compact, verified": spectrim.Compact(gamma=0.1, verified=True),
}
results = {
    label: spectrim.compress(
        model,
        calibration=splits.calibration,
        verification=splits.verification,
        algorithm=algorithm,
        decomposer=decomposer,
    )
    for label, algorithm in algorithms.items()
}
rows = []
for label, result in results.items():
    after = test.evaluate(result.model, "test")
    rows.append(
        {
            "method": label,
            "params kept %": 100 * result.params_kept,
            "MACs kept %": 100 * result.macs_kept,
            "predicted change of loss": result.predicted_change,
            "change of test loss": after.loss - before.loss,
            "top-1 %": 100 * after.accuracy,
        }
    )
comparison = pd.DataFrame(rows).set_index("method").round(4)
comparison

# %% [markdown]
# ## What was kept, layer by layer

# %%
results["compact, verified"].report.round(4)

# %% [markdown]
# ## To disk and back
#
# The file holds the plan; the dense architecture, built anew, is factored by it and filled. Nothing is unpickled.

# %%
path = root / "build" / "tour.safetensors"
results["compact, verified"].save(path)
again = spectrim.load(path, into=ResNet(20, in_channels=1)).eval()
assert test.evaluate(again, "test") == test.evaluate(results["compact, verified"].model.eval(), "test")
