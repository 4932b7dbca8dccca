"""Models of many families, heads that stay and heads that start anew, and what can't be opened."""

import json
import shutil

import pytest
import torch
import transformers as hf

from fasttune.errors import ConfigError, ModelError
from fasttune.task import Source
from fasttune_question_answering.task import QuestionAnswering

KINDS = [
    "bert",
    "distilbert",
    "roberta",
    "modernbert",
    "deberta-v2",
    "electra",
    "gpt2",
    "llama",
    "qwen3",
    "xlnet",
    "bart",
    "t5",
]
DECODERS = {"gpt2", "llama", "qwen3"}
ROW = {
    "question": "Where does it rise?",
    "context": "The river Elbe rises in the Giant Mountains " + "of old " * 12,
}


def build(folder, **options):
    return QuestionAnswering(QuestionAnswering.Options(**options)).build(Source(folder), [])


@pytest.mark.parametrize("kind", KINDS)
def test_architectures(kind, make_model, collate, tmp_path):
    task = QuestionAnswering(QuestionAnswering.Options(max_length=32, doc_stride=8))
    bundle = task.build(Source(make_model(tmp_path / kind, kind)), [])
    assert bundle.notes == ("new head: start and end of the answer",)
    modules = dict(bundle.model.named_modules())
    assert {*bundle.head, *bundle.blocks, *bundle.lora_targets} <= modules.keys()
    assert len(bundle.blocks) == (4 if kind in ("bart", "t5") else 2)
    assert bundle.lora_targets
    assert not any(name.startswith(bundle.head) for name in bundle.lora_targets)
    assert bundle.processor.padding_side == ("left" if kind == "xlnet" else "right")
    assert getattr(bundle.model.config, "use_cache", False) is False

    rows = [{**ROW, "answers": "Giant Mountains"}, {"question": "What?", "context": "the Elbe", "answers": "Elbe"}]
    samples = [sample for row in rows for sample in task.encode(row, bundle, train=True)]
    batch = collate(samples, bundle.padding)
    with torch.no_grad():
        loss = task.loss(bundle.model, batch)
        single = [task.loss(bundle.model, collate([sample], bundle.padding)) for sample in samples]
        # The model's own loss, a window at a time, where no padding is in its denominator.
        own = []
        for sample in samples:
            inputs = {k: v for k, v in collate([sample], {}).items() if k not in ("offsets", "null_position")}
            own.append(float(bundle.model(**inputs).loss))
    assert loss.count == len(samples) > 2
    assert float(loss.total) == pytest.approx(sum(own), rel=1e-4)
    assert [float(one.total) for one in single] == pytest.approx(own, rel=1e-5)


def test_decoders_read_the_question_first_whatever_their_tokenizer_says(make_model, make_tokenizer, tmp_path):
    folder = make_model(tmp_path / "qwen3", "qwen3")
    make_tokenizer(folder, "bytes", pad=False, padding_side="left")
    bundle = build(folder)
    assert bundle.processor.padding_side == "right"
    assert bundle.processor.pad_token == "[EOS]"
    assert bundle.model.config.pad_token_id == bundle.padding["input_ids"] == 4
    (sample,) = QuestionAnswering().encode(ROW, bundle, False)
    assert bundle.processor.decode(sample.tensors["input_ids"]).startswith("Where")


