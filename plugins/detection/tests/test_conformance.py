"""The contract, clause by clause, over the detectors that differ; tiny random models."""

import numpy as np
import pytest
from PIL import Image

from fasttune.testing import TaskConformance
from fasttune_detection.task import ObjectDetection


def picture(folder, index, size):
    path = folder / f"{index}.png"
    values = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


class Kit(TaskConformance):
    """Images of several sizes, with none to four boxes."""

    task = ObjectDetection
    labels = ("cat", "dog", "hen")
    sizes = ((96, 64), (64, 64), (64, 96), (80, 70))
    kind = "rt_detr"
    learning_rate = 2e-3
    learned = 0.5

    @pytest.fixture(autouse=True)
    def maker(self, make_model):
        self.make_model = make_model

    def model(self, folder):
        return self.make_model(folder, self.kind)

    def table(self, folder):
        self.folder = folder
        rows = []
        for i in range(9):
            chance = np.random.default_rng(i)
            width, height = size = self.sizes[i % len(self.sizes)]
            corners = chance.uniform(0, 0.5, (i % 5, 2))
            boxes = np.hstack([corners, corners + chance.uniform(0.1, 0.5, (i % 5, 2))])
            names = [self.labels[j % 3] for j in range(i, i + i % 5)]
            boxes = (boxes * [width, height, width, height]).round(2).tolist()
            rows.append({"image": picture(folder, i, size), "objects": {"boxes": boxes, "labels": names}})
        rows[0], rows[1] = rows[1], rows[0]  # the kit predicts the first one, and bad rows are made of it
        return rows

    @staticmethod
    def objects(*boxes, labels=("cat",)):
        return {"objects": {"boxes": boxes, "labels": list(labels)}}

    @property
    def bad_rows(self):
        (self.folder / "text.png").write_text("no picture")
        return (
            (self.objects([9, 9, 5, 20]), "objects"),
            (self.objects([5, 9, 5, 20]), "objects"),
            (self.objects([5, 9, 500, 20]), "objects"),
            (self.objects([5, 9, float("nan"), 20]), "objects"),
            (self.objects([5, 9, 15, 20], labels=("cow",)), "objects"),
            ({"objects": None}, "objects"),
            ({"image": "nowhere.png"}, "image"),
            ({"image": str(self.folder / "text.png")}, "image"),
        )

    @staticmethod
    def perfect(row):
        objects = row["objects"]
        return {**objects, "scores": [0.9] * len(objects["boxes"])}


class TestRTDetr(Kit):
    """Queries picked from the encoder, heads inside the base, images of one size."""


class TestRTDetrV2(Kit):
    kind = "rt_detr_v2"


class TestDFine(Kit):
    """A loss that is summed image by image; only the last layer predicts in eval mode."""

    kind = "d_fine"


class TestDeimV2(Kit):
    kind = "deimv2"


class TestLwDetr(Kit):
    """Groups of queries in training."""

    kind = "lw_detr"


class TestRfDetr(Kit):
    """The same, with a windowed DINOv2."""

    kind = "rf_detr"


class TestYolos(Kit):
    """Softmax with "no object", a bare vision transformer."""

    kind = "yolos"


class Masked(Kit):
    """Padding masks: at an image's edge a convolution sees what is beside it, so that no two sizes here."""

    sizes = ((96, 64),)
    kind = "detr"


class TestDetr(Masked):
    pass


class TestTableTransformer(Masked):
    kind = "table"


class TestConditionalDetr(Masked):
    kind = "conditional"


class TestDabDetr(Masked):
    kind = "dab"


class TestDeformableDetr(Masked):
    kind = "deformable"


class TestTwoStageDeformableDetr(Masked):
    kind = "two_stage"
