"""The contract, clause by clause, over the architectures and tokenizers that differ; tiny random models."""

import pytest

from fasttune.testing import TaskConformance
from fasttune_question_answering.task import QuestionAnswering

ELBE = (
    "The river Elbe rises in the Giant Mountains and flows through Dresden, Magdeburg and Hamburg to the "
    "North Sea. It is 1,094 kilometres long."
)
BRIDGE = "Käthe Zürn, an engineer born in 1801, built the first bridge near Meißen; it cost $4.5 million."
ASKED = (
    ("Where does the river rise?", ELBE, "the Giant Mountains"),
    ("How long is it?", ELBE, "1,094 kilometres"),
    ("Which city comes first?", ELBE, "Dresden"),
    ("Where does it end?", ELBE, "North Sea"),
    ("Who built the first bridge?", BRIDGE, "Käthe Zürn"),
    ("When was she born?", BRIDGE, "1801"),
    ("What did it cost?", BRIDGE, "$4.5 million"),
    ("Where?", BRIDGE, "Meißen"),
    ("What did she build?", BRIDGE, "the first bridge near Meißen"),
)


def row(question, context, *answers):
    starts = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": {"text": [*answers], "answer_start": starts}}


class Kit(TaskConformance):
    task = QuestionAnswering
    rows = tuple(row(*asked) for asked in ASKED)
    bad_rows = (
        ({"question": " "}, "question"),
        ({"context": None}, "context"),
        ({"answers": {"text": ["Prague"], "answer_start": [3]}}, "answers"),
        ({"answers": {"text": ["the Giant Mountains"], "answer_start": [23]}}, "answers"),
        ({"answers": {"text": ["river", "Elbe"], "answer_start": [4]}}, "answers"),
        ({"answers": ELBE}, "answers"),  # longer than any window
    )
    options = {"max_length": 28, "doc_stride": 8, "max_answer_length": 12}
    perfect_score = 100.0
    kind = "bert"

    @pytest.fixture(autouse=True)
    def maker(self, make_model):
        self.make_model = make_model

    def model(self, folder):
        return self.make_model(folder, self.kind)

    @staticmethod
    def perfect(row):
        texts = row["answers"]["text"]
        return {"answer": texts[0] if texts else "", "score": 1.0, "start": 0, "end": 0}


class TestBert(Kit):
    """Token types; whole words in lower case."""


class TestRoberta(Kit):
    """Two separators between the pair, no token types, bytes with blanks trimmed off their offsets."""

    kind = "roberta"
    options = {"max_length": 40, "doc_stride": 14}


class TestDistilBert(Kit):
    kind = "distilbert"
    options = {"max_length": 40, "doc_stride": 14}


class TestModernBert(Kit):
    """A head of two layers, and attention in a sliding window."""

    kind = "modernbert"
    options = {"max_length": 40, "doc_stride": 14}


class TestGPT2(Kit):
    """No special tokens, no padding token, Conv1D."""

    kind = "gpt2"
    options = {"max_length": 40, "doc_stride": 14}


class TestLlama(Kit):
    """A start token before either text; blanks at the heads of words."""

    kind = "llama"
    options = {"max_length": 40, "doc_stride": 14}


class TestXLNet(Kit):
    """The context stands first, the classification token last."""

    kind = "xlnet"


class TestT5(Kit):
    """An encoder and a decoder."""

    kind = "t5"
    options = {"max_length": 40, "doc_stride": 14}
    learning_rate = 1e-2


class TestUnanswerable(Kit):
    options = {**Kit.options, "unanswerable": True}
    rows = (*Kit.rows[:6], *({**Kit.rows[i], "answers": {"text": [], "answer_start": []}} for i in (6, 7, 8)))
    bad_rows = (
        *Kit.bad_rows,
        ({"is_impossible": True}, "is_impossible"),
        ({"answers": [], "is_impossible": False}, "answers"),
        ({"is_impossible": "perhaps"}, "is_impossible"),
    )


class TestFlat(Kit):
    """One answer a row, and no offset where it occurs once."""

    rows = tuple({"question": q, "context": c, "answers": a} for q, c, a in ASKED)
    bad_rows = (({"answers": "the"}, "answers"), ({"answers": "nowhere"}, "answers"), ({"answers": 7}, "answers"))

    @staticmethod
    def perfect(row):
        return {"answer": row["answers"]}
