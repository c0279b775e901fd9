"""Padding counts in no moment, even where a row of another sequence lies at the same place."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.statistics.input_moments import input_moments
from spectrim.statistics.objective import Objective
from spectrim.statistics.padding import padding_of
from spectrim.tools.hooks import hooked

WORDS, WIDTH = 20, 8


class Sides(nn.Module):
    """An encoder and a decoder that attends to it, with one embedding, or an encoder of texts and one of images."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.encoder, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.decoder = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.patches = nn.Linear(3, WIDTH)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        text = self.norm(self.encoder(self.words(input_ids)))
        if image is not None:
            return text.mean(1) + self.patches(image).mean(1)
        assert decoder_input_ids is not None
        scores = self.q(self.words(decoder_input_ids)) @ self.k(text).mT
        weights = scores.masked_fill(attention_mask.unsqueeze(1) == 0, float("-inf")).softmax(-1)
        return self.decoder(weights @ self.v(text))


TEXT, DECODER = ("encoder", "k", "v"), ("q", "decoder")


def mask_of(*lengths: int) -> Tensor:
    return (torch.arange(6) < torch.tensor(lengths).unsqueeze(1)).long()


def batch(length: int, decoder_mask: bool) -> dict[str, Tensor]:
    mask = mask_of(6, 3, 2)
    inputs = {
        "input_ids": torch.randint(1, WORDS, (3, 6)) * mask,
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(1, WORDS, (3, length)),
    }
    if decoder_mask:
        inputs["decoder_attention_mask"] = mask_of(4, 6, 5)[:, :length]
        inputs["decoder_input_ids"] *= inputs["decoder_attention_mask"]
    return inputs


def moments(model: nn.Module, inputs: Any, names: Any) -> dict[str, Tensor]:
    objective = Objective(F.cross_entropy, {"calibration": [(inputs, None)]})
    found = input_moments(model, {name: ["linear"] for name in names}, objective, 3)
    return {name: own["linear"] for name, own in found.items()}


def by_hand(model: nn.Module, inputs: dict[str, Tensor], masks: dict[str, Tensor | None]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def noting(name: str) -> Any:
        return lambda _, args, __: seen.update({name: args[0].detach().double()})

    with hooked(before=[(model.get_submodule(name), noting(name)) for name in masks]):
        model(**inputs)
    rows = {
        name: x.flatten(0, 1) if masks[name] is None else x[masks[name].bool()]  # type: ignore[union-attr]
        for name, x in seen.items()
    }
    return {name: (own.T @ own / len(own)).unsqueeze(0) for name, own in rows.items()}


def require_those_by_hand(model: Any, inputs: Any, masks: Any) -> None:
    expected = by_hand(model, inputs, masks)
    for name, moment in moments(model, inputs, masks).items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("length", [5, 6], ids=["shorter decoder", "as long a decoder"])
@pytest.mark.parametrize("decoder_mask", [False, True])
def test_each_side_leaves_out_its_own_padding(length: int, decoder_mask: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Sides(), batch(length, decoder_mask)
    masks = {name: inputs["attention_mask"] for name in TEXT}
    masks |= {name: inputs.get("decoder_attention_mask") for name in DECODER}
    require_those_by_hand(model, inputs, masks)


def test_a_shared_embedding_counts_the_ids_of_both_sides() -> None:
    torch.manual_seed(0)
    model, inputs = Sides(), batch(6, True)
    ids = torch.cat([inputs["input_ids"][mask_of(6, 3, 2) == 1], inputs["decoder_input_ids"][mask_of(4, 6, 5) == 1]])
    padding = padding_of(model.eval(), [model.words], inputs)
    taken = []

    def note(layer: nn.Module, args: tuple, _: dict[str, Any]) -> None:
        mask = padding.at_next_call(layer, args[0].shape)
        assert mask is not None
        taken.append(args[0][mask.bool()])

    with hooked(before=[(model.words, note)]):
        model(**inputs)
    assert torch.cat(taken).equal(ids)


def test_the_patches_of_an_image_are_no_padding_of_a_text_of_their_number() -> None:
    torch.manual_seed(0)
    model, inputs = Sides(), {**batch(6, False), "image": torch.randn(3, 6, 3)}
    del inputs["decoder_input_ids"]
    masks = {"encoder": inputs["attention_mask"], "patches": None}
    require_those_by_hand(model, inputs, masks)


def test_what_lies_at_padding_changes_no_moment_of_the_decoder() -> None:
    torch.manual_seed(0)
    model, inputs = Sides(), batch(6, True)
    first = moments(model, inputs, (*TEXT, *DECODER))
    mask = inputs["attention_mask"]
    other = {**inputs, "input_ids": torch.where(mask == 1, inputs["input_ids"], WORDS - 1)}
    for name, moment in moments(model, other, (*TEXT, *DECODER)).items():
        torch.testing.assert_close(moment, first[name], msg=name)


def test_choices_that_a_model_folds_into_the_samples_leave_out_their_padding() -> None:
    class Choices(Sides):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return self.encoder(self.words(input_ids.flatten(0, 1)))

    torch.manual_seed(0)
    model, mask = Choices(), mask_of(6, 3, 2, 5).unflatten(0, (2, 2))
    inputs = {"input_ids": torch.randint(WORDS, (2, 2, 6)), "attention_mask": mask}
    x = model.words(inputs["input_ids"])[mask.bool()].double()
    found = moments(model, inputs, ["encoder"])["encoder"]
    torch.testing.assert_close(found[0], x.T @ x / len(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [5, 6], ids=["shorter decoder", "as long a decoder"])
def test_a_mask_may_be_given_by_its_position(length: int) -> None:
    torch.manual_seed(0)
    model, inputs, names = Sides(), batch(length, True), (*TEXT, *DECODER)
    by_name, by_position = (moments(model, own, names) for own in (inputs, tuple(inputs.values())))
    for name in names:
        assert by_position[name].equal(by_name[name])


def test_what_lies_at_padding_changes_no_fit() -> None:
    torch.manual_seed(0)
    model, inputs, targets = Sides(), batch(6, True), torch.randn(3, 6, WIDTH)
    mask, decoder_mask = inputs["attention_mask"], inputs["decoder_attention_mask"]
    other = {**inputs, "input_ids": torch.where(mask == 1, inputs["input_ids"], WORDS - 1)}
    other["decoder_input_ids"] = torch.where(decoder_mask == 1, inputs["decoder_input_ids"], WORDS - 1)

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        return ((outputs - wanted).square().mean(-1) * decoder_mask).sum() / decoder_mask.sum()

    first, second = (
        spectrim.compress(model, calibration=[(own, targets)], loss=loss, params_kept=0.8) for own in (inputs, other)
    )
    assert first.plan == second.plan and {"decoder", "encoder"} & set(first.plan)
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
