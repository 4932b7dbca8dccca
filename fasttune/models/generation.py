"""Text from a language model, in batches: the same for a row whatever stands beside it."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, *, max_new_tokens: int, beams: int = 1, **settings: Any
) -> list[list[int]]:
    """Greedy or beam search. Returns the new tokens of each row, without what follows its end.

    ids, mask: int64 [N, T]; the mask is 1 on each row's own tokens, wherever they stand in it. settings: further
    ones of transformers' `generate`, such as no_repeat_ngram_size. Sampling that the model's generation config
    asks for is off, so that equal rows give equal text.
    """
    if not model.config.is_encoder_decoder:
        ids, mask = to_the_left(ids, mask, tokenizer.pad_token_id)
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    new = found[:, 1:] if model.config.is_encoder_decoder else found[:, ids.shape[1] :]
    return [_until_the_end(row, _ends(model, tokenizer)) for row in new.tolist()]


def to_the_left(ids: Tensor, mask: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Each row's own tokens moved to its right end, padding before them: a decoder goes on where a row ends.
    Columns that are padding in every row are left out."""
    order = mask.to(torch.bool).long().argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    width = int(mask.sum(1).max())
    ids, mask = ids[:, -width:], mask[:, -width:]
    return ids.masked_fill(mask == 0, pad), mask


def _ends(model: Any, tokenizer: Any) -> set[int]:
    stated = model.generation_config.eos_token_id
    stated = stated if isinstance(stated, list) else [stated]
    return {token for token in (*stated, tokenizer.eos_token_id) if token is not None}


def _until_the_end(tokens: list[int], ends: set[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens
