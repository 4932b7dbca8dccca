"""The contract, clause by clause, for encoder-decoders and decoders; tiny models with random weights."""

import pytest

from fasttune.testing import TaskConformance
from fasttune_summarization.tasks import Summarization, Text2Text

TEXTS = (
    ("the red fox runs over the hill while the grey dog sleeps", "fox runs"),
    ("rain falls", "wet"),
    ("a boat with two sails goes down the river and does not come back today", "a boat goes away today"),
    ("seven birds sit on one wire", "birds sit"),
    ("the mill stands still since the wind does not blow", "no wind no flour"),
    ("one", "one"),
    ("she reads the long letter twice and then burns it in the stove", "letter burns"),
    ("two trains leave the town at noon and only one of them arrives", "one train arrives"),
    ("snow on the roof and smoke from the chimney", "winter"),
)


class TestT5(TaskConformance):
    task = Summarization
    rows = tuple({"document": document, "summary": summary} for document, summary in TEXTS)
    bad_rows = (
        ({"document": " "}, "document"),
        ({"document": None}, "document"),
        ({"summary": ""}, "summary"),
        ({"summary": None}, "summary"),
        ({"summary": 3}, "summary"),
    )
    options = {"max_new_tokens": 8}
    kind = "t5"
    settings: dict = {}

    @pytest.fixture(autouse=True)
    def writer(self, write_model):
        self.write_model = write_model

    def model(self, folder):
        return self.write_model(self.kind, folder, **self.settings)

    @staticmethod
    def perfect(row):
        return {"summary": row["summary"]}


class TestT5WithPrefixAndBeams(TestT5):
    options = {"prefix": "summarize: ", "beams": 3, "max_new_tokens": 6, "no_repeat_ngram_size": 2}


class TestBart(TestT5):
    kind = "bart"


class TestGPT2(TestT5):
    """Conv1D layers, tied head, no padding token."""

    kind = "gpt2"


class TestLlama(TestT5):
    kind = "llama"
    options = {"prompt": "Text: {document}\nIn short:", "max_new_tokens": 8}


class TestLlamaWithBeams(TestT5):
    kind = "llama"
    options = {"beams": 2, "max_new_tokens": 6, "length_penalty": 0.5}


class TestTextToText(TestT5):
    task = Text2Text
    rows = tuple({"source": source, "target": target} for source, target in TEXTS)
    bad_rows = (({"source": ""}, "source"), ({"target": None}, "target"))

    @staticmethod
    def perfect(row):
        return {"target": row["target"]}
