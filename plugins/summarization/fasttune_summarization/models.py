"""Opens a model that writes text from text, and settles how it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
)

from fasttune.errors import ConfigError, ModelError, nearest
from fasttune.models.checkpoint import load_config, require_family
from fasttune.models.language import decoder_inputs, open_language_model
from fasttune.models.tokenizer import fit_language_tokenizer, load_tokenizer, positions
from fasttune.task import Bundle, Source
from fasttune_summarization.options import Options

DEFAULT_SOURCE, DEFAULT_TARGET = 1024, 128
"""Tokens, where neither the options nor the model's positions say otherwise."""

_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""What of a pretrained model's generation settings belongs to its vocabulary, and stays."""

_NOT_OF_THE_TEXT = (
    "transformers_version",
    "use_cache",
    "cache_implementation",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
)
"""Settings that change no text."""


@dataclass(frozen=True)
class Layout:
    """How a row becomes tokens.

    before, after: text around the input; the prefix of an encoder-decoder alone, or a prompt. glue: the blanks at
    the prompt's end: they are written with the first word of the target, as in running text.
    max_source: tokens of `before`, input and `after`, special ones included. max_target: tokens of the target and
    its end. fixed: tokens of a source without input. marks: special tokens that the tokenizer puts around a
    target. end: the token that ends a target; append_end: it is not among the marks.
    """

    before: str
    after: str
    glue: str
    max_source: int
    max_target: int
    fixed: int
    marks: int
    end: int
    append_end: bool


@dataclass(kw_only=True)
class Writer(Bundle):
    """The host's bundle, and the layout that belongs to its model."""

    layout: Layout


def build_writer(source: Source, options: Options, role: str, task: str, default_prompt: str) -> Writer:
    """role: the placeholder of the input in a prompt. Raises ModelError if the folder holds no model that writes
    text, ConfigError if an option doesn't suit the model."""
    config = load_config(source)
    encodes = config.is_encoder_decoder
    family = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if encodes else MODEL_FOR_CAUSAL_LM_MAPPING
    require_family(source, config, task, family)
    reads_both_ways = not (encodes or getattr(config, "is_decoder", False) or getattr(config, "causal", False))
    if reads_both_ways and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ModelError(
            f"model {str(source)!r} is of type {config.model_type!r}, an encoder, which sees the words that it is "
            "to write; name an encoder-decoder or a decoder"
        )
    tokenizer = load_tokenizer(source)
    if not encodes and not tokenizer.is_fast:
        raise ModelError(
            f"model {str(source)!r}: its tokenizer ({type(tokenizer).__name__}) doesn't tell where its tokens "
            "stand in the text, which a prompt needs; use one with a tokenizer.json"
        )
    opened = open_language_model(source, config, AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM)
    model = opened.model
    notes = [*opened.notes, *fit_language_tokenizer(source, tokenizer, model)]
    notes += _settle_languages(options, tokenizer, model)
    ends = _ends(source, tokenizer, model)
    template = tokenizer(text_target="", verbose=False)["input_ids"] if encodes else []
    max_source, max_target = _lengths(options, tokenizer, model)
    if encodes:
        before, after, glue = _prefix(options, model, task), "", ""
    else:
        before, after, glue = _prompt(options, role, default_prompt)
        # What `generate` wants of whoever opens the folder; encode pads nothing. Only init_kwargs are saved.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    layout = Layout(
        before=before,
        after=after,
        glue=glue,
        max_source=max_source,
        max_target=max_target,
        fixed=len(tokenizer(before + after, verbose=False)["input_ids"]),
        marks=len(template),
        end=next((token for token in template if token in ends), ends[0]),
        append_end=not set(template) & set(ends),
    )
    _check_room(layout)
    if encodes:
        notes += _settle_start(model, tokenizer, [*template, *[layout.end] * layout.append_end])
    notes += _settle_generation(options, layout, ends, template, model)
    notes.append(_describe(layout, encodes))
    padding = {"input_ids": tokenizer.pad_token_id, "labels": -100}
    return Writer(
        model=model,
        processor=tokenizer,
        head=opened.head,
        blocks=opened.blocks,
        lora_targets=opened.lora_targets,
        padding=padding,
        notes=tuple(notes),
        head_is_new=False,
        layout=layout,
    )


