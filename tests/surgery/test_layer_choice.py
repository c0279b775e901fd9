"""Layers that the user names: by name, by glob, by regular expression, or by a module around them."""

from typing import Any

import pytest
from torch import nn

from spectrim.errors import UserError
from spectrim.surgery.find_layers import factorable
from spectrim.surgery.layer_choice import LayerChoice


def block() -> nn.Module:
    return nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"body": nn.ModuleList([block(), block()]), "head": nn.Linear(8, 4)})


ALL = ["body.0.up", "body.0.down", "body.1.up", "body.1.down", "head"]


def chosen(model: nn.Module, include: Any = None, exclude: Any = ()) -> list[str]:
    return list(factorable(model, None, choice=LayerChoice.of(include, exclude, {}))[0])


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        (["head"], ["head"]),
        (["body"], ALL[:4]),
        (["body.1"], ALL[2:4]),
        (["*.up"], ["body.0.up", "body.1.up"]),
        (["body.[0].*", "head"], ["body.0.up", "body.0.down", "head"]),
        (["re:.*down$"], ["body.0.down", "body.1.down"]),
        (["re:body\\.1"], ALL[2:4]),
    ],
)
def test_a_pattern_includes_and_excludes_the_same_layers(model: nn.Module, patterns: list[str], named: Any) -> None:
    assert chosen(model, include=patterns) == named
    assert chosen(model, exclude=patterns) == [name for name in ALL if name not in named]


def test_exclude_wins_over_include(model: nn.Module) -> None:
    assert chosen(model, include=["body"], exclude=["*.up"]) == ["body.0.down", "body.1.down"]


def test_the_reason_names_the_argument(model: nn.Module) -> None:
    assert factorable(model, None, choice=LayerChoice.of(["body"], ["*.up"], {}))[1] == {
        "body.0.up": "exclude= names it",
        "body.1.up": "exclude= names it",
        "head": "include= does not name it",
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"exclude": ["hed"]}, "^exclude: 'hed' matches no module of this model, whose modules are body, body.0, "),
        ({"include": ["re:hed"]}, "^include: 're:hed' matches no module"),
        ({"overrides": {"hed": 2}}, "^overrides: 'hed' is no layer of this model, whose modules are"),
    ],
)
def test_a_name_that_is_unknown_is_refused(model: nn.Module, given: dict, said: str) -> None:
    choice = LayerChoice.of(given.get("include"), given.get("exclude", ()), given.get("overrides", {}))
    with pytest.raises(UserError, match=said):
        factorable(model, None, choice=choice)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, "head", {}), "^exclude='head' is no list of names"),
        ((None, [3], {}), "^exclude=.* is no list of names"),
        (("head", [], {}), "^include='head' is no list of names"),
        (([], ["re:("], {}), r"^exclude: 're:\(' is no regular expression"),
        (([], [], {"head": 0}), r"^overrides\['head'\]=0 is not a rank"),
        (([], [], {"head": True}), r"^overrides\['head'\]=True is not a rank"),
    ],
)
def test_what_is_no_choice_is_refused(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        LayerChoice.of(*given)
