"""What tasks draw: `check` shows their samples on a sheet, `predict --draw` a picture a row, `demo` what its best
model sees. On a toy task."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

TASK = '''
"""How bright a picture is. What it draws tells what it got: samples and rows as they came."""
import json
from pathlib import Path

import numpy as np
from PIL import Image

from fasttune.task import Bundle, Column, Demo, Loss, Metric, Sample, Task


class Meter:
    def __init__(self):
        self.answers = []

    def update(self, prediction, reference):
        self.answers.append(prediction)

    def result(self):
        return {"answers": sum(self.answers) / len(self.answers)}


class Brightness(Task):
    columns = (Column("image", "image"), Column("bright", "number"))
    metrics = (Metric("answers", "max", primary=True),)

    def build(self, source, labels):
        from toy_model import Toy

        return Bundle(Toy.from_pretrained(source), None, head=("head",), blocks=(), lora_targets=())

    def encode(self, row, bundle, train):
        tensors = {"pixels": np.asarray(row["image"], dtype=np.float32).transpose(2, 0, 1) / 255}
        if "bright" in row:
            tensors["bright"] = np.float32(row["bright"])
        return Sample(tensors, cost=tensors["pixels"][0].size)

    def loss(self, model, batch):
        return Loss(((model(batch["pixels"]) - batch["bright"]) ** 2).sum(), len(batch["bright"]))

    def decode(self, model, batch, bundle):
        return [round(value, 3) for value in model(batch["pixels"]).tolist()]

    def meter(self):
        return Meter()
'''
DRAWING = """
    def sheet(self, samples, bundle):
        values = [(255 * sample.tensors["pixels"][:, 0, 0]).round() for sample in samples]
        return Image.fromarray(np.array([values], dtype=np.uint8))

    def draw(self, row, prediction, bundle):
        assert set(row) == {"image"} and isinstance(prediction, float), (row, prediction)
        return row["image"].transpose(Image.Transpose.ROTATE_90)

    @classmethod
    def demo(cls):
        rows = [{"image": Image.new("RGB", (9, 6), (n, n, n)), "bright": n / 20} for n in range(20)]
        train = {"epochs": 1, "batch": 4, "precision": "fp32"}
        low, high = ({"strategy": {"kind": "full"}, "train": {**train, "lr": lr}} for lr in (1e-9, 0.1))
        return Demo("Bright?", "model", rows[:10], rows[10:], (("low", low), ("a high one", high)), before=True,
                    picture=lambda pictures: Image.fromarray(np.concatenate([np.asarray(p) for p in pictures])))
"""
MODEL = """
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 1)

    def forward(self, pixels):
        return self.head(pixels.mean((2, 3)))[:, 0]

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "toy.safetensors")

    @classmethod
    def from_pretrained(cls, folder):
        model = cls()
        model.load_state_dict(load_file(Path(folder) / "toy.safetensors"))
        return model
