"""image-segmentation: masks of known classes in an image. Importing this module imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fasttune.errors import DataError
from fasttune.layouts import Opened, Place
from fasttune.task import Bundle, Column, Loss, Meter, Metric, Sample, Source, Task
from fasttune_detection.counted import found_in, size_name, stuff_in, stuff_names, stuff_of
from fasttune_detection.options import SegmentationOptions

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor, nn

MASK_ALIASES = (
    "segmentation_mask",
    "segmentation",
    "semantic_mask",
    "label_mask",
    "mask_path",
    "label",
    "segmentation_map",
    "annotation",
)
OBJECT_ALIASES = ("annotations", "segments_info", "labels", "target", "targets")

_TRUTH = frozenset({"labels", "mask_labels", "class_labels"})
"""What a sample holds beside pixel_values and size where there is truth."""

_METRICS = {
    "semantic": (
        Metric("mIoU", "max", primary=True),
        Metric("pixel_accuracy", "max"),
        Metric("mean_accuracy", "max"),
    ),
    "instance": (Metric("mAP", "max", primary=True), Metric("mAP50", "max"), Metric("mAP75", "max")),
    "panoptic": (Metric("PQ", "max", primary=True), Metric("SQ", "max"), Metric("RQ", "max")),
}


class ImageSegmentation(Task):
    """Segmentation models of transformers: a class a pixel, or segments found by queries."""

    Options = SegmentationOptions
    columns = (
        Column("image", "image"),
        Column("mask", "mask", MASK_ALIASES, required=False, target=True),
        Column("objects", "json", OBJECT_ALIASES, required=False, target=True),
    )

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        return _METRICS[self.options.kind]

    @classmethod
    def open(cls, place: Place) -> Opened | None:
        """Folders of masks, COCO's JSON (objects or panoptic), YOLO's folders with polygons."""
        from fasttune_detection.layouts import open_segments

        return open_segments(place)

    def check_columns(self, roles: frozenset[str]) -> None:
        if not roles & {"mask", "objects"} and "image" in roles:
            raise DataError(None, "no truth: expected a column `mask` (pictures of ids) or `objects` (with masks)")

    def classes_of(self, row: Mapping[str, Any]) -> Iterable[str]:
        """The class of each segment; they are checked on the way."""
        from fasttune_detection.segments import read_segments

        return read_segments(row, row["image"], self.options.reading).labels

    def count(self, row: Mapping[str, Any]) -> Iterable[str]:
        """The image's size, and which classes are stuff."""
        stuff = stuff_of(row, self.options.reading) if self.options.kind == "panoptic" else ()
        return (size_name(row["image"]), *stuff_names(stuff))

    def resolve(self, counts: Mapping[str, int]) -> SegmentationOptions:
        """The options with the median size of train's images, how many segments they have on average, and the
        classes that are stuff. Raises DataError if there is nothing to learn: no segment, or one class alone
        that all pixels have."""
        options: SegmentationOptions = self.options
        classes = [name for name in counts if not name.startswith(" ")]
        if options.kind == "semantic" and len(classes) == 1:
            raise DataError(
                None,
                f"all truth of train is of one class, {classes[0]!r}: nothing tells it from other pixels. Name "
                "what no object covers with options.background, or keep it in the masks as a class of its own "
                "(options.ignore drops ids)",
            )
        found = found_in(counts, options, "segment", "segments_per_image")
        if options.kind == "panoptic" and options.stuff is None:
            found["stuff"] = stuff_in(counts)
        return options.model_copy(update=found)

    def build(self, source: Source, labels: list[str]) -> Bundle:
        """Raises ModelError if the folder holds no segmenter that can be trained here, or one that needs a package
        that is not installed; ConfigError if it can't do what the options want."""
        from fasttune_detection.segmenters import build

        return build(source, labels, self.options)

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample:
        """pixel_values, float32 [3, h, w], as the model's processor makes them; size, int64 [2], (height, width)
        of the image before. With truth, masks are resized by the nearest neighbour: of models that give each pixel
        a class labels, int64 [h, w], IGNORED where there is no truth; of the others mask_labels, bool [n, h, w],
        and class_labels, int64 [n], without crowds. The cost is in pixels. truncated: segments that have no pixel
        left at that size, or are more than the model has queries.

        Raises DataError for truth that can't be used."""
        from fasttune_detection.mask_encoding import encode

        return encode(row, bundle, self.options)

    def vary(self, row: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """Image and segments as `augment` draws them; the image keeps its size."""
        from fasttune_detection.augment import augment
        from fasttune_detection.segments import read_segments

        if self.options.augment is None:
            return row
        segments = read_segments(row, row["image"].size, self.options.reading)
        image, segments = augment(row["image"], segments, random, self.options.augment)
        return {"image": image, "objects": segments}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """transformers' own loss of the model's family as a sum; the count is the number of pixels with truth, or
        of segments. How the two are defined is said in `mask_losses`."""
        from fasttune_detection.mask_forward import forward, loss_of

        return loss_of(model, forward(model, batch), batch)

    def decode(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> list[dict[str, Any]]:
        """{"size": [width, height], "segments": [{"label", "mask", …}]} an image, masks as COCO's run lengths in
        pixels of the image as it was. semantic: one a class that is there. instance: with "score" and "box", xyxy,
        the best first; they may overlap. A batch with truth is to be scored, and all that the model finds is
        given; in one without, what scores above options.threshold. panoptic: with "score", disjoint, above that
        threshold, one a class of stuff."""
        from fasttune_detection.mask_forward import forward, predictions_of

        inputs = {name: tensor for name, tensor in batch.items() if name not in _TRUTH}
        return predictions_of(forward(model, inputs), batch, bundle, self.options, _has_truth(batch))

    def score(
        self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle
    ) -> tuple[Loss, list[dict[str, Any]]]:
        from fasttune_detection.mask_forward import forward, loss_of, predictions_of

        outputs = forward(model, batch)
        predictions = predictions_of(outputs, batch, bundle, self.options, _has_truth(batch))
        return loss_of(model, outputs, batch), predictions

    def meter(self) -> Meter:
        from fasttune_detection import segment_meters

        kinds: dict[str, Any] = {
            "semantic": segment_meters.SemanticMeter,
            "instance": segment_meters.InstanceMeter,
            "panoptic": segment_meters.PanopticMeter,
        }
        return kinds[self.options.kind](self.options.reading)

    def show(self, sample: Sample, bundle: Bundle) -> str:
        """The size that the model sees, and what of each class is in it: its share of pixels, or its segments."""
        names: Any = bundle.model.config.id2label  # type: ignore[union-attr]
        height, width = sample.tensors["pixel_values"].shape[1:]
        old_height, old_width = sample.tensors["size"].tolist()
        if "labels" in sample.tensors:
            pixels = Counter(sample.tensors["labels"].ravel().tolist())
            shares = sorted((number, count / (height * width)) for number, count in pixels.items())
            said = ", ".join(f"{share:.1%} {names[i] if i >= 0 else 'without truth'}" for i, share in shares)
        else:
            seen = Counter(names[i] for i in sample.tensors["class_labels"].tolist())
            said = ", ".join(f"{count} {name}" for name, count in sorted(seen.items())) or "no segments"
        return f"{old_width} x {old_height}, seen as {width} x {height}: {said}"

    def sheet(self, samples: list[Sample], bundle: Bundle) -> Image.Image:
        """Samples of train as the loss sees them, on one picture."""
        from fasttune_detection.draw import as_image, draw_segments, sheet

        names: Any = bundle.model.config.id2label  # type: ignore[union-attr]
        settings = bundle.processor.to_dict()
        mean, std = ((0, 0, 0), (1, 1, 1))
        if settings.get("do_normalize"):
            mean, std = settings["image_mean"], settings["image_std"]
        pictures = []
        for sample in samples:
            values = sample.tensors["pixel_values"]
            image = as_image(values[::-1] if settings.get("do_flip_channel_order") else values, mean, std)
            masks, ids = _masks_of(sample)
            pictures.append(draw_segments(image, masks, [names[i] for i in ids], None, list(names.values())))
        return sheet(pictures)

    def draw(self, row: Mapping[str, Any], prediction: Any, bundle: Bundle) -> Image.Image:
        """The image with the segments that were found."""
        from fasttune_detection.draw import draw_segments
        from fasttune_detection.segments import from_rle

        names: Any = bundle.model.config.id2label  # type: ignore[union-attr]
        found = prediction["segments"]
        masks = [from_rle(segment["mask"]) for segment in found]
        scores = [segment["score"] for segment in found] if found and "score" in found[0] else None
        labels = [segment["label"] for segment in found]
        return draw_segments(row["image"], masks, labels, scores, list(names.values()))


def _has_truth(batch: Mapping[str, Any]) -> bool:
    return not _TRUTH.isdisjoint(batch)


def _masks_of(sample: Sample) -> tuple[Any, list[int]]:
    """The masks, bool [n, h, w], and classes of a sample of either kind of model."""
    if "labels" not in sample.tensors:
        return sample.tensors["mask_labels"], sample.tensors["class_labels"].tolist()
    labels = sample.tensors["labels"]
    ids = sorted({*labels.ravel().tolist()} - {-100})
    return [labels == i for i in ids], ids
