"""audio-classification on waveforms and spectrograms, against transformers' own pipeline."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers as hf

from fasttune.errors import DataError
from fasttune.task import Source
from fasttune_classification.audio import AudioClassification

LABELS = ["go", "no", "stop"]
RATE = 16000
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONVOLUTIONS = {
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 8, 4),
    "conv_stride": (5, 8, 8),
    "num_feat_extract_layers": 3,
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "do_stable_layer_norm": True,
}

CONFIGS = {
    "wav2vec2": lambda: hf.Wav2Vec2Config(vocab_size=8, **SMALL, **CONVOLUTIONS),
    "hubert": lambda: hf.HubertConfig(vocab_size=8, **SMALL, **CONVOLUTIONS),
    "wavlm": lambda: hf.WavLMConfig(vocab_size=8, **SMALL, **CONVOLUTIONS),
    "ast": lambda: hf.ASTConfig(max_length=64, num_mel_bins=32, **SMALL),
    "whisper": lambda: hf.WhisperConfig(
        vocab_size=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=32,
        max_source_positions=100,
        classifier_proj_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    ),
}


@dataclass
class Audio:
    samples: np.ndarray
    rate: int


@pytest.fixture
def make(tmp_path):
    def write(kind):
        folder = tmp_path / kind
        hf.AutoModelForAudioClassification.from_config(CONFIGS[kind]()).save_pretrained(folder)
        if kind == "ast":
            extractor = hf.ASTFeatureExtractor(num_mel_bins=32, max_length=64)
        elif kind == "whisper":
            extractor = hf.WhisperFeatureExtractor(feature_size=32, chunk_length=2)
        else:
            extractor = hf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
        extractor.save_pretrained(folder)
        return Source(str(folder))

    return write


def tone(seconds, rate=RATE, pitch=440.0):
    time = np.arange(int(seconds * rate)) / rate
    return Audio(np.sin(2 * np.pi * pitch * time).astype(np.float32), rate)


@pytest.mark.parametrize("kind", CONFIGS)
def test_architectures(kind, make, collate, tmp_path):
    task = AudioClassification()
    bundle = task.build(make(kind), LABELS)
    assert bundle.notes == ("head replaced: 2 classes became 3",)
    modules = dict(bundle.model.named_modules())
    assert {*bundle.head, *bundle.blocks, *bundle.lora_targets} <= modules.keys()
    assert len(bundle.blocks) == 2
    assert bundle.lora_targets

    clips = [tone(0.31), tone(0.5, pitch=220), tone(0.12, pitch=880), tone(0.4, pitch=100)]
    data = [{"audio": clip, "label": LABELS[i % 3]} for i, clip in enumerate(clips)]
    samples = [task.encode(row, bundle, False) for row in data]
    loss, predictions = task.score(bundle.model, collate(samples, bundle.padding), bundle)
    single = [task.decode(bundle.model, collate([s], bundle.padding), bundle)[0] for s in samples]
    for together, alone in zip(predictions, single, strict=True):
        assert together["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    wanted = -sum(np.log(p["scores"][row["label"]]) for p, row in zip(predictions, data, strict=True))
    assert loss.total.item() == pytest.approx(wanted, rel=1e-5)
    assert loss.count == 4

    bundle.model.save_pretrained(tmp_path / "out")
    bundle.processor.save_pretrained(tmp_path / "out")
    pipeline = hf.pipeline("audio-classification", str(tmp_path / "out"))
    for clip, prediction in zip(clips, single, strict=True):
        scores = {entry["label"]: entry["score"] for entry in pipeline(clip.samples.copy())}
        assert scores == pytest.approx(prediction["scores"], abs=1e-5)


@pytest.mark.parametrize("kind", ["wav2vec2", "wavlm"])
def test_lora_targets_are_called(kind, make, collate):
    """A module whose weights are read past its forward would never see an adapter."""
    task = AudioClassification()
    bundle = task.build(make(kind), LABELS)
    called = set()
    for name in bundle.lora_targets:
        bundle.model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    task.decode(bundle.model, collate([task.encode({"audio": tone(0.3)}, bundle, False)], {}), bundle)
    assert called == set(bundle.lora_targets)


def test_other_rates_are_resampled(make):
    task = AudioClassification()
    bundle = task.build(make("wav2vec2"), LABELS)
    wanted = task.encode({"audio": tone(0.5)}, bundle, False)
    found = task.encode({"audio": tone(0.5, rate=44100)}, bundle, False)
    assert found.cost == wanted.cost == 8000
    middle = slice(1000, 7000)
    a, b = found.tensors["input_values"][middle], wanted.tensors["input_values"][middle]
    assert np.abs(a - b).max() < 0.01


@pytest.mark.parametrize(
    ("kind", "limit", "kept"), [("wav2vec2", 0.25, 4000), ("ast", None, 10480), ("whisper", None, 32000)]
)
def test_truncation_is_counted(kind, limit, kept, make):
    task = AudioClassification(AudioClassification.Options(max_seconds=limit))
    bundle = task.build(make(kind), LABELS)
    sample = task.encode({"audio": tone(3.0)}, bundle, False)
    assert (sample.cost, sample.truncated) == (kept, 48000 - kept)


def test_bad_clips(make):
    task = AudioClassification()
    bundle = task.build(make("wav2vec2"), LABELS)
    broken = tone(0.3)
    broken.samples[7] = np.nan
    for clip, reason in ((tone(0.0), "0.000 s of sound"), (broken, "NaN"), (tone(0.026), "one frame")):
        if reason == "one frame":
            bundle.model.config.conv_stride = (50, 8, 8)
        with pytest.raises(DataError, match=f"^audio: .*{reason}"):
            task.encode({"audio": clip}, bundle, True)


def test_short_clips_can_be_trained_on(make, collate):
    """Masking spans of frames fails in transformers if a batch is shorter than one span."""
    task = AudioClassification()
    bundle = task.build(make("wav2vec2"), LABELS)
    bundle.model.train()
    clip = {"audio": tone(0.1), "label": "go"}
    with pytest.raises(ValueError, match="mask_length"):
        task.loss(bundle.model, collate([task.encode(clip, bundle, False)], {}))
    sample = task.encode(clip, bundle, True)
    assert sample.tensors["attention_mask"].sum() == 1600 < sample.tensors["attention_mask"].size
    assert torch.isfinite(task.loss(bundle.model, collate([sample], {})).total)


def test_multi_label(make, collate):
    task = AudioClassification(AudioClassification.Options(problem="multi"))
    bundle = task.build(make("hubert"), LABELS)
    data = [{"audio": tone(0.3), "label": ["go", "stop"]}, {"audio": tone(0.2), "label": []}]
    batch = collate([task.encode(row, bundle, False) for row in data], bundle.padding)
    loss, predictions = task.score(bundle.model, batch, bundle)
    assert loss.count == 6
    json.dumps(predictions, allow_nan=False)
