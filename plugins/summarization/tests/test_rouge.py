"""ROUGE: values counted by hand, and the rouge-score package as oracle."""

import json
import random

import pytest

from fasttune_summarization.rouge import NAMES, RougeMeter, common, rouge

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "and",
    "ran",
    "to",
    "New-York",
    "42",
    "naïve",
    "über",
    "don't",
)


def text(chance, longest=40):
    """Words with repeats, punctuation, capitals and line breaks; sometimes nothing at all."""
    parts = []
    for _ in range(chance.randrange(longest)):
        word = chance.choice(WORDS[: chance.choice((4, 10, len(WORDS)))])
        parts.append(chance.choice((word, word, word.upper(), f"{word},", f"({word})")))
        parts.append(chance.choice((" ", " ", " ", "  ", "\n", "\n\n", "\t", " - ", "")))
    return "".join(parts)


def test_equal_to_rouge_score_on_four_thousand_pairs():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(list(NAMES), use_stemmer=False)
    chance = random.Random(5)
    above_zero = 0
    for _ in range(4000):
        prediction, reference = text(chance), text(chance)
        theirs = scorer.score(reference, prediction)
        ours = rouge(prediction, reference)
        assert set(ours) == set(NAMES)
        for name in NAMES:
            assert ours[name] == pytest.approx(theirs[name].fmeasure, abs=1e-9), (name, prediction, reference)
        above_zero += ours["rougeLsum"] != ours["rougeL"] > 0
    assert above_zero > 1000, "the texts must tell ROUGE-L and Lsum apart"


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # 5 of 6 and 6 words; pairs: the cat, on the, the mat; the longest subsequence leaves "is" out.
        ("the cat is on the mat", "the cat sat on the mat", (5 / 6, 3 / 5, 5 / 6, 5 / 6)),
        # Common words a, b, c, but in order only one of them.
        ("c b a", "a b c", (1.0, 0.0, 1 / 3, 1 / 3)),
        # Line by line all words are found, as a whole only two in order.
        ("c d\na b", "a b\nc d", (1.0, 2 / 3, 0.5, 1.0)),
        # A word counts as often as both texts have it: 1 hit, 3 and 1 words.
        ("a a a", "a", (0.5, 0.0, 0.5, 0.5)),
        ("Don't!", "don t", (1.0, 1.0, 1.0, 1.0)),
        ("", "something", (0.0, 0.0, 0.0, 0.0)),
        ("…", "…", (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_counted_by_hand(prediction, reference, expected):
    assert rouge(prediction, reference) == pytest.approx(dict(zip(NAMES, expected, strict=True)))


def test_the_subsequence_is_common_and_longest():
    chance = random.Random(1)
    for _ in range(200):
        one, other = ([chance.choice("abcd") for _ in range(chance.randrange(30))] for _ in range(2))
        longest = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                longest[i + 1][j + 1] = longest[i][j] + 1 if a == b else max(longest[i][j + 1], longest[i + 1][j])
        places = common(one, other)
        assert len(places) == longest[-1][-1]
        assert places == sorted(set(places))
        rest = iter(other)
        assert all(one[place] in rest for place in places), "not a subsequence"


def test_the_meter_averages_rows_and_counts_words():
    meter = RougeMeter("summary")
    meter.update({"summary": "the cat is on the mat"}, {"document": "…", "summary": "the cat sat on the mat"})
    meter.update({"summary": ""}, {"document": "…", "summary": "well, well"})
    result = meter.result()
    assert result["rouge1"] == pytest.approx(5 / 12)
    assert result["rouge2"] == pytest.approx(3 / 10)
    assert (result["predicted_words"], result["reference_words"]) == (3.0, 4.0)
    assert result["length_ratio"] == pytest.approx(6 / 8)
    json.dumps(RougeMeter("summary").result(), allow_nan=False)


def test_merged_meters_say_what_one_would():
    chance = random.Random(9)
    whole, halves = RougeMeter("target"), (RougeMeter("target"), RougeMeter("target"))
    for i in range(60):
        pair = {"target": text(chance)}, {"target": text(chance)}
        whole.update(*pair)
        halves[i % 3 == 0].update(*pair)
    halves[0].merge(halves[1])
    assert halves[0].result() == pytest.approx(whole.result())