def test_the_question_stands_where_the_padding_doesnt(make_model, tmp_path):
    bundle = build(make_model(tmp_path / "xlnet", "xlnet"))
    (sample,) = QuestionAnswering().encode(ROW, bundle, False)
    names = bundle.processor.convert_ids_to_tokens(sample.tensors["input_ids"])
    assert (names[0], names[-7:-2]) == ("the", ["where", "does", "it", "rise", "?"])
    assert names[int(sample.tensors["null_position"])] == "[CLS]"
    assert sample.tensors["null_position"] == len(names) - 1


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama"])
def test_a_head_for_answers_is_kept(kind, make_model, tmp_path):
    folder = make_model(tmp_path / kind, kind, head=True)
    bundle = build(folder)
    assert bundle.notes == ("head kept: start and end of the answer",)
    saved = hf.AutoModelForQuestionAnswering.from_pretrained(folder)
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(bundle.model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("labels", [5, 2])
def test_a_head_of_the_same_name_for_other_things_is_replaced(labels, make_model, tmp_path):
    """ModernBERT's classifier is `classifier` in every task."""
    folder = make_model(tmp_path / "modernbert", "modernbert")
    config = hf.AutoConfig.from_pretrained(folder, num_labels=labels)
    classifier = hf.AutoModelForSequenceClassification.from_config(config)
    classifier.save_pretrained(folder)
    bundle = build(folder)
    assert bundle.notes == (
        "head replaced: ModernBertForSequenceClassification became start and end of the answer",
    )
    assert bundle.model.classifier.weight.shape == (2, 32)
    assert 0 < bundle.model.classifier.weight.std() < 0.3
    if labels == 2:
        assert not torch.equal(bundle.model.classifier.weight, classifier.classifier.weight)
    torch.testing.assert_close(bundle.model.head.dense.weight, classifier.head.dense.weight)


def test_the_number_of_a_classifiers_classes_is_not_that_of_our_outputs(make_model, tmp_path):
    folder = make_model(tmp_path / "bert", "bert")
    config = hf.AutoConfig.from_pretrained(folder, num_labels=7)
    hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    bundle = build(folder)
    assert bundle.notes == ("new head: start and end of the answer",)
    assert bundle.model.qa_outputs.out_features == bundle.model.config.num_labels == 2


def test_random_weights(make_model, tmp_path):
    source = Source(make_model(tmp_path / "bert", "bert"))
    source.random_weights = True
    (tmp_path / "bert" / "model.safetensors").unlink()
    bundle = QuestionAnswering().build(source, [])
    assert bundle.notes == ("random weights: nothing is pretrained", "new head: start and end of the answer")


def test_the_length_of_windows(make_model, tmp_path):
    bert = make_model(tmp_path / "bert", "bert")
    assert build(bert).processor.model_max_length == 384
    assert build(bert, max_length=500).processor.model_max_length == 500
    # 130 rows of positions, which start behind the padding id 0
    assert build(make_model(tmp_path / "roberta", "roberta")).processor.model_max_length == 129
    assert build(make_model(tmp_path / "gpt2", "gpt2")).processor.model_max_length == 256
    for options, why in (
        ({"max_length": 600}, "512 positions"),
        ({"max_length": 3}, "no room"),
        ({"max_length": 40, "doc_stride": 40}, "doc_stride: windows of 40 tokens can't share 40"),
    ):
        with pytest.raises(ConfigError, match=why):
            build(bert, **options)


def test_what_cant_be_opened(make_model, tmp_path):
    folder = tmp_path / "vit"
    hf.ViTConfig(hidden_size=8).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(ModelError, match="'vit', which transformers can't use for question-answering"):
        build(str(folder))
    folder = make_model(tmp_path / "bert", "bert")
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="its tokenizer can't be loaded"):
        build(str(tmp_path / "bare"))
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match="not in the checkpoint"):
        build(folder)


def test_a_model_that_wants_more_than_text(make_tokenizer, tmp_path):
    sizes = {"vocab_size": 512, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 48}
    config = hf.LiltConfig(num_hidden_layers=2, **sizes)
    hf.AutoModel.from_config(config).save_pretrained(tmp_path / "lilt")
    make_tokenizer(tmp_path / "lilt", "words")
    build(str(tmp_path / "lilt"))  # its boxes may be left out
    config = hf.LxmertConfig(
        num_attention_heads=2,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        num_qa_labels=2,
        **{key: value for key, value in sizes.items() if key != "num_attention_heads"},
    )
    hf.AutoModel.from_config(config).save_pretrained(tmp_path / "lxmert")
    make_tokenizer(tmp_path / "lxmert", "words")
    with pytest.raises(ModelError, match="gives no start and end of an answer in plain text"):
        build(str(tmp_path / "lxmert"))
