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
# This notebook loads a trained network, plots the spectra of its layers, compresses it in four ways and compares the
# results. Nothing is downloaded: the data are the 8x8 digits of scikit-learn, and the checkpoint is in
# `results/checkpoints`.

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
# Each layer is decomposed once, which gives its error at every rank. A curve that falls slowly means that the layer
# needs most of its rank.

# %%
decomposer = spectrim.SVD()
figure, axes = plt.subplots(figsize=(6, 3.5))
for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer3.2.conv2"):
    spectrum = spectrum_of(model.get_submodule(name), decomposer)
    error = spectrum.relative_error()
    axes.plot([k / spectrum.max_rank for k in range(len(error))], error, label=name)
axes.set(xlabel="rank / full rank", ylabel=r"$\|W_k - W\|_F \, / \, \|W\|_F$", title="Truncation error of a weight")
axes.legend()
figure.tight_layout()

# %% [markdown]
# ## Four ways to compress
#
# - Truncation cuts every layer by the same ratio and reads no data.
# - Joint selection removes components over all layers together, by their effect on the loss, and fits what is left.
# - Lossless and compact optimisation choose the rank of each layer by the first-order change of the loss.
#
# Calibration and verification images were held out of the training. Algorithms take gradients on the former.
# A verified algorithm measures what it chose on the verification images. The test images are read only for the table.
#
# The table shows the first-order change of the loss that is predicted on the calibration images, and the change that is
# measured on the test images.

# %%
before = test.evaluate(model, "test")
algorithms = {
    "truncation to 70 %": spectrim.Truncation(params_kept=0.7),
    "joint to 70 %": spectrim.Joint(params_kept=0.7),
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
# ## The report
#
# The report has one row per layer that can be factored. A layer without a rank stays dense.

# %%
results["joint to 70 %"].report.round(4)

# %% [markdown]
# ## Save and load
#
# The file holds the factors and the plan. `spectrim.load` takes a dense model, factors it by the plan and fills it.
# Nothing is unpickled.

# %%
path = root / "build" / "tour.safetensors"
results["joint to 70 %"].save(path)
again = spectrim.load(path, into=ResNet(20, in_channels=1)).eval()
assert test.evaluate(again, "test") == test.evaluate(results["joint to 70 %"].model.eval(), "test")
