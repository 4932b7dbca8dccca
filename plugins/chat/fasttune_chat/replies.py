"""What the model writes: replies to conversations, continuations of texts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttune.models.generation import generate
from fasttune_chat.build import Built
from fasttune_chat.encoding import new_tokens
from fasttune_chat.options import ChatOptions


def replies(
    model: Any, batch: dict[str, Tensor], tokenizer: Any, built: Built, options: ChatOptions
) -> list[dict[str, Any] | None]:
    """One a sample; None where it has no prompt. batch: prompt_ids, prompt_mask [N, T], prompt_cut and
    prompt_is_text [N]."""
    asked = batch["prompt_mask"].any(dim=1)
    found: list[dict[str, Any] | None] = [None] * len(asked)
    places = asked.nonzero().flatten().tolist()
    if not places:
        return found
    written = generate(
        model,
        tokenizer,
        batch["prompt_ids"][asked],
        batch["prompt_mask"][asked],
        max_new_tokens=new_tokens(built.positions, options),
        beams=options.beams,
    )
    for place, tokens in zip(places, written, strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        name = "continuation" if bool(batch["prompt_is_text"][place]) else "reply"
        cut = int(batch["prompt_cut"][place])
        found[place] = {name: text, "cut": cut} if cut else {name: text}
    return found
