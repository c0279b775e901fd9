"""A misspelt name is answered with the one that was probably meant, and a right one with nothing."""

import inspect

import pytest

import spectrim
from spectrim.tools import spelling
from spectrim.tools.settings import settings

OPTIONS = ["-h", "--help", "-m", "--params-kept", "--out"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "--params-kept", "0.5", "--out=x"], ""),
        (["--params", "0.5", "-h"], ""),  # argparse takes the beginning of an option for the option
        (["--params-kept", "-0.5", "--out", "-"], ""),
        (["--", "--param-kept"], ""),
        (["-mx"], ""),
        (["--out", "x", "--param-kept=1"], "--param-kept is no option (did you mean --params-kept?)"),
        (["--params_kept"], "--params_kept is no option (did you mean --params-kept?)"),
        (["-params-kept"], "-params-kept is no option (did you mean --params-kept?)"),
        (["--zzz"], "--zzz is no option"),
    ],
)
def test_the_first_unknown_option_is_told(words: list[str], said: str) -> None:
    assert spelling.misspelt(words, OPTIONS) == said


@settings
class Chosen:
    """Settings."""

    params_kept: float = 1.0


@spelling.checked("place.function")
def function(first: int, *, params_kept: float = 1.0) -> float:
    """Return the sum."""
    return first + params_kept


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Chosen(param_kept=0.5), "Chosen() got an unexpected keyword argument 'param_kept'"),
        (lambda: function(1, params_keep=0.5), "place.function() got an unexpected keyword argument 'params_keep'"),
        (
            lambda: spectrim.compress(None, params_keep=0.5),
            "spectrim.compress() got an unexpected keyword argument 'params_keep'",
        ),
        (lambda: spectrim.Joint(paramskept=0.5), "Joint() got an unexpected keyword argument 'paramskept'"),
    ],
)
def test_a_misspelt_argument_names_the_one_that_was_meant(call: object, said: str) -> None:
    with pytest.raises(TypeError) as raised:
        call()  # type: ignore[operator]
    assert str(raised.value) == f"{said}. Did you mean 'params_kept'?"


def test_an_argument_that_is_like_none_is_only_refused() -> None:
    with pytest.raises(TypeError, match=r"^place.function\(\) got an unexpected keyword argument 'zzz'$"):
        function(1, zzz=2)  # type: ignore[call-arg]


def test_a_checked_function_is_the_same_to_a_reader() -> None:
    assert function(1, params_kept=0.5) == 1.5 and Chosen(0.5).params_kept == 0.5
    assert list(inspect.signature(function).parameters) == ["first", "params_kept"]
    assert list(inspect.signature(Chosen).parameters) == ["params_kept"]
    assert function.__doc__ == "Return the sum."
