"""lm-evaluation-harness on compressed models, whose name there is ``spectrim``.

``python -m spectrim.cli.harness --model spectrim --model_args pretrained=FOLDER --tasks piqa`` is the harness's own
command. In Python, ``lm_eval.simple_evaluate(model="spectrim", …)`` knows the name after ``import spectrim``.
"""

from functools import cache
from importlib import import_module
from typing import Any

from spectrim import language
from spectrim.errors import UserError

NAME = "spectrim"


def register() -> None:
    """Make the name known to the harness. The class is made at first use."""
    registry: Any = import_module("lm_eval.api.registry").model_registry
    if NAME not in registry:
        registry.register(NAME, target=f"{__name__}:SpectrimLM")


@cache
def model_class() -> Any:
    """Return the class of models, whose base is that of the harness for transformers."""
    base: Any = import_module("lm_eval.models.huggingface").HFLM

    class SpectrimLM(base):
        """A compressed decoder. ``pretrained`` is a folder that ``spectrim.language.load`` reads."""

        def __init__(self, pretrained: str, device: str | None = None, **settings: Any) -> None:
            model, tokenizer = language.load(pretrained)
            if tokenizer is None:
                raise UserError(f"{pretrained} holds no tokenizer; give one to spectrim.language.save")
            super().__init__(model.to(device) if device else model, tokenizer=tokenizer, **settings)

    return SpectrimLM


def __getattr__(name: str) -> Any:
    if name == "SpectrimLM":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the command of the harness."""
    try:
        command = import_module("lm_eval.__main__").cli_evaluate
    except ImportError as error:
        raise SystemExit(f"the harness is not installed ({error}): pip install lm-eval") from None
    command()


if __name__ == "__main__":
    main()
