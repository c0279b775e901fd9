"""``spectrim-compress``: one model in, one folder out, or one line that says what to do."""

import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import spectrim
from spectrim import api, language
from spectrim.checkpoints import sharded
from spectrim.cli import compressing, given_data, given_model, model_card
from spectrim.cli.compress import main, parser
from spectrim.data.own_text import own_text
from spectrim.errors import MissingInput, UserError
from spectrim.fetch import pretrained

FACTORY = """
import torch
from torch import nn

def build(classes=3, width=12):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, classes))

def broken():
    raise RuntimeError("no such thing")

def number():
    return 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a module with factories, images of three classes, a text, and weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_nets.py").write_text(FACTORY)
    generator = torch.Generator().manual_seed(0)
    for n in range(24):
        folder = tmp_path / "images" / f"class{n % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{n}.png")
    words = torch.randint(0, 50, (60, 20), generator=generator).tolist()
    (tmp_path / "text.txt").write_text("\n".join(" ".join(f"w{n}" for n in line) for line in words))
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    save_file(namespace["build"]().state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


IMAGES = [
    *("own_nets:build", "--weights", "weights.safetensors", "--calibration", "images", "--image-size", "16"),
    *("--samples", "10", "--params-kept", "0.6"),
]


def text_command(folder: Path) -> list[str]:
    return [str(folder), *["--calibration", "text.txt", "--context", "12", "--samples", "12", "--params-kept", "0.8"]]


def answers(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.inference_mode():
        return model(*args, **kwargs)


def test_a_decoder_is_written_to_a_folder_that_loads(
    word_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*text_command(word_folder), "--out", "small"]) == 0
    said = capsys.readouterr().out
    assert "parameters: " in said and "perplexity: " in said and "written to small; small/README.md says" in said
    model, tokenizer = language.load("small")
    ids = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    again = pretrained.library().AutoModelForCausalLM.from_pretrained("small").eval()
    assert torch.equal(answers(model, input_ids=ids).logits, answers(again, input_ids=ids).logits)
    dense = pretrained.library().AutoModelForCausalLM.from_pretrained(word_folder)
    kept = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
    assert 0.7 < kept <= 0.8
    card = (place / "small" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and f"{100 * kept:.1f} % of the parameters" in card
    assert f"spectrim-compress {word_folder} --calibration text.txt" in card and "base_model" not in card
    assert "| loss, nats a token | " in card and "predicted tokens of the calibration data that chose nothing" in card
    assert "read: model.safetensors (sha256 " in card and "software: spectrim " in card
    report = pd.read_csv(place / "small" / "report.csv")
    assert report["params_after"].sum() < report["params_before"].sum()
    assert not (place / "small.unfinished").exists()


def test_a_decoder_needs_no_data_but_its_own_text(word_folder: Path, place: Path) -> None:
    command = text_command(word_folder)
    command[command.index("--calibration") + 1] = "own-text"
    assert main([*command, "--out", "small"]) == 0
    said = "text that the model wrote itself: "
    assert said in (place / "small" / "README.md").read_text()


def test_a_dry_run_writes_few_blocks_of_its_own_text(
    word_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []

    def counting(model: nn.Module, blocks: int, *rest: Any) -> Any:
        written.append(blocks)
        return own_text(model, blocks, *rest)

    monkeypatch.setattr(given_data, "own_text", counting)
    command = text_command(word_folder)
    command[command.index("--calibration") + 1] = "own-text"
    assert main([*command, "--dry-run"]) == 0
    assert written == [given_data.LEAST] and "parameters" in capsys.readouterr().out


def test_a_module_of_your_own_is_written_to_a_folder_that_loads(place: Path) -> None:
    assert main([*IMAGES, "--out", "small"]) == 0
    card = (place / "small" / "README.md").read_text()
    (code,) = [part.partition("\n```")[0] for part in card.split("```python\n")[1:]]
    given: dict[str, Any] = {}
    exec(code, given)  # as it stands on the card
    assert any(type(part).__name__.startswith("Factored") for part in given["model"])
    assert "| answered as the targets | " in card and "the dense model's own answers" not in card


def test_without_labels_the_dense_model_is_the_measure(place: Path) -> None:
    for path in list((place / "images").rglob("*.png")):
        shutil.move(path, place / "images" / path.name)
    for n in range(3):
        (place / "images" / f"class{n}").rmdir()
    assert main([*IMAGES, "--out", "small"]) == 0
    card = (place / "small" / "README.md").read_text()
    assert "the targets of the losses are the dense model's own answers" in card and "| 100.0 % | " in card


@pytest.mark.parametrize("how", [["--out", "small"], ["--dry-run"]])
def test_an_algorithm_that_needs_data_says_so(place: Path, capsys: pytest.CaptureFixture[str], how: list[str]) -> None:
    assert main(["own_nets:build", "--params-kept", "0.6", *how]) == 1
    error = capsys.readouterr().err
    assert error == "spectrim-compress: joint needs data that the model was not trained on; give --calibration\n"
    assert not [path for path in place.iterdir() if path.name.startswith("small")]


def test_a_split_that_no_option_gives_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise MissingInput("train batches are missing; pass train=")

    monkeypatch.setattr(compressing.api, "compress", missing)
    assert main([*IMAGES, "--out", "small"]) == 1
    assert capsys.readouterr().err == "spectrim-compress: train batches are missing; pass train=\n"


def test_a_rule_without_data_needs_none(place: Path) -> None:
    options = ["--algorithm", "truncation", "--decomposer", "svd_channel", "--params-kept", "0.6", "--out", "small"]
    assert main(["own_nets:build", "--with", "classes=4", "--with", "width=16", *options]) == 0
    card = (place / "small" / "README.md").read_text()
    assert "The losses were not measured." in card and "into=build(classes=4, width=16)" in card
    assert "multiply-accumulates" not in card


def test_what_does_not_fit_into_memory_goes_tensor_by_tensor(
    word_folder: Path, tiny: Any, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama").save_pretrained(word_folder)
    options = ["--params-kept", "0.8", "--out", "small"]
    assert main([str(word_folder), *options, "--memory", "0.00001"]) == 0
    assert "does not fit into memory: it is truncated tensor by tensor" in capsys.readouterr().out
    model, _ = language.load("small")
    dense = pretrained.library().AutoModelForCausalLM.from_pretrained(word_folder)
    kept = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
    assert 0.7 < kept <= 0.8
    assert "The losses were not measured." in (place / "small" / "README.md").read_text()
    assert main([str(word_folder), *options, "--memory", "0.00001"]) == 0  # goes on, and finds all done


def test_a_dry_run_writes_nothing(word_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    assert main([*text_command(word_folder), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("Joint: nothing is compressed yet\nparameters ")
    assert sorted(path for path in place.rglob("*") if "__pycache__" not in str(path)) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--params-kept", "0.01"], "out of reach"),
        (["--weights", "weights.pth"], "no safetensors file, and a pickle can run any code; convert it: python -c"),
        (["--weights", "none.safetensors"], "cannot read none.safetensors: No such file"),
        (["--with", "classes=4"], "has shape [3, 24], and [4, 24] in the model; set the factory's arguments by --with"),
        (["--with", "classes"], "--with classes is not NAME=VALUE"),
        (["--with", "depth=4"], "own_nets:build cannot be made: TypeError: "),
        (["--calibration", "nothing"], "--calibration nothing is not there; give a file, a folder, a text set"),
        (["--calibration", "sotu"], "--calibration sotu is not there; give a file"),
        (["--samples", "0"], "--samples 0 is too small; give at least 1"),
        (["--batch-size", "0"], "--batch-size 0 is too small; give at least 1"),
        (["--image-size", "0"], "--image-size 0 is too small; give at least 1"),
        (["--image-size", "1"], "the model failed on inputs of shape (8, 3, 1, 1)"),
        (["--preprocess", "imagenette"], "--preprocess imagenette is none of imagenet, none, MEAN/STD such as 0.5/0.5"),
        (
            ["--preprocess", "own_nets:build"],
            "--image-size is none of --preprocess own_nets:build, which scales images",
        ),
        (["--calibration", "digits"], "--image-size is for a folder of images; digits has a size of its own"),
        (["--context", "-1"], "--context -1 is too small; give at least 1"),
        (["--seed", "-1"], "--seed=-1 is not a whole number in 0..4294967295"),
        (["--memory", "nan"], "--memory nan is no size; give GiB, such as 16"),
        (["--algorithm", "nothing"], "algorithm='nothing' is unknown; known are aimet, alds"),
        (["--algorithm", "jiont"], "algorithm='jiont' is unknown (did you mean joint?); known are aimet"),
        (["--algorithm", "lossless"], "--algorithm lossless takes no --params-kept; it takes none of the budgets"),
        (["--device", "tpu"], "device='tpu' is none"),
        (["--exclude", "*"], "nothing to factor"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], changed: list[str], said: str
) -> None:
    assert main([*IMAGES, *changed, "--out", "small"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("spectrim-compress: ") and said in error and error.count("\n") == 1
    assert not [path for path in place.iterdir() if path.name.startswith(("small", ".small"))]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("own_nets:broken", "own_nets:broken cannot be made: RuntimeError: no such thing"),
        ("own_nets:number", "own_nets:number returns a int, not a torch.nn.Module"),
        ("own_nets:nothing", "own_nets:nothing cannot be imported: AttributeError: "),
        ("own_nets.py:build", "own_nets.py:build names a file; name its module: own_nets:build"),
        ("no_such_package:build", "no_such_package:build cannot be imported: ModuleNotFoundError: "),
    ],
)
def test_a_factory_that_makes_no_model_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], model: str, said: str
) -> None:
    assert main([model, *IMAGES[3:], "--out", "small"]) == 1
    assert said in capsys.readouterr().err


def test_a_module_is_imported_only_where_it_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "own_nets.py").write_text("raise SystemExit(9)")
    (place / "folder").mkdir()
    assert main(["folder", "--params-kept", "0.5", "--out", "small"]) == 1
    assert "cannot be opened by transformers' AutoConfig" in capsys.readouterr().err


def test_an_encoder_is_refused(word_folder: Path, tiny: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("bert").save_pretrained(word_folder)
    assert main([*text_command(word_folder), "--out", "small"]) == 1
    assert "is a BertForSequenceClassification, and this command takes decoders" in capsys.readouterr().err


def test_images_have_no_place_beside_text(word_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*text_command(word_folder), "--preprocess", "none", "--out", "small"]) == 1
    assert "--preprocess is for images, and " in capsys.readouterr().err


def test_too_little_text_is_said(word_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "text.jsonl").write_text(json.dumps({"text": "w1 w2 w3"}) + "\n")
    command = [*text_command(word_folder), "--calibration", "text.jsonl", "--out", "small"]
    assert main(command) == 1
    assert "holds 0 blocks of 12 tokens, of which 4 are needed; give more text" in capsys.readouterr().err
    (place / "text.jsonl").write_text("w1\n")
    assert main(command) == 1
    assert 'line 1 is no object with a "text"' in capsys.readouterr().err


def test_a_folder_that_is_there_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "small").mkdir()
    assert main([*IMAGES, "--out", "small"]) == 1
    assert "--out small is there already; give a new folder" in capsys.readouterr().err
    assert not list((place / "small").iterdir())


def test_after_ctrl_c_the_same_command_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = api.compress

    def interrupted(*args: Any, resume: Path, **kwargs: Any) -> Any:
        resume.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(compressing.api, "compress", interrupted)
    assert main([*IMAGES, "--out", "small"]) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert (place / "small.unfinished").is_dir() and not (place / "small").exists()
    monkeypatch.setattr(compressing.api, "compress", whole)
    assert main([*IMAGES, "--out", "small"]) == 0
    assert (place / "small").is_dir() and not (place / "small.unfinished").exists()


@pytest.mark.parametrize(
    ("before", "error", "stays"),
    [(False, UserError("so"), False), (True, UserError("so"), True), (False, MemoryError(), True)],
)
def test_what_an_earlier_call_computed_survives_a_mistake(
    place: Path, monkeypatch: pytest.MonkeyPatch, before: bool, error: Exception, stays: bool
) -> None:
    if before:
        (place / "small.unfinished").mkdir()

    def failing(*_: Any, resume: Path, **__: Any) -> None:
        resume.mkdir(exist_ok=True)
        raise error

    monkeypatch.setattr(compressing.api, "compress", failing)
    with suppress(MemoryError):
        assert main([*IMAGES, "--out", "small"]) == 1
    assert (place / "small.unfinished").exists() is stays


def test_a_streamed_folder_is_refused_before_the_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "small").mkdir()
    (place / "small" / sharded.MANIFEST).write_text("{}")
    monkeypatch.setattr(compressing.api, "compress", pytest.fail)
    assert main([*IMAGES, "--out", "small"]) == 1
    assert capsys.readouterr().err == "spectrim-compress: --out small is there already; give a new folder\n"


def test_a_reader_that_ends_costs_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main([*IMAGES, "--out", "small"]) == 0
    assert (place / "small" / "README.md").is_file()


class Hub:
    """Stands for the client of the hub."""

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at, self.calls = fails_at, list[tuple]()

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> None:
            if name == self.fails_at:
                raise OSError("401 Unauthorized\nmore")
            self.calls.append((name, args, kwargs))

        return called


def hub(monkeypatch: pytest.MonkeyPatch, client: Hub) -> None:
    library = pretrained.imported("huggingface_hub")
    monkeypatch.setattr(library, "HfApi", lambda: client)


def test_the_folder_is_pushed_where_someone_is_logged_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    client = Hub()
    hub(monkeypatch, client)
    assert main([*IMAGES, "--out", "small", "--push-to-hub", "me/small"]) == 0
    assert [name for name, *_ in client.calls] == ["whoami", "create_repo", "upload_folder"]
    assert client.calls[-1][2] == {"repo_id": "me/small", "folder_path": "small"}


@pytest.mark.parametrize(
    ("fails_at", "said", "written"),
    [
        ("whoami", "--push-to-hub needs a login (401 Unauthorized); run `hf auth login`, or leave it out", False),
        ("upload_folder", "small is whole, but was not uploaded (401 Unauthorized); upload it by: hf upload", True),
    ],
)
def test_a_push_that_fails_is_said(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fails_at: str,
    said: str,
    written: bool,
) -> None:
    pytest.importorskip("huggingface_hub")
    hub(monkeypatch, Hub(fails_at))
    assert main([*IMAGES, "--out", "small", "--push-to-hub", "me/small"]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (place / "small").exists() is written


@pytest.mark.parametrize("arguments", [["own_nets:build"], ["own_nets:build", "--params-kept", "x", "--out", "y"], []])
def test_a_wrong_command_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "--help lists all options" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--param-kept", "0.5"], "--param-kept is no option (did you mean --params-kept?)"),
        (["--params-kept", "0.5", "--calibraton=x"], "--calibraton is no option (did you mean --calibration?)"),
    ],
)
def test_a_misspelt_option_names_the_one_that_was_meant(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["own_nets:build", *arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error == f"spectrim-compress: {said}; spectrim-compress --help lists all options\n"


def test_memory_decides_how() -> None:
    weights = 100
    ways = {free: given_model.Memory(free, weights) for free in (100, 299, 300, 1199, 1200)}
    assert [own.streamed for own in ways.values()] == [True, True, False, False, False]
    assert [own.layers_at_once for own in ways.values()][2:] == [8, 8, None]
    assert [own.batch_size for own in ways.values()][2:] == [1, 1, 8]
    assert given_model.memory_for(weights, 2.0) == given_model.Memory(2**31, weights)
    assert given_model.memory_for(weights, None).free > 2**20


def test_a_folder_is_no_name_on_the_hub(place: Path) -> None:
    (place / "owner" / "here").mkdir(parents=True)
    assert [model_card._is_of_hub(name) for name in ("owner/here", "owner/elsewhere", "a.b:c/d")] == [
        False,
        True,
        False,
    ]


def test_every_option_has_a_word_of_help() -> None:
    actions = [action for action in parser()._actions if action.dest != "help"]
    assert len(actions) > 15 and all(action.help for action in actions)
    assert spectrim.__name__ == parser().prog.partition("-")[0]


def test_layers_that_stay_dense_for_one_reason_share_a_note() -> None:
    layers = [f"{name}: left dense: include= does not name it (1.25% of the parameters)" for name in "abcde"]
    other = "x.y: left dense: its weight is shared: twice (2.00% of the parameters)"
    assert model_card.gathered(["first", *layers, other, "2.50% of the parameters"]) == [
        "first",
        "a, b, c and 2 more: left dense: include= does not name it (6.25% of the parameters)",
        other,
        "2.50% of the parameters",
    ]


def test_the_card_gathers_the_notes_of_its_layers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*IMAGES[:-1], "0.9", "--include", "6", "--out", "small"]) == 0
    note = "0, 2, 8: left dense: include= does not name it ("
    assert note in capsys.readouterr().out and f"- {note}" in (place / "small" / "README.md").read_text()


def test_more_multiply_accumulates_than_before_are_explained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = "note: there are more multiply-accumulates than before: factors of a convolution may save parameters and no "
    for out, budget, said in (("first", "--params-kept", True), ("second", "--macs-kept", False)):
        assert main([*IMAGES[:-2], budget, "0.9", "--include", "0", "2", "--out", out]) == 0
        assert (note in capsys.readouterr().out) is said
