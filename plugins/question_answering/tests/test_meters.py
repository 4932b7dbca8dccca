"""Exact match and F1 by hand, and as the official scripts count them."""

import random
import re
import string
from collections import Counter

import pytest

from fasttune_question_answering.meters import AnswerMeter, exact, f1, normalized


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Cat's\tMat.", "cats mat"),
        ("A.B.C", "abc"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("the-end", "theend"),  # punctuation goes first, so that "the" is no word any more
        ("a", ""),
        ("£1,000 – “so”", "£1000 – “so”"),  # only ASCII punctuation
        ("ÉCOLE", "école"),
        ("the a an", ""),
    ],
)
def test_normalized(text, wanted):
    assert normalized(text) == wanted


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "score"),
    [
        ("Denver Broncos", "the Denver Broncos!", 1, 1),
        ("Denver", "Denver Broncos", 0, 2 / 3),
        ("Carolina Panthers", "Denver Broncos", 0, 0),
        ("to be or not to be", "to be", 0, 2 * (2 / 6) * 1 / (2 / 6 + 1)),
        ("be be be", "be or be", 0, 2 / 3),
        ("Santa Clara, California", "Levi's Stadium in Santa Clara California", 0, 2 * 1 * 0.5 / 1.5),
    ],
)
def test_by_hand(prediction, answer, em, score):
    assert exact(prediction, answer) == em
    for empty_may_match in (False, True):
        assert f1(prediction, answer, empty_may_match=empty_may_match) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "second"), [("", "", 1), ("the", "a", 1), ("", "x", 0), ("x", "", 0)]
)
def test_answers_without_words(prediction, answer, second):
    assert f1(prediction, answer, empty_may_match=False) == 0
    assert f1(prediction, answer, empty_may_match=True) == second


def row(*texts):
    context = " ".join(texts)
    starts = [sum(len(t) + 1 for t in texts[:i]) for i in range(len(texts))]
    return {"context": context, "answers": {"text": [*texts], "answer_start": starts}}


def counted(pairs):
    meter = AnswerMeter()
    for prediction, reference in pairs:
        meter.update({"answer": prediction}, reference)
    return meter


def test_squad_1_takes_the_best_of_the_answers():
    pairs = [
        ("Saint Bernadette", row("Saint Bernadette Soubirous", "Bernadette")),
        ("1858", row("1858", "in 1858")),
    ]
    result = counted(pairs).result()
    assert result == {"exact_match": 50.0, "f1": pytest.approx(100 * (0.8 + 1) / 2)}
    assert counted([]).result() == {"exact_match": 0.0, "f1": 0.0}


def test_squad_2_splits_by_whether_there_is_an_answer():
    pairs = [
        ("France", row("France", "in France")),
        ("", row("Normandy")),
        ("", row()),
        ("Norse", row()),
        ("", row()),
    ]
    assert counted(pairs).result() == {
        "exact_match": 60.0,
        "f1": 60.0,
        "HasAns_exact": 50.0,
        "HasAns_f1": 50.0,
        "HasAns_total": 2,
        "NoAns_exact": pytest.approx(200 / 3),
        "NoAns_f1": pytest.approx(200 / 3),
        "NoAns_total": 3,
    }
    assert counted([("", row()), ("x", row())]).result() == {
        "exact_match": 50.0,
        "f1": 50.0,
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "NoAns_total": 2,
    }


def test_an_answer_without_words_counts_as_each_script_has_it():
    # 1.1: equal strings, no word in common. 2.0: such a question wants "".
    pairs = [("The", row("The"))]
    assert counted(pairs).result() == {"exact_match": 100.0, "f1": 0.0}
    both = counted([*pairs, ("", row())]).result()
    assert (both["HasAns_exact"], both["HasAns_f1"], both["HasAns_total"]) == (100.0, 100.0, 1)


def official(text):
    """normalize_answer of both scripts, by their own steps."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def evaluate_1(pairs):
    """evaluate-v1.1.py, written anew: percentages of exact match and F1."""
    em = total = 0.0
    for prediction, answers in pairs:
        em += max(official(prediction) == official(a) for a in answers)
        scores = []
        for answer in answers:
            p, g = official(prediction).split(), official(answer).split()
            same = sum((Counter(p) & Counter(g)).values())
            scores.append(
                0 if same == 0 else 2 * (same / len(p)) * (same / len(g)) / (same / len(p) + same / len(g))
            )
        total += max(scores)
    return 100 * em / len(pairs), 100 * total / len(pairs)


def evaluate_2(pairs):
    """evaluate-v2.0.py, written anew: sums of exact match and F1, and questions, by whether there is an answer."""
    found = {True: [0, 0.0, 0], False: [0, 0.0, 0]}
    for prediction, answers in pairs:
        golds = [a for a in answers if official(a)] or [""]
        scores = []
        for gold in golds:
            g, p = official(gold).split() if gold else [], official(prediction).split() if prediction else []
            same = sum((Counter(g) & Counter(p)).values())
            if len(g) == 0 or len(p) == 0:
                scores.append(int(g == p))
            else:
                scores.append(2 * same / (len(p) + len(g)))
        sums = found[bool(answers)]
        sums[0] += max(int(official(g) == official(prediction)) for g in golds)
        sums[1] += max(scores)
        sums[2] += 1
    return found


@pytest.mark.parametrize("unanswerable", [False, True])
def test_a_few_thousand_pairs_as_the_official_scripts_count_them(unanswerable):
    chance = random.Random(11)
    words = ["The", "a", "an", "Elbe", "elbe,", "sea", "cold", "1,094", "km.", "-", "Käthe", "“no”", "the-sea"]

    def text():
        return " ".join(chance.choice(words) for _ in range(chance.randint(1, 4)))

    pairs = []
    for _ in range(3000):
        answers = [] if unanswerable and chance.random() < 0.3 else [text() for _ in range(chance.randint(1, 3))]
        prediction = chance.choice([text(), chance.choice(answers or [""]), ""])
        pairs.append((prediction, answers))
    halves = [counted([(p, row(*a)) for p, a in part]) for part in (pairs[:1234], pairs[1234:])]
    halves[0].merge(halves[1])
    result = halves[0].result()
    if not unanswerable:
        assert (result["exact_match"], result["f1"]) == pytest.approx(evaluate_1(pairs), abs=1e-9)
        return
    has, none = (evaluate_2(pairs)[key] for key in (True, False))
    assert result["HasAns_exact"] == pytest.approx(100 * has[0] / has[2], abs=1e-9)
    assert result["HasAns_f1"] == pytest.approx(100 * has[1] / has[2], abs=1e-9)
    assert result["NoAns_exact"] == pytest.approx(100 * none[0] / none[2], abs=1e-9)
    assert (result["HasAns_total"], result["NoAns_total"]) == (has[2], none[2])
    assert result["exact_match"] == pytest.approx(100 * (has[0] + none[0]) / 3000, abs=1e-9)
    assert result["f1"] == pytest.approx(100 * (has[1] + none[1]) / 3000, abs=1e-9)
