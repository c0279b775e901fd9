"""Texts as tokens: each by itself for classes, in whole blocks for language models; documents stay in their split."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from spectrim.data import imdb, sotu
from spectrim.data.corpus import Corpus
from spectrim.data.imdb import IMDB, IMDBCorpus, divided
from spectrim.data.sotu import SOTU
from spectrim.data.text import TextSplit, blocks, classified
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.losses import token_loss

SMALL: dict[str, Any] = {"context": 8, "held_out": 10, "calibration_size": 5, "verification_size": 3, "test_size": 7}
FEW: dict[str, Any] = {"context": 8, "held_out": 12, "calibration_size": 2, "verification_size": 2, "test_size": 3}
CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture
def folder(word_folder: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a tiny model and its tokenizer; and forty reviews of four words, with their number."""

    def reviews() -> Any:
        return divided({f"review w{n} is w{n % 7}": n % 2 for n in range(40)}, 15)

    monkeypatch.setattr(imdb, "reviews", reviews)
    return str(word_folder)


def numbers(split: TextSplit) -> set[int]:
    """The second token of each text: its number."""
    return set(split.tokens.ids[:, 1].tolist())


def test_each_text_is_cut_off_and_padded_on_the_right(word_folder: Any) -> None:
    tokenizer = pretrained.tokenizer(str(word_folder))
    tokens = classified(tokenizer, ["w1 w2", "w1 w2 w3 w4 w5"], [0, 1], 4)
    assert tokens.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert tokens.ids[0, 2:].tolist() == [tokenizer.pad_token_id] * 2
    assert tokens.labels.tolist() == [0, 1]


def test_blocks_hold_the_documents_one_after_the_other(word_folder: Any) -> None:
    tokenizer = pretrained.tokenizer(str(word_folder))
    documents = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    every, begun = blocks(tokenizer, documents, 4)
    words = tokenizer.convert_ids_to_tokens(every.ids.flatten().tolist())
    assert words == [f"w{n}" for n in range(1, 9)] and begun == 3 and every.ids.shape == (2, 4)
    first, begun = blocks(tokenizer, documents, 4, 1)
    assert torch.equal(first.ids, every.ids[:1]) and begun == 2
    assert torch.equal(first.labels, first.ids) and first.mask.all()
    with pytest.raises(UserError, match="3 blocks of 4 tokens were asked for, the documents hold 9 tokens"):
        blocks(tokenizer, documents, 4, 3)


def test_a_split_is_read_again_and_again_in_batches(folder: str) -> None:
    split = IMDB(tokenizer=folder, **SMALL).load().test
    split = TextSplit(split.make, split.identity, 3)
    assert [len(labels) for _, labels in split] == [3, 3, 1] == [len(labels) for _, labels in split]
    assert len(split) == 3
    inputs, _ = next(iter(split))
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs["input_ids"].shape == (3, 8)


@pytest.mark.parametrize("pool", ["held_out", "train", "test"])
def test_reviews_are_in_one_split_only(folder: str, pool: str) -> None:
    settings: dict[str, Any] = {
        "context": 8,
        "held_out": 10,
        "calibration_size": 5,
        "verification_size": 3,
        "test_size": 15,
    }
    splits = IMDB(tokenizer=folder, **settings, calibration_from=pool).load()
    calibration, verification, train, test = (
        numbers(split) for split in (splits.calibration, splits.verification, splits.train, splits.test)
    )
    assert [len(part) for part in (calibration, verification, train, test)] == [5, 3, 15, 15]
    assert not calibration & verification and not train & test
    assert bool(calibration & train) == (pool == "train") and bool(calibration & test) == (pool == "test")
    assert splits.digest == IMDB(tokenizer=folder, **settings, calibration_from=pool).load().digest
    assert splits.digest != IMDB(tokenizer=folder, **settings | {"context": 7}, calibration_from=pool).load().digest
    assert "train 15, calibration 5, verification 3, test 15" in splits.description


def test_a_text_that_is_there_twice_is_taken_once() -> None:
    train, test = divided(dict([("a", 0), ("b", 1), ("a", 0), ("c", 1)]), 1)
    assert sorted(train[0] + test[0]) == ["a", "b", "c"]


