"""A dataset of single samples and a collator, as users of ``Trainer`` have them."""

import copy
from collections.abc import Sized
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import spectrim
from spectrim.default_losses import default_loss
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.statistics.collated import collated, with_decoder_inputs
from spectrim.statistics.objective import Objective

ROWS = [{"input_ids": list(range(3, 3 + n)), "note": f"row {n}", "row": n} for n in (4, 9, 12, 5, 7)]


def tokenizer(word_folder: Any) -> Any:
    return pretrained.library().AutoTokenizer.from_pretrained(word_folder)


def test_a_dataset_of_mappings_is_compressed_as_its_batches_are(tiny: Any, word_folder: Any) -> None:
    model = tiny("llama")
    collator = pretrained.library().DataCollatorForLanguageModeling(tokenizer(word_folder), mlm=False)
    batches = [collator([{"input_ids": row["input_ids"]} for row in ROWS[at : at + 2]]) for at in (0, 2, 4)]
    choice: Any = {"algorithm": spectrim.Joint(params_kept=0.8, samples=5, refit=5)}
    ours = spectrim.compress(model, calibration=ROWS, collator=collator, batch_size=2, **choice)  # type: ignore[arg-type]
    theirs = spectrim.compress(copy.deepcopy(model), calibration=batches, **choice)  # type: ignore[arg-type]
    assert ours.plan == theirs.plan and ours.params_kept < 0.81
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name])


def test_a_dataset_without_a_collator_is_said(tiny: Any) -> None:
    with pytest.raises(
        UserError, match=r"^a batch of the calibration split is a mapping without a tensor \(input_ids, "
    ) as no:
        spectrim.compress(tiny("llama"), calibration=ROWS)  # type: ignore[arg-type]
    assert "collator=" in str(no.value) and "\n" not in str(no.value)


def test_a_collator_that_tokenizes_gets_the_whole_sample() -> None:
    seen: list[Any] = []
    loader = collated(
        [{"text": "a", "row": 1}], lambda samples: seen.extend(samples) or torch.ones(1), 1, nn.Linear(1, 1)
    )
    list(loader)
    assert seen == [{"text": "a", "row": 1}]


def test_samples_that_are_pairs_need_no_names(net: nn.Module, batches: Any) -> None:
    samples = [(image, int(label)) for inputs, labels in batches for image, label in zip(inputs, labels, strict=True)]
    collator = torch.utils.data.default_collate
    by_samples = spectrim.compress(net, calibration=samples, collator=collator, batch_size=13)  # type: ignore[arg-type]
    assert by_samples.plan == spectrim.compress(net, calibration=batches).plan


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"collator": 3}, "collator=3 cannot be called"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"dataset": DataLoader([1, 2])}, "a DataLoader has a collator of its own"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    given = {"dataset": ROWS, "collator": list, "batch_size": 2, "model": nn.Linear(1, 1)} | changes
    with pytest.raises(UserError, match=said) as refusal:
        collated(**given)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def bart(tiny: Any) -> nn.Module:
    """A tiny encoder-decoder."""
    transformers = pretrained.library()
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in LAYERS.items()}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.BartConfig(vocab_size=60, d_model=24, max_position_embeddings=32, **sides, **special)
    return transformers.BartForConditionalGeneration(config).eval()


LAYERS = {"layers": 1, "attention_heads": 2, "ffn_dim": 40}


@pytest.mark.parametrize("length", [5, 8])  # the labels may be as long as the inputs, or not
def test_an_encoder_decoder_is_compressed_on_labels_as_its_own_loss_reads_them(bart: Any, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(3, 60, (4, 8), generator=generator), "labels": labels.clone()}
        for labels in torch.randint(3, 60, (2, 4, length), generator=generator)
    ]
    batches[1]["labels"][0, -2:] = -100
    with torch.no_grad():
        own = [float(bart(**batch).loss) for batch in batches]
    objective = Objective(default_loss(bart), {"calibration": with_decoder_inputs(batches, bart)})
    counts = [4 * length, 4 * length - 2]
    expected = sum(loss * count for loss, count in zip(own, counts, strict=True)) / sum(counts)
    assert objective.evaluate(bart, "calibration").loss == pytest.approx(expected, rel=1e-5)
    result = spectrim.compress(bart, calibration=batches, algorithm=spectrim.Joint(params_kept=0.8, samples=8, refit=8))
    assert result.params_kept <= 0.8 and "model.decoder.layers.0.encoder_attn.q_proj" in result.report.layer.tolist()


def test_decoder_inputs_that_are_given_stay_and_other_models_get_their_batches(bart: Any, tiny: Any) -> None:
    given = [{"input_ids": torch.ones(1, 2), "decoder_input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)}]
    filled = with_decoder_inputs(given, bart)
    assert list(filled) == given and len(filled) == 1  # type: ignore[arg-type]
    assert not isinstance(with_decoder_inputs((batch for batch in given), bart), Sized)
    assert with_decoder_inputs(given, tiny("llama")) is given
