"""object-detection: boxes of known classes in an image. Importing this module imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fasttune.layouts import Opened, Place
from fasttune.task import Bundle, Column, Demo, Loss, Meter, Metric, Sample, Source, Task
from fasttune_detection.counted import found_in, size_name
from fasttune_detection.options import DetectionOptions

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor, nn

OBJECT_ALIASES = ("annotations", "annotation", "boxes", "bboxes", "bbox", "labels", "target", "targets")

BOXES, CLASSES, SIZE, MASK = "boxes", "class_labels", "size", "pixel_mask"
"""What a sample holds beside pixel_values: float32 [n, 4], int64 [n], int64 [2] and bool [h, w]."""


class ObjectDetection(Task):
    """Any object-detection model of transformers that has a loss to train with."""

    Options = DetectionOptions
    columns = (Column("image", "image"), Column("objects", "json", OBJECT_ALIASES, target=True))
    metrics = (Metric("mAP", "max", primary=True), Metric("mAP50", "max"), Metric("mAP75", "max"))

    @classmethod
    def open(cls, place: Place) -> Opened | None:
        """COCO's JSON, YOLO's folders, Pascal VOC's XML."""
        from fasttune_detection.layouts import open_layout

        return open_layout(place)

    def classes_of(self, row: Mapping[str, Any]) -> Iterable[str]:
        """The class of each box; the boxes are checked on the way."""
        from fasttune_detection.boxes import read_objects

        return read_objects(row["objects"], self.options.box_format, row["image"]).labels

    def count(self, row: Mapping[str, Any]) -> Iterable[str]:
        """The image's size: no class is named " 640x480", since names of classes have no blanks around them."""
        return (size_name(row["image"]),)

    def resolve(self, counts: Mapping[str, int]) -> DetectionOptions:
        """The options with the median size of train's images, and how many boxes they have on average. Raises
        DataError if they have none."""
        return self.options.model_copy(update=found_in(counts, self.options, "box", "boxes_per_image"))

    def build(self, source: Source, labels: list[str]) -> Bundle:
        """Raises ModelError if the folder holds no detector that can be trained here, or one that needs a package
        that is not installed."""
        from fasttune_detection.build import build

        return build(source, labels, self.options)

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample:
        """pixel_values, float32 [3, h, w], as the model's processor makes them; size, int64 [2], (height, width)
        of the image before; for models that heed padding pixel_mask, bool [h, w]. With objects also their boxes,
        float32 [n, 4], xyxy in pixels of the resized image, and class_labels, int64 [n]; crowds are left out. The
        cost is in pixels. truncated: boxes beyond the number of the model's queries, which can't be found.

        Raises DataError for boxes that can't be used."""
        from fasttune_detection.encoding import encode

        return encode(row, bundle, self.options)

    def vary(self, row: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """Image and objects as `augment` draws them; the image keeps its size."""
        from fasttune_detection.augment import augment
        from fasttune_detection.boxes import read_objects

        if self.options.augment is None:
            return row
        objects = read_objects(row["objects"], self.options.box_format, row["image"].size)
        image, objects = augment(row["image"], objects, random, self.options.augment)
        return {**row, "image": image, "objects": objects}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """transformers' own loss of the model's family as a sum; the count is the number of boxes. How the two are
        defined is said in `losses`."""
        from fasttune_detection.forward import forward, loss_of

        return loss_of(forward(model, batch), batch)

    def decode(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> list[dict[str, Any]]:
        """{"boxes": xyxy in pixels of the image as it was, "labels", "scores", "size": its [width, height]} an
        image, the best first, by the family's own post-processing. A batch with objects is to be scored, and all
        that the model finds is given; in one without, what scores above options.threshold."""
        from fasttune_detection.forward import forward, predictions_of

        inputs = {name: tensor for name, tensor in batch.items() if name not in (BOXES, CLASSES)}
        return predictions_of(forward(model, inputs), batch, bundle, self._threshold(batch))

    def score(
        self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle
    ) -> tuple[Loss, list[dict[str, Any]]]:
        from fasttune_detection.forward import forward, loss_of, predictions_of

        outputs = forward(model, batch)
        return loss_of(outputs, batch), predictions_of(outputs, batch, bundle, self._threshold(batch))

    def meter(self) -> Meter:
        from fasttune_detection.meters import DetectionMeter

        return DetectionMeter(self.options.box_format)

    def show(self, sample: Sample, bundle: Bundle) -> str:
        """The size that the model sees, and what of each class is in it."""
        height, width = sample.tensors["pixel_values"].shape[1:]
        old_height, old_width = sample.tensors[SIZE].tolist()
        names: Any = bundle.model.config.id2label  # type: ignore[union-attr]
        seen = Counter(names[i] for i in sample.tensors[CLASSES].tolist())
        objects = ", ".join(f"{count} {name}" for name, count in sorted(seen.items())) or "no objects"
        return f"{old_width} x {old_height}, seen as {width} x {height}: {objects}"

    def sheet(self, samples: list[Sample], bundle: Bundle) -> Image.Image:
        """Samples of train as the loss sees them, on one picture."""
        from fasttune_detection.draw import as_image, draw, sheet

        names: Any = bundle.model.config.id2label  # type: ignore[union-attr]
        settings = bundle.processor.to_dict()
        mean, std = settings["image_mean"], settings["image_std"]
        mean, std = (mean, std) if settings["do_normalize"] else ((0, 0, 0), (1, 1, 1))
        pictures = []
        for sample in samples:
            image = as_image(sample.tensors["pixel_values"], mean, std)
            labels = [names[i] for i in sample.tensors[CLASSES].tolist()]
            pictures.append(draw(image, sample.tensors[BOXES].tolist(), labels, None, list(names.values())))
        return sheet(pictures)

    def draw(self, row: Mapping[str, Any], prediction: Any, bundle: Bundle) -> Image.Image:
        """The image with the boxes that were found."""
        from fasttune_detection.draw import draw

        names: Any = bundle.model.config.id2label  # type: ignore[union-attr]
        found = prediction["boxes"], prediction["labels"], prediction["scores"]
        return draw(row["image"], *found, list(names.values()))

    @classmethod
    def demo(cls) -> Demo:
        """Handwritten digits on sheets of paper, and a small RT-DETR that was pretrained on other digits.
        Raises RuntimeError without scikit-learn, which carries the digits."""
        from fasttune_detection.demo import make

        return make()

    def _threshold(self, batch: Mapping[str, Any]) -> float:
        return 0.0 if CLASSES in batch else self.options.threshold
