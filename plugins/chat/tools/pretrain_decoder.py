"""Pretrain the chat plugin's small decoder, a Llama, on the docstrings of the installed packages.

Next to a docstring stands the signature of its function; the objective is the next token.

    python plugins/chat/tools/pretrain_decoder.py --out model --steps 5000 --threads 1 --seed 0
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from pretraining import Row, arguments, pretrain, read_docstrings, save_start, train_tokenizer

from fasttune.docstrings import Docstring

SPECIAL = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]  # the last two are what chatml needs
PAD, END = 0, 1
WINDOW = 128  # tokens


def row_of(docstring: Docstring) -> Row:
    head = f"{docstring.signature}:\n" if docstring.signature else ""
    return {"text": f'{head}"""{docstring.text}"""'}


def main() -> None:
    options = arguments(__doc__ or "", steps=5_000)
    texts, source = read_docstrings(options.seed, options.texts)
    rows = [row_of(docstring) for docstring in texts]
    tokenizer = train_tokenizer((row["text"] for row in rows), 5120, SPECIAL, flat=False)
    ids = {"pad_token_id": PAD, "eos_token_id": END}
    config = LlamaConfig(
        **ids,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        names = {"pad_token": "<pad>", "eos_token": "</s>", "extra_special_tokens": SPECIAL[2:]}
        save_start(Path(folder), config, tokenizer, ids, **names)
        pretrain(
            options,
            task="text-generation",
            model=Path(folder),
            auto=AutoModelForCausalLM,
            rows=rows,
            settings={
                "weights": "random",
                "options": {"max_length": WINDOW, "max_new_tokens": 32},
                "eval": {"every": 4000, "max_rows": 20, "samples": 3},
            },
            train={"batch": 32, "lr": 2e-3, "schedule": {"kind": "linear", "warmup": 300}},
            card={
                "title": "Small documentation decoder",
                "what": "A Llama (4 layers, width 192, 5120 byte-level BPE tokens, tied embeddings) with",
                "objective": f"the next token of pieces of at most {WINDOW} tokens: a function's signature and "
                "its docstring. It\n  saw no conversation.",
                **source,
            },
        )


if __name__ == "__main__":
    main()
