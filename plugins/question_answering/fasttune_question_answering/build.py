"""Opens a model with a head for the start and the end of an answer, and fits its tokenizer to it."""

from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_QUESTION_ANSWERING_MAPPING, AutoModelForQuestionAnswering

from fasttune.errors import ConfigError, ModelError
from fasttune.models import tokenizer as tokenizers
from fasttune.models.checkpoint import LOADING_ERRORS, load_config, require_family
from fasttune.models.heads import Headed, open_headed, restart
from fasttune.task import Bundle, Source
from fasttune_question_answering.options import QuestionAnsweringOptions

LONGEST_DEFAULT = 384
_OUTPUTS = 2  # logits of a token: that the answer starts there, that it ends there
_HEAD = "start and end of the answer"


def build(source: Source, options: QuestionAnsweringOptions) -> Bundle:
    """Raises ModelError if the folder holds no text model with a fast tokenizer, ConfigError if the options don't
    suit the model."""
    config = load_config(source)
    require_family(source, config, "question-answering", MODEL_FOR_QUESTION_ANSWERING_MAPPING)
    was = next(iter(getattr(config, "architectures", None) or ()), "")
    config.num_labels = _OUTPUTS
    tokenizer = tokenizers.load_tokenizer(source)
    if not tokenizer.is_fast:
        raise ModelError(
            f"model {str(source)!r}: its tokenizer, {type(tokenizer).__name__}, does not tell where in the text a "
            "token stands; question answering needs a fast tokenizer (tokenizer.json)"
        )
    opened = open_headed(source, config, AutoModelForQuestionAnswering)
    notes = (*opened.notes, f"new head: {_HEAD}") if source.random_weights else _settle_head(opened, was)
    tokenizers.fit_inputs(tokenizer, opened.model)
    decoder = _reads_from_left_to_right(source, opened.model, tokenizer)
    tokenizers.fit_padding(source, tokenizer, opened.model, decoder)
    if decoder:  # it must have read the question when it comes to the context, whatever side it is padded on
        tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"  # windows come in the order of the text
    tokenizers.fit_length(tokenizer, opened.model, options.max_length, LONGEST_DEFAULT)
    length = tokenizer.model_max_length
    if options.doc_stride is not None and options.doc_stride >= length:
        raise ConfigError(
            f"options.doc_stride: windows of {length} tokens can't share {options.doc_stride}; name fewer"
        )
    return Bundle(
        model=opened.model,
        processor=tokenizer,
        head=opened.head,
        blocks=opened.blocks,
        lora_targets=opened.lora_targets,
        padding={"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id},
        notes=notes,
    )


def _settle_head(opened: Headed, was: str) -> tuple[str, ...]:
    """Starts the head anew where it was trained for another task. Returns what the user should know.

    was: the class that wrote the checkpoint.
    """
    if opened.missing - opened.mismatched:
        return (f"new head: {_HEAD}", *opened.notes)
    if not opened.missing and "QuestionAnswering" in was:
        return (f"head kept: {_HEAD}", *opened.notes)
    if not opened.missing:  # a head of as many outputs, whose name this class shares: ModernBERT's `classifier`
        restart(opened.model, _last_layer(opened))
    return (f"head replaced: {was} became {_HEAD}", *opened.notes)


def _last_layer(opened: Headed) -> list[str]:
    return [
        f"{name}.{parameter}"
        for name, module in opened.model.named_modules()
        if name.startswith(opened.head) and isinstance(module, nn.Linear) and module.out_features == _OUTPUTS
        for parameter, _ in module.named_parameters()
    ]


@torch.no_grad()
def _reads_from_left_to_right(source: Source, model: Any, tokenizer: Any) -> bool:
    """Whether what follows a token leaves its logits as they are: tried out. Raises ModelError if the model wants
    more than text, such as a picture or places on a page."""
    encoding = tokenizer("a", "b c d e", return_tensors="pt")
    inputs = {name: encoding[name] for name in tokenizer.model_input_names if name in encoding}
    context = [place for place, part in enumerate(encoding.sequence_ids(0)) if part == 1]
    changed = inputs["input_ids"].clone()
    known = {*tokenizer.all_special_ids, int(changed[0, context[-1]])}
    changed[0, context[-1]] = next(i for i in range(len(tokenizer)) if i not in known)
    try:
        one, other = (model(**{**inputs, "input_ids": ids}) for ids in (inputs["input_ids"], changed))
        return bool(torch.equal(one.start_logits[:, : context[-1]], other.start_logits[:, : context[-1]]))
    except (*LOADING_ERRORS, IndexError) as error:
        why = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {str(source)!r} gives no start and end of an answer in plain text: {why}"
        ) from error
