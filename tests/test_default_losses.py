"""A model of transformers is compressed on the loss that it was trained by, or refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.default_losses import decoder_inputs_of, default_loss
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.statistics.collated import with_decoder_inputs
from spectrim.statistics.objective import Objective

pytest.importorskip("transformers")


def bert(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    library = pretrained.library()
    return library.BertForSequenceClassification(library.BertConfig(vocab_size=30, **sizes, **settings)).eval()


def texts(labels: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(30, (len(labels), 7)), "labels": labels}]


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"num_labels": 3}, torch.tensor([0, 2, 1, 1])),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.tensor([[1.0, 1, 0], [0, 0, 0]])),
        ({"num_labels": 3, "problem_type": "regression"}, torch.randn(4, 3)),
        ({"num_labels": 1, "problem_type": "regression"}, torch.randn(4, 1)),
        ({"num_labels": 1}, torch.randn(4)),
    ],
    ids=["classes", "several classes", "several numbers", "a number", "a number that is not named"],
)
def test_a_classifier_has_the_loss_of_its_problem(settings: Any, labels: Tensor) -> None:
    model, batches = bert(**settings), texts(labels)
    with torch.no_grad():
        expected = float(model(**batches[0]).loss)
    found = Objective(default_loss(model), {"calibration": batches}).evaluate(model).loss
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_decoder_that_reads_images_too_predicts_next_tokens() -> None:
    library = pretrained.library()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = library.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = library.LlamaConfig(**sizes, vocab_size=30)
    config = library.LlavaConfig(vision_config=vision, text_config=text, image_token_index=29, image_seq_length=4)
    torch.manual_seed(0)
    model = library.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(29, (3, 10))
    ids[:, 1:5] = 29
    batch = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 8, 8), "labels": ids.where(ids < 29, -100)}
    with torch.no_grad():
        expected = float(model(**batch).loss)
    found = Objective(default_loss(model), {"calibration": [batch]}).evaluate(model).loss
    assert found == pytest.approx(expected, rel=1e-5)
    result = spectrim.compress(model, calibration=[batch], params_kept=0.7)
    assert any(name.startswith("model.vision_tower.") for name in result.plan)
    for own in (model, result.model):  # its language model reads the last but one state of its vision tower
        states = own.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states  # type: ignore
        assert len(states) == 3


def test_a_writer_without_a_function_of_its_own_has_its_decoder_inputs() -> None:
    sizes = {"vocab_size": 30, "d_model": 16, "num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 10}
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    config = pretrained.library().WhisperConfig(
        **sizes,
        **dict.fromkeys(names, 1),
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    model = pretrained.library().WhisperForConditionalGeneration(config).eval()
    assert not hasattr(model, "prepare_decoder_input_ids_from_labels")
    labels = torch.randint(3, 30, (2, 6))
    labels[1, 4:] = -100
    batch = {"input_features": torch.randn(2, 4, 20), "labels": labels}
    with torch.no_grad():
        expected = float(model(**batch).loss)
    found = Objective(default_loss(model), {"calibration": with_decoder_inputs([batch], model)}).evaluate(model).loss
    assert found == pytest.approx(expected, rel=1e-5)
    assert labels[1, 4:].tolist() == [-100, -100]


def test_a_model_that_writes_nothing_has_no_decoder_inputs() -> None:
    assert decoder_inputs_of(bert()) is None and decoder_inputs_of(nn.Linear(2, 2)) is None


def test_cross_entropy_of_what_is_no_probability_is_refused_with_what_to_give() -> None:
    model, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)), torch.randn(8, 6)
    several = (torch.rand(8, 5) < 0.4).float()
    several[0] = 1
    for targets in (several, several.long(), torch.randn(8, 5)):
        with pytest.raises(UserError, match=r"^cross-entropy takes classes.*give loss=, such as torch.nn.BCE"):
            spectrim.compress(model, calibration=[(x, targets)], params_kept=0.8)
    soft = torch.randn(8, 5).softmax(1)
    assert Objective(F.cross_entropy, {"calibration": [(x, soft)]}).evaluate(model).loss == pytest.approx(
        F.cross_entropy(model(x), soft).item()
    )
    given = spectrim.compress(model, calibration=[(x, several)], loss=nn.BCEWithLogitsLoss(), params_kept=0.8)
    assert given.params_kept <= 0.8
