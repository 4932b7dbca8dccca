"""The loss of language models: that of the model itself, for every kind of head, without its logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from fasttune.adapt import adapt
from fasttune.config import Head
from fasttune.errors import ModelError
from fasttune.features import cache_features
from fasttune.models.checkpoint import load_config
from fasttune.models.language import (
    decoder_inputs,
    language_loss,
    open_language_model,
    projection_of,
    settle_projection,
)
from fasttune.task import Bundle, Source

SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
)
SEQ2SEQ = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=2,
)
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
VOCABULARY = 96

CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "llama tied": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**SMALL),
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gemma2, soft cap": lambda: hf.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere, scaled": lambda: hf.CohereConfig(**SMALL, logit_scale=0.0625),
    "granite, scaled": lambda: hf.GraniteConfig(**SMALL, logits_scaling=6.0),
    "phi, biased": lambda: hf.PhiConfig(**SMALL, resid_pdrop=0.0, embd_pdrop=0.0),
    "t5, tied and scaled": lambda: hf.T5Config(**T5),
    "t5, untied": lambda: hf.T5Config(**T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "bart": lambda: hf.BartConfig(**SEQ2SEQ),
    "pegasus": lambda: hf.PegasusConfig(**SEQ2SEQ),
    "mbart": lambda: hf.MBartConfig(**SEQ2SEQ),
    "marian": lambda: hf.MarianConfig(**SEQ2SEQ),
}


def make(name: str) -> Any:
    config = CONFIGS[name]()
    config.vocab_size = VOCABULARY
    config.initializer_range = 0.3  # so that the logits differ enough to tell a wrong head
    if config.model_type == "marian":
        config.decoder_vocab_size = VOCABULARY
    if not config.is_encoder_decoder:
        config.pad_token_id = 0
    torch.manual_seed(3)
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def batch_for(model: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, bool]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.clone() if not model.config.is_encoder_decoder else ids[:, 2:9].clone()
    labels[1, 5:] = -100
    labels[2, :2] = -100
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        return {**inputs, "decoder_input_ids": decoder_inputs(model, labels)}, labels, False
    return inputs, labels, True


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_and_its_gradients_are_the_models_own(name: str) -> None:
    model = make(name)
    inputs, labels, shift = batch_for(model)
    own = model(**{k: v for k, v in inputs.items() if k != "decoder_input_ids"}, labels=labels).loss
    own.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    assert settle_projection(model) is None, "the head is one that projection_of knows"
    loss = language_loss(model, inputs, labels, shift=shift)
    (loss.total / loss.count).backward()

    assert float(loss.total.detach() / loss.count) == pytest.approx(float(own.detach()), rel=2e-6)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for n, parameter in model.named_parameters():
        if n in expected:
            scale = float(expected[n].abs().max())
            assert parameter.grad is not None
            # Some are 0 but for rounding: a bias of the keys changes no softmax.
            assert float((parameter.grad - expected[n]).abs().max()) <= 2e-5 * scale + 1e-6 * largest, n


@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap", "phi, biased", "bart"])
def test_accuracy_counts_the_most_likely_tokens(name: str) -> None:
    model = make(name)
    inputs, labels, shift = batch_for(model)
    loss = language_loss(model, inputs, labels, shift=shift, accuracy=True)
    with torch.no_grad():
        best = model(**inputs).logits.argmax(-1)
    best, wanted = (best[:, :-1], labels[:, 1:]) if shift else (best, labels)
    assert int(loss.parts["token_accuracy"]) == int(((best == wanted) & (wanted != -100)).sum())
    assert int(loss.count) == int((wanted != -100).sum())


def test_a_head_of_another_kind_is_noticed_and_served_from_whole_logits() -> None:
    model = make("llama")
    forward = model.forward

    def shifted(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        output.logits = output.logits * torch.linspace(0.5, 2, output.logits.shape[-1])
        return output

    model.forward = shifted
    note = settle_projection(model)
    assert note is not None
    assert "computed whole" in note
    inputs, labels, _ = batch_for(model)
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    assert float(language_loss(model, inputs, labels, shift=True).total.detach()) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def test_the_models_own_forward_is_left_as_it_was() -> None:
    model = make("bart")
    inputs, labels, _ = batch_for(model)
    before = model(**inputs).logits
    language_loss(model, inputs, labels, shift=False)
    assert "forward" not in model.get_output_embeddings().__dict__
    assert torch.equal(model(**inputs).logits, before)


def test_opening_a_folder_names_head_blocks_and_targets(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    source = Source(tmp_path)
    opened = open_language_model(source, load_config(source), hf.AutoModelForCausalLM)
    assert opened.head == ("lm_head",)
    assert opened.blocks == ("model.layers.0", "model.layers.1")
    assert len(opened.lora_targets) == 14
    assert not opened.notes
    assert projection_of(opened.model).softcap is None


@pytest.mark.parametrize(
    ("name", "head", "blocks"),
    [
        ("llama tied", ("model.embed_tokens",), 2),
        ("gpt2", ("transformer.wte",), 2),
        ("bart", ("model.shared",), 4),
        ("t5, tied and scaled", ("shared",), 4),
        ("phi, biased", ("lm_head",), 2),
    ],
)
def test_strategy_head_trains_the_projection_tied_or_not(
    name: str, head: tuple[str, ...], blocks: int, tmp_path: Path
) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    source = Source(tmp_path)
    auto = hf.AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else hf.AutoModelForCausalLM
    opened = open_language_model(source, load_config(source), auto)
    assert opened.head == head
    assert len(opened.blocks) == blocks, "both stacks of an encoder-decoder"
    bundle = Bundle(opened.model, None, opened.head, opened.blocks, opened.lora_targets, head_is_new=False)
    adapted = adapt(bundle, Head())
    projection = opened.model.get_output_embeddings()
    assert any(parameter is projection.weight for parameter in adapted.trained.values())
    assert {trained.rpartition(".")[0] for trained in adapted.trained} == set(head)


@pytest.mark.parametrize(("name", "cached"), [("llama", True), ("bart", False), ("bart, untied", False)])
def test_features_are_kept_only_where_they_have_a_length_of_their_own(name: str, cached: bool) -> None:
    if name == "bart, untied":
        model = hf.BartForConditionalGeneration(
            hf.BartConfig(**SEQ2SEQ, vocab_size=VOCABULARY, tie_word_embeddings=False)
        )
    else:
        model = make(name)
    head = ("model.shared",) if name == "bart" else ("lm_head",)
    bundle = Bundle(model, None, head, (), (), head_is_new=False)
    assert (cache_features(bundle, 1.0) is not None) == cached


def test_a_checkpoint_without_its_output_projection_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Source(tmp_path)
    with pytest.raises(ModelError, match=r"lm_head\.weight is not in the checkpoint"):
        open_language_model(source, load_config(source), hf.AutoModelForCausalLM)