"""
SIZE = (9, 6)


def colour(number: int) -> tuple[int, int, int]:
    return (17 * number % 256, 5 * number, 200)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two tasks, toy-pictures and toy-silent, which draws nothing; their model; 20 pictures with their table."""
    site = tmp_path / "site"
    entries = "[fasttune.tasks.v1]\ntoy-pictures = toy_pictures:Brightness\ntoy-silent = toy_silent:Brightness\n"
    files = {
        "toy_pictures.py": TASK + DRAWING,
        "toy_silent.py": TASK,
        "toy_model.py": MODEL,
        "fasttune_toy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: fasttune-toy\nVersion: 1.0\n",
        "fasttune_toy-1.0.dist-info/entry_points.txt": entries,
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    from toy_model import Toy

    Toy().save_pretrained(tmp_path / "model")
    rows = []
    for number in range(20):
        Image.new("RGB", SIZE, colour(number)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "bright": number / 20})
    for name, some in (("train.jsonl", rows[:16]), ("valid.jsonl", rows[16:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    yield tmp_path
    for name in ("toy_pictures", "toy_silent", "toy_model"):
        sys.modules.pop(name, None)


def arguments(command: str, task: str, *more: str) -> list[str]:
    data = ["--data", "train.jsonl", "--valid", "valid.jsonl", "--model", "model", "--strategy", "full"]
    sets = [part for s in ("train.epochs=1", "train.batch=4", "train.precision=fp32") for part in ("--set", s)]
    return [command, task, *data, *sets, *more]


@pytest.fixture
def run(toy: Path, invoke: Any) -> Path:
    result = invoke(*arguments("run", "toy-pictures", "--output", "runs/one", "--quiet"))
    assert result.exit_code == 0, (result.output, result.exc_info)
    return toy / "runs/one"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_check_draws_the_first_samples_beside_the_run(toy: Path, invoke: Any) -> None:
    result = invoke(*arguments("check", "toy-pictures", "--output", "runs/one"))
    assert result.exit_code == 0, (result.output, result.exc_info)
    assert "picture: runs/one-samples.png: the first 8 samples" in result.output
    assert pixels(toy / "runs/one-samples.png").tolist() == [[list(colour(number)) for number in range(8)]]
    assert not (toy / "runs/one").exists()
    assert invoke(*arguments("run", "toy-pictures", "--output", "runs/one", "--quiet")).exit_code == 0


def test_check_draws_where_it_is_told(toy: Path, invoke: Any) -> None:
    result = invoke(*arguments("check", "toy-pictures", "--json", "--draw", "new/folder/samples.png"))
    assert result.exit_code == 0, (result.output, result.exc_info)
    assert json.loads(result.stdout)["picture"] == "new/folder/samples.png: the first 8 samples"
    assert pixels(toy / "new/folder/samples.png").shape == (1, 8, 3)
    assert not list(toy.glob("**/*-samples.png"))
    assert not list(toy.glob("**/.staging*"))


def test_check_of_fewer_rows_than_a_sheet_has(toy: Path, invoke: Any) -> None:
    (toy / "train.jsonl").write_text("".join((toy / "train.jsonl").read_text().splitlines(keepends=True)[:5]))
    result = invoke(*arguments("check", "toy-pictures", "--draw", "samples.png"))
    assert "the first 5 samples" in result.output
    assert pixels(toy / "samples.png").shape == (1, 5, 3)


def test_check_of_a_task_without_pictures_writes_nothing(toy: Path, invoke: Any) -> None:
    before = sorted(toy.rglob("*"))
    result = invoke(*arguments("check", "toy-silent", "--output", "runs/one"))
    assert result.exit_code == 0, (result.output, result.exc_info)
    assert "picture" not in result.output.replace("toy_pictures", "")
    assert [path for path in sorted(toy.rglob("*")) if "__pycache__" not in path.parts] == [
        path for path in before if "__pycache__" not in path.parts
    ]
    refused = invoke(*arguments("check", "toy-silent", "--draw", "samples.png"))
    assert refused.exit_code == 2
    assert "toy-silent draws no samples" in refused.stderr


def test_predict_draws_a_picture_a_row(run: Path, toy: Path, invoke: Any) -> None:
    """Named by the rows' numbers; JSON lines are what they are without."""
    plain = invoke("predict", str(run), "--data", "valid.jsonl")
    drawn = invoke("predict", str(run), "--data", "valid.jsonl", "--draw", "drawn/here")
    assert drawn.exit_code == 0, (drawn.output, drawn.exc_info)
    assert drawn.stdout == plain.stdout
    assert len(drawn.stdout.splitlines()) == 4
    assert sorted(path.name for path in (toy / "drawn/here").iterdir()) == [f"00000{i}.png" for i in (1, 2, 3, 4)]
    for number in range(4):
        picture = pixels(toy / f"drawn/here/00000{number + 1}.png")
        assert picture.shape == (SIZE[0], SIZE[1], 3)  # turned: it is what the task drew, not the file
        assert (picture == colour(16 + number)).all()


def test_predict_draws_a_single_input(run: Path, toy: Path, invoke: Any) -> None:
    result = invoke("predict", str(run), "--input", str(toy / "3.png"), "--draw", "one")
    assert result.exit_code == 0, (result.output, result.exc_info)
    assert (pixels(toy / "one/000001.png") == colour(3)).all()


def test_predict_from_python(run: Path, toy: Path) -> None:
    import fasttune

    found = fasttune.load(run).predict([{"image": str(toy / "3.png")}], draw=toy / "python")
    assert len(found) == 1
    assert (pixels(toy / "python/000001.png") == colour(3)).all()


@pytest.mark.parametrize(
    ("place", "said"),
    [("full", "holds something already"), ("0.png", "holds something already"), ("0.png/in", "can't be written")],
)
def test_predict_spoils_nothing(run: Path, toy: Path, invoke: Any, place: str, said: str) -> None:
    (toy / "full").mkdir()
    (toy / "full/000001.png").write_text("mine")
    result = invoke("predict", str(run), "--data", "valid.jsonl", "--draw", place)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
    assert (toy / "full/000001.png").read_text() == "mine"


def test_predict_of_a_task_without_pictures(toy: Path, invoke: Any) -> None:
    assert invoke(*arguments("run", "toy-silent", "--output", "runs/silent", "--quiet")).exit_code == 0
    result = invoke("predict", "runs/silent", "--data", "valid.jsonl", "--draw", "drawn")
    assert result.exit_code == 2
    assert "toy-silent draws no pictures" in result.stderr
    assert not (toy / "drawn").exists()


@pytest.mark.parametrize("output", [None, "kept"])
def test_a_demo_draws_the_first_rows_and_measures_what_it_starts_from(
    toy: Path, invoke: Any, output: str | None
) -> None:
    from toy_model import Toy

    result = invoke("demo", "toy-pictures", *(["--output", output] if output else []))
    assert result.exit_code == 0, (result.output, result.exc_info)
    lines = result.output.splitlines()
    shown = {line[:18].strip(): float(line.split()[-2]) for line in lines[4:7]}
    assert list(shown) == ["before", "low", "a high one"]
    greys = torch.arange(10, 20).repeat(3, 1).T[:, :, None, None] / 255
    with torch.no_grad():
        mean = Toy.from_pretrained(toy / "model")(greys).mean()
    assert shown["before"] == pytest.approx(float(mean), abs=6e-4), "shown to three digits"
    assert shown["low"] == shown["before"]
    best = "a high one" if shown["a high one"] > shown["low"] else "low"
    where = "kept/demo.png" if output else "runs/demo-toy-pictures.png"
    assert f"picture: {where}: the first rows held out, as {best} sees them" in result.output
    picture = pixels(toy / where)
    assert picture.shape == (8 * SIZE[0], SIZE[1], 3)
    assert picture[:: SIZE[0], 0, 0].tolist() == list(range(10, 18))
    if output:
        line = json.loads((toy / "kept/valid.jsonl").read_text().splitlines()[2])
        assert line == {"image": "valid/000003.png", "bright": 0.6}
        assert (pixels(toy / "kept" / line["image"]) == 12).all()
        assert sorted(path.name for path in (toy / "kept").iterdir() if path.is_dir()) == [
            "a-high-one",
            "low",
            "train",
            "valid",
        ]
