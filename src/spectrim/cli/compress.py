"""Compress one model: ``spectrim-compress MODEL --params-kept 0.8 --calibration TEXT --out FOLDER``."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from spectrim.cli import streams
from spectrim.cli.messages import Parser
from spectrim.cli.termination import ending, terminable
from spectrim.errors import UserError

BUDGETS = ("params_kept", "macs_kept", "milliseconds", "max_loss_increase")
ABOUT = """\
Compress one model and write it to a folder, with a model card that holds its sizes, its losses and this command.

MODEL is a decoder of transformers, by its name on the Hugging Face hub or as a folder, or a module of your own as
package.module:factory, such as torchvision.models:resnet18. Code is imported only where you name it.
"""
EXAMPLES = """\
examples:
  spectrim-compress smollm2 --params-kept 0.8 --calibration wikitext --out small
  spectrim-compress smollm2 --params-kept 0.8 --calibration wikitext --dry-run
  spectrim-compress torchvision.models:resnet18 --weights resnet18.safetensors --macs-kept 0.5 --calibration photos \\
      --out small
"""


def parser() -> Parser:
    """Return the parser of the command line."""
    made = Parser(
        prog="spectrim-compress",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).with_version()
    made.add_argument("model", metavar="MODEL", help="a name on the hub, a folder, or package.module:factory")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder, written whole or not at all")
    size = made.add_argument_group("how small (exactly one)").add_mutually_exclusive_group(required=True)
    size.add_argument("--params-kept", type=float, metavar="PART", help="part of the parameters, in (0, 1)")
    size.add_argument("--macs-kept", type=float, metavar="PART", help="part of the multiply-accumulates, in (0, 1)")
    size.add_argument("--milliseconds", type=float, metavar="MS", help="a forward pass of one sample, on this machine")
    size.add_argument("--max-loss-increase", type=float, metavar="NATS", help="rise of the loss that is allowed")
    data = made.add_argument_group("calibration data, which the model was not trained on")
    data.add_argument(
        "--calibration",
        metavar="DATA",
        help="text: a .txt or .jsonl file, a folder of .txt files, a data set of the hub as owner/name[:subset], or "
        "sotu, wikitext, imdb_corpus, or own-text, which the model writes itself; images: a folder of them, or "
        "cifar10, mnist, fashion_mnist, digits",
    )
    data.add_argument("--samples", type=int, default=128, metavar="N", help="blocks or images (default: %(default)s)")
    data.add_argument("--context", type=int, default=256, metavar="T", help="tokens a block (default: %(default)s)")
    data.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="a side of the images of a folder (default: 224)"
    )
    data.add_argument(
        "--preprocess",
        metavar="HOW",
        help="how your network was fed with images: imagenet; none, for pixels in [0, 1]; MEAN/STD, such as 0.5/0.5 or "
        "0.49,0.48,0.45/0.25,0.24,0.26; or package.module:function, which makes a tensor of an RGB image of PIL "
        "(default: what the model tells, else imagenet; for cifar10 and the like their own)",
    )
    data.add_argument("--batch-size", type=int, metavar="N", help="(default: 8, and 1 where memory is short)")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="draws the samples (default: %(default)s)")
    own = made.add_argument_group("a module of your own")
    own.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="its weights, a safetensors file (default: those that the factory gives it)",
    )
    own.add_argument(
        "--with", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="argument of the factory"
    )
    how = made.add_argument_group("how")
    how.add_argument(
        "--algorithm", metavar="NAME", help="what chooses the ranks (default: joint_cut for text, joint for images)"
    )
    how.add_argument("--decomposer", metavar="NAME", help="the decomposition (default: the best of the algorithm)")
    how.add_argument("--include", nargs="+", metavar="LAYER", help="names, globs, or re: and a regular expression")
    how.add_argument("--exclude", nargs="+", default=[], metavar="LAYER", help="layers that stay dense, likewise")
    how.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: %(default)s)")
    how.add_argument("--memory", type=float, metavar="GIB", help="memory to plan with (default: what is free)")
    how.add_argument("--dry-run", action="store_true", help="tell sizes, time and memory to expect, and end")
    made.add_argument("--push-to-hub", metavar="OWNER/NAME", help="also upload the folder; log in by `hf auth login`")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of ``spectrim-compress``. Return 0, or 1 after a mistake, which is told in one line on stderr."""
    made = parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = made.parse_args(given)
    if options.out is None and not options.dry_run:
        made.error("give --out, a new folder for the result, or --dry-run")
    streams.open_closed()
    try:
        with terminable(), redirect_stdout(streams.Outlet(sys.stdout)):
            from spectrim.cli import compressing  # torch takes seconds to import, and help needs none of it

            compressing.run(options, given)
    except UserError as error:
        return _said(str(error), 1)
    except KeyboardInterrupt as stop:
        word, status = ending(stop)
        return _said(f"{word}; the same command goes on where it stopped", status)
    return 0


def _said(line: str, status: int) -> int:
    print(f"spectrim-compress: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
