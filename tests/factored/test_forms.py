"""A form is a value: its text in JSON gives it back, and it makes the layers that a dense layer can take."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spectrim.errors import UserError
from spectrim.factored.forms import EmbeddingForm, Form, PivotedForm, PlainForm, TuckerForm
from spectrim.factored.layers import TuckerConv2d

VIEWS = ("linear", "channel", "spatial", "vertical")
counts = st.integers(1, 10**6)
forms = (
    st.builds(PlainForm, st.sampled_from(VIEWS), counts)
    | st.builds(PivotedForm, st.sampled_from(VIEWS[:3]))
    | st.builds(EmbeddingForm, st.integers(0, 10**6), st.booleans())
    | st.builds(TuckerForm, counts, counts)
)
# The texts of the files and records that exist.
WRITTEN = {
    "linear": PlainForm("linear"),
    "linear in 8": PlainForm("linear", 8),
    "channel": PlainForm("channel"),
    "channel in 4": PlainForm("channel", 4),
    "spatial in 2": PlainForm("spatial", 2),
    "vertical": PlainForm("vertical"),
    "embedding": EmbeddingForm(),
    "embedding but 3988": EmbeddingForm(3988),
    "pivoted spatial": PivotedForm("spatial"),
    "pivoted embedding but 7": EmbeddingForm(7, pivoted=True),
    "tucker 12x7": TuckerForm(12, 7),
}
NONSENSE = [
    *("", "Linear", "linear ", " linear", "linear\n", "channel in 1", "channel in 0", "channel in x", "channel in 02"),
    *("channel in -2", "channel in 2 in 2", "tucker", "tucker 0x2", "tucker 2x", "tucker 2x2 in 2", "tucker ٣x٣"),
    *(
        "embedding but 0",
        "embedding but",
        "pivoted vertical",
        "pivoted",
        "pivoted linear in 2",
        "channel in " + "9" * 5000,
        "tucker 2x" + "9" * 5000,
    ),
    *("pivoted vertical", "pivoted", "pivoted linear in 2", "pivoted tucker 2x2"),
    *("embedding but " + "9" * 5000, "9" * 5000, "x\n" * 500, None, 3, ["linear"], {"view": "linear"}),
]


@given(forms)
def test_text_gives_the_form_back(form: Form) -> None:
    assert Form.from_text(form.to_text()) == form


@pytest.mark.parametrize("text", WRITTEN)
def test_what_was_written_is_read_and_written_alike(text: str) -> None:
    assert Form.from_text(text) == WRITTEN[text] and WRITTEN[text].to_text() == text


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_any_other_text_is_refused_in_one_short_line(text: Any) -> None:
    with pytest.raises(UserError, match="is no form of a factored layer") as refusal:
        Form.from_text(text)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 100


@given(st.text())
def test_random_text_is_a_form_or_refused(text: str) -> None:
    try:
        assert Form.from_text(text).to_text() == text
    except UserError as refusal:
        assert len(str(refusal).splitlines()) == 1


def filled(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("form", [PlainForm("channel"), PlainForm("spatial"), TuckerForm(2, 1)], ids=Form.to_text)
@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
@pytest.mark.parametrize("padding", [0, 1, (2, 1)])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
def test_output_has_the_dense_shape(form: Form, stride: int, padding: int, dilation: int) -> None:
    dense = nn.Conv2d(4, 6, (3, 2), stride, padding, dilation, groups=2)
    x = torch.randn(2, 4, 11, 10)
    assert filled(form.layer_for(dense, 1))(x).shape == dense(x).shape


@pytest.mark.parametrize(
    ("dense", "form"),
    [
        (nn.Linear(3, 3), PlainForm("linear")),
        (nn.Conv2d(3, 3, 3), PlainForm("spatial")),
        (nn.Conv2d(3, 3, 3), TuckerForm(2, 1)),
        (nn.Embedding(5, 3), EmbeddingForm(2)),
    ],
)
def test_precision_and_device_are_the_dense_ones(dense: nn.Module, form: Form) -> None:
    layer = form.layer_for(dense.to(torch.float64), 1)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {p.device.type for p in form.layer_for(dense.to("meta"), 1).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("dense", "form", "said"),
    [
        (nn.Linear(3, 3), PlainForm("channel"), "a Linear has no factored form 'channel'"),
        (nn.Conv2d(3, 3, 3), PlainForm("linear"), "a Conv2d has no factored form 'linear'"),
        (nn.Conv2d(3, 3, 3), EmbeddingForm(), "a Conv2d has no factored form 'embedding'"),
        (nn.Embedding(3, 3), PlainForm("linear"), "an Embedding has no factored form 'linear'"),
        (nn.Linear(3, 3), TuckerForm(2, 2), "a Linear has no factored form 'tucker 2x2'"),
        (nn.Conv2d(3, 3, 3), TuckerForm(0, 2), "rank 0 of form 'tucker 0x2' is below 1"),
        (nn.Conv2d(3, 4, 3), PlainForm("channel", 2), "the 3 inputs of a Conv2d cannot be split into 2 subspaces"),
        (nn.ReLU(), PlainForm("linear"), "can be factored, not a ReLU"),
    ],
)
def test_a_form_that_the_layer_cannot_take_is_refused(dense: nn.Module, form: Form, said: str) -> None:
    with pytest.raises(UserError, match=said):
        form.layer_for(dense, 1)


@pytest.mark.parametrize("rank", [10**9, 2**64, 10**4000])
@pytest.mark.parametrize(
    ("dense", "form"),
    [
        (nn.Linear(6, 4), "linear"),
        (nn.Linear(6, 4), "linear in 2"),
        (nn.Conv2d(4, 6, 3), "channel"),
        (nn.Conv2d(4, 6, 3), "spatial"),
        (nn.Conv2d(4, 6, 1), "vertical"),
        (nn.Embedding(9, 4), "embedding"),
    ],
)
def test_a_rank_beyond_the_layer_is_refused_before_memory_is_taken(dense: nn.Module, form: str, rank: int) -> None:
    with pytest.raises(UserError, match="rank .* is above the full rank of this layer") as refusal:
        Form.from_text(form).layer_for(dense, rank)
    assert len(str(refusal.value)) < 150


@pytest.mark.parametrize(
    ("dense", "form", "most"),
    [
        (nn.Linear(6, 4), "linear", 4),
        (nn.Linear(6, 4), "linear in 2", 3),
        (nn.Conv2d(4, 60, 3, groups=2), "channel", 18),
        (nn.Conv2d(4, 60, (5, 3), groups=2), "spatial", 6),
        (nn.Conv2d(4, 60, (5, 3), groups=2), "vertical", 10),
        (nn.Embedding(9, 4), "embedding but 6", 3),
    ],
)
def test_the_full_rank_of_each_form_is_the_smaller_side_of_its_matrix(dense: nn.Module, form: str, most: int) -> None:
    assert Form.from_text(form).layer_for(dense, most).rank == most
    with pytest.raises(UserError, match=f"the full rank of this layer, {most}$"):
        Form.from_text(form).layer_for(dense, most + 1)


def test_a_tucker_form_beyond_the_layer_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(UserError, match=r"is above the full rank"):
        TuckerForm(2, 10**9).layer_for(nn.Conv2d(4, 6, 3), 2)


@pytest.mark.parametrize(("outputs", "inputs", "kept"), [(16, 64, (12, 40)), (2, 64, (2, 18))])
def test_a_tucker_plan_may_keep_more_directions_than_the_other_side_has(
    outputs: int, inputs: int, kept: tuple[int, int]
) -> None:
    layer = TuckerForm(*kept).layer_for(nn.Conv2d(inputs, outputs, 3), sum(kept) - 1)
    assert isinstance(layer, TuckerConv2d) and layer.second.weight.shape == (*kept, 3, 3)
