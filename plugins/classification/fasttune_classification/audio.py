"""audio-classification: one class or several for a clip."""

from __future__ import annotations

from typing import Any

from fasttune.task import Bundle, Column, Sample, Source
from fasttune_classification.classifier import Classifier
from fasttune_classification.options import AudioOptions

AUDIO_LABEL_ALIASES = ("keyword", "command", "intent", "emotion", "genre", "language", "speaker", "speaker_id")


class AudioClassification(Classifier):
    """Any audio-classification model of transformers, on waveforms or on spectrograms."""

    Options = AudioOptions
    input_columns = (Column("audio", "audio"),)
    label_aliases = (*Classifier.label_aliases, *AUDIO_LABEL_ALIASES)

    def build(self, source: Source, labels: list[str]) -> Bundle:
        """Raises ModelError if the folder holds no audio model with a feature extractor."""
        from transformers import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING, AutoModelForAudioClassification

        from fasttune.models.checkpoint import load_config, require_family
        from fasttune_classification import feature_extractor as extractors
        from fasttune_classification.build import build_model

        config = load_config(source)
        require_family(source, config, "audio-classification", MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING)
        extractor = extractors.load_extractor(source)
        built = build_model(source, config, AutoModelForAudioClassification, labels, self.options.problem)
        extractors.fit_extractor(extractor, built.model)
        silence = extractor.padding_value
        return Bundle(
            model=built.model,
            processor=extractor,
            head=built.head,
            blocks=built.blocks,
            lora_targets=built.lora_targets,
            padding={"input_values": silence, "input_features": silence},
            notes=built.notes,
        )

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample:
        """input_values, float32 [samples] or [frames, mels], or input_features, float32 [mels, frames]; with
        attention_mask, int64 [samples], where the extractor makes one; "labels" as `target` makes it.

        Cost and truncation are in samples at the model's rate. Raises DataError("audio", why) for a clip that is
        too short for the model, or that holds NaN or infinity.
        """
        from fasttune_classification import feature_extractor as extractors

        clip = extractors.clip(row["audio"], bundle.processor, self.options.max_seconds)
        tensors = extractors.features(clip.samples, bundle.processor, bundle.model.config, train)
        cost = extractors.fixed_samples(bundle.processor) or clip.samples.size
        return Sample(tensors | self.target(row, bundle), cost=cost, truncated=clip.cut)
