"""Tiny decoders with random weights, and their tokenizers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fasttune.testing import collate

TEXTS = (
    "Which day comes after Monday?",
    "Tuesday comes after Monday, and Wednesday after that.",
    "Be brief. Answer in one word, please!",
    "What is seven and five?\nIt is twelve.",
    "user assistant system tool model",
    "Below is an instruction that describes a task.",
)
SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
)
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "llama tied": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**SMALL),
    "mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=16),
    "phi3": lambda: hf.Phi3Config(**SMALL, pad_token_id=0),
    "gemma2": lambda: hf.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0),
    "gpt2": lambda: hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=512, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(17)


def make_tokenizer(folder, pad=True, bos=True, eos=True, template=None, added=()):
    """A byte-level BPE of the few texts above, written into the folder. Returns it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [*(["<pad>"] if pad else []), *(["<s>"] if bos else []), *(["</s>"] if eos else []), *added]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    names = {"pad_token": "<pad>"} if pad else {}
    names |= {"bos_token": "<s>"} if bos else {}
    names |= {"eos_token": "</s>"} if eos else {}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    if added:
        tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder, kind="llama", **tokenizer):
    """A model's folder, of a kind above."""
    made = make_tokenizer(folder, **tokenizer)
    config = CONFIGS[kind]()
    # transformers gives the tokenizer of a Qwen2 a token of its own.
    config.vocab_size = len(made) + (8 if kind == "qwen2" else 0)
    config.initializer_range = 0.1
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        made.bos_token_id,
        made.eos_token_id,
        made.pad_token_id,
    )
    torch.manual_seed(3)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(name="make_tokenizer")
def make_tokenizer_fixture():
    return make_tokenizer


@pytest.fixture(name="make_model")
def make_model_fixture():
    return make_model


@pytest.fixture(name="collate")
def collate_fixture():
    return collate