def search_settings(options: Options, layout: Layout) -> dict[str, Any]:
    """Keyword arguments of `fasttune.models.generation.generate`."""
    settings: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens or layout.max_target,
        "beams": options.beams,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
    }
    if options.beams > 1:
        settings["length_penalty"] = 1.0 if options.length_penalty is None else options.length_penalty
    return settings


def _prefix(options: Options, model: Any, task: str) -> str:
    if options.prompt is not None:
        name = type(model).__name__
        raise ConfigError(f"options.prompt: {name} is an encoder-decoder; what it reads first is options.prefix")
    if options.prefix is not None:
        return options.prefix
    stated = getattr(model.config, "task_specific_params", None) or {}
    return (stated.get(task) or {}).get("prefix") or ""


def _prompt(options: Options, role: str, default: str) -> tuple[str, str, str]:
    if options.prefix is not None:
        raise ConfigError("options.prefix: the model is a decoder; what it reads is options.prompt")
    before, _, after = (options.prompt or default).partition(f"{{{role}}}")
    return before, after.rstrip(" "), after[len(after.rstrip(" ")) :]


def _settle_languages(options: Options, tokenizer: Any, model: Any) -> list[str]:
    """Tells the tokenizer its languages, and the model which one its texts begin with."""
    codes = getattr(tokenizer, "lang_code_to_id", None) or getattr(tokenizer, "fairseq_language_codes", None)
    if not hasattr(tokenizer, "src_lang") or not hasattr(tokenizer, "tgt_lang"):
        for name in ("src_lang", "tgt_lang"):
            if getattr(options, name) is not None:
                raise ConfigError(f"options.{name}: the tokenizer of this model marks no languages")
        return []
    source = options.src_lang or tokenizer.src_lang
    target = options.tgt_lang or tokenizer.tgt_lang or source
    for name, code in (("src_lang", source), ("tgt_lang", target)):
        known = list(codes or tokenizer.all_special_tokens)
        if code not in known:
            raise ConfigError(
                f"options.{name}: {code!r} is no language of the tokenizer.{nearest(str(code), known)} "
                f"It knows {', '.join(known)}"
            )
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    written = tokenizer(text_target="", verbose=False)["input_ids"]
    mark = next(token for token in written if token not in (tokenizer.eos_token_id, tokenizer.bos_token_id))
    if written[0] == mark:  # mBART-50, M2M100, NLLB: the text begins with it; mBART's decoder starts with it
        model.generation_config.forced_bos_token_id = mark
    return [f"reads {source}, writes {target}"]


def _ends(source: Source, tokenizer: Any, model: Any) -> list[int]:
    """Tokens that end a text, the tokenizer's own first. Raises ModelError if there is none."""
    stated = model.generation_config.eos_token_id
    stated = stated if isinstance(stated, list) else [stated]
    rows = model.get_output_embeddings().weight.shape[0]
    ends = [token for token in (tokenizer.eos_token_id, *stated) if token is not None and token < rows]
    if not ends:
        raise ModelError(
            f"model {str(source)!r}: neither its tokenizer nor its generation_config.json names an end-of-text "
            "token, so that it would never stop; add an eos_token to its tokenizer_config.json"
        )
    return list(dict.fromkeys(ends))


def _lengths(options: Options, tokenizer: Any, model: Any) -> tuple[int, int]:
    """Tokens of source and target. Raises ConfigError if the model hasn't so many positions."""
    config = model.config
    if not config.is_encoder_decoder:
        return _shared_lengths(options, tokenizer, positions(model))
    both = None if hasattr(config, "relative_attention_num_buckets") else positions(model)  # T5: any length
    source = getattr(config, "max_encoder_position_embeddings", both)  # LED has one for each
    target = getattr(config, "max_decoder_position_embeddings", both)
    _must_fit("max_source_length", options.max_source_length, source)
    _must_fit("max_target_length", options.max_target_length, target)
    _must_fit("max_new_tokens", options.max_new_tokens, target)
    found = options.max_source_length or min(DEFAULT_SOURCE, tokenizer.model_max_length, source or DEFAULT_SOURCE)
    tokenizer.model_max_length = found
    return found, options.max_target_length or min(DEFAULT_TARGET, target or DEFAULT_TARGET)


