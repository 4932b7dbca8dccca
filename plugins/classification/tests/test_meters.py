"""Meters against scikit-learn and scipy, at sizes where a class may be missing anywhere."""

import json
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle

from fasttune_classification.meters import MultiLabel, Regression, SingleLabel


def feed(meter, pairs):
    for prediction, reference in pairs:
        meter.update(prediction, reference)
    return meter


def halves(make, pairs):
    """The same rows seen by one meter, and by two that are merged."""
    merged = feed(make(), pairs[: len(pairs) // 3])
    merged.merge(feed(make(), pairs[len(pairs) // 3 :]))
    return feed(make(), pairs).result(), merged.result()


def finite(result):
    return json.loads(json.dumps(result, allow_nan=False))


@pytest.mark.parametrize(
    ("rows", "true_classes", "predicted_classes"),
    [(253, 7, 7), (123, 5, 3), (123, 3, 5), (507, 2, 2), (1, 2, 2), (11, 1, 4)],
)
def test_single_label_equals_scikit_learn(rows, true_classes, predicted_classes):
    random = np.random.default_rng(rows)
    truth = [f"c{i}" for i in random.integers(0, true_classes, rows)]
    # Offset, so that some classes are only in the references and some only in the predictions.
    guess = [f"c{i + (true_classes != predicted_classes)}" for i in random.integers(0, predicted_classes, rows)]
    guess = [t if random.random() < 0.4 else g for t, g in zip(truth, guess, strict=True)]
    pairs = [({"label": g}, {"label": t}) for t, g in zip(truth, guess, strict=True)]
    result, merged = halves(SingleLabel, pairs)
    assert result == merged == finite(result)
    classes = sorted({*truth, *guess})
    assert result["confusion"]["classes"] == classes
    np.testing.assert_array_equal(
        result["confusion"]["counts"], oracle.confusion_matrix(truth, guess, labels=classes)
    )
    assert result["accuracy"] == pytest.approx(oracle.accuracy_score(truth, guess))
    assert result["macro_f1"] == pytest.approx(oracle.f1_score(truth, guess, average="macro"))
    assert result["weighted_f1"] == pytest.approx(oracle.f1_score(truth, guess, average="weighted"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert result["mcc"] == pytest.approx(oracle.matthews_corrcoef(truth, guess))
    rows_of = oracle.precision_recall_fscore_support(truth, guess, labels=classes, zero_division=0)
    for i, name in enumerate(classes):
        mine = result["per_class"][name]
        theirs = [column[i] for column in rows_of]
        assert [mine[k] for k in ("precision", "recall", "f1", "support")] == pytest.approx(theirs)


def multi_pairs(rows, classes, coarse):
    random = np.random.default_rng(rows + classes)
    truth = random.random((rows, classes)) < 0.3
    truth[:, 0] = False
    score = np.clip(truth * 0.3 + random.random((rows, classes)) * 0.7, 0, 1).astype(np.float32)
    score[:, -1] *= 0.4
    if coarse:  # many ties
        score = np.round(score * 4) / 4
    names = [f"c{i}" for i in range(classes)]
    pairs = []
    for t, s in zip(truth, score, strict=True):
        scores = dict(zip(names, s.tolist(), strict=True))
        prediction = {"labels": [n for n, p in scores.items() if p >= 0.5], "scores": scores}
        pairs.append((prediction, {"label": [n for n, hot in zip(names, t, strict=True) if hot]}))
    return truth, score, names, pairs


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("rows", "classes"), [(123, 5), (252, 3), (17, 11)])
def test_multi_label_equals_scikit_learn(rows, classes, coarse):
    truth, score, names, pairs = multi_pairs(rows, classes, coarse)
    result, merged = halves(MultiLabel, pairs)
    assert result == merged == finite(result)
    guess = score >= 0.5
    assert result["micro_f1"] == pytest.approx(oracle.f1_score(truth, guess, average="micro"))
    assert result["macro_f1"] == pytest.approx(oracle.f1_score(truth, guess, average="macro", zero_division=0))
    present = truth.any(0)
    expected = [oracle.average_precision_score(truth[:, i], score[:, i]) for i in np.flatnonzero(present)]
    assert result["mAP"] == pytest.approx(np.mean(expected))
    assert "average_precision" not in result["per_class"]["c0"]
    assert result["per_class"][names[-1]]["support"] == truth[:, -1].sum()


@pytest.mark.parametrize("rows", [2, 123, 507])
def test_regression_equals_scipy(rows):
    random = np.random.default_rng(rows)
    actual = np.round(random.normal(size=rows) * 3)  # ties
    predicted = actual + random.normal(size=rows) + 1e6
    pairs = [({"value": p}, {"label": a}) for p, a in zip(predicted.tolist(), actual.tolist(), strict=True)]
    result, merged = halves(Regression, pairs)
    assert result == pytest.approx(merged)
    assert result["mse"] == pytest.approx(np.mean((predicted - actual) ** 2))
    assert result["pearson"] == pytest.approx(stats.pearsonr(predicted, actual)[0], abs=1e-7)
    assert result["spearman"] == pytest.approx(stats.spearmanr(predicted, actual)[0], abs=1e-12)


def test_degenerate_input_gives_numbers():
    one = feed(SingleLabel(), [({"label": "a"}, {"label": "a"})] * 3).result()
    assert (one["accuracy"], one["macro_f1"], one["mcc"]) == (1.0, 1.0, 0.0)
    constant = feed(Regression(), [({"value": 0.1 + 0.2}, {"label": 2.0})] * 5).result()
    assert (constant["pearson"], constant["spearman"]) == (0.0, 0.0)
    silent = {"labels": [], "scores": {"a": 0.1, "b": 0.2}}
    none = feed(MultiLabel(), [(silent, {"label": []})] * 4).result()
    assert (none["micro_f1"], none["macro_f1"], none["mAP"]) == (0.0, 0.0, 0.0)
    for make in (SingleLabel, MultiLabel, Regression):
        finite(make().result())


def test_perfect_predictions_score_perfectly():
    _, _, names, pairs = multi_pairs(57, 4, False)
    perfect = []
    for _, reference in pairs:
        scores = {name: float(name in reference["label"]) for name in names}
        perfect.append(({"labels": reference["label"], "scores": scores}, reference))
    result = feed(MultiLabel(), perfect).result()
    assert (result["micro_f1"], result["mAP"]) == (1.0, 1.0)


def test_meters_of_different_models_do_not_merge():
    a = feed(MultiLabel(), [({"labels": [], "scores": {"a": 0.1}}, {"label": []})])
    b = feed(MultiLabel(), [({"labels": [], "scores": {"b": 0.1}}, {"label": []})])
    with pytest.raises(ValueError, match="different classes"):
        a.merge(b)