def test_documents_of_a_corpus_are_in_one_split_only(folder: str) -> None:
    corpus = IMDBCorpus(tokenizer=folder, **FEW)
    splits = corpus.load()

    def found(split: TextSplit) -> set[int]:
        tokenizer = pretrained.tokenizer(folder)
        return {int(n) for n in tokenizer.convert_tokens_to_ids(sorted({f"w{i}" for i in range(7, 40)}))} & set(
            split.tokens.ids.flatten().tolist()
        )

    parts = [found(split) for split in (splits.calibration, splits.verification, splits.train, splits.test)]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))
    assert splits.loss is token_loss
    assert "predicted: calibration 14, verification 14, test 21" in splits.description
    other = IMDBCorpus(
        tokenizer=folder,
        context=8,
        held_out=12,
        calibration_size=2,
        verification_size=2,
        test_size=3,
        calibration_seed=1,
    ).load()
    assert not torch.equal(other.calibration.tokens.ids, splits.calibration.tokens.ids)
    assert torch.equal(other.test.tokens.ids, splits.test.tokens.ids)


def test_a_corpus_mixes_its_calibration_blocks_with_those_that_the_model_writes(folder: str) -> None:
    plain, mixed, again = (IMDBCorpus(tokenizer=folder, own_text=count, **FEW).load() for count in (0, 3, 3))
    rows = [tuple(row) for row in plain.calibration.labels.tolist()]
    found = [tuple(row) for row in mixed.calibration.labels.tolist()]
    assert len(found) == len(rows) + 3 and set(rows) < set(found)
    assert mixed.verification.digest() == plain.verification.digest()
    assert mixed.test.digest() == plain.test.digest()
    assert mixed.digest == again.digest != plain.digest
    assert "predicted: calibration 35, " in mixed.description
    assert mixed.description.endswith("3 blocks of the calibration are text that the model wrote itself")
    with pytest.raises(UserError, match="own_text must be at least 0 blocks, got -1"):
        IMDBCorpus(tokenizer=folder, own_text=-1, **FEW)


@pytest.mark.parametrize("kind", [IMDB, IMDBCorpus])
def test_without_verification_there_is_no_batch_of_it(folder: str, kind: Any) -> None:
    splits = kind(tokenizer=folder, **(FEW | {"verification_size": 0})).load()
    assert len(splits.verification) == 0 and not list(splits.verification)


def test_more_blocks_than_there_are_is_said_in_one_line(folder: str) -> None:
    with pytest.raises(UserError, match="imdb_corpus, verification: 9 blocks of 8 tokens were asked for") as refusal:
        IMDBCorpus(
            tokenizer=folder, context=8, held_out=12, calibration_size=2, verification_size=9, test_size=3
        ).load()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", [IMDB, IMDBCorpus])
@pytest.mark.parametrize("context", [1, 33])
def test_a_context_that_the_model_has_no_positions_for_is_refused(folder: str, kind: Any, context: int) -> None:
    with pytest.raises(UserError, match=f"context must lie in 2..32 tokens, .* got {context}"):
        kind(tokenizer=folder, context=context).load()


def test_a_tokenizer_without_padding_is_refused_where_texts_are_padded(folder: str, word_folder: Any) -> None:
    tokenizer = pretrained.tokenizer(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="has no padding token"):
        IMDB(tokenizer=folder, **SMALL).load()
    IMDBCorpus(tokenizer=folder, **FEW).load()


@pytest.mark.parametrize("kind", [IMDB, IMDBCorpus, SOTU])
def test_the_yaml_states_the_class_s_own_defaults(kind: Any) -> None:
    name = getattr(kind, "name", "imdb")
    node = OmegaConf.merge({"model": {"name": kind().tokenizer}}, OmegaConf.load(CONF / f"{name}.yaml"))
    assert instantiate(node.data) == kind()
    unsaid = {"own_text"}  # given as +data.own_text=64; records are signed by what the yaml says
    assert set(node.data) - {"_target_"} == set(inspect.signature(kind).parameters) - unsaid


def test_the_pins_are_whole() -> None:
    for bundle in (imdb.REVIEWS, sotu.SPEECHES, *pretrained.PACKAGED.values()):
        assert all(len(digits) == 64 for digits in (bundle.package.sha256, *bundle.sha256.values()))
    assert issubclass(SOTU, Corpus)
