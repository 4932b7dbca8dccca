"""Loads a tokenizer and makes it agree with its model: length, padding, and which tensors it makes."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from fasttune.errors import ConfigError, DataError, ModelError
from fasttune.models.checkpoint import LOADING_ERRORS, load_arguments, quiet, trouble
from fasttune.task import Source

LONGEST_DEFAULT = 512


def load_tokenizer(source: Source) -> Any:
    """The tokenizer beside a model. Raises ModelError if there is none, or if it has no vocabulary."""
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **load_arguments(source))
    except LOADING_ERRORS as error:
        if Path(source).is_dir() and not any(Path(source).glob("*token*")):
            raise ModelError(_no_tokenizer(source)) from error
        raise trouble(source, "its tokenizer", error) from error
    # Without vocabulary files transformers makes an empty tokenizer of the model's type, and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(_no_tokenizer(source))
    return tokenizer


def fit_tokenizer(source: Source, tokenizer: Any, model: Any, max_length: int | None) -> None:
    """Writes into the tokenizer what `encode` and transformers' pipeline go by: the length limit, padding on the
    right, a padding token (the model's configuration learns of it), and only tensors that the model takes."""
    # Decoders name their head `score`, and classify by the last token that is not padding, on whichever side.
    decoder = hasattr(model, "score")
    if tokenizer.padding_side == "left" and not decoder:
        raise ModelError(
            f"model {str(source)!r} ({model.config.model_type}) wants padding on the left of a text; fasttune "
            "pads on the right"
        )
    fit_length(tokenizer, model, max_length)
    tokenizer.padding_side = "right"
    fit_inputs(tokenizer, model)
    fit_padding(source, tokenizer, model, decoder)


def fit_length(tokenizer: Any, model: Any, wanted: int | None, longest: int = LONGEST_DEFAULT) -> None:
    """Writes the length limit into the tokenizer: what is wanted, else what tokenizer and model state, at most
    `longest`. Raises ConfigError if the wanted length leaves no room for text, or is more than the model has."""
    limit = positions(model)
    if wanted is None:
        stated = int(min(tokenizer.model_max_length, longest))  # 1e30 where the tokenizer states none
        tokenizer.model_max_length = stated if limit is None else min(stated, limit)
        return
    if limit is not None and wanted > limit:
        raise ConfigError(f"options.max_length: {wanted} is more than the model's {limit} positions")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if wanted <= special:
        raise ConfigError(f"options.max_length: {wanted} leaves no room for text beside {special} special tokens")
    tokenizer.model_max_length = wanted


def fit_inputs(tokenizer: Any, model: Any) -> None:
    """Lets the tokenizer make only tensors that the model takes."""
    accepted = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in accepted]


def fit_padding(source: Source, tokenizer: Any, model: Any, decoder: bool) -> None:
    """A padding token, the end-of-text token where there is none; the model's configuration learns of it.
    Raises ModelError if there is neither."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"model {str(source)!r}: its tokenizer has neither a padding nor an end-of-text token, so texts "
                "of different lengths can't share a batch; add a pad_token to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        # Where no decoder classifies by it, the configuration's id stays: RoBERTa counts its positions from it.
        if getattr(part, "pad_token_id", None) is None or decoder:
            part.pad_token_id = tokenizer.pad_token_id


def check_ids(ids: np.ndarray | Sequence[int], tokenizer: Any, vocabulary: int | None, column: str | None) -> None:
    """Raises DataError(column, why) if a token is not in the model's vocabulary. ids: whole numbers [tokens].
    vocabulary: how many tokens the model has, `stated_vocabulary` or the rows of its embeddings; None: unknown."""
    largest = int(max(ids, default=-1))
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            column,
            f"token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but the model's vocabulary "
            f"ends at {vocabulary - 1}: tokenizer and model don't belong together",
        )


def stated_vocabulary(model: Any) -> int | None:
    """How many tokens the model's configuration says it has."""
    return getattr(model.config.get_text_config(), "vocab_size", None)


def fit_language_tokenizer(source: Source, tokenizer: Any, model: Any) -> list[str]:
    """For models that write text: a padding token, the model's length limit, and embeddings for every token of the
    tokenizer. Returns what the user should know.

    Without a padding token the end-of-text token pads. That teaches nothing, as long as labels are masked by
    position and never by token id. Raises ModelError if there is neither.
    """
    has_padding = tokenizer.pad_token_id is not None
    fit_padding(source, tokenizer, model, decoder=False)
    generation = model.generation_config
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    limit = positions(model)
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    tokenizer.padding_side = "right"
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"model {str(source)!r}: its tokenizer has {len(tokenizer)} tokens, but its vocabulary ends at "
            f"{rows - 1}: tokenizer and model don't belong together"
        )
    if has_padding:
        return []
    return [f"no padding token: {tokenizer.eos_token!r} pads, where nothing is supervised"]


def add_tokens(tokenizer: Any, model: Any, tokens: Sequence[str]) -> tuple[str, ...]:
    """Adds special tokens that the tokenizer lacks, and rows for them to the model's embeddings and output.

    Returns the names of the modules whose rows are new, to be trained and saved; empty if nothing was missing.
    """
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    if not missing:
        return ()
    tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    grown = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(name for name, module in model.named_modules() if any(module is own for own in grown))


def positions(model: Any) -> int | None:
    """How many tokens the model can take, or None if its positions have no end."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    for module in model.modules():
        # RoBERTa and its kin start counting after the padding id, and lose the rows up to it.
        table = getattr(module, "position_embeddings", None)
        offset = getattr(table, "padding_idx", None)
        if offset is not None:
            return stated - offset - 1
    return stated


def _no_tokenizer(source: Source) -> str:
    return (
        f"model {str(source)!r} has no tokenizer; expected tokenizer.json or vocabulary files beside config.json. "
        "Copy them from the model it was trained from."
    )
