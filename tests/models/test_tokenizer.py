"""Tokens that a task adds: rows in the embeddings and in the output, tied or not."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from fasttune.models.tokenizer import add_tokens

WORDS = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(WORDS, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [4, 16])
def test_new_tokens_have_rows_and_their_modules_are_named(tmp_path: Path, tied: bool, rows: int) -> None:
    """rows: a model may have more of them than its tokenizer has tokens; those were never trained."""
    config = hf.LlamaConfig(
        vocab_size=rows,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=tied,
    )
    model, made = hf.LlamaForCausalLM(config), tokenizer()
    before = model.get_input_embeddings().weight[:4].clone()
    assert add_tokens(made, model, ("<new>", "b", "<other>")) == ("model.embed_tokens", "lm_head")
    assert made("a <new><other>")["input_ids"] == [2, 4, 5]
    assert made.decode([2, 4], skip_special_tokens=True).strip() == "a"
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == model.get_output_embeddings().weight.shape[0] == max(rows, 6)
    assert (model.get_output_embeddings().weight is weight) == tied
    torch.testing.assert_close(weight[:4], before)
    assert add_tokens(made, model, ("<new>",)) == ()
    made.save_pretrained(tmp_path)
    assert hf.AutoTokenizer.from_pretrained(tmp_path)("<new>")["input_ids"] == [4]
