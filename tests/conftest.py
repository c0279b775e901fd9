"""What the tests share: one thread, a tiny net with every kind of layer, and batches for it."""

import dataclasses
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.initialize import initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from spectrim.factored.layers import FactoredLinear, TuckerConv2d
from spectrim.fetch import pretrained
from spectrim.losses import IGNORED
from spectrim.refit.refinement import Refinement
from spectrim.runs import configuration
from spectrim.statistics.objective import Objective
from spectrim.training.recipe import Recipe

torch.set_num_threads(1)
# A shell lets its background jobs ignore Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what was skipped, and why: a skipped test is not a passed one."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        said = "; ".join(f"{count} × {reason.removeprefix('Skipped: ')}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"skipped: {said}")


Batches = list[tuple[Tensor, Tensor]]
VOCABULARY = 61


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def net() -> nn.Sequential:
    """Two convolutions (one strided, one grouped), BatchNorm with statistics of its own, and two linear layers."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    )
    model.train()
    with torch.no_grad():
        model(3 * torch.randn(64, 3, 8, 8) + 1)
    return model


@pytest.fixture
def batches() -> Batches:
    """Three batches of unequal size for ``net``."""
    return [(torch.randn(n, 3, 8, 8), torch.randint(5, (n,))) for n in (16, 16, 7)]


@pytest.fixture
def objective(batches: Batches) -> Objective:
    """Cross-entropy on ``batches``: all of them are calibration, the first two train, the last two verification."""
    splits = {"calibration": batches, "train": batches[:2], "verification": batches[1:]}
    return Objective(F.cross_entropy, splits)


@pytest.fixture
def brief() -> Callable[[Any], Any]:
    """``brief(algorithm)``: the same, training and searching (if it does) for no longer than a test takes."""
    short = {"recipe": Recipe(epochs=2, lr=0.01, precision="float32"), "evaluations": 12}

    def of(algorithm: Any) -> Any:
        if isinstance(getattr(algorithm, "refine", None), Refinement):
            algorithm = dataclasses.replace(algorithm, refine=dataclasses.replace(algorithm.refine, samples=64))
        return dataclasses.replace(algorithm, **{key: short[key] for key in vars(algorithm).keys() & short.keys()})

    return of


def _beside(weight: Tensor, blocks: int) -> Tensor:
    """The weight of one group (outputs, inputs of a block, ...) with zeros where a block does not look."""
    parts = weight.unflatten(0, (blocks, -1))
    whole = torch.zeros(*parts.shape[:2], blocks, *parts.shape[2:], dtype=weight.dtype)
    for block in range(blocks):
        whole[block, :, block] = parts[block]
    return whole.flatten(2, 3).flatten(0, 1)


def _weight_of(layer: nn.Module, groups: int) -> Tensor:
    plain = layer.plain([factor.weight for factor in layer.factors])[1]
    if isinstance(layer, FactoredLinear):
        return plain @ _beside(layer.first.weight, getattr(layer.first, "blocks", 1))
    second = plain.unflatten(0, (groups, -1))
    first = layer.first.weight.unflatten(0, (groups, -1))
    if not isinstance(layer, TuckerConv2d):
        first = torch.stack([_beside(own, layer.first.groups // groups) for own in first])
    if isinstance(layer, TuckerConv2d):
        third = layer.third.weight.unflatten(0, (groups, -1))
        return torch.einsum("gopvx,gpqhw,gqivx->goihw", third, second, first).flatten(0, 1)
    product = "gorvx,grihw->goihw" if layer.view == "channel" else "gorhx,grivw->goihw"
    return torch.einsum(product, second, first).flatten(0, 1)


@pytest.fixture
def weight_of() -> Callable[[nn.Module, int], Tensor]:
    """``weight_of(layer, groups)``: the dense weight that a factored layer stands for."""
    return _weight_of


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """``tiny("gpt2")``, ``tiny("llama")``, ``tiny("bert")``: untrained, two layers of width 24."""
    pytest.importorskip("transformers")
    transformers = pretrained.library()

    def made(kind: str, **changes: Any) -> nn.Module:
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"max_position_embeddings": 32, "initializer_range": 0.2}  # wide enough for a loss that is not flat
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if kind == "gpt2":
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **special, **changes)).eval()
        sizes["intermediate_size"] = 40
        if kind == "llama":
            more = {"num_key_value_heads": 1, "tie_word_embeddings": True} | changes
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **special, **more)).eval()
        config = transformers.BertConfig(**sizes, **special, num_labels=3, **changes)
        return transformers.BertForSequenceClassification(config).eval()

    return made


@pytest.fixture
def word_folder(tiny: Any, tmp_path: Path) -> Path:
    """A folder with a tiny GPT-2 and a tokenizer that takes "w0" to "w49" and a few words more for one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "review", "is", *(f"w{n}" for n in range(50))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = pretrained.library().PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")
    folder = tmp_path / "words"
    tokenizer.save_pretrained(folder)
    tiny("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture
def token_batches() -> list[tuple[dict[str, Tensor], Tensor]]:
    """Two batches for a language model, the second of which has two sequences that are padded on the right."""
    batches = []
    for lengths in ([12, 12, 12], [12, 5, 8]):
        ids = torch.randint(3, VOCABULARY, (3, 12))
        mask = (torch.arange(12) < torch.tensor(lengths).unsqueeze(1)).long()
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        batches.append((inputs, torch.where(mask.bool(), ids, IGNORED)))
    return batches


Compose = Callable[..., DictConfig]


@pytest.fixture
def compose() -> Iterator[Compose]:
    """``compose("model=mlp", …)``: the configuration that the command line would get."""
    from hydra import compose as hydra_compose

    def composed(*overrides: str, name: str = "config") -> DictConfig:
        cfg = hydra_compose(name, overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return cfg

    with initialize_config_dir(configuration.CONF, version_base="1.3"):
        yield composed
    HydraConfig.instance().cfg = None


@pytest.fixture
def digits(tmp_path: Path) -> list[str]:
    """Overrides for a run of seconds: an untrained multilayer perceptron on the embedded digits."""
    return ["data=digits", "model=mlp", "checkpoint=null", f"records={tmp_path}", "model.hidden=[16,16]"]
