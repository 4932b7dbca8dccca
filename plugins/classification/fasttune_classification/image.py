"""image-classification: one class or several for an image."""

from __future__ import annotations

from typing import Any

from fasttune.task import Bundle, Column, Sample, Source
from fasttune_classification.classifier import Classifier
from fasttune_classification.options import ImageOptions


class ImageClassification(Classifier):
    """Any image-classification model of transformers, timm's included where timm is installed."""

    Options = ImageOptions
    input_columns = (Column("image", "image"),)

    def build(self, source: Source, labels: list[str]) -> Bundle:
        """Raises ModelError if the folder holds no image model with a processor, or if the model can't take images
        of the size that the options ask for."""
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification

        from fasttune.models.checkpoint import load_config, require_family
        from fasttune_classification import image_processor as processors
        from fasttune_classification.build import build_model

        config = load_config(source)
        require_family(source, config, "image-classification", MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
        processor, notes = processors.load_processor(source, config, self.options.image_size)
        built = build_model(source, config, AutoModelForImageClassification, labels, self.options.problem)
        if self.options.image_size is not None:
            processors.fit_model(source, built.model, self.options.image_size)
        return Bundle(
            model=built.model,
            processor=processor,
            head=built.head,
            blocks=built.blocks,
            lora_targets=built.lora_targets,
            notes=(*built.notes, *notes),
        )

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample:
        """pixel_values, float32 [3, height, width], as the model's own processor makes them; "labels" as `target`
        makes it. The cost is in pixels."""
        from fasttune_classification.image_processor import pixels

        values = pixels(bundle.processor, row["image"])
        return Sample({"pixel_values": values, **self.target(row, bundle)}, cost=values[0].size)
