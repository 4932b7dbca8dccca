"""A decoder-only language model with its tokenizer, its chat template, and what was found out about both."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from fasttune.errors import ConfigError, ModelError
from fasttune.models import tokenizer as tokenizers
from fasttune.models.checkpoint import load_config, quiet, require_family
from fasttune.models.language import IGNORED, last_hidden_states, open_language_model
from fasttune.task import Bundle, Source
from fasttune_chat.options import TEMPLATES, ChatOptions, is_jinja
from fasttune_chat.rendering import Dialect, learn_dialect

LONGEST_DEFAULT = 2048
TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
"""The special tokens of our templates; mistral and alpaca close a turn with the end-of-text token."""

_PROBE = (5, 7)  # tokens of the two samples that are tried together


@dataclass(frozen=True)
class Built:
    """What `encode` and `pack` go by.

    longest: tokens of a sample. positions: tokens that the model can take, or None. packing: tokens of a packed
    row, 0 if samples are not packed. begins: the token that the tokenizer puts before a text, if any.
    """

    dialect: Dialect
    longest: int
    positions: int | None
    packing: int
    begins: int | None


def build(source: Source, options: ChatOptions) -> tuple[Bundle, Built]:
    """Raises ModelError if the folder holds no decoder with a tokenizer, or if its template can't be used;
    ConfigError if an option doesn't suit the model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = load_config(source)
    require_family(source, config, "text generation", MODEL_FOR_CAUSAL_LM_MAPPING)
    if config.is_encoder_decoder:
        raise ModelError(
            f"model {str(source)!r} ({config.model_type}) has an encoder; text-generation is for decoders alone"
        )
    opened = open_language_model(source, config, AutoModelForCausalLM)
    model = opened.model
    tokenizer = tokenizers.load_tokenizer(source)
    if not tokenizer.is_fast:
        raise ModelError(f"model {str(source)!r}: its tokenizer can't say where in a text a token stands")
    side = tokenizer.padding_side
    notes = [*opened.notes, *tokenizers.fit_language_tokenizer(source, tokenizer, model)]
    tokenizer.padding_side = side  # that of whoever opens the model to generate; here nothing is padded by it
    positions = tokenizers.positions(model)
    longest = _longest(options.max_length, tokenizer.model_max_length, positions)
    begins = _begins(tokenizer)

    wanted, note = _install_template(source, tokenizer, options, begins)
    with quiet():
        known = len(tokenizer)
        grown = tokenizers.add_tokens(tokenizer, model, (*wanted, *options.add_tokens))
    notes += note
    if grown:
        new = ", ".join(tokenizer.convert_ids_to_tokens(list(range(known, len(tokenizer)))))
        notes.append(f"new tokens: {new}; {' and '.join(grown)} are trained and saved with every strategy")
    dialect = learn_dialect(tokenizer, options.template_variables)
    notes += _settle_end(tokenizer, model, dialect)
    packs, note = _settle_packing(source, model, options)
    bundle = Bundle(
        model=model,
        processor=tokenizer,
        head=grown or opened.head,
        blocks=opened.blocks,
        lora_targets=opened.lora_targets,
        padding={"input_ids": tokenizer.pad_token_id, "labels": IGNORED, "prompt_ids": tokenizer.pad_token_id},
        notes=(*notes, *note),
        head_is_new=bool(grown),
    )
    return bundle, Built(dialect, longest, positions, longest if packs else 0, begins)


def _longest(wanted: int | None, stated: int, positions: int | None) -> int:
    if wanted is None:
        return int(min(stated, positions or stated, LONGEST_DEFAULT))
    if positions is not None and wanted > positions:
        raise ConfigError(f"options.max_length: {wanted} is more than the model's {positions} positions")
    return wanted


def _begins(tokenizer: Any) -> int | None:
    ids = tokenizer("a", verbose=False)["input_ids"]
    return ids[0] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else None


def _install_template(
    source: Source, tokenizer: Any, options: ChatOptions, begins: int | None
) -> tuple[tuple[str, ...], list[str]]:
    """Gives the tokenizer the template that was asked for. Returns the special tokens that it needs, and notes."""
    name = options.template
    if name == "model" and not tokenizer.chat_template:
        raise ModelError(f"model {str(source)!r}: its tokenizer has no chat template; choose options.template")
    if name == "model" or (name == "auto" and tokenizer.chat_template):
        return (), ["chat template: the model's own"]
    said = f"chat template: {name}"
    if name == "auto":
        name, said = "chatml", "chat template: chatml, as the model has none"
    if is_jinja(name):
        tokenizer.chat_template = name
        return (), ["chat template: that of options.template"]
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    if "eos_token" in text and tokenizer.eos_token is None:
        raise ModelError(f"model {str(source)!r}: template {name} needs an end-of-text token, there is none")
    # What the model saw before every text when it was pretrained stands before every conversation.
    tokenizer.chat_template = ("{{- bos_token -}}\n" if begins is not None else "") + text
    return TOKENS.get(name, ()), [said]


def _settle_end(tokenizer: Any, model: Any, dialect: Dialect) -> list[str]:
    """Lets whoever generates with the model stop at its end-of-turn token."""
    stated = model.generation_config.eos_token_id
    ends = [] if stated is None else list(stated) if isinstance(stated, list) else [stated]
    if dialect.stop is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the chat template writes no special token at the end of the assistant's turn, and the tokenizer "
                "has no end-of-text token: the model could not learn to stop; choose options.template"
            )
        stop, said = tokenizer.eos_token_id, tokenizer.eos_token
        notes = [f"the chat template ends no turn of the assistant: {said!r} is put behind its last one"]
    else:
        stop, notes = tokenizer.convert_tokens_to_ids(dialect.stop), []
    if stop not in ends:
        ends.append(stop)
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return notes


def _settle_packing(source: Source, model: Any, options: ChatOptions) -> tuple[bool, list[str]]:
    """Whether samples are packed. Raises ModelError if the model is no decoder."""
    heeds = _tries(source, model)
    if options.packing is True and not heeds:
        name = type(model).__name__
        return False, [f"packing: off, as {name} doesn't keep samples of one row apart (tried on two)"]
    if options.packing == "auto":
        attention = getattr(model.config, "_attn_implementation", None) or "none"
        if not (heeds and "flash" in attention):
            return False, [f"packing: off, buckets of like length are faster with {attention} attention"]
    return bool(options.packing), [f"packing: {'on' if options.packing else 'off'}"]


@torch.no_grad()
def _tries(source: Source, model: Any) -> bool:
    """Whether two samples in one row, their positions counted anew, give what each gives alone.

    Raises ModelError if a token's features depend on those behind it.
    """
    first, second = _PROBE
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (3 + torch.arange(first + second)).remainder(vocabulary).unsqueeze(0)
    alone = [_features(model, part) for part in (ids[:, :first], ids[:, first:])]
    if not _close(_features(model, ids)[:, :first], alone[0]):
        raise ModelError(
            f"model {str(source)!r} ({model.config.model_type}) is no decoder: what it makes of a token depends "
            "on the tokens behind it"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    places = torch.cat([torch.arange(first), torch.arange(second)]).unsqueeze(0)
    together = last_hidden_states(model, {"input_ids": ids, "position_ids": places})
    return _close(together, torch.cat(alone, dim=1))


def _features(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return last_hidden_states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    tolerance = 1e-4 if one.dtype == torch.float32 else 3e-2
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance * float(other.abs().max()))
