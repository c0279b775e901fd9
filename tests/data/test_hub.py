"""Data sets by the library ``datasets``: folders of the form that those of the hub have."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from spectrim.data.hub import HubAnswers, HubClasses, HubCorpus
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.losses import span_loss

datasets = pytest.importorskip("datasets")
CONF = Path(__file__).parents[2] / "conf" / "data"
SIZES: dict[str, Any] = {"context": 8, "held_out": 6, "calibration_size": 2, "verification_size": 2, "test_size": 3}
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def made(folder: Path, **parts: Rows) -> str:
    """A folder with one file of rows a part, such as a data set of the hub consists of."""
    folder.mkdir()
    for part, rows in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def glue(tmp_path: Path) -> str:
    """Twelve labelled pairs of texts that are sorted by class, and four to be tested on."""
    rows = [{"sentence": f"w{n} is", "other": f"review w{n}", "label": int(n >= 6)} for n in range(16)]
    return made(tmp_path / "glue", train=rows[:12], validation=rows[12:])


def classes(folder: str, tokenizer: Path, **others: Any) -> HubClasses:
    return HubClasses(dataset=folder, subset="", tokenizer=str(tokenizer), **(SIZES | others))


def corpus(folder: str, tokenizer: Path, **others: Any) -> HubCorpus:
    return HubCorpus(dataset=folder, subset="", tokenizer=str(tokenizer), **(SIZES | others))


def test_texts_come_with_their_labels_each_in_one_split(glue: str, word_folder: Path) -> None:
    splits = classes(glue, word_folder).load()
    tokenizer = pretrained.tokenizer(str(word_folder))
    seen: list[str] = []
    for split in (splits.train, splits.calibration, splits.verification, splits.test):
        words = tokenizer.convert_ids_to_tokens(split.tokens.ids[:, 0].tolist())
        assert split.labels.tolist() == [int(int(word[1:]) >= 6) for word in words]
        seen += words
    assert len(seen) == len(set(seen)) == 6 + 2 + 2 + 3
    assert splits.description.startswith(f"{glue}, texts cut off after 8 tokens")
    assert splits.digest == classes(glue, word_folder).load().digest


def test_two_texts_are_one_with_a_separator_between(glue: str, word_folder: Path) -> None:
    tokenizer = pretrained.tokenizer(str(word_folder))
    tokenizer.sep_token = "[UNK]"
    tokenizer.save_pretrained(word_folder)
    test = classes(glue, word_folder, second="other").load().test
    for ids, mask in zip(test.tokens.ids, test.tokens.mask, strict=True):
        number, *rest = tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())
        assert rest == ["is", "[UNK]", "review", number]


@pytest.fixture
def wikitext(tmp_path: Path) -> str:
    """Articles of a title and two lines, with blank rows; the last one is in both parts."""

    def articles(numbers: range) -> Rows:
        lines = [
            line for n in numbers for line in (f" = w{n} = \n", "", f"w{n} is w{n}\n", f" = = w{n} = = \n", "review\n")
        ]
        return [{"text": line} for line in ["", *lines]]

    return made(tmp_path / "wikitext", train=articles(range(20)), test=articles(range(19, 30)))


def test_a_document_begins_at_its_title(wikitext: str, word_folder: Path) -> None:
    data = corpus(wikitext, word_folder)
    train, test = data.documents()
    assert sorted(train) == sorted(f" = w{n} = \nw{n} is w{n}\n = = w{n} = = \nreview\n" for n in range(19))
    assert len(test) == 11 and not set(train) & set(test)
    splits = data.load()
    assert splits.test.tokens.ids.shape == (3, 8) and len(splits.calibration.labels) == 2
    assert torch.equal(data.load().calibration.tokens.ids, splits.calibration.tokens.ids)


def test_without_titles_each_row_is_a_document_taken_once(tmp_path: Path, word_folder: Path) -> None:
    rows: Rows = [{"context": f"w{n // 2}", "question": "is"} for n in range(20)]
    folder = made(tmp_path / "squad", train=rows, validation=rows[18:])
    train, test = corpus(folder, word_folder, text="context", begins="", test_part="validation").documents()
    assert sorted(train) == [f"w{n}" for n in range(9)] and test == ["w9"]


def question(number: int, answer: str, **others: Any) -> dict[str, Any]:
    text = f"w1 is w{number} review w7"
    start = text.index(answer) if answer else 0
    answers = {"text": [answer] if answer else [], "answer_start": [start] if answer else []}
    return {"question": f"is w{number}", "context": text, "answers": answers} | others


@pytest.fixture
def squad(tmp_path: Path) -> str:
    """Fourteen questions whose answer is one word or two of their text, and one without."""
    rows = [question(n, f"w{n} review" if n % 2 else f"w{n}") for n in range(10, 24)]
    return made(tmp_path / "squad", train=rows[:11], validation=[*rows[11:], question(30, "")])


def answers(folder: str, tokenizer: Path, **others: Any) -> HubAnswers:
    return HubAnswers(dataset=folder, tokenizer=str(tokenizer), **(SIZES | {"test_size": 4} | others))


def test_answers_are_the_tokens_of_their_characters(squad: str, word_folder: Path) -> None:
    splits, tokenizer = answers(squad, word_folder).load(), pretrained.tokenizer(str(word_folder))
    found = {}
    for split in (splits.train, splits.calibration, splits.verification, splits.test):
        for inputs, labels in split:
            assert set(inputs) == {"input_ids", "attention_mask"}
            for ids, (first, last) in zip(inputs["input_ids"], labels.tolist(), strict=True):
                words = tokenizer.convert_ids_to_tokens(ids)
                found[words[1]] = words[first : last + 1] if last else []
    meant = {f"w{n}": [f"w{n}", "review"] if n % 2 else [f"w{n}"] for n in range(10, 24)} | {"w30": []}
    assert found.items() <= meant.items() and len(found) == 5 + 2 + 2 + 4
    assert splits.loss is span_loss and splits.digest == answers(squad, word_folder).load().digest


def test_a_tokenizer_that_tells_question_and_text_apart_is_listened_to(squad: str, word_folder: Path) -> None:
    path = word_folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    inputs, _ = next(iter(answers(squad, word_folder).load().test))
    assert inputs["token_type_ids"][:, :7].tolist() == [[0, 0, 1, 1, 1, 1, 1]] * 4


def test_an_answer_that_is_cut_off_counts_as_none(squad: str, word_folder: Path) -> None:
    whole, short = (answers(squad, word_folder, context=size).load().test.labels for size in (8, 5))
    assert (whole[:, 1] == 6 - 1).any() and short[whole[:, 1] >= 5].eq(0).all()
    assert short[whole[:, 1] < 5].equal(whole[whole[:, 1] < 5])


@pytest.mark.parametrize("broken", ["w10", {"text": ["w10"]}, {"text": ["w10"], "answer_start": []}])
def test_answers_of_another_form_are_refused(tmp_path: Path, word_folder: Path, broken: Any) -> None:
    rows = [question(n, "", answers=broken) for n in range(10, 20)]
    with pytest.raises(UserError, match="is not of type dict|answers of row 0 are no lists of text and answer_start"):
        answers(made(tmp_path / "broken", train=rows, validation=rows), word_folder).load()


def test_what_is_not_there_is_said_in_one_line(
    glue: str, wikitext: str, word_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(message: str, data: Any) -> None:
        with pytest.raises(UserError, match=message) as refusal:
            data.load()
        assert "\n" not in str(refusal.value)

    refuses("has no column 'text'; it has sentence, other, label", classes(glue, word_folder, text="text"))
    refuses("column 'sentence', row 0: 'w0 is' is not of type int", classes(glue, word_folder, label="sentence"))
    refuses("column 'label', row 0: 0 is not of type str", corpus(glue, word_folder, text="label"))
    refuses("test_size must lie in 1..4, got 5", classes(glue, word_folder, test_size=5))
    refuses("part test of .*glue cannot be had from datasets: ", classes(glue, word_folder, test_part="test"))
    refuses("nothing cannot be had from datasets: ", classes(str(tmp_path / "nothing"), word_folder))
    wrong = HubClasses(dataset=glue, subset="sst2", tokenizer=str(word_folder), **SIZES)
    refuses("part train of .*glue, subset sst2 cannot be had from datasets: ", wrong)
    hidden = made(tmp_path / "hidden", train=[{"sentence": "w1", "label": -1}])
    refuses("has texts without a label; name another test_part", classes(hidden, word_folder))
    broken = Path(made(tmp_path / "broken", train=[]))
    (broken / "train.jsonl").write_text('{"sentence": "w1", "lab')
    refuses("part train of .*broken cannot be had from datasets: ", classes(str(broken), word_folder))

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nin five tries")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refuses("wikitext cannot be had from datasets: Couldn't reach the hub$", corpus(wikitext, word_folder))


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="begins is not a pattern"):
        HubCorpus(begins="(")


def test_the_missing_library_is_said_in_one_line(word_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs extra packages") as refusal:
        classes("nothing", word_folder).load()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "kind"), [("glue", HubClasses), ("wikitext", HubCorpus), ("squad", HubAnswers), ("squad_text", HubCorpus)]
)
def test_the_yaml_states_every_setting(file: str, kind: Any) -> None:
    node = OmegaConf.merge({"model": {"name": kind().tokenizer}}, OmegaConf.load(CONF / f"{file}.yaml"))
    data = instantiate(node.data)
    unsaid = {"own_text"}  # given as +data.own_text=64; records are signed by what the yaml says
    assert type(data) is kind and set(node.data) - {"_target_"} == set(inspect.signature(kind).parameters) - unsaid
    assert data == kind() or file == "squad_text"
