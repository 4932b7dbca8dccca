"""From start and end logits [N, T] to the best spans of a window, and from windows to a row's answer."""

import math
from typing import Any

import torch
from torch import Tensor


def best_spans(
    start: Tensor, end: Tensor, offsets: Tensor, null: Tensor, *, longest: int, count: int
) -> list[dict[str, Any]]:
    """For each window {"null": score, "spans": [[begin, end, score], …]}: its best spans of context, best first,
    as characters; a score is the sum of the start's and the end's logit.

    start, end: [N, T]. offsets: int64 [N, T, 2], empty where a token shows nothing of the context; spans begin and
    end elsewhere. null: int64 [N]. longest: most tokens of a span. count: most spans of a window.
    """
    start, end = start.float(), end.float()
    rows = torch.arange(len(start), device=start.device)
    none = start[rows, null] + end[rows, null]
    hidden = offsets[..., 1] <= offsets[..., 0]
    longest = min(longest, start.shape[1])
    # scores[n, t, k]: the span from token t to token t + k. T · longest of them, not T².
    ends = torch.nn.functional.pad(end.masked_fill(hidden, -torch.inf), (0, longest - 1), value=-torch.inf)
    scores = start.masked_fill(hidden, -torch.inf).unsqueeze(-1) + ends.unfold(1, longest, 1)
    found = scores.flatten(1).topk(min(count, scores[0].numel()), dim=1)
    first = found.indices // longest
    last = (first + found.indices % longest).clamp_max(start.shape[1] - 1)  # past the end scores are -inf
    begins = offsets[..., 0].gather(1, first)
    finishes = offsets[..., 1].gather(1, last)
    predictions = []
    for n, row in enumerate(zip(begins.tolist(), finishes.tolist(), found.values.tolist(), strict=True)):
        spans = [[b, e, score] for b, e, score in zip(*row, strict=True) if math.isfinite(score)]
        predictions.append({"null": none[n].item(), "spans": spans})
    return predictions


def best_answer(
    windows: list[dict[str, Any]], context: str, *, count: int, unanswerable: bool, threshold: float
) -> dict[str, Any]:
    """The answer of a row from what `best_spans` found in its windows: {"answer", "score", "start", "end"}.

    It is the best span of all windows. If unanswerable, the null score of the row is its windows' lowest (what is
    in one window is missing in the others); if that exceeds the best span's score by more than the threshold, the
    answer is "" at 0; the difference stands in "no_answer". score: the answer's probability among the `count` best
    spans of the row and, if unanswerable, no answer, as in the run_qa.py of transformers 4; what two windows share
    is one span.
    """
    scores: dict[tuple[int, int], float] = {}
    for window in windows:
        for begin, end, score in window["spans"]:
            place = trimmed(context, begin, end)
            scores[place] = max(score, scores.get(place, score))
    ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    if not ranked:  # the logits of a model that diverged are no numbers
        return {"answer": "", "score": 0.0, "start": 0, "end": 0}
    (begin, end), best = ranked[0]
    null = min(window["null"] for window in windows)
    near = [score for _, score in ranked[:count]]
    if unanswerable:  # it is one of the best, or stands beside them
        near = [*(near[: max(1, count - 1)] if null > near[-1] else near), null]
    shares = _softmax(near)
    answer = {"answer": context[begin:end], "score": shares[0], "start": begin, "end": end}
    if not unanswerable:
        return answer
    if null - best > threshold:
        answer = {"answer": "", "score": shares[-1], "start": 0, "end": 0}
    return {**answer, "no_answer": null - best}


def _softmax(scores: list[float]) -> list[float]:
    most = max(scores)
    powers = [math.exp(score - most) for score in scores]
    return [power / sum(powers) for power in powers]


def trimmed(context: str, begin: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends, which some tokenizers count to a word."""
    text = context[begin:end]
    if not text.strip():
        return begin, end
    return begin + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
