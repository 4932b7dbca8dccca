"""Tiny checkpoints with random weights, and the host's collation in a few lines."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

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


def stack(samples, padding):
    """A batch as the host makes it: padded to the longest in every dimension."""
    batch = {}
    for name in samples[0].tensors:
        arrays = [sample.tensors[name] for sample in samples]
        shape = np.max([array.shape for array in arrays], axis=0).astype(int) if arrays[0].ndim else ()
        whole = np.full((len(arrays), *shape), padding.get(name, 0), dtype=arrays[0].dtype)
        for i, array in enumerate(arrays):
            whole[(i, *map(slice, array.shape))] = array
        batch[name] = torch.from_numpy(whole)
    return batch


@pytest.fixture(name="make_tokenizer")
def make_tokenizer_fixture():
    return make_tokenizer


@pytest.fixture
def sentences():
    return SENTENCES


@pytest.fixture
def collate():
    return stack


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
