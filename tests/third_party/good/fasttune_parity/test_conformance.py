"""What a plugin's author writes to know that the task keeps the contract: `pytest --pyargs fasttune_parity`."""

from fasttune.testing import TaskConformance
from fasttune_parity.model import ParityModel
from fasttune_parity.task import SentenceParity

SENTENCES = (
    "a sentence of some words",
    "one",
    "to be or not to be that is the question",
    "fast",
    "we tag each word",
    "even and odd",
    "an extraordinarily long word",
    "the end is near",
)


def parity(sentence):
    return ["odd" if len(word) % 2 else "even" for word in sentence.split()]


class TestSentenceParity(TaskConformance):
    task = SentenceParity
    rows = tuple({"words": sentence, "tags": parity(sentence)} for sentence in SENTENCES)
    bad_rows = (
        ({"words": " "}, "words"),
        ({"words": None}, "words"),
        ({"tags": ["even"]}, "tags"),
        ({"words": "one", "tags": ["strange"]}, "tags"),
    )

    def model(self, folder):
        ParityModel().save_pretrained(folder)
        return str(folder)

    def perfect(self, row):
        return row["tags"]
