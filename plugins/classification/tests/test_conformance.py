"""The contract, clause by clause, for each task and kind of answer; tiny models with random weights."""

import numpy as np
import pytest
import soundfile
import transformers as hf
from PIL import Image

from fasttune.testing import Full, Head, TaskConformance
from fasttune_classification.audio import AudioClassification
from fasttune_classification.image import ImageClassification
from fasttune_classification.text import TextClassification

LABELS = ["bad", "fine", "good"]
TEXTS = (
    "red one two",
    "green",
    "blue three four five six seven eight one two",
    "one one green blue",
    "eight seven",
    "two two two red",
    "five green six",
    "three",
    "four four blue one red seven",
)


def one_hot(row):
    label = row["label"]
    return {"label": label, "score": 1.0, "scores": {name: float(name == label) for name in LABELS}}


def labelled(rows):
    return [{**row, "label": LABELS[i % 3]} for i, row in enumerate(rows)]


class TextKit(TaskConformance):
    task = TextClassification
    labels = LABELS
    rows = labelled({"text": text} for text in TEXTS)
    bad_rows = (({"text": "  "}, "text"), ({"text": None}, "text"), ({"label": "unheard of"}, "label"))
    config = hf.BertConfig
    settings = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)

    @pytest.fixture(autouse=True)
    def tokenizer(self, make_tokenizer):
        self.make_tokenizer = make_tokenizer

    def model(self, folder):
        config = self.config(vocab_size=32, **self.settings)
        hf.AutoModel.from_config(config).save_pretrained(folder)
        self.make_tokenizer(folder)
        return str(folder)

    perfect = staticmethod(one_hot)


class TestBert(TextKit):
    pass


class TestGPT2(TextKit):
    """Conv1D layers, no padding token, and the last token's features."""

    config = hf.GPT2Config
    settings = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64)

    def model(self, folder):
        hf.AutoModel.from_config(hf.GPT2Config(vocab_size=32, **self.settings)).save_pretrained(folder)
        self.make_tokenizer(folder, pad=False, special=False)
        return str(folder)


class TestModernBert(TextKit):
    """Mean pooling: padding must not be in the mean."""

    config = hf.ModernBertConfig
    settings = dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        classifier_pooling="mean",
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    )


class TestPairs(TextKit):
    rows = labelled({"text": text, "text_pair": other} for text, other in zip(TEXTS, reversed(TEXTS), strict=True))


class TestClassWeights(TextKit):
    options = {"class_weights": {"bad": 0.5, "fine": 2.0, "good": 1.25}, "label_smoothing": 0.1}
    learned = 0.6  # label smoothing keeps the loss above zero


class TestMultiLabel(TextKit):
    options = {"problem": "multi"}
    rows = tuple({"text": text, "label": LABELS[: i % 4]} for i, text in enumerate(TEXTS))
    bad_rows = (({"label": None}, "label"), ({"label": ["unheard of"]}, "label"))

    @staticmethod
    def perfect(row):
        return {"labels": row["label"], "scores": {name: float(name in row["label"]) for name in LABELS}}


class TestRegression(TextKit):
    options = {"problem": "regression"}
    labels = ()
    rows = tuple({"text": text, "label": i - 3.5} for i, text in enumerate(TEXTS))
    bad_rows = (({"label": float("nan")}, "label"), ({"label": "many"}, "label"))
    perfect_score = 0.0

    @staticmethod
    def perfect(row):
        return {"value": row["label"]}


class TestViT(TaskConformance):
    task = ImageClassification
    labels = LABELS
    perfect = staticmethod(one_hot)

    def table(self, folder):
        random = np.random.default_rng(3)
        rows = []
        for i in range(9):
            path = folder / f"{i}.png"
            Image.fromarray(random.integers(0, 255, (16 + i, 20, 3), dtype=np.uint8)).save(path)
            rows.append({"image": str(path)})
        (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:200])
        (folder / "text.png").write_text("not an image")
        self.bad_rows = tuple(
            ({"image": str(folder / name)}, "image") for name in ("torn.png", "text.png", "missing.png")
        )
        return labelled(rows)

    def model(self, folder):
        config = hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
        )
        self.save(folder, config, 32)
        return str(folder)

    def save(self, folder, config, size):
        hf.AutoModel.from_config(config).save_pretrained(folder)
        hf.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)


class TestResNet(TestViT):
    """Batch norms, and no linear layer that LoRA could adapt."""

    strategies = (Full(), Head())

    def model(self, folder):
        config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        self.save(folder, config, 32)
        return str(folder)


class TestWav2Vec2(TaskConformance):
    task = AudioClassification
    labels = LABELS
    perfect = staticmethod(one_hot)

    def table(self, folder):
        random = np.random.default_rng(3)
        rows = []
        for i in range(9):
            path = folder / f"{i}.wav"
            soundfile.write(path, 0.1 * random.standard_normal((4000 + 500 * i, 1 + i % 2)), 8000 * (1 + i % 2))
            rows.append({"audio": str(path)})
        (folder / "empty.wav").write_bytes(b"")
        (folder / "text.wav").write_text("not audio")
        self.bad_rows = tuple(({"audio": str(folder / name)}, "audio") for name in ("empty.wav", "text.wav"))
        return labelled(rows)

    def model(self, folder):
        config = hf.Wav2Vec2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            conv_dim=(16, 16),
            conv_kernel=(10, 8),
            conv_stride=(5, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            apply_spec_augment=False,
        )
        hf.AutoModel.from_config(config).save_pretrained(folder)
        hf.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
        return str(folder)
