"""Architectures of timm: those that it releases for tests, and others with fewer blocks or channels."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from given import CLASSES, Architecture, Given, images

from spectrim.tools.torchvision_shim import prepare

PIXELS = 64  # of a side, where the settings say nothing
ALIVE = {"zero_init_last": False}  # else no loss depends on the residual branches of an untrained net
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
MIXED = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_blocks": 2}
FOUR = {"embed_dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1)}
# Settings by the name of a released model; or by MODULE.CLASS, where the name fixes them.
MODELS: dict[str, dict[str, Any]] = {
    "test_resnet": ALIVE,
    "test_byobnet": {},
    "test_convnext": {},
    "test_convnext2": {},
    "test_efficientnet": {},
    "test_efficientnet_gn": {},
    "test_mambaout": {},
    "test_nfnet": {},
    "test_vit": {},
    "test_vit2": {},
    "test_vit4": {},
    "resnet18": {"channels": (16, 32, 48, 64), **ALIVE},
    "seresnet18": {"channels": (16, 32, 48, 64), **ALIVE},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "mobilenetv3_small_050": {},
    "lcnet_035": {},
    "ghostnet_050": {},
    "edgenext_xx_small": {"dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1)},
    "starnet_s1": {"base_dim": 8, "depths": (1, 1, 1, 1)},
    "convmixer.ConvMixer": {"dim": 48, "depth": 2, "kernel_size": 5, "patch_size": 4},
    "metaformer.MetaFormer": {"dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1)},
    "deit_tiny_patch16_224": PLAIN,
    "beit_base_patch16_224": PLAIN,
    "cait_xxs24_224": PLAIN,
    "eva02_tiny_patch14_224": PLAIN,
    "xcit_nano_12_p8_224": {key: value for key, value in PLAIN.items() if key != "patch_size"},
    "mlp_mixer.MlpMixer": MIXED,
    "swinv2_tiny_window8_256": {
        "img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4),
    },
    "davit_tiny": {**FOUR, "num_heads": (2, 2, 4, 4)},
    "twins_svt_small": {**FOUR, "img_size": 64, "num_heads": (1, 2, 2, 4), "wss": (4, 4, 4, 2)},
    "coat_lite_tiny": {"img_size": 64, "embed_dims": (16, 24, 32, 48), "serial_depths": (1, 1, 1, 1)},
    "levit_128s": {
        "img_size": 64, "embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 4), "key_dim": 8,
    },
    "hiera_tiny_224": {"img_size": (64, 64), "embed_dim": 24, "stages": (1, 1, 1, 1)},
    "mobilevitv2_050": {},
}  # fmt: skip


def architectures() -> list[Architecture]:
    """Return one row for each model. ONNX is left to the nets of torchvision, which have the same layers."""
    return [Architecture("timm", name.rpartition(".")[2], partial(_made, name), onnx=False) for name in MODELS]


def _made(name: str) -> Given:
    prepare()
    import timm

    settings: Mapping[str, Any] = {"num_classes": CLASSES, **MODELS[name]}
    module, _, kind = name.rpartition(".")
    model = getattr(getattr(timm.models, module), kind)(**settings) if module else timm.create_model(name, **settings)
    size = settings.get("img_size", PIXELS)
    return images(model, size if isinstance(size, int) else size[0])
