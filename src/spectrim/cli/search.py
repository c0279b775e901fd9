"""Search settings by optuna: ``spectrim-search --trials 20 SETTING=interval(0.1,0.9) SETTING=1,2,3 ...``.

Each trial is a run of ``spectrim`` with a record. The sampler is seeded, and a recorded run is not run again. So the
same command goes on where it stopped, without a database.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig

from spectrim.cli import messages, streams
from spectrim.cli.messages import LOG, RESULTS
from spectrim.cli.termination import ending, terminable
from spectrim.errors import UserError
from spectrim.runs import configuration
from spectrim.tools import extras
from spectrim.tools.settings import require_seed

METRICS = {"loss": "minimize", "accuracy": "maximize"}


def space(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the words that are fixed, and the distributions of optuna for the settings that are searched.

    The grammar is that of Hydra: ``interval(0.1,1)`` is a real number, ``int(interval(1,10))`` a whole one,
    ``tag(log,interval(1,100))`` one on a logarithmic scale, and ``1,2`` a choice.

    Raises ``UserError`` where nothing is searched.
    """
    fixed, searched = [], {}
    for one in OverridesParser.create().parse_overrides(list(words)):
        if one.is_sweep_override():
            searched[one.get_key_element()] = _distribution(one)
        else:
            fixed.append(str(one.input_line))
    if not searched:
        raise UserError("no setting is searched: give one as SETTING=interval(0.1,0.9) or SETTING=1,2,3")
    return fixed, searched


def _distribution(override: Override) -> Any:
    optuna = extras.imported("optuna", "search", "spectrim-search")
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return optuna.distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
    low, high, log = value.start, value.end, "log" in value.tags
    kind = "IntDistribution" if isinstance(low, int) and isinstance(high, int) else "FloatDistribution"
    try:
        return getattr(optuna.distributions, kind)(low, high, log=log)
    except (ValueError, TypeError) as error:
        raise UserError(f"{override.input_line}: {error}") from error


def search(options: argparse.Namespace) -> list[str]:
    """Run the trials, one after the other. Return the words of the best one.

    A trial that fails, such as one whose budget is out of reach, is told and left out. Raises ``UserError`` where all
    fail, and for a number of trials or a seed that cannot be.
    """
    if options.trials < 1:
        raise UserError(f"--trials {options.trials} is too small; give at least 1")
    require_seed("--seed", options.seed)
    fixed, searched = space(options.overrides)
    optuna = extras.imported("optuna", "search", "spectrim-search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=options.seed)
    study = optuna.create_study(direction=METRICS[options.metric], sampler=sampler)
    fixed = ["name=search", *fixed, f"returns={options.metric}"]
    reason = ""
    for number in range(1, options.trials + 1):
        trial = study.ask(searched)
        words = [f"{key}={value}" for key, value in trial.params.items()]
        try:
            value = _run([*fixed, *words])
        except configuration.MISTAKES as error:
            reason = configuration.innermost(error)
            LOG.warning("trial %d of %d, %s: %s", number, options.trials, " ".join(words), reason)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        study.tell(trial, value)
        said = f"verification {options.metric} {value:.4f}, best {study.best_value:.4f}"
        RESULTS.info("[trial %d of %d] %s: %s", number, options.trials, " ".join(words), said)
    if all(trial.value is None for trial in study.trials):
        raise UserError(f"every trial failed, the last one so: {reason}")
    return [*fixed, *(f"{key}={value}" for key, value in study.best_params.items())]


def _run(words: list[str]) -> float:
    from spectrim.cli import run  # torch takes seconds to import, and help needs none of it

    with _composed(words) as cfg:
        value = run.returned(run.run(cfg), cfg.returns)
    assert value is not None  # ``returns`` is among the words
    return value


@contextmanager
def _composed(words: list[str]) -> Iterator[DictConfig]:
    """Yield the configuration that the command ``spectrim`` would get."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.initialize import initialize_config_dir

    running = HydraConfig.instance()
    before = running.cfg
    try:
        with initialize_config_dir(configuration.CONF, version_base="1.3"):
            cfg = compose("config", words, return_hydra_config=True)
            running.set_config(cfg)
            configuration.check_choices()
            yield cfg
    finally:
        running.cfg = before


def parser() -> messages.Parser:
    """Return the parser of the command line."""
    made = messages.Parser(prog="spectrim-search", description="Search the settings of a run by optuna.").with_version()
    made.add_argument(
        "overrides", nargs="+", metavar="SETTING=VALUE", help="settings; interval(A,B) or A,B,C is searched"
    )
    made.add_argument("--trials", type=int, default=20, help="runs, default %(default)s")
    made.add_argument("--metric", choices=METRICS, default="loss", help="of the verification split, default loss")
    made.add_argument("--seed", type=int, default=0, help="of the sampler, default %(default)s")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of ``spectrim-search``. Return 0, or 1 after a mistake, which is told in one line on stderr."""
    options = parser().parse_args(arguments)
    streams.open_closed()
    messages.configure()
    try:
        with terminable(), redirect_stdout(streams.Outlet(sys.stdout)):
            RESULTS.info("best: %s", shlex.join(["spectrim", *search(options)]))
    except configuration.MISTAKES as error:
        LOG.error(configuration.innermost(error))
        return 1
    except KeyboardInterrupt as stop:
        word, status = ending(stop)
        LOG.error("%s; the same command goes on where it stopped", word)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
