"""The code on the pages runs as it stands there, and each line for a shell names a target or a script that exists."""

import copy
import re
import shlex
import socket
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spectrim
from spectrim.cli import grid, search, table
from spectrim.cli.compress import parser
from spectrim.cli.search import space
from spectrim.fetch import pretrained
from spectrim.runs.configuration import grids_called

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The examples of extensions run in a test of their own.
ELSEWHERE = {"extending.md"}


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def run(page: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Run the blocks of a page one after the other, each with what the blocks before it left."""
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), given)
    return given


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def network(net: nn.Module, batches: Any) -> dict[str, Any]:
    """What the pages call by these names: a network, its batches, and a way to build it anew."""
    splits = {"loader": batches, "other": batches[1:], "train_loader": batches}
    splits["samples"] = [(x, y) for inputs, targets in batches for x, y in zip(inputs, targets, strict=True)]
    return {"model": net, "build_dense_model": lambda: copy.deepcopy(net), **splits}


@pytest.fixture
def decoder(word_folder: Path) -> tuple[nn.Module, Any]:
    """A tiny decoder and its tokenizer."""
    library = pretrained.library()
    tokenizer = library.AutoTokenizer.from_pretrained(word_folder)
    return library.AutoModelForCausalLM.from_pretrained(word_folder).eval(), tokenizer


def test_no_page_with_code_is_left_out() -> None:
    kinds = {(page.name, kind) for page in PAGES for kind, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert {kind for _, kind in kinds} == {"", "python", "yaml"}
    assert {page for page, kind in kinds if kind == "yaml"} == ELSEWHERE
    with_code = {page.name for page in PAGES if blocks(page, "python")}
    pages = {
        "README.md",
        "algorithms.md",
        "faq.md",
        "language_models.md",
        "large_models.md",
        "own_network.md",
        "using_the_result.md",
    }
    assert with_code - ELSEWHERE == pages


def test_the_ten_lines_of_the_readme_run(
    network: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert len(code.splitlines()) <= 10
    given = run(ROOT / "README.md", network)
    assert (folder / "small.safetensors").is_file() and "relative_error" in capsys.readouterr().out
    assert given["result"].params_kept <= 0.5


def test_the_page_on_your_own_network_runs(network: dict[str, Any], folder: Path, batches: Any) -> None:
    network["dense"] = network["model"]
    given = run(ROOT / "docs" / "own_network.md", network)
    assert given["result"].params_kept <= 0.3 and given["result"].trained
    assert type(given["model"]) is type(given["dense"])
    assert (folder / "small.safetensors").is_file()


def test_the_page_on_language_models_runs(decoder: tuple[nn.Module, Any], token_batches: Any, folder: Path) -> None:
    model, tokenizer = decoder
    given = run(
        ROOT / "docs" / "language_models.md",
        {"model": model, "tokenizer": tokenizer, "batches": token_batches, "other": token_batches},
    )
    ids = token_batches[0][0]
    assert torch.equal(given["model"](**ids).logits, given["result"].model(**ids).logits)


@pytest.mark.filterwarnings("ignore")  # of torch's exporter, peft and torchao about their own code
def test_the_page_on_using_the_result_runs(
    network: dict[str, Any], decoder: tuple[nn.Module, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(folder))
    ids = torch.randint(3, 50, (4, 12))
    given = network | {"decoder": decoder[0], "texts": [({"input_ids": ids}, ids)], "inputs": network["loader"][0][0]}
    needed = {"onnx": "onnxruntime", "peft": "peft", "torchao": "torchao"}
    page, left = ROOT / "docs" / "using_the_result.md", []
    try:
        for code in blocks(page, "python"):
            missing = [package for word, package in needed.items() if word in code and not find_spec(package)]
            left += missing
            if not missing:
                exec(compile(code, page.name, "exec"), given)
    finally:
        sys.modules.pop("small_net", None)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert torch.equal(given["scores"], given["module"](given["inputs"])) and given["result"].params_kept <= 0.5
    if left:
        pytest.skip(f"the rest of the page ran; not installed: {', '.join(left)}")


def test_the_page_on_large_models_runs(token_batches: Any, tiny: Any, folder: Path) -> None:
    model = tiny("llama")
    (folder / "dense").mkdir()
    names = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(names, folder / "dense" / "model.safetensors")
    given = run(ROOT / "docs" / "large_models.md", {"model": copy.deepcopy(model), "batches": token_batches})
    cut = sum(parameter.numel() for parameter in given["model"].parameters())
    assert cut < sum(parameter.numel() for parameter in model.parameters())
    assert given["result"].params_kept <= 0.9


def test_the_answers_run(
    network: dict[str, Any], decoder: tuple[nn.Module, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(network["model"].state_dict(), folder / "model.pth")
    model, tokenizer = decoder
    ids = torch.randint(3, 50, (4, 12))
    texts = [({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)]
    library = pretrained.library()
    sizes = {"vocab_size": 61, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 2}
    t5 = library.T5ForConditionalGeneration(library.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    pairs = [({"input_ids": ids, "decoder_input_ids": ids}, ids)]
    own = {"decoder": model, "tokenizer": tokenizer, "texts": texts, "encoder_decoder": t5, "pairs": pairs}
    given = run(ROOT / "docs" / "faq.md", network | own)
    assert given["small"].params_kept <= 0.9 and given["factored"]
    inputs = given["loader"][0][0]
    assert torch.equal(given["same"].eval()(inputs), given["result"].model.eval()(inputs))
    assert "relative" not in capsys.readouterr().err


def shell_lines() -> list[tuple[str, str]]:
    """Each command in a block without a language, without its comment."""
    found = []
    for page in PAGES:
        for code in blocks(page, ""):
            lines = re.sub(r"\\\n\s*", " ", code).splitlines()
            found += [
                (page.name, " ".join(words)) for words in (shlex.split(line, comments=True) for line in lines) if words
            ]
    return found


@cache
def make_targets() -> set[str]:
    """Every target of the Makefile."""
    command = ["make", "--print-data-base", "--dry-run", "--question", "help"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", printed, re.MULTILINE))


def test_every_target_in_a_text_or_a_table_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z][\w-]*)", page.read_text(encoding="utf-8"))}
    assert len(named) > 15
    assert {name for name in named if not re.search("NAME|mine", name)} <= make_targets()


def test_every_target_with_a_description_has_a_row() -> None:
    described = re.findall(r"^([a-z][\w-]*):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    rows = set(re.findall(r"`make ([\w-]+)`", (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")))
    assert len(described) > 15
    assert {target for target in described if not target.endswith("NAME")} - rows == {"help"} - rows


LINES = shell_lines()


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}" for page, line in LINES])
def test_a_line_for_a_shell_can_be_given(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        targets = {word for word in words if "=" not in word}
        assert targets and targets <= make_targets()
    elif program == "python":
        script, *arguments = words
        said = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert all(option in said for option in arguments if option.startswith("--"))
    elif program == "spectrim-compress":
        assert parser().parse_args(words).out is not None
    elif program == "spectrim-search":
        assert space(search.parser().parse_args(words).overrides)[1]
    elif program == "spectrim-table":
        with pytest.raises(SystemExit):
            table.main([words[0], "--help"])
        said = capsys.readouterr().out
        assert all(option in said for option in words if option.startswith("--"))
    else:
        # The tests of the documented commands compose these.
        assert program in {"spectrim", "spectrim-train", "spectrim-grid"}
        if program == "spectrim-grid":
            options = grid.parser().parse_args(words)
            files = (options.first, options.second) if words[0] == "diff" else ()
            assert all((ROOT / file).is_file() for file in files) and (files or grids_called(options.experiment))
        else:
            assert any("=" in word for word in words)


def test_the_page_on_algorithms(network: dict[str, Any]) -> None:
    made = run(ROOT / "docs/algorithms.md", {"spectrim": spectrim, "batches": network["loader"], **network})
    assert made["small"].params_kept <= 0.3 and made["small"].log[-1]["steps"] > 0
