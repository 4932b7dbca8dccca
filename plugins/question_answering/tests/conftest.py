"""Tiny checkpoints with random weights, the tokenizers that make a difference, and the host's collation."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="fasttune-qa-tests-"))

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, UNK, CLS, SEP, EOS = range(5)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
TEXT = (
    "The river Elbe rises in the Giant Mountains and flows through Dresden, Magdeburg and Hamburg to the "
    "North Sea. It is 1,094 kilometres long. In 1842 a fire destroyed a third of Hamburg. Who built the "
    "first bridge? Käthe Zürn, an engineer born in 1801, built the first bridge near Meißen; it cost $4.5 "
    "million. What did it cost? Where does the river rise? How long is it? When was she born? Which city "
    "burned? 🍐 and 梨 are pears. "
)
VOCABULARY = 512
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}

CONFIGS = {
    "bert": lambda: hf.BertConfig(vocab_size=VOCABULARY, **SMALL),
    "distilbert": lambda: hf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
    "roberta": lambda: hf.RobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=130, pad_token_id=0, type_vocab_size=1, **SMALL
    ),
    "modernbert": lambda: hf.ModernBertConfig(
        vocab_size=VOCABULARY, pad_token_id=0, cls_token_id=2, sep_token_id=3, local_attention=8, **SMALL
    ),
    "deberta-v2": lambda: hf.DebertaV2Config(
        vocab_size=VOCABULARY, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, **SMALL
    ),
    "electra": lambda: hf.ElectraConfig(vocab_size=VOCABULARY, embedding_size=16, **SMALL),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=256, bos_token_id=4, eos_token_id=4
    ),
    "llama": lambda: hf.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, bos_token_id=2, eos_token_id=4, pad_token_id=None, **SMALL
    ),
    "qwen3": lambda: hf.Qwen3Config(
        vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=16, bos_token_id=4, eos_token_id=4, **SMALL
    ),
    "xlnet": lambda: hf.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=2, d_inner=48),
    "bart": lambda: hf.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    ),
    "t5": lambda: hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    ),
}
TOKENIZERS = {"bert": "words", "electra": "words", "xlnet": "left", "gpt2": "bytes", "qwen3": "bytes"}
TOKENIZERS |= {"llama": "metaspace", "t5": "metaspace"}


def words(pair, kinds):
    """Whole words, by white space and punctuation, in lower case; [UNK] for what is not in TEXT."""
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=SPECIAL, vocab_size=VOCABULARY))
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return core, kinds | {"cls_token": "[CLS]", "sep_token": "[SEP]"}


def byte_pairs(special):
    """GPT-2's bytes: a word holds the blank before it; a letter may be several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL, vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator([TEXT], trainer)
    if special:
        core.post_processor = processors.RobertaProcessing(("[SEP]", SEP), ("[CLS]", CLS), trim_offsets=True)
        return core, {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core, {}


def metaspace():
    """SentencePiece's way: "▁" stands for a blank, and before the first word."""
    core = Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL + fallback, vocab_size=460, limit_alphabet=60)
    core.train_from_iterator([TEXT], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [CLS]:1 $B:1", special_tokens=[("[CLS]", CLS)]
    )
    return core, {"bos_token": "[CLS]"}


def make_tokenizer(folder, kind="words", pad=True, **settings):
    match kind:
        case "words":
            core, names = words("[CLS] $A [SEP] $B:1 [SEP]:1", {})
        case "left":  # XLNet: the question on the right, and the classification token last
            core, names = words("$A [SEP] $B:1 [SEP]:1 [CLS]:2", {"padding_side": "left", "pad_token_type_id": 3})
        case "pairs":
            core, names = byte_pairs(special=True)
        case "bytes":
            core, names = byte_pairs(special=False)
        case "metaspace":
            core, names = metaspace()
    names |= {"unk_token": "[UNK]", "eos_token": "[EOS]"} | ({"pad_token": "[PAD]"} if pad else {})
    kinds = ["input_ids", "attention_mask", *(["token_type_ids"] if kind in ("words", "left") else [])]
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, **names | {"model_input_names": kinds} | settings
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder, kind, head=False, **settings):
    """A folder with a tiny model, without a head unless told, and the tokenizer of its kind."""
    config = CONFIGS[kind]()
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(5)
    auto = hf.AutoModelForQuestionAnswering if head else hf.AutoModel
    auto.from_config(config).save_pretrained(folder)
    make_tokenizer(folder, TOKENIZERS.get(kind, "pairs"), pad=kind not in ("gpt2", "llama", "qwen3"))
    return str(folder)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(17)


@pytest.fixture(name="make_model", scope="session")
def make_model_fixture():
    return make_model


@pytest.fixture(name="make_tokenizer", scope="session")
def make_tokenizer_fixture():
    return make_tokenizer


@pytest.fixture(scope="session")
def text():
    return TEXT


def stack(samples, padding):
    """A batch as the host makes it: padded at the end to the longest."""
    batch = {}
    for name in samples[0].tensors:
        arrays = [torch.from_numpy(np.asarray(sample.tensors[name])) for sample in samples]
        whole = arrays[0].ndim and torch.nn.utils.rnn.pad_sequence(arrays, True, padding.get(name, 0))
        batch[name] = whole if arrays[0].ndim else torch.stack(arrays)
    return batch


@pytest.fixture
def collate():
    return stack


@pytest.fixture(name="nested")
def nested_fixture():
    return nested


def nested(rows, versions=2):
    """Rows as SQuAD writes them: a paragraph a context, two paragraphs an article."""
    paragraphs = {}
    for number, row in enumerate(rows):
        answers = [{"text": t, "answer_start": s} for t, s in row["answers"]]
        question = {"id": f"q{number}", "question": row["question"], "answers": answers}
        question |= {"is_impossible": not answers} if versions == 2 else {}
        paragraphs.setdefault(row["context"], []).append(question)
    articles = [{"context": context, "qas": questions} for context, questions in paragraphs.items()]
    data = [{"title": "t", "paragraphs": articles[i : i + 2]} for i in range(0, len(articles), 2)]
    return {"version": f"v{versions}.0", "data": data}
