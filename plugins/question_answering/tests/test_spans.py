"""The best spans against all pairs of tokens in plain Python, and answers against run_qa's arithmetic."""

import math
import random

import pytest
import torch

from fasttune_question_answering.spans import best_answer, best_spans

INF = float("inf")


def a_batch(seed, windows=5, tokens=23):
    """Random logits; questions of several lengths before the context, padding behind, tokens that show nothing."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    start, end = torch.randn(2, windows, tokens)
    offsets = torch.zeros(windows, tokens, 2, dtype=torch.int64)
    for row in offsets:
        first, last = chance.randint(1, 6), tokens - chance.randint(0, 5)
        for token in range(first, last):
            row[token] = torch.tensor([3 * token, 3 * token + chance.choice([0, 2, 2, 2])])
    return start, end, offsets, torch.zeros(windows, dtype=torch.int64)


def all_pairs(start, end, offsets, longest):
    """Every valid span with its score, best first."""
    shows = [t for t, (begin, finish) in enumerate(offsets.tolist()) if finish > begin]
    pairs = [
        ([int(offsets[i, 0]), int(offsets[j, 1])], float(start[i] + end[j]))
        for i in shows
        for j in shows
        if i <= j < i + longest
    ]
    return sorted(pairs, key=lambda pair: -pair[1])


@pytest.mark.parametrize("longest", [1, 4, 23, 100])
@pytest.mark.parametrize("count", [1, 20, 10_000])
def test_best_spans_are_the_best_of_all_pairs(longest, count):
    start, end, offsets, null = a_batch(longest * 31 + count)
    found = best_spans(start, end, offsets, null, longest=longest, count=count)
    for n, window in enumerate(found):
        wanted = all_pairs(start[n], end[n], offsets[n], longest)[:count]
        assert [span[:2] for span in window["spans"]] == [place for place, _ in wanted]
        assert [span[2] for span in window["spans"]] == pytest.approx([score for _, score in wanted])
        assert window["null"] == pytest.approx(float(start[n, 0] + end[n, 0]))


def test_the_null_position_may_stand_last_and_16_bits_are_enough():
    start, end, offsets, _ = a_batch(2)
    null = torch.tensor([22, 21, 22, 20, 19])
    found = best_spans(start.bfloat16(), end.bfloat16(), offsets, null, longest=5, count=2)
    for n, window in enumerate(found):
        place = null[n]
        assert window["null"] == float(start.bfloat16()[n, place].float() + end.bfloat16()[n, place].float())
        assert len(window["spans"]) == 2


def test_padding_is_no_span_even_where_its_logits_are_minus_infinity():
    start, end, offsets, null = a_batch(4)
    wider = [torch.cat([x, torch.full((5, 9), -INF)], 1) for x in (start, end)]
    padded = torch.cat([offsets, torch.zeros(5, 9, 2, dtype=torch.int64)], 1)
    narrow = best_spans(start, end, offsets, null, longest=30, count=20)
    assert best_spans(*wider, padded, null, longest=30, count=20) == narrow


def run_qa(windows, context, count, unanswerable, threshold):
    """postprocess_qa_predictions of transformers 4's utils_qa.py, written anew: text, probability, difference."""
    spans = [{"place": (0, 0), "score": min(w["null"] for w in windows)}] if unanswerable else []
    spans += [{"place": (b, e), "score": score} for w in windows for b, e, score in w["spans"]]
    spans = sorted(spans, key=lambda span: -span["score"])[:count]
    null = min(w["null"] for w in windows)
    if unanswerable and not any(span["place"] == (0, 0) for span in spans):
        spans.append({"place": (0, 0), "score": null})
    top = max(span["score"] for span in spans)
    total = sum(math.exp(span["score"] - top) for span in spans)
    best = next(span for span in spans if span["place"] != (0, 0))
    probability = {span["place"]: math.exp(span["score"] - top) / total for span in spans}
    if unanswerable and null - best["score"] > threshold:
        return "", probability[0, 0], null - best["score"]
    return context[slice(*best["place"])], probability[best["place"]], null - best["score"]


@pytest.mark.parametrize("unanswerable", [False, True])
@pytest.mark.parametrize("threshold", [-1.5, 0.0, 1.0])
def test_answers_are_those_of_run_qa(unanswerable, threshold):
    context = "".join(chr(ord("a") + i % 26) for i in range(500))
    empty = 0
    for seed in range(60):
        start, end, offsets, null = a_batch(seed, windows=3)
        start[:, 0] += 4.0
        offsets += torch.arange(3).reshape(3, 1, 1) * 100 * (offsets > 0)  # windows that share nothing
        windows = best_spans(start, end, offsets, null, longest=6, count=20)
        answer = best_answer(windows, context, count=20, unanswerable=unanswerable, threshold=threshold)
        text, probability, difference = run_qa(windows, context, 20, unanswerable, threshold)
        assert answer["answer"] == text == context[answer["start"] : answer["end"]]
        assert answer["score"] == pytest.approx(probability, rel=1e-6)
        if unanswerable:
            assert answer["no_answer"] == pytest.approx(difference)
            assert (answer["answer"] == "") == (difference > threshold)
        else:
            assert "no_answer" not in answer
        empty += text == ""
    assert (0 < empty < 60) if unanswerable else empty == 0


def test_what_two_windows_share_is_one_span():
    first = {"null": 1.0, "spans": [[0, 3, 2.0], [4, 7, 1.0]]}
    windows = [first, {"null": 3.0, "spans": [[4, 7, 2.5], [8, 9, 0.0]]}]
    answer = best_answer(windows, "one two x", count=20, unanswerable=False, threshold=0.0)
    total = sum(math.exp(score) for score in (2.5, 2.0, 0.0))
    assert answer == {"answer": "two", "score": pytest.approx(math.exp(2.5) / total), "start": 4, "end": 7}
    answer = best_answer(windows, "one two x", count=20, unanswerable=True, threshold=-2.0)
    nothing = {"answer": "", "start": 0, "end": 0, "no_answer": -1.5}
    assert answer == {**nothing, "score": pytest.approx(math.e / (total + math.e))}


def test_white_space_at_the_ends_is_no_part_of_an_answer():
    windows = [{"null": 0.0, "spans": [[3, 8, 2.0], [4, 7, 1.0]]}]
    answer = best_answer(windows, "one two three", count=20, unanswerable=False, threshold=0.0)
    assert answer == {"answer": "two", "score": 1.0, "start": 4, "end": 7}


def test_a_model_that_diverged_answers_nothing():
    start, end, offsets, null = a_batch(1)
    windows = best_spans(start * float("nan"), end, offsets, null, longest=5, count=3)
    answer = best_answer(windows, "abc", count=3, unanswerable=False, threshold=0.0)
    assert answer == {"answer": "", "score": 0.0, "start": 0, "end": 0}
