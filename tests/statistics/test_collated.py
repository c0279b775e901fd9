"""A dataset of single samples and a collator, as users of ``Trainer`` have them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import spectrim
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.statistics.collated import collated

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
        UserError, match=r"^a batch of the calibration set is a mapping without a tensor \(input_ids, "
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
