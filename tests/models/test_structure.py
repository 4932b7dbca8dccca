"""Backbone, head and blocks where transformers does not name the backbone."""

import pytest
import transformers as hf

from fasttune.models.structure import base_name, block_names, head_modules, linear_names

T5 = hf.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)


@pytest.mark.parametrize(
    ("kind", "head"),
    [(hf.T5ForQuestionAnswering, ["qa_outputs"]), (hf.T5ForConditionalGeneration, ["lm_head"])],
)
def test_encoder_and_decoder_without_a_common_parent(kind: type, head: list[str]) -> None:
    model = kind(T5)
    base = base_name(model)
    assert base == ""
    assert head_modules(model, base) == head
    blocks = block_names(model, base)
    assert blocks == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    linear = linear_names(model, blocks, head)
    assert "encoder.block.1.layer.0.SelfAttention.q" in linear
    assert "decoder.block.0.layer.1.EncDecAttention.v" in linear
    assert len(linear) == 2 * (4 + 2) + 2 * (8 + 2)


def test_a_common_parent_is_the_backbone() -> None:
    config = hf.BartConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24
    )
    model = hf.BartForQuestionAnswering(config)
    assert base_name(model) == "model"
    assert head_modules(model, "model") == ["qa_outputs"]
    assert block_names(model, "model") == ("model.encoder.layers.0", "model.decoder.layers.0")
