"""Tiny checkpoints with random weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fasttune.testing import collate

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
WORDS = [*SPECIAL, "red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven", "eight"]
SENTENCES = ("red one two", "green", "blue three four five six seven eight one two", "one one green blue")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(17)


def make_tokenizer(folder, pad=True, special=True, **settings):
    ids = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(ids, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = {"unk_token": "[UNK]", "eos_token": "[EOS]"}
    if special:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    if pad:
        names["pad_token"] = "[PAD]"
    PreTrainedTokenizerFast(tokenizer_object=core, **names, **settings).save_pretrained(folder)


@pytest.fixture(name="make_tokenizer")
def make_tokenizer_fixture():
    return make_tokenizer


@pytest.fixture
def sentences():
    return SENTENCES


@pytest.fixture(name="collate")
def collate_fixture():
    return collate


@pytest.fixture
def bert(tmp_path):
    """A BERT folder without head and pooler."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    folder = tmp_path / "bert"
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
