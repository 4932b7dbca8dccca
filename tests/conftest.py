"""What all tests share: no network, one thread, a tiny pretrained BERT, and a task that it learns in seconds."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fasttune-tests-")  # not the user's own

import pytest
import torch

collect_ignore = ["third_party"]  # packages to be installed elsewhere, with tests of their own

CLASSES = {
    "drink": ("tea", "coffee", "milk", "juice"),
    "fruit": ("apple", "pear", "plum", "grape"),
    "tool": ("hammer", "saw", "drill", "wrench"),
}
FILLERS = ("the", "a", "my", "old", "new", "big", "small", "one", "is", "was", "here", "there", "on", "table")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Files(NamedTuple):
    """A train and a valid table, as --data and --valid take them."""

    train: str
    valid: str


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of random weights, without pooler and head, and its tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    words = [*SPECIAL, *FILLERS, *(word for group in CLASSES.values() for word in group)]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.15,  # at BERT's own 0.02 a model this narrow tells words apart too slowly
    )
    torch.manual_seed(3)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    _save_tokenizer(words, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_distilbert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DistilBERT of random weights: its head stands wholly outside the base, whose features can be kept."""
    from transformers import DistilBertConfig, DistilBertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-distilbert"
    shutil.copytree(tiny_bert, folder)
    words = json.loads((tiny_bert / "config.json").read_text())["vocab_size"]
    config = DistilBertConfig(
        vocab_size=words, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=64
    )
    config.initializer_range = 0.15
    torch.manual_seed(3)
    DistilBertModel(config).save_pretrained(folder)
    return folder


def _save_tokenizer(words: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT of random weights for images of 32 x 32, and its processor."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    torch.manual_seed(3)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of 1 to 12 words, a third of each class: one word in two tells the class, the others say nothing."""
    chance = random.Random(seed)
    rows = []
    for index in range(count):
        label = list(CLASSES)[index % len(CLASSES)]
        words = [chance.choice(CLASSES[label])]
        for _ in range(chance.randrange(12)):
            words.append(chance.choice(chance.choice((CLASSES[label], FILLERS))))
        chance.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


@pytest.fixture(scope="session")
def toy_rows() -> dict[str, list[dict[str, str]]]:
    """48 rows to train on, 16 to validate on, all different."""
    rows = make_rows(200, seed=5)
    different = list({row["text"]: row for row in rows}.values())
    return {"train": different[:48], "valid": different[48:64]}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(name="write_jsonl")
def write_jsonl_fixture() -> Any:
    """write_jsonl(path, rows) -> the path as text."""
    return write_jsonl


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory: pytest.TempPathFactory, toy_rows: dict[str, list[dict[str, str]]]) -> Files:
    folder = tmp_path_factory.mktemp("toy")
    return Files(*(write_jsonl(folder / f"{split}.jsonl", toy_rows[split]) for split in ("train", "valid")))


def invoke(*arguments: str) -> Any:
    """The command line, in this process."""
    from click.testing import CliRunner

    from fasttune.cli import main

    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """refused(*arguments, say=[...]) -> the message of a command that must exit with 2 and leave no run folder."""

    def check(*arguments: str, say: tuple[str, ...]) -> str:
        output = tmp_path / "runs" / "run"
        result = invoke(*arguments, "--output", str(output))
        assert result.exit_code == 2, (result.output, result.exception)
        assert isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output
        for part in say:
            assert part in result.stderr
        assert not output.exists()
        return result.stderr

    return check


@pytest.fixture
def text(tiny_bert: Path, toy_files: Any) -> Callable[..., list[str]]:
    """text(train=, valid=, *settings) -> a command line for text-classification."""

    def arguments(*settings: str, train: Any = None, valid: Any = None, command: str = "run") -> list[str]:
        data = ["--data", str(train or toy_files.train), "--valid", str(valid or toy_files.valid)]
        sets = [part for setting in settings for part in ("--set", setting)]
        return [command, "text-classification", "--model", str(tiny_bert), *data, *sets]

    return arguments


def write_file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(name="invoke")
def invoke_fixture() -> Any:
    return invoke


@pytest.fixture
def write() -> Callable[[Path, str | bytes], Path]:
    return write_file


TIMING = {"seconds", "rows_per_s", "tokens_per_s", "pixels_per_s", "peak_memory_bytes"}


@pytest.fixture
def start(tiny_bert: Path, toy_files: Any) -> Callable[..., Any]:
    """start(output, kind, resume=..., **sections): a run of six steps in two epochs."""

    import fasttune

    def run(output: Path, kind: Any, resume: bool = False, model: Path = tiny_bert, **sections: Any) -> Any:
        train = {"batch": 16, "epochs": 2, "lr": 1e-3, "precision": "fp32", **sections.pop("train", {})}
        data = {"train": toy_files.train, "valid": toy_files.valid, **sections.pop("data", {})}
        return fasttune.finetune(
            task="text-classification",
            model=str(model),
            data=data,
            strategy=kind,
            train=train,
            output=str(output),
            resume=resume,
            **sections,
        )

    return run


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in TIMING}


def compare_runs(one: Path, other: Path) -> None:
    """Weights, optimizer, random states, losses, sample order and metrics, bit by bit."""
    from safetensors.torch import load_file

    last = sorted((one / "checkpoints").iterdir())[-1].name
    for name in ("trained", "optimizer", "buffers", "random"):
        file = f"checkpoints/{last}/{name}.safetensors"
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), f"{file} differs"
    for folder in ("best", "last"):
        for weights in (one / folder).glob("*.safetensors"):
            assert weights.read_bytes() == (other / folder / weights.name).read_bytes(), f"{weights.name} differs"
    lines = [
        [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]
    assert lines[0] == lines[1]
    metrics = [untimed(json.loads((run / "metrics.json").read_text())) for run in (one, other)]
    assert metrics[0] == metrics[1]


@pytest.fixture
def without_timing() -> Callable[[dict[str, Any]], dict[str, Any]]:
    return untimed


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    return compare_runs
