"""text-classification over the architectures that people use, against transformers' own pipeline."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from fasttune.errors import ConfigError, DataError, ModelError
from fasttune.task import Source
from fasttune_classification.text import TextClassification

LABELS = ["bad", "fine", "good"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WORDS = 16

CONFIGS = {
    "bert": lambda: hf.BertConfig(vocab_size=WORDS, **SMALL),
    "roberta": lambda: hf.RobertaConfig(vocab_size=WORDS, max_position_embeddings=66, pad_token_id=0, **SMALL),
    "distilbert": lambda: hf.DistilBertConfig(vocab_size=WORDS, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
    "deberta-v2": lambda: hf.DebertaV2Config(
        vocab_size=WORDS,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        max_relative_positions=-1,
        **SMALL,
    ),
    "modernbert": lambda: hf.ModernBertConfig(vocab_size=WORDS, pad_token_id=0, local_attention=8, **SMALL),
    "electra": lambda: hf.ElectraConfig(vocab_size=WORDS, embedding_size=16, **SMALL),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, bos_token_id=4, eos_token_id=4
    ),
    "llama": lambda: hf.LlamaConfig(
        vocab_size=WORDS, num_key_value_heads=1, bos_token_id=4, eos_token_id=4, pad_token_id=None, **SMALL
    ),
    "qwen3": lambda: hf.Qwen3Config(
        vocab_size=WORDS, num_key_value_heads=1, head_dim=16, bos_token_id=4, eos_token_id=4, **SMALL
    ),
}
DECODERS = ("gpt2", "llama", "qwen3")


@pytest.fixture
def make(tmp_path, make_tokenizer):
    def write(kind, bare=True):
        folder = tmp_path / kind
        auto = hf.AutoModel if bare else hf.AutoModelForSequenceClassification
        auto.from_config(CONFIGS[kind]()).save_pretrained(folder)
        make_tokenizer(folder, pad=kind not in DECODERS, special=kind not in DECODERS)
        return Source(str(folder))

    return write


def rows(sentences, labels=LABELS):
    return [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(sentences)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_architectures(kind, make, sentences, collate, tmp_path):
    task = TextClassification()
    bundle = task.build(make(kind), LABELS)
    assert bundle.notes[0] == "new head: 3 classes"
    assert len(bundle.blocks) == 2
    modules = dict(bundle.model.named_modules())
    assert {*bundle.head, *bundle.blocks, *bundle.lora_targets} <= modules.keys()
    assert len(bundle.lora_targets) >= 8
    assert not any(name.startswith(bundle.head) for name in bundle.lora_targets)

    data = rows(sentences)
    samples = [task.encode(row, bundle, train=True) for row in data]
    assert [s.cost for s in samples] == [len(s.tensors["input_ids"]) for s in samples]
    loss, predictions = task.score(bundle.model, collate(samples, bundle.padding), bundle)
    single = [task.decode(bundle.model, collate([sample], bundle.padding), bundle)[0] for sample in samples]
    for together, alone in zip(predictions, single, strict=True):
        assert together["scores"] == pytest.approx(alone["scores"], abs=2e-6)
    wanted = -sum(np.log(p["scores"][row["label"]]) for p, row in zip(single, data, strict=True))
    assert loss.total.item() == pytest.approx(wanted, rel=1e-5)
    assert loss.count == len(data)
    json.dumps(predictions, allow_nan=False)

    bundle.model.save_pretrained(tmp_path / "out")
    bundle.processor.save_pretrained(tmp_path / "out")
    pipeline = hf.pipeline("text-classification", str(tmp_path / "out"), top_k=None, device="cpu")
    for text, prediction in zip(sentences, single, strict=True):
        scores = {entry["label"]: entry["score"] for entry in pipeline([text], truncation=True)[0]}
        assert scores == pytest.approx(prediction["scores"], abs=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_every_parameter_that_is_trained_by_the_head_strategy_is_new(kind, make):
    source = make(kind)
    bundle = TextClassification().build(source, LABELS)
    pretrained = hf.AutoModel.from_pretrained(source).state_dict()
    inside = bundle.model.base_model_prefix + "."
    for name, value in bundle.model.state_dict().items():
        if not name.startswith(tuple(f"{module}." for module in bundle.head)):
            torch.testing.assert_close(value, pretrained[name.removeprefix(inside)], rtol=0, atol=0)


def test_pooler_that_the_checkpoint_lacks_is_part_of_the_head(bert):
    bundle = TextClassification().build(Source(str(bert)), LABELS)
    assert bundle.head == ("classifier", "bert.pooler.dense")
    assert "bert.pooler.dense" in bundle.notes[1]


def classifier_folder(bert, names):
    config = hf.AutoConfig.from_pretrained(bert, id2label=dict(enumerate(names)))
    config.label2id = {name: i for i, name in enumerate(names)}
    model = hf.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(bert)
    return model, Source(str(bert))


@pytest.mark.parametrize(
    ("stated", "labels", "order"),
    [
        (["good", "bad", "fine"], LABELS, ["good", "bad", "fine"]),
        (["GOOD", "BAD", "FINE"], LABELS, ["good", "bad", "fine"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], LABELS, LABELS),
        (["0", "1", "2"], LABELS, LABELS),
    ],
)
def test_matching_head_is_kept(bert, stated, labels, order):
    model, source = classifier_folder(bert, stated)
    bundle = TextClassification().build(source, labels)
    assert bundle.notes == ("head kept: 3 classes",)
    assert bundle.head == ("classifier",)
    assert list(bundle.model.config.id2label.values()) == order
    torch.testing.assert_close(bundle.model.classifier.weight, model.classifier.weight)
    task = TextClassification()
    assert task.encode({"text": "red", "label": order[1]}, bundle, True).tensors["labels"] == 1


@pytest.mark.parametrize(
    ("stated", "note"),
    [
        (["a", "b"], "head replaced: 2 classes became 3"),
        (["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4"], "head replaced: 5 classes became 3"),
        (["joy", "fear", "rage"], "head replaced: its 3 classes are not the ones of train"),
    ],
)
def test_other_head_is_replaced(bert, capfd, stated, note):
    model, source = classifier_folder(bert, stated)
    capfd.readouterr()
    bundle = TextClassification().build(source, LABELS)
    assert capfd.readouterr() == ("", "")
    assert bundle.notes == (note,)
    assert bundle.model.config.num_labels == 3
    assert bundle.model.config.label2id == {"bad": 0, "fine": 1, "good": 2}
    head = bundle.model.classifier
    assert head.weight.shape == (3, 32)
    assert 0 < head.weight.std() < 0.1
    assert not head.bias.any()
    if len(stated) == 3:
        assert not torch.equal(head.weight, model.classifier.weight)
    torch.testing.assert_close(bundle.model.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_random_weights_need_no_checkpoint(bert):
    (bert / "model.safetensors").unlink()
    source = Source(str(bert))
    source.random_weights = True
    bundle = TextClassification().build(source, LABELS)
    assert bundle.notes == ("random weights: nothing is pretrained", "new head: 3 classes")
    assert {p.dtype for p in bundle.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, {"bad": 0.3, "fine": 1.0, "good": 2.5}])
def test_single_loss_is_a_sum_and_count_of_torchs_mean(bert, sentences, collate, smoothing, weights):
    options = TextClassification.Options(label_smoothing=smoothing, class_weights=weights)
    task = TextClassification(options)
    bundle = task.build(Source(str(bert)), LABELS)
    batch = collate([task.encode(row, bundle, True) for row in rows(sentences)], bundle.padding)
    loss = task.loss(bundle.model, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    tensor = None if weights is None else torch.tensor(list(weights.values()))
    logits = bundle.model(**inputs).logits
    wanted = F.cross_entropy(logits, batch["labels"], weight=tensor, label_smoothing=smoothing)
    torch.testing.assert_close(loss.total / loss.count, wanted)
    assert loss.total.dtype == torch.float32


def test_class_weights_follow_the_models_order(bert, sentences, collate):
    _, source = classifier_folder(bert, ["good", "bad", "fine"])
    weights = {"bad": 0.3, "fine": 1.0, "good": 2.5}
    task = TextClassification(TextClassification.Options(class_weights=weights))
    bundle = task.build(source, LABELS)
    batch = collate([task.encode(row, bundle, True) for row in rows(sentences)], bundle.padding)
    loss = task.loss(bundle.model, batch)
    assert float(loss.count) == pytest.approx(0.3 + 1.0 + 2.5 + 0.3)
    logits = bundle.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = F.cross_entropy(logits, batch["labels"], weight=torch.tensor([2.5, 0.3, 1.0]))
    torch.testing.assert_close(loss.total / loss.count, wanted)


def test_multi_label(bert, sentences, collate, tmp_path):
    task = TextClassification(TextClassification.Options(problem="multi", threshold=0.5))
    assert [c.kind for c in task.columns] == ["text", "text", "labels"]
    bundle = task.build(Source(str(bert)), LABELS)
    chosen = [["good"], [], ["bad", "good"], LABELS]
    data = [{"text": text, "label": labels} for text, labels in zip(sentences, chosen, strict=True)]
    batch = collate([task.encode(row, bundle, True) for row in data], bundle.padding)
    assert batch["labels"].tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1]]
    loss, predictions = task.score(bundle.model, batch, bundle)
    logits = bundle.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(
        loss.total / loss.count, F.binary_cross_entropy_with_logits(logits, batch["labels"])
    )
    assert loss.count == 12
    for p in predictions:
        assert p["labels"] == [name for name, score in p["scores"].items() if score >= 0.5]
    bundle.model.save_pretrained(tmp_path / "out")
    bundle.processor.save_pretrained(tmp_path / "out")
    entries = hf.pipeline("text-classification", str(tmp_path / "out"), top_k=None)([sentences[0]])[0]
    assert {e["label"]: e["score"] for e in entries} == pytest.approx(predictions[0]["scores"], abs=1e-6)
    assert "mAP" in task.meter().result()


def test_regression(bert, sentences, collate, tmp_path):
    task = TextClassification(TextClassification.Options(problem="regression"))
    assert task.columns[-1].kind == "number"
    bundle = task.build(Source(str(bert)), [])
    data = [{"text": text, "label": float(i)} for i, text in enumerate(sentences)]
    batch = collate([task.encode(row, bundle, True) for row in data], bundle.padding)
    loss, predictions = task.score(bundle.model, batch, bundle)
    wanted = sum((p["value"] - row["label"]) ** 2 for p, row in zip(predictions, data, strict=True))
    assert loss.total.item() == pytest.approx(wanted, rel=1e-5)
    assert loss.count == 4
    bundle.model.save_pretrained(tmp_path / "out")
    bundle.processor.save_pretrained(tmp_path / "out")
    assert hf.pipeline("text-classification", str(tmp_path / "out"))(sentences[0])[0]["score"] == pytest.approx(
        predictions[0]["value"], abs=1e-6
    )


def test_truncation_is_counted_and_pairs_lose_the_longer_text_first(bert):
    task = TextClassification(TextClassification.Options(max_length=7))
    bundle = task.build(Source(str(bert)), LABELS)
    cut = task.encode({"text": "one two three four five six seven"}, bundle, False)
    assert (cut.cost, cut.truncated) == (7, 2)
    pair = task.encode({"text": "one two three four five", "text_pair": "red green"}, bundle, False)
    assert (pair.cost, pair.truncated) == (7, 3)
    names = bundle.processor.convert_ids_to_tokens(pair.tensors["input_ids"])
    assert names == ["[CLS]", "one", "two", "[SEP]", "red", "green", "[SEP]"]
    assert "labels" not in pair.tensors
    assert {a.dtype for a in cut.tensors.values()} == {np.dtype("int64")}


def test_length_follows_the_model(make, bert, make_tokenizer):
    # RoBERTa's positions start after the padding id: 66 rows with padding id 0 are 65 positions.
    assert TextClassification().build(make("roberta"), LABELS).processor.model_max_length == 65
    assert TextClassification().build(make("llama"), LABELS).processor.model_max_length == 512
    make_tokenizer(bert, model_max_length=100)
    assert TextClassification().build(Source(str(bert)), LABELS).processor.model_max_length == 100
    for wanted, reason in ((600, "512 positions"), (3, "no room")):
        with pytest.raises(ConfigError, match=reason):
            TextClassification(TextClassification.Options(max_length=wanted)).build(Source(str(bert)), LABELS)


def test_decoders_pad_with_the_end_token(make):
    bundle = TextClassification().build(make("llama"), LABELS)
    assert bundle.processor.pad_token == "[EOS]"
    assert bundle.model.config.pad_token_id == bundle.padding["input_ids"] == 4
    assert not bundle.model.config.use_cache


def test_left_padding(bert, make, make_tokenizer):
    make_tokenizer(bert, padding_side="left")
    with pytest.raises(ModelError, match="wants padding on the left"):
        TextClassification().build(Source(str(bert)), LABELS)
    source = make("qwen3")
    make_tokenizer(source, pad=False, special=False, padding_side="left")
    assert TextClassification().build(source, LABELS).processor.padding_side == "right"


def test_bad_rows_name_their_column(bert):
    task = TextClassification()
    bundle = task.build(Source(str(bert)), LABELS)
    with pytest.raises(DataError, match=r"label: 'goood' is not a class of the model\. Did you mean 'good'"):
        task.encode({"text": "red", "label": "goood"}, bundle, True)
    bundle.model.config.vocab_size = 6
    with pytest.raises(DataError, match="text: token 'blue' has id 7, but the model's vocabulary ends at 5"):
        task.encode({"text": "red blue"}, bundle, True)


def test_resolve_writes_class_weights_out():
    def weights(chosen, counts):
        return TextClassification(TextClassification.Options(class_weights=chosen)).resolve(counts).class_weights

    assert weights("balanced", {"a": 1, "b": 3}) == {"a": 2.0, "b": pytest.approx(2 / 3)}
    assert weights({"b": 2}, {"a": 1, "b": 3}) == {"a": 1.0, "b": 2.0}
    assert weights(None, {"a": 1, "b": 3}) is None
    with pytest.raises(ConfigError, match=r"'postive' is not a class of train\. Did you mean 'positive'"):
        weights({"postive": 2}, {"negative": 1, "positive": 3})
    with pytest.raises(ConfigError, match="every class has weight 0"):
        weights({"a": 0, "b": 0}, {"a": 1, "b": 3})
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        TextClassification.Options(class_weights={"a": -1})
    with pytest.raises(ValueError, match="'regression'"):
        TextClassification.Options(problem="regression", label_smoothing=0.1)


def test_resolve_refuses_too_few_classes():
    with pytest.raises(
        DataError, match="label: at least two classes are needed to learn from; train has only 'a'"
    ):
        TextClassification().resolve({"a": 5})
    multi = TextClassification(TextClassification.Options(problem="multi"))
    assert multi.resolve({"a": 5}) == multi.options
    with pytest.raises(DataError):
        multi.resolve({})


def test_tokenizer_without_any_token_to_pad_with(bert, make_tokenizer):
    path = bert / "tokenizer_config.json"
    make_tokenizer(bert, pad=False)
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        TextClassification().build(Source(str(bert)), LABELS)


def test_tasks_import_no_torch_and_pickle():
    code = (
        "import sys, fasttune_classification.text, fasttune_classification.image, fasttune_classification.audio\n"
        "found = {'torch', 'transformers', 'numpy', 'PIL', 'soxr'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    task = TextClassification(TextClassification.Options(class_weights={"a": 2.0}))
    assert pickle.loads(pickle.dumps(task)).options == task.options
