"""What a row becomes: prefixes, prompts, languages, lengths, and what can be wrong with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf

from fasttune.errors import ConfigError, DataError, ModelError
from fasttune.models.language import decoder_inputs
from fasttune.task import Source
from fasttune_summarization.tasks import Summarization, Text2Text

DOCUMENT, SUMMARY = "the red fox runs over the hill while the grey dog sleeps", "fox runs"
ROW = {"document": DOCUMENT, "summary": SUMMARY}


@pytest.fixture
def opened(tmp_path, write_model):
    """opened(kind, options, **config settings) -> (task, bundle)."""

    def build(kind, tokenizer=None, task=Summarization, config=None, **options):
        write_model(kind, tmp_path / kind, tokenizer, **(config or {}))
        subject = task(task.Options(**options))
        return subject, subject.build(Source(tmp_path / kind), [])

    return build


def words(bundle, ids):
    return bundle.processor.convert_ids_to_tokens(np.asarray(ids).tolist())


def note(bundle):
    return bundle.notes[-1]


def test_an_encoder_decoder_reads_a_prefix(opened):
    task, bundle = opened("t5", prefix="summarize : ")
    sample = task.encode(ROW, bundle, True)
    assert words(bundle, sample.tensors["input_ids"]) == ["summarize", ":", *DOCUMENT.split(), "</s>"]
    assert words(bundle, sample.tensors["labels"]) == ["fox", "runs", "</s>"]
    assert sample.cost == 3 + 12 + 3
    assert sample.truncated == {"document": 0, "summary": 0}
    assert "labels" not in task.encode({"document": DOCUMENT}, bundle, False).tensors
    assert note(bundle) == "prefix 'summarize : '; reads at most 1024 tokens, learns to write at most 128"


def test_the_prefix_is_what_the_models_configuration_states(opened):
    stated = {"summarization": {"prefix": "summarize: ", "num_beams": 4}, "translation_en_to_de": {"prefix": "no"}}
    for task in (Summarization, Text2Text):
        expected = "'summarize: '" if task is Summarization else "no prefix"
        _, bundle = opened("t5", task=task, config={"task_specific_params": stated})
        assert expected in note(bundle)
    _, bundle = opened("t5", config={"task_specific_params": stated}, prefix="")
    assert note(bundle).startswith("no prefix")


def test_a_decoder_reads_a_prompt_and_learns_what_stands_behind_it(opened):
    task, bundle = opened("llama", prompt="Text: {document}\n\nIn short: ")
    sample = task.encode(ROW, bundle, True)
    ids, labels = sample.tensors["input_ids"], sample.tensors["labels"]
    prompt = bundle.processor(f"Text: {DOCUMENT}\n\nIn short:")["input_ids"]
    assert ids[: len(prompt)].tolist() == prompt
    assert (labels[: len(prompt)] == -100).all()
    assert labels[len(prompt) :].tolist() == ids[len(prompt) :].tolist()
    # The blank goes with the first word, as it does in running text.
    assert words(bundle, labels[len(prompt) :])[0].startswith("Ġ")
    assert bundle.processor.decode(labels[len(prompt) :]) == " fox runs</s>"
    assert task.encode({"document": DOCUMENT}, bundle, False).tensors["input_ids"].tolist() == prompt
    assert bundle.processor.padding_side == "left"
    shown = task.show(sample, bundle)
    assert shown.startswith("reads 'Text: the red fox")
    assert shown.endswith("writes ⟦ fox runs</s>⟧")


def test_a_beginning_is_kept_and_an_end_is_not_put_before_the_summary(opened, write_model, tmp_path):
    from_bart = hf.AutoTokenizer.from_pretrained(write_model("bart", tmp_path / "b"))
    task, bundle = opened("llama", from_bart)
    sample = task.encode(ROW, bundle, True)
    assert words(bundle, sample.tensors["input_ids"])[0] == "<s>"
    assert sample.tensors["input_ids"].tolist().count(bundle.processor.eos_token_id) == 1


def test_the_document_is_cut_never_the_prompt(opened):
    task, bundle = opened("gpt2", max_source_length=24, prompt="Text: {document}\n\nIn short:")
    whole = len(bundle.processor(f"Text: {DOCUMENT}\n\nIn short:")["input_ids"])
    sample = task.encode(ROW, bundle, True)
    prompt = sample.tensors["input_ids"][sample.tensors["labels"] == -100]
    assert len(prompt) == 24
    assert sample.truncated == {"document": whole - 24, "summary": 0}
    text = bundle.processor.decode(prompt)
    assert text.startswith("Text: the red")
    assert text.endswith("\n\nIn short:")
    assert bundle.processor.decode(sample.tensors["labels"][24:]).startswith("fox runs")


@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_a_long_summary_is_cut_before_its_end(kind, opened):
    task, bundle = opened(kind, max_target_length=5)
    labels = task.encode({"document": DOCUMENT, "summary": DOCUMENT}, bundle, True).tensors["labels"]
    labels = labels[labels != -100]
    assert len(labels) == 5
    assert labels[-1] == bundle.processor.eos_token_id
    assert task.encode({"document": DOCUMENT, "summary": DOCUMENT}, bundle, True).truncated["summary"] > 0


def test_an_encoder_decoder_loses_the_end_of_the_document_alone(opened):
    task, bundle = opened("t5", prefix="summarize : ", max_source_length=6)
    sample = task.encode(ROW, bundle, True)
    assert words(bundle, sample.tensors["input_ids"]) == ["summarize", ":", "the", "red", "fox", "</s>"]
    assert sample.truncated["document"] == 9


def test_a_tokenizer_that_adds_no_end_gets_one(opened, write_model, tmp_path):
    plain = hf.AutoTokenizer.from_pretrained(write_model("llama", tmp_path / "l"))
    task, bundle = opened("t5", plain)
    labels = task.encode(ROW, bundle, True).tensors["labels"]
    assert labels[-1] == bundle.processor.eos_token_id
    assert bundle.processor.decode(labels[:-1]) == SUMMARY


def test_rows_without_tokens_are_bad(opened):
    task, bundle = opened("t5")
    for role in ("document", "summary"):
        with pytest.raises(DataError, match=f"{role}: the tokenizer makes no token"):
            task.encode({**ROW, role: "\u2003"}, bundle, True)


def test_a_document_of_which_nothing_is_left_is_bad(opened):
    task, bundle = opened("llama", max_source_length=4, prompt="{document}:")
    cut = task.encode(ROW, bundle, True).tensors["labels"]
    assert (cut == -100).sum() == 4
    bundle.layout = replace(bundle.layout, after=":" * 9)
    with pytest.raises(DataError, match="document: nothing of it is left within max_source_length 4"):
        task.encode(ROW, bundle, True)


def test_tokens_outside_the_vocabulary_are_bad(opened):
    task, bundle = opened("t5")
    bundle.model.config.vocab_size = 9
    with pytest.raises(DataError, match=r"document: token '\w+' has id \d+, but the model's vocabulary ends at 8"):
        task.encode(ROW, bundle, True)
    with pytest.raises(DataError, match="summary: token"):
        task.encode({"document": "and", "summary": "wire"}, bundle, True)


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("t5", {"prompt": "{document}:"}, r"options\.prompt: T5ForConditionalGeneration is an encoder-decoder"),
        ("gpt2", {"prefix": "x"}, r"options\.prefix: the model is a decoder"),
        ("gpt2", {"max_source_length": 100, "max_target_length": 40}, "more than the model's 128 positions"),
        ("gpt2", {"max_source_length": 100, "max_new_tokens": 29}, "more than the model's 128 positions"),
        ("bart", {"max_source_length": 129}, r"max_source_length: 129 is more than the model's 128 positions"),
        ("bart", {"max_target_length": 129}, "max_target_length: 129 is more"),
        ("bart", {"max_new_tokens": 129}, "max_new_tokens: 129 is more"),
        ("gpt2", {"max_source_length": 4}, r"max_source_length: 4 leaves no room for the input beside \d+ tokens"),
        ("bart", {"max_target_length": 2}, "max_target_length: 2 leaves no room for text beside 2 special tokens"),
        ("t5", {"src_lang": "en_XX"}, r"options\.src_lang: the tokenizer of this model marks no languages"),
    ],
)
def test_options_that_do_not_suit_the_model(kind, options, why, opened):
    with pytest.raises(ConfigError, match=why):
        opened(kind, **options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"prompt": "Summarize this."}, r"expected \{document\} in it once, found it 0 times"),
        ({"prompt": "{document}{document}"}, "found it 2 times"),
        ({"length_penalty": 2.0}, "length_penalty needs beams above 1"),
        ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size 1"),
        ({"beams": 0}, "greater than or equal to 1"),
        ({"num_beams": 4}, "Extra inputs"),
    ],
)
def test_options_that_make_no_sense(options, why):
    with pytest.raises(ValueError, match=why):
        Summarization.Options(**options)


def test_relative_positions_have_no_end(opened):
    task, bundle = opened("t5", config={"n_positions": 16}, max_source_length=40)
    sample = task.encode({"document": " ".join([DOCUMENT] * 3), "summary": SUMMARY}, bundle, True)
    assert (len(sample.tensors["input_ids"]), sample.truncated["document"]) == (37, 0)


def test_an_encoder_is_refused(tmp_path, write_model):
    tokenizer = hf.AutoTokenizer.from_pretrained(write_model("t5", tmp_path))
    config = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    hf.BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="an encoder, which sees the words"):
        Summarization().build(Source(tmp_path), [])


def test_generation_settings_made_for_other_texts_are_left_out_and_said(opened, tmp_path, write_model):
    folder = write_model("bart", tmp_path / "made")
    hf.GenerationConfig(
        min_length=56, num_beams=4, length_penalty=2.0, eos_token_id=1, decoder_start_token_id=1, pad_token_id=0
    ).save_pretrained(folder)
    task = Summarization(Summarization.Options(max_new_tokens=5))
    bundle = task.build(Source(folder), [])
    assert any("left out: length_penalty 2.0, min_length 56" in note for note in bundle.notes)
    own = bundle.model.generation_config
    assert (own.num_beams, own.max_new_tokens, own.min_length) == (1, 5, None)
    assert (own.eos_token_id, own.decoder_start_token_id) == (1, 1)


class TestLanguages:
    """mBART's own tokenizer, with a language's code behind a text that is read or written."""

    @pytest.fixture
    def mbart(self, tmp_path):
        return self.folder(tmp_path, hf.MBartTokenizer)

    @staticmethod
    def folder(tmp_path, kind):
        vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        vocabulary += [(f"▁{word}", -float(i)) for i, word in enumerate(DOCUMENT.split())] + [("▁", -20.0)]
        tokenizer = kind(vocab=vocabulary)
        tokenizer.save_pretrained(tmp_path)
        config = hf.MBartConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            init_std=0.2,
            dropout=0.0,
        )
        hf.MBartForConditionalGeneration(config).save_pretrained(tmp_path)
        return Source(tmp_path)

    def test_each_side_gets_its_code(self, mbart):
        task = Text2Text(Text2Text.Options(src_lang="en_XX", tgt_lang="de_DE", max_new_tokens=4))
        bundle = task.build(mbart, [])
        sample = task.encode({"source": "the fox", "target": "dog"}, bundle, True)
        assert words(bundle, sample.tensors["input_ids"]) == ["▁the", "▁fox", "</s>", "en_XX"]
        assert words(bundle, sample.tensors["labels"]) == ["▁dog", "</s>", "de_DE"]
        labels = torch.from_numpy(sample.tensors["labels"]).unsqueeze(0)
        assert words(bundle, decoder_inputs(bundle.model, labels)[0]) == ["de_DE", "▁dog", "</s>"]
        batch = {name: torch.from_numpy(array).unsqueeze(0) for name, array in sample.tensors.items()}
        with torch.no_grad():
            loss, predictions = task.score(bundle.model, batch, bundle)
            assert float(loss.total / loss.count) == pytest.approx(float(bundle.model(**batch).loss), rel=1e-5)
        assert predictions == task.decode(bundle.model, batch, bundle)
        german = bundle.processor.convert_tokens_to_ids("de_DE")
        assert bundle.model.generation_config.decoder_start_token_id == german
        assert "reads en_XX, writes de_DE" in bundle.notes

    def test_where_the_code_begins_a_text_generation_is_made_to_begin_with_it(self, tmp_path):
        """mBART-50, as M2M100 and NLLB: the decoder starts with </s>, and writes the code first."""
        task = Text2Text(Text2Text.Options(src_lang="en_XX", tgt_lang="de_DE", max_new_tokens=4))
        bundle = task.build(self.folder(tmp_path, hf.MBart50Tokenizer), [])
        sample = task.encode({"source": "the fox", "target": "dog"}, bundle, True)
        assert words(bundle, sample.tensors["input_ids"]) == ["en_XX", "▁the", "▁fox", "</s>"]
        assert words(bundle, sample.tensors["labels"]) == ["de_DE", "▁dog", "</s>"]
        written = bundle.model.generate(input_ids=torch.from_numpy(sample.tensors["input_ids"]).unsqueeze(0))
        assert words(bundle, written[0][:2]) == ["</s>", "de_DE"]
        assert "the decoder starts with '</s>'" in bundle.notes

    def test_an_unknown_language_gets_the_nearest(self, mbart):
        with pytest.raises(ConfigError, match=r"options\.tgt_lang: 'de' is no language .*It knows ar_AR"):
            Text2Text(Text2Text.Options(tgt_lang="de")).build(mbart, [])

    def test_one_language_is_read_and_written_where_none_is_named(self, mbart):
        assert "reads en_XX, writes en_XX" in Summarization().build(mbart, []).notes


def test_the_first_token_of_led_sees_all_others(tmp_path, write_model):
    tokenizer = hf.AutoTokenizer.from_pretrained(write_model("bart", tmp_path))
    config = hf.LEDConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        attention_window=8,
        max_encoder_position_embeddings=256,
        max_decoder_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
        decoder_start_token_id=1,
        init_std=0.2,
        dropout=0.0,
    )
    hf.LEDForConditionalGeneration(config).save_pretrained(tmp_path)
    task = Summarization(Summarization.Options(max_new_tokens=5, beams=2))
    bundle = task.build(Source(tmp_path), [])
    assert note(bundle) == "no prefix; reads at most 256 tokens, learns to write at most 64"
    sample = task.encode(ROW, bundle, True)
    assert sample.tensors["global_attention_mask"].tolist() == [1] + [0] * (len(sample.tensors["input_ids"]) - 1)
    batch = {name: torch.from_numpy(array).unsqueeze(0) for name, array in sample.tensors.items()}
    with torch.no_grad():
        loss, predictions = task.score(bundle.model, batch, bundle)
        own = bundle.model(**batch)
    assert float(loss.total / loss.count) == pytest.approx(float(own.loss), rel=1e-5)
    assert predictions == task.decode(bundle.model, batch, bundle)
    with pytest.raises(ConfigError, match="257 is more than the model's 256"):
        Summarization(Summarization.Options(max_source_length=257)).build(Source(tmp_path), [])


@pytest.mark.parametrize("family", [hf.PegasusConfig, hf.MarianConfig, hf.M2M100Config])
def test_further_families_learn_their_own_loss(family, tmp_path, write_model):
    tokenizer = hf.AutoTokenizer.from_pretrained(write_model("t5", tmp_path))
    config = family(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        dropout=0.0,
        init_std=0.2,
    )
    if family is hf.MarianConfig:
        config.decoder_vocab_size = config.vocab_size
    hf.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    task = Summarization(Summarization.Options(max_new_tokens=5))
    bundle = task.build(Source(tmp_path), [])
    batch = {n: torch.from_numpy(a).unsqueeze(0) for n, a in task.encode(ROW, bundle, True).tensors.items()}
    with torch.no_grad():
        loss, predictions = task.score(bundle.model, batch, bundle)
        assert float(loss.total / loss.count) == pytest.approx(float(bundle.model(**batch).loss), rel=1e-5)
    assert predictions == task.decode(bundle.model, batch, bundle)


def test_an_end_that_the_model_does_not_know_ends_its_texts(tmp_path, write_model):
    """GPT-2's configuration states token 50256, beyond this vocabulary; the tokenizer's own end is learned."""
    task = Summarization(Summarization.Options(max_new_tokens=5))
    bundle = task.build(Source(write_model("gpt2", tmp_path)), [])
    assert bundle.model.generation_config.eos_token_id == bundle.processor.eos_token_id == 1
