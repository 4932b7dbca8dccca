"""Tiny models with random weights, and tokenizers made on the spot."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
PAD, END, _, BEGIN = range(4)
PAIRS = (
    ("the red fox runs over the hill while the grey dog sleeps", "fox runs"),
    ("rain falls", "wet"),
    ("a boat with two sails goes down the river and does not come back today", "a boat goes away today"),
    ("seven birds sit on one wire", "birds sit"),
    ("the mill stands still since the wind does not blow", "no wind no flour"),
    ("one", "one"),
    ("she reads the long letter twice and then burns it in the stove", "letter burns"),
    ("two trains leave the town at noon and only one of them arrives", "one train arrives"),
    ("snow on the roof and smoke from the chimney", "winter"),
)
SEQ2SEQ = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    pad_token_id=PAD,
    eos_token_id=END,
    bos_token_id=BEGIN,
    decoder_start_token_id=END,
    forced_eos_token_id=END,
    init_std=0.2,
)
DECODER = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    bos_token_id=BEGIN,
    eos_token_id=END,
    initializer_range=0.2,
)
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=1.0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(17)


def words_of(pairs):
    return sorted({word for pair in pairs for text in pair for word in text.split()})


def word_tokenizer(pairs=PAIRS, end=True):
    """A token a word. end: it puts </s> behind a text, as T5's does."""
    ids = {word: i for i, word in enumerate([*SPECIAL, *words_of(pairs), "summarize", ":", "Summary", "Answer"])}
    core = Tokenizer(models.WordLevel(ids, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


def byte_tokenizer(pairs=PAIRS, pad=True):
    """Byte-level BPE, as GPT-2's: blanks belong to the word behind them, nothing is put around a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([text for pair in pairs for text in pair], trainer)
    named = {"pad_token": "<pad>"} if pad else {}
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", **named)


def bart_tokenizer(pairs=PAIRS):
    """As BART's: <s> and </s> around a text."""
    tokenizer = byte_tokenizer(pairs)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    return tokenizer


def t5(tokenizer, **settings):
    return hf.T5Config(vocab_size=len(tokenizer), **{**T5, **settings})


def bart(tokenizer, **settings):
    return hf.BartConfig(vocab_size=len(tokenizer), **{**SEQ2SEQ, "max_position_embeddings": 128, **settings})


def gpt2(tokenizer, **settings):
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.2, **settings}
    return hf.GPT2Config(vocab_size=len(tokenizer), **settings)


def llama(tokenizer, **settings):
    return hf.LlamaConfig(vocab_size=len(tokenizer), **{**DECODER, "max_position_embeddings": 256, **settings})


KINDS = {
    "t5": (t5, word_tokenizer),
    "bart": (bart, bart_tokenizer),
    "gpt2": (gpt2, lambda: byte_tokenizer(pad=False)),
    "llama": (llama, byte_tokenizer),
}


def write_model(kind, folder, tokenizer=None, **settings):
    """A folder with a tiny model of random weights. Returns it as text."""
    make_config, make_tokenizer = KINDS[kind]
    tokenizer = tokenizer or make_tokenizer()
    config = make_config(tokenizer, **settings)
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    hf.set_seed(3)
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(name="write_model")
def write_model_fixture():
    return write_model


@pytest.fixture
def rows():
    return [{"document": document, "summary": summary} for document, summary in PAIRS]
