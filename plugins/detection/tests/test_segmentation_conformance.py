"""The contract, clause by clause, over the segmenters that differ; tiny random models."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fasttune.testing import TaskConformance
from fasttune_detection.mask_encoding import resized
from fasttune_detection.segmentation import ImageSegmentation
from fasttune_detection.segments import Segments, from_rle, read_segments, to_rle

sys.path.insert(0, str(Path(__file__).parent))
import segmenters

LABELS = ("cat", "dog", "sky")


def picture(folder, index, size):
    path = folder / f"{index}.png"
    values = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


def rectangles(index, size):
    """Masks of none to three rectangles, bool [n, h, w], and their classes."""
    chance = np.random.default_rng(index)
    width, height = size
    masks = np.zeros((index % 4, height, width), dtype=bool)
    for mask in masks:
        x, y = chance.integers(0, width // 2), chance.integers(0, height // 2)
        mask[y : y + height // 3, x : x + width // 3] = True
    return masks, [LABELS[j % 2] for j in range(index, index + len(masks))]


class Kit(TaskConformance):
    """Images of several sizes."""

    task = ImageSegmentation
    labels = LABELS
    sizes = ((96, 64), (64, 64), (64, 96), (80, 70))
    model_kind = "segformer"
    learning_rate = 2e-3
    learned = 0.6

    def model(self, folder):
        return segmenters.write(folder, self.model_kind)

    def table(self, folder):
        self.folder = folder
        rows = [self.row(folder, i, self.sizes[i % len(self.sizes)]) for i in range(9)]
        return rows[1:] + rows[:1]  # the kit predicts the first one, and bad rows are made of it

    def comparable(self, prediction):
        """Masks as the share of their image: rounding may turn a pixel where two classes are nearly alike."""
        shape = tuple(prediction["size"][::-1])
        segments = []
        for segment in prediction["segments"]:
            mask = from_rle(segment["mask"])
            assert mask.shape == shape
            segments.append({**segment, "mask": float(mask.mean())})
        return {**prediction, "segments": segments}


class OfMasks(Kit):
    """Semantic truth as masks of ids, 255 where there is none."""

    options = {"classes": dict(enumerate(LABELS))}

    def row(self, folder, index, size):
        masks, names = rectangles(index, size)
        ids = np.full(size[::-1], 2, dtype=np.uint8)
        for mask, name in zip(masks, names, strict=True):
            ids[mask] = LABELS.index(name)
        ids[:3] = 255
        Image.fromarray(ids).save(folder / f"{index}-mask.png")
        return {"image": picture(folder, index, size), "mask": str(folder / f"{index}-mask.png")}

    @property
    def bad_rows(self):
        Image.fromarray(np.zeros((5, 7), dtype=np.uint8)).save(self.folder / "small.png")
        Image.fromarray(np.full((64, 64), 9, dtype=np.uint8)).save(self.folder / "strange.png")
        (self.folder / "text.png").write_text("no picture")
        return (
            ({"mask": str(self.folder / "small.png")}, "mask"),
            ({"mask": str(self.folder / "strange.png")}, "mask"),
            ({"mask": "nowhere.png"}, "mask"),
            ({"image": str(self.folder / "text.png")}, "image"),
        )

    def perfect(self, row):
        reading = self.task.Options.model_validate(self.options).reading
        segments = read_segments(row, row["mask"].size, reading)
        found = [
            {"label": label, "mask": to_rle(mask)}
            for label, mask in zip(segments.labels, segments.masks, strict=True)
        ]
        return {"size": list(segments.size), "segments": found}


class TestSegformer(OfMasks):
    """A class a pixel, no auxiliary head."""


class TestUperNet(OfMasks):
    """An auxiliary head; no linear layers in its backbone."""

    model_kind = "upernet_resnet"
    strategies = TaskConformance.strategies[:2]


class TestUperNetSwin(OfMasks):
    model_kind = "upernet_swin"


class TestBeit(OfMasks):
    model_kind = "beit"


class TestData2Vec(OfMasks):
    model_kind = "data2vec"


class TestDpt(OfMasks):
    model_kind = "dpt"


class TestMobileNetV2(OfMasks):
    model_kind = "mobilenet_v2"
    strategies = TaskConformance.strategies[:2]


class TestMobileViT(OfMasks):
    model_kind = "mobilevit"


class TestMobileViTV2(OfMasks):
    """Its attention is made of convolutions."""

    model_kind = "mobilevitv2"
    strategies = TaskConformance.strategies[:2]


class TestEomt(OfMasks):
    """Semantic segmentation by queries."""

    model_kind = "eomt"


class TestEomtDinov3(OfMasks):
    model_kind = "eomt_dinov3"


class OfObjects(Kit):
    """Objects with polygons and run lengths; images without any."""

    options = {"kind": "instance", "threshold": 0.0}

    def row(self, folder, index, size):
        masks, names = rectangles(index, size)
        objects = {"masks": [to_rle(mask) for mask in masks], "labels": names}
        return {"image": picture(folder, index, size), "objects": objects}

    @property
    def bad_rows(self):
        return (
            ({"objects": {"masks": [[1, 2, 3, 4]], "labels": ["cat"]}}, "objects"),
            ({"objects": {"masks": [[1, 1, 500, 1, 500, 30]], "labels": ["cat"]}}, "objects"),
            ({"objects": {"masks": [[1, 1, 30, 1, 30, 30]], "labels": ["cow"]}}, "objects"),
            ({"objects": {"masks": [[1, 1, 30, 1, 30, 30]], "labels": []}}, "objects"),
            ({"objects": None}, "objects"),
            ({"image": "nowhere.png"}, "image"),
        )

    @staticmethod
    def perfect(row):
        with Image.open(row["image"]) as image:
            size = list(image.size)
        objects = row["objects"]
        found = zip(objects["labels"], objects["masks"], strict=True)
        return {"size": size, "segments": [{"label": label, "score": 0.9, "mask": mask} for label, mask in found]}


class TestMask2Former(OfObjects):
    model_kind = "mask2former"


class TestMaskFormer(OfObjects):
    """Panoptic truth of objects on a background."""

    model_kind = "maskformer"
    options = {"kind": "panoptic", "background": "sky", "threshold": 0.0}

    def perfect(self, row):
        with Image.open(row["image"]) as image:
            segments = read_segments(row, image.size, self.task.Options.model_validate(self.options).reading)
        found = zip(segments.labels, segments.masks, strict=True)
        kept = [{"label": label, "score": 0.9, "mask": to_rle(mask)} for label, mask in found]
        return {"size": list(segments.size), "segments": kept}


def test_nearest_neighbours_are_pillows():
    """Masks are resized beside an image that Pillow resizes."""
    for old, new in (((37, 211), (64, 96)), ((500, 333), (96, 64)), ((64, 64), (64, 64)), ((7, 5), (64, 96))):
        mask = np.random.default_rng(3).random(old[::-1]) > 0.5
        none = np.zeros(1, dtype=bool)
        segments = Segments(mask[None], ("cat",), none, none, np.zeros_like(mask))
        expected = Image.fromarray(mask).resize(new, Image.Resampling.NEAREST)
        np.testing.assert_array_equal(resized(segments, new[::-1])[0], np.asarray(expected))
