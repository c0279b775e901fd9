"""Write text with a compressed language model: ``python experiments/generate.py FOLDER "Once upon a time"``.

FOLDER was written by ``spectrim.language.save`` or ``spectrim.compress_checkpoint``. With ``--dense smollm2`` the dense
model writes too. Then the script prints the decoding speed of both at batch size 1, and their ratio.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median

from torch import nn

from spectrim import language
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.models.language import causal_lm

PROMPT = "The best film that I have seen this year is"


def speeds(models: Sequence[nn.Module], tokenizer: object, prompt: str, tokens: int, rounds: int) -> list[list[float]]:
    """Return the tokens a second of each model in each round. The models take turns; the pass of the prompt counts."""
    found: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, own in zip(models, found, strict=True):
            started = time.perf_counter()
            language.generate(model, tokenizer, prompt, tokens)
            own.append(tokens / (time.perf_counter() - started))
    return found


def say(options: argparse.Namespace) -> None:
    """Print text and speed of the compressed model, and of the dense one if it is named."""
    small, tokenizer = language.load(options.folder)
    if tokenizer is None and options.dense is None:
        raise UserError(f"{options.folder} holds no tokenizer; name a model that has one by --dense")
    tokenizer = tokenizer or pretrained.tokenizer(options.dense)
    models = {"compressed": small} | ({} if options.dense is None else {"dense": causal_lm(options.dense)})
    for name, model in models.items():
        text = language.generate(model, tokenizer, options.prompt, options.tokens)
        params = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}, {params:,} parameters: {options.prompt}{text}")
    measured = speeds(list(models.values()), tokenizer, options.prompt, options.tokens, options.rounds)
    for name, own in zip(models, measured, strict=True):
        print(f"{name}: {median(own):.2f} tokens a second at batch size 1 (median of {options.rounds})")
    if len(measured) == 2:
        ratio = median(ours / theirs for ours, theirs in zip(*measured, strict=True))
        print(f"compressed over dense: {ratio:.2f} times as fast")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and print. Return the exit status."""
    parser = argparse.ArgumentParser(description="Write text with a compressed language model.")
    parser.add_argument("folder", help="folder of the compressed model")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--dense", help="the dense model: smollm2, a folder, or a name of the hub")
    parser.add_argument("--tokens", type=int, default=32, help="number of tokens to write (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of measurements of the speed (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.tokens < 1 or options.rounds < 1:
            raise UserError("tokens and rounds must be at least 1")
        say(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
