"""Object detection against transformers' Trainer, on a CPU: images/s, memory, validation loss.

python bench/detection.py --train instances_train.json --valid instances_valid.json --check

A small RT-DETR of random weights; the same images (COCO's JSON), size and settings for each contender, in turn,
each in a process of its own. bench/README.md says what it all means.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders import (
    TRAIN_LOSS,
    WARM_UP,
    Results,
    Trained,
    adapted,
    machine,
    medians,
    print_checks,
    print_table,
    train_fasttune,
    train_watched,
    trainer_settings,
    write_result,
)
from contenders import measure as measure_child

LEAST_SPEED, MOST_MEMORY, MOST_LOSS = 1.5, 1.0, 1.01  # the bars, as shares of the fastest other contender's
CLIP, WARM_UP_STEPS = 0.1, 10
MEASURES = {
    "rows_per_s": ("images/s", "{:.2f}"),
    "peak_tree_mb": ("peak memory with its workers, MB", "{:.0f}"),
    "valid_loss": ("validation loss", "{:.4f}"),
    "train_loss": TRAIN_LOSS,
    "process_s": ("whole process, s", "{:.1f}"),
}
DTYPES, WORKERS = ("autocast", "fp32"), (0, 1, 2)  # of weights in bf16 alone, RT-DETR mixes types


def make_model(folder: Path, size: int, classes: int) -> None:
    """2.5 million parameters, four stages of one block each under one encoder and three decoder layers."""
    import torch
    import transformers as hf

    torch.manual_seed(3)
    backbone = hf.RTDetrResNetConfig(
        embedding_size=24,
        hidden_sizes=[24, 48, 96, 160],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = hf.RTDetrConfig(
        backbone_config=backbone,
        use_pretrained_backbone=False,
        freeze_backbone_batch_norms=False,
        encoder_hidden_dim=128,
        d_model=128,
        encoder_in_channels=[48, 96, 160],
        encoder_ffn_dim=256,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        decoder_in_channels=[128, 128, 128],
        decoder_ffn_dim=256,
        decoder_attention_heads=4,
        decoder_layers=3,
        num_queries=100,
        num_denoising=50,
        num_labels=classes,
    )
    hf.RTDetrForObjectDetection(config).save_pretrained(folder)
    hf.RTDetrImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)


class Pages:
    """Images of a COCO file as Trainer's collate function takes them: read, resized and normalised when asked for,
    boxes as fractions of the image around their centres."""

    def __init__(self, file: str, most: int, processor: Any):
        document = json.loads(Path(file).read_text(encoding="utf-8"))
        self.folder, self.processor = Path(file).parents[1] / "images", processor
        self.images = document["images"][:most]
        classes = {category["id"]: i for i, category in enumerate(document["categories"])}
        self.boxes: dict[Any, list[Any]] = {image["id"]: [] for image in self.images}
        for annotation in document["annotations"]:
            if annotation["image_id"] in self.boxes:
                self.boxes[annotation["image_id"]].append((classes[annotation["category_id"]], annotation["bbox"]))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch
        from PIL import Image

        image = self.images[index]
        with Image.open(self.folder / image["file_name"]) as opened:
            found = self.processor(opened.convert("RGB"), return_tensors="pt")
        held = self.boxes[image["id"]]
        boxes = torch.tensor([box for _, box in held], dtype=torch.float32).reshape(-1, 4)
        sides = torch.tensor([image["width"], image["height"]] * 2)
        centres = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], dim=1) / sides
        labels = {"class_labels": torch.tensor([label for label, _ in held]), "boxes": centres}
        return {"pixel_values": found["pixel_values"][0], "labels": labels}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [r["labels"] for r in rows],
    }


def train_ours(spec: Namespace) -> Trained:
    return train_fasttune(
        spec,
        task="object-detection",
        model=spec.source,
        weights="random",
        options={"size": (spec.size, spec.size)},
        data={"train": spec.train, "valid": spec.valid},
        train={"schedule": {"kind": "linear", "warmup": WARM_UP_STEPS}, "clip": CLIP},
        eval={"every": spec.steps, "max_rows": 1, "samples": 0},
    )


def train_other(spec: Namespace) -> Trained:
    import torch
    import transformers as hf

    hf.set_seed(spec.seed)
    dtype = torch.bfloat16 if spec.dtype.startswith("bf16") else torch.float32
    config = hf.AutoConfig.from_pretrained(spec.source)
    model = adapted(spec, hf.AutoModelForObjectDetection.from_config(config, dtype=dtype), spec.dtype, "")
    if spec.channels_last:
        model.to(memory_format=torch.channels_last)
    settings = trainer_settings(spec, spec.dtype, WARM_UP_STEPS) | {"max_grad_norm": CLIP}
    settings |= {"train_sampling_strategy": "random", "dataloader_num_workers": spec.workers}
    settings |= {"remove_unused_columns": False, "output_dir": str(Path(spec.folder) / "trainer")}
    pages = Pages(spec.train, sys.maxsize, hf.RTDetrImageProcessorPil.from_pretrained(spec.source))
    return train_watched(
        spec,
        hf.Trainer,
        lambda inputs: {"rows": len(inputs["pixel_values"])},
        model=model,
        args=hf.TrainingArguments(**settings),
        train_dataset=pages,
        data_collator=collate,
    )


def score(spec: Namespace, saved: Path) -> dict[str, Any]:
    """transformers' loss a box over the validation images, of what a contender saved, in fp32, without denoising
    queries: those would draw noise."""
    import torch
    import transformers as hf

    model: Any = hf.AutoModelForObjectDetection.from_pretrained(saved, dtype=torch.float32).eval()
    pages = Pages(spec.valid, sys.maxsize, hf.RTDetrImageProcessorPil.from_pretrained(spec.source))
    total, boxes = 0.0, 0
    for start in range(0, len(pages), 8):
        batch = collate([pages[i] for i in range(start, min(start + 8, len(pages)))])
        found = sum(len(label["class_labels"]) for label in batch["labels"])
        with torch.inference_mode():
            total += float(model(**batch).loss) * found
        boxes += found
    return {"valid_loss": total / boxes}


def contend(spec: Namespace) -> None:
    """The child process: trains, takes the figures, only then scores, and writes the result."""
    trained = train_ours(spec) if spec.contender == "fasttune" else train_other(spec)
    write_result(spec, trained, {}, lambda saved: score(spec, saved))


def measure(args: Namespace, contender: str, title: str, **settings: Any) -> dict[str, Any]:
    return measure_child(__file__, vars(args) | settings, MEASURES, contender, title, contender != "fasttune")


def tune(args: Namespace) -> dict[str, Any]:
    """Trainer's settings that take the most images/s on a few steps: types first, then workers."""
    found: list[tuple[float, dict[str, Any]]] = []

    def best_of(settings: Iterator[dict[str, Any]]) -> dict[str, Any]:
        for setting in settings:
            title = f"trying {', '.join(f'{key} {value}' for key, value in setting.items())}"
            result = measure(args, "trainer", title, **setting, seed=0, steps=args.tune_steps)
            found.append((result["rows_per_s"], setting))
        return max(found, key=lambda pair: pair[0])[1]

    plain = {"workers": 0, "channels_last": False}
    best = best_of({**plain, "dtype": dtype} for dtype in DTYPES)
    return best_of({**best, "workers": workers} for workers in WORKERS[1:])


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--train", metavar="JSON", required=True)
    add("--valid", metavar="JSON", required=True)
    numbers: dict[str, Any] = {"--steps": 50, "--batch": 8, "--size": 512, "--lr": 3e-4, "--tune-steps": 12}
    for name, value in numbers.items():
        add(name, type=type(value), default=value, help=f"default: {value}")
    add("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3])
    add("--json", metavar="FILE", help="write every figure here")
    add("--check", action="store_true", help="exit with 1 if fasttune misses a bar")
    args = parser.parse_args()
    if min(args.steps, args.tune_steps) <= WARM_UP:
        parser.error(f"the first {WARM_UP} steps are not measured: give more")
    return args


def compare(args: Namespace) -> int:
    print(where := machine())
    args.strategy = "full"
    results: Results = {"fasttune": [], "trainer": [], "converted": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        args.source = str(Path(folder, "model"))
        classes = json.loads(Path(args.train).read_text(encoding="utf-8"))["categories"]
        make_model(Path(args.source), args.size, len(classes))
        best = tune(args)
        chosen = {"fasttune": {}, "trainer": best, "converted": {**best, "channels_last": True}}
        print(f"{chosen}; pages kept by all")
        for turn, seed in enumerate(args.seeds):
            for contender in list(results)[:: -1 if turn % 2 else 1]:
                title = f"seed {seed}, {contender}"
                results[contender].append(measure(args, contender, title, seed=seed, **chosen[contender]))
    print_table(results, MEASURES)
    passed = passes(medians(results, MEASURES))
    if args.json:
        report = {"machine": where, "arguments": vars(args), "chosen": chosen, "results": results}
        Path(args.json).write_text(json.dumps({**report, "passed": passed}, indent=2), encoding="utf-8")
    return 1 if args.check and not passed else 0


def passes(found: dict[str, dict[str, float]]) -> bool:
    ours, best = found["fasttune"], found["trainer"]
    speed, memory, loss = (ours[key] / best[key] for key in ("rows_per_s", "peak_tree_mb", "valid_loss"))
    return print_checks(
        {
            f"images/s at least {LEAST_SPEED} x: {speed:.2f}": speed >= LEAST_SPEED,
            f"no more memory: {memory:.2f} x": memory <= MOST_MEMORY,
            f"validation loss no worse than by 1 %: {loss:.4f} x": loss <= MOST_LOSS,
        }
    )


if __name__ == "__main__":
    if "--spec" not in sys.argv:
        sys.exit(compare(parse()))
    contend(Namespace(**json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))))
