"""Columns, aliases and documented options of the three tasks."""

import pytest

from fasttune_classification.audio import AudioClassification
from fasttune_classification.image import ImageClassification
from fasttune_classification.text import TextClassification

TASKS = (TextClassification, ImageClassification, AudioClassification)


@pytest.mark.parametrize("task", TASKS)
def test_no_name_belongs_to_two_roles(task):
    names = [name for column in task().columns for name in column.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("task", TASKS)
def test_every_option_is_documented(task):
    assert all(field.description for field in task.Options.model_fields.values())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("problem", ["single", "multi"])
def test_one_metric_is_primary(task, problem):
    made = task(task.Options(problem=problem))
    assert [metric.primary for metric in made.metrics].count(True) == 1
    assert {metric.name for metric in made.metrics} <= made.meter().result().keys()