def _shared_lengths(options: Options, tokenizer: Any, limit: int | None) -> tuple[int, int]:
    """Of a decoder, whose positions source and target share."""
    limit = min(limit or 2**31, tokenizer.model_max_length)
    target = options.max_target_length or min(DEFAULT_TARGET, limit // 2)
    written = max(target, options.max_new_tokens or 0)
    source = options.max_source_length or min(DEFAULT_SOURCE, limit - written)
    if source < 1 or source + written > limit:
        raise ConfigError(
            f"options: {source} tokens of input and {written} of output are more than the model's {limit} "
            "positions; lower max_source_length, max_target_length or max_new_tokens"
        )
    return source, target


def _must_fit(name: str, wanted: int | None, limit: int | None) -> None:
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError(f"options.{name}: {wanted} is more than the model's {limit} positions")


def _check_room(layout: Layout) -> None:
    if layout.fixed >= layout.max_source:
        raise ConfigError(
            f"options.max_source_length: {layout.max_source} leaves no room for the input beside {layout.fixed} "
            "tokens of prefix or prompt"
        )
    fixed = layout.marks + layout.append_end
    if fixed >= layout.max_target:
        raise ConfigError(
            f"options.max_target_length: {layout.max_target} leaves no room for text beside {fixed} special tokens"
        )


def _settle_generation(
    options: Options, layout: Layout, ends: list[int], template: list[int], model: Any
) -> list[str]:
    """Gives the model a generation config that says what the options say, so that plain `generate` writes what
    `predict` does. Settings that were made for what the model wrote before, such as a least length, are left out.
    """
    own = model.generation_config
    kept = {name: value for name in _TOKENS if (value := getattr(own, name, None)) is not None}
    kept["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if kept.get("forced_bos_token_id") not in template[:1]:
        kept.pop("forced_bos_token_id", None)
    if kept.get("forced_eos_token_id") not in ends:
        kept.pop("forced_eos_token_id", None)
    notes = []
    settings = search_settings(options, layout)
    wanted = {"num_beams": settings.pop("beams"), "do_sample": False, **settings}
    if not wanted["no_repeat_ngram_size"]:
        del wanted["no_repeat_ngram_size"]
    dropped = {
        name: value
        for name, value in own.to_diff_dict().items()
        if name not in (*_TOKENS, *wanted, *_NOT_OF_THE_TEXT) and not name.startswith("_")
    }
    if dropped:
        listed = ", ".join(f"{name} {value}" for name, value in sorted(dropped.items()))
        notes.append(f"the model's own settings for generation are left out: {listed}")
    model.generation_config = GenerationConfig(**kept, **wanted)
    return notes


def _settle_start(model: Any, tokenizer: Any, example: list[int]) -> list[str]:
    """Lets generation start with what the decoder reads first in training, whatever decides on that. example: the
    tokens of a target.

    Where the model doesn't say, T5's kin start with padding, others with the first token of a text.
    """
    config, own = model.config, model.generation_config
    notes = []
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = own.decoder_start_token_id
    if config.decoder_start_token_id is None:
        first = getattr(config, "bos_token_id", None)
        relative = hasattr(config, "relative_attention_num_buckets")
        config.decoder_start_token_id = config.pad_token_id if first is None or relative else first
    start = int(decoder_inputs(model, torch.tensor([example]))[0, 0])
    if own.decoder_start_token_id != start:
        notes.append(f"the decoder starts with {tokenizer.convert_ids_to_tokens(start)!r}")
    config.decoder_start_token_id = own.decoder_start_token_id = start
    return notes


def _describe(layout: Layout, encodes: bool) -> str:
    if encodes:
        reads = f"prefix {layout.before!r}" if layout.before else "no prefix"
    else:
        reads = f"prompt {layout.before + '…' + layout.after + layout.glue!r}"
    return f"{reads}; reads at most {layout.max_source} tokens, learns to write at most {layout.max_target}"
