"""Models, settings and output folders that can't be used: told before the first step, nothing left behind."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def model_folder(
    write: Any, kind: str, tmp_path: Path, tiny_bert: Path, tiny_vit: Path
) -> tuple[str, tuple[str, ...]]:
    """A model that can't be used, and what must be said about it."""
    folder = tmp_path / "model"
    match kind:
        case "missing folder":
            return str(tmp_path / "nothing"), ("nothing", "config.json")
        case "missing hub id":
            return "nobody/nothing", ("nobody/nothing", "no local folder")
        case "image model":
            return str(tiny_vit), ("of type 'vit'", "can't use for text-classification", "image-classification")
        case "a file":
            return str(write(folder, "x")), ("is a file; name the folder",)
    shutil.copytree(tiny_bert, folder)
    weights = folder / "model.safetensors"
    match kind:
        case "no weights":
            weights.unlink()
            return str(folder), ("has no weights; expected model.safetensors",)
        case "pickled weights":
            weights.rename(folder / "pytorch_model.bin")
            return str(folder), ("only as pytorch_model.bin", "can run code")
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:2000])
            return str(folder), ("its weights can't be loaded",)
        case "other weights":
            shutil.copy(tiny_vit / "model.safetensors", weights)
            return str(folder), ("its weights don't fit its configuration (bert)",)
        case "no config":
            (folder / "config.json").unlink()
            return str(folder), ("has no config.json",)
        case "broken config":
            write(folder / "config.json", '{"model_type": "bert"')
            return str(folder), ("config.json is not valid JSON",)
        case "no tokenizer":
            for path in folder.glob("token*"):
                path.unlink()
            return str(folder), ("has no tokenizer",)
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "missing folder",
        "missing hub id",
        "image model",
        "a file",
        "no weights",
        "pickled weights",
        "cut weights",
        "other weights",
        "no config",
        "broken config",
        "no tokenizer",
    ],
)
def test_models_that_can_not_be_used(
    write: Any, tmp_path: Path, tiny_bert: Path, tiny_vit: Path, text: Any, refused: Any, kind: str
) -> None:
    model, say = model_folder(write, kind, tmp_path, tiny_bert, tiny_vit)
    refused(*text(), "--model", model, say=say)


def test_a_text_model_for_images(tmp_path: Path, tiny_bert: Path, refused: Any) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "1.png")
    data = str(tmp_path / "images")
    refused(
        *("run", "image-classification", "--data", data, "--valid", data, "--model", str(tiny_bert)),
        say=("of type 'bert'", "can't use for image-classification", "text-classification"),
    )


@pytest.mark.parametrize(
    ("setting", "say"),
    [
        ("train.epoch=3", ("train.epoch: unknown key", "Did you mean 'epochs'?")),
        ("train.batch=many", ("train.batch", "integer", "'many'")),
        ("train.batch=0", ("train.batch", "found 0")),
        ("options.max_lenght=5", ("max_lenght: unknown key", "Did you mean 'max_length'?")),
        ("options.max_length=1000", ("options.max_length: 1000", "64 positions")),
        ("options.max_length=1", ("options.max_length: 1 leaves no room",)),
        ("options.problem=double", ("problem", "'double'")),
        ("options.class_weights={tol: 2}", ("'tol' is not a class of train", "Did you mean 'tool'?")),
        ("strategy.targets=[quary]", ("strategy.targets", "'quary'", "Did you mean 'query'?")),
        ("strategy.kind=lorra", ("no kind 'lorra'", "Did you mean 'lora'?")),
        ("weights=random", ("strategy lora adapts pretrained weights",)),
    ],
)
def test_settings_that_are_wrong(text: Any, refused: Any, setting: str, say: tuple[str, ...]) -> None:
    refused(*text(setting), say=say)


def test_a_run_file_that_is_wrong(write: Any, tmp_path: Path, refused: Any) -> None:
    path = write(tmp_path / "run.yaml", "task: text-classification\nmodel: m\ndata:\n  trian: a.csv\n")
    refused("run", str(path), say=("run.yaml, line 4: data.trian: unknown key", "Did you mean 'train'?"))


def test_a_table_in_the_place_of_a_run_file(write: Any, tmp_path: Path, refused: Any) -> None:
    path = write(tmp_path / "train.csv", "text,label\na,b\n")
    refused("run", str(path), say=("a run file ends in .yaml; a table goes to --data",))


@pytest.mark.parametrize("name", ["a: b.jsonl", "a #b.jsonl", "[a].jsonl", "- a.jsonl", "no"])
def test_names_of_files_that_yaml_would_take_apart(
    invoke: Any, write: Any, tmp_path: Path, text: Any, toy_files: Any, name: str, monkeypatch: Any
) -> None:
    """--data and --valid take a path as it is."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, Path(toy_files.train).read_bytes())
    result = invoke(*text("train.steps=1", train=name, valid=name), "--output", "run", "--quiet")
    if name == "no":
        assert result.exit_code == 2
        assert "no: format 'without a suffix' is not known" in result.stderr
    else:
        assert result.exit_code == 0, result.output


def test_an_output_folder_that_another_process_uses(invoke: Any, write: Any, tmp_path: Path, text: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    holder = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'a+')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write('process 4711 on elsewhere')\nfile.flush()\nprint('held', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        result = invoke(*text(), "--output", str(run))
        process.communicate()
    assert result.exit_code == 2
    assert f"output {run}: in use by process 4711 on elsewhere" in result.stderr
    assert [path.name for path in run.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "say"), [("config.yaml", "holds a run already; go on with it by --resume"), ("notes", "'notes'")]
)
def test_an_output_folder_that_holds_something(
    invoke: Any, write: Any, tmp_path: Path, text: Any, name: str, say: str
) -> None:
    kept = write(tmp_path / "run" / name, "precious")
    result = invoke(*text(), "--output", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert say in result.stderr
    assert kept.read_text() == "precious"


def test_an_output_folder_below_a_file(invoke: Any, write: Any, tmp_path: Path, text: Any) -> None:
    below = write(tmp_path / "file", "x") / "run"
    result = invoke(*text(), "--output", str(below))
    assert result.exit_code == 2
    assert f"output {below}: can't be written: Not a directory" in result.stderr


def test_a_disk_that_can_only_be_read(text: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        refused(*text(), say=("can't be written: Read-only file system",))


def test_a_disk_without_room(text: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9, free=1234))
    refused(*text(), say=("1,234 bytes are free", "need about", "save.keep"))
