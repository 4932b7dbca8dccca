"""The contract, clause by clause, for each layout and kind of model; tiny models with random weights."""

import pytest

from fasttune.testing import TaskConformance
from fasttune_chat.chat import Chat

QUESTIONS = (
    "Which day comes after Monday?",
    "And?",
    "What is seven and five?\nIt is twelve.",
    "Be brief. Answer in one word, please! What comes after Tuesday, and what after that?",
    "a",
    "Which task?",
    "Describe the user, the assistant, the system and the tool.",
    "Seven?",
    "Below is an instruction that describes a task.",
)


def asked(question, *rest):
    turns = [question, *rest]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


CHATS = tuple(
    {"messages": asked(question, f"It is {i}.", *(("Sure?", f"Yes, {i * 7}!") if i % 3 == 1 else ()))}
    for i, question in enumerate(QUESTIONS)
)


class ChatKit(TaskConformance):
    task = Chat
    rows = CHATS
    kind = "llama"
    tokenizer = {}
    options = {"max_new_tokens": 8, "packing": True, "max_length": 200}
    bad_rows = (
        ({"messages": asked("a")}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": asked("a", " ")}, "messages"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "messages"),
        ({"messages": None}, None),
    )
    perfect_score = 1.0

    @pytest.fixture(autouse=True)
    def maker(self, make_model):
        self.make_model = make_model

    def model(self, folder):
        return self.make_model(folder, self.kind, **self.tokenizer)

    def perfect(self, row):
        return {"reply": row["messages"][-1]["content"]}


class TestLlama(ChatKit):
    """No template of its own: chatml, with new tokens."""


class TestTiedWithItsTokens(ChatKit):
    """The tokens are there: the output projection is a pretrained head, and part of the embeddings."""

    kind = "llama tied"
    tokenizer = {"added": ("<|im_start|>", "<|im_end|>")}


class TestGPT2(ChatKit):
    """Conv1D layers, positions from a table, no padding token."""

    kind = "gpt2"
    tokenizer = {"pad": False, "bos": False}
    options = {**ChatKit.options, "template": "alpaca"}


class TestGemma2(ChatKit):
    """Soft caps, and layers with a window."""

    kind = "gemma2"
    options = {**ChatKit.options, "template": "gemma"}


class TestInstructions(ChatKit):
    options = {**ChatKit.options, "template": "mistral"}
    rows = tuple(
        {"instruction": question, "input": "" if i % 2 else "in short", "output": f"It is {i}."}
        for i, question in enumerate(QUESTIONS)
    )
    bad_rows = (
        ({"instruction": None, "input": ""}, "instruction"),
        ({"output": ""}, "output"),
        ({"output": 7}, "output"),
    )

    def perfect(self, row):
        return {"reply": row["output"]}


class TestTexts(ChatKit):
    options = {**ChatKit.options, "max_length": 12}
    rows = tuple({"text": text} for text in QUESTIONS)
    bad_rows = (({"text": " "}, "text"), ({"text": None}, None))

    def perfect(self, row):
        return {"continuation": ""}
