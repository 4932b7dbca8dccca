"""Answers through windows and back, for every way that tokenizers count characters."""

import itertools
import random

import numpy as np
import pytest

from fasttune.errors import DataError
from fasttune.task import Source
from fasttune_question_answering.spans import best_answer, best_spans
from fasttune_question_answering.task import QuestionAnswering
from fasttune_question_answering.windows import Cutter

KINDS = ["bert", "roberta", "gpt2", "llama", "xlnet"]


def opened(folder, **options):
    task = QuestionAnswering(QuestionAnswering.Options(**options))
    return task, task.build(Source(folder), [])


def a_row(chance, words):
    """Words of the text in any order, parted by any white space; the answer is a few of them."""
    blanks = [" ", " ", " ", "  ", "\n"]
    pieces = [chance.choice(words) + chance.choice(blanks) for _ in range(chance.randint(5, 90))]
    first = chance.randrange(len(pieces))
    chosen = pieces[first : first + chance.randint(1, 4)]
    start = sum(map(len, pieces[:first]))
    question = " ".join(chance.choice(words) for _ in range(chance.randint(1, 6)))
    answers = {"text": ["".join(chosen).rstrip()], "answer_start": [start]}
    return {"question": question, "context": "".join(pieces), "answers": answers}


def gold_logits(sample):
    """High where the sample says that the answer starts and ends."""
    import torch

    start, end = torch.zeros(2, 1, len(sample.tensors["offsets"]))
    start[0, int(sample.tensors["start_positions"])] = 5.0
    end[0, int(sample.tensors["end_positions"])] = 5.0
    return start, end


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [None, 0, 7, 25])
def test_every_answer_comes_back_from_its_windows(kind, stride, make_model, collate, text, tmp_path):
    task, bundle = opened(make_model(tmp_path / kind, kind), max_length=64, doc_stride=stride)
    chance = random.Random(f"{kind} {stride}")
    several = whole = 0
    for _ in range(120):
        row = a_row(chance, text.split())
        samples = task.encode(row, bundle, train=False)
        assert all(len(sample.tensors["input_ids"]) <= 64 for sample in samples)
        several += len(samples) > 1
        windows = []
        for sample in samples:
            batch = collate([sample], {})
            found = best_spans(*gold_logits(sample), batch["offsets"], batch["null_position"], longest=64, count=3)
            windows += found
        placed = [int(s.tensors["start_positions"]) != int(s.tensors["null_position"]) for s in samples]
        if not any(placed):
            assert stride in (0, 7), "windows that share 25 tokens can't all cut four words"
            continue
        whole += 1
        answer = best_answer(windows, row["context"], count=20, unanswerable=True, threshold=0.0)
        wanted, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        # Null is the highest of the windows without the answer, and the lowest counts.
        assert (answer["answer"], answer["start"], answer["end"]) == (wanted, start, start + len(wanted))
    assert several > 40
    assert whole > 80


@pytest.mark.parametrize("kind", KINDS)
def test_windows_cover_the_context_and_share_what_was_asked(kind, make_model, text, tmp_path):
    task, bundle = opened(make_model(tmp_path / kind, kind), max_length=48, doc_stride=9)
    row = {"question": "Where does it rise?", "context": text.partition(" 🍐")[0] * 2}
    samples = task.encode(row, bundle, train=False)
    whole = bundle.processor(row["context"], add_special_tokens=False)["input_ids"]
    pieces = []
    for sample in samples:
        shows = np.flatnonzero(sample.tensors["offsets"][:, 1] > sample.tensors["offsets"][:, 0])
        pieces.append(sample.tensors["input_ids"][shows[0] : shows[-1] + 1].tolist())
        assert "start_positions" not in sample.tensors
        assert sample.truncated == {"question": 0}
    assert len(samples) > 4
    joined = pieces[0]
    for before, piece in itertools.pairwise(pieces):
        assert before[-9:] == piece[:9]
        joined = joined + piece[9:]
    assert joined == whole


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_windows_and_targets_are_those_of_run_qa(kind, make_model, text, tmp_path):
    """Against the arithmetic of prepare_train_features in transformers' run_qa.py, written anew."""
    task, bundle = opened(make_model(tmp_path / kind, kind), max_length=48, doc_stride=16)
    tokenizer, chance = bundle.processor, random.Random(3)
    rows = [a_row(chance, text.split()) for _ in range(60)]
    windows = 0
    for row in rows:
        encoding = tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=48,
            stride=16,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        samples = task.encode(row, bundle, train=False)
        assert len(samples) == len(encoding["input_ids"])
        start = row["answers"]["answer_start"][0]
        end = start + len(row["answers"]["text"][0])
        for i, sample in enumerate(samples):
            ids, offsets, parts = encoding["input_ids"][i], encoding["offset_mapping"][i], encoding.sequence_ids(i)
            first, last = parts.index(1), len(parts) - 1 - parts[::-1].index(1)
            if offsets[first][0] > start or offsets[last][1] < end:
                wanted = (0, 0)
            else:
                begun = [k for k in range(first, last + 1) if offsets[k][0] <= start]
                ended = [k for k in range(first, last + 1) if offsets[k][1] >= end]
                wanted = (begun[-1], ended[0])
            assert sample.tensors["input_ids"].tolist() == ids
            found = (int(sample.tensors["start_positions"]), int(sample.tensors["end_positions"]))
            assert found == wanted, (row, i)
            windows += 1
    assert windows > 80


def test_an_answer_inside_a_word_takes_the_whole_word(make_model, tmp_path):
    task, bundle = opened(make_model(tmp_path / "bert", "bert"))
    row = {"question": "who?", "context": "the river Elbe", "answers": {"text": ["iver El"], "answer_start": [5]}}
    (sample,) = task.encode(row, bundle, train=True)
    ids = sample.tensors["input_ids"][sample.tensors["start_positions"] : sample.tensors["end_positions"] + 1]
    assert bundle.processor.decode(ids) == "river elbe"


def test_letters_of_several_tokens(make_model, tmp_path):
    task, bundle = opened(make_model(tmp_path / "gpt2", "gpt2"))
    row = {"question": "what?", "context": "a 梨🍐 is ripe", "answers": {"text": ["梨🍐"], "answer_start": [2]}}
    (sample,) = task.encode(row, bundle, train=True)
    chosen = slice(int(sample.tensors["start_positions"]), int(sample.tensors["end_positions"]) + 1)
    assert chosen.stop - chosen.start > 2
    offsets = sample.tensors["offsets"][chosen]
    assert row["context"][offsets[0, 0] : offsets[-1, 1]].strip() == "梨🍐"


def test_long_questions_lose_their_end_and_it_is_told(make_model, tmp_path):
    task, bundle = opened(make_model(tmp_path / "bert", "bert"), max_length=24, max_question_length=5)
    row = {
        "question": "Where does the river rise and how long is it?",
        "context": "The Elbe rises in the mountains",
    }
    (sample,) = task.encode(row, bundle, train=False)
    names = bundle.processor.convert_ids_to_tokens(sample.tensors["input_ids"])
    assert names[:8] == ["[CLS]", "where", "does", "the", "river", "rise", "[SEP]", "the"]
    assert sample.truncated == {"question": 6}


def test_texts_that_give_no_window(make_model, tmp_path):
    task, bundle = opened(make_model(tmp_path / "bert", "bert"), max_length=16, max_question_length=64)
    good = {"question": "where?", "context": "by the river", "id": "a7"}
    for row, why in (
        (
            {"question": "where " * 13},
            r"question: it leaves no room .* 16 tokens.*\(question id 'a7'\)",
        ),
        ({"question": "\u0000"}, r"question: the tokenizer makes no token of"),
        ({"context": "\u0000 \u0000"}, r"context: the tokenizer makes no token of"),
    ):
        with pytest.raises(DataError, match=why):
            task.encode({**good, **row}, bundle, train=False)


def test_a_stride_that_a_question_has_no_room_for_is_cut_to_half(make_model, text, tmp_path):
    _, bundle = opened(make_model(tmp_path / "bert", "bert"), max_length=24)
    windows, _ = Cutter(bundle.processor, 20, 64).windows("where does the river rise and how long is it", text)
    shown = [window.offsets[window.offsets[:, 1] > 0] for window in windows]
    assert len(shown[0]) == 11
    assert {len(set(map(tuple, a)) & set(map(tuple, b))) for a, b in itertools.pairwise(shown)} == {5}


def test_an_answer_whole_in_no_window_is_a_bad_row_of_train_alone(make_model, tmp_path):
    task, bundle = opened(make_model(tmp_path / "bert", "bert"), max_length=16, doc_stride=2)
    context = "The river Elbe rises in the Giant Mountains and flows through Dresden"
    row = {"question": "What?", "context": context, "answers": context, "id": 9}
    with pytest.raises(DataError, match=r"whole in none of 2 windows .* targets are truncated.*question id 9"):
        task.encode(row, bundle, train=True)
    samples = task.encode(row, bundle, train=False)
    assert [int(s.tensors["start_positions"]) for s in samples] == [0] * len(samples)


def test_samples_are_shown_with_their_answer_marked(make_model, tmp_path):
    task, bundle = opened(make_model(tmp_path / "roberta", "roberta"), max_length=30, doc_stride=4)
    context = "The river Elbe rises in the Giant Mountains and flows through Dresden."
    row = {"question": "Where does it rise?", "context": context, "answers": "the Giant Mountains"}
    shown = [task.show(sample, bundle) for sample in task.encode(row, bundle, train=True)]
    assert "Where does it rise? | The river Elbe rises in «the Giant Mountains»" in shown[0]
    assert shown[-1].startswith("Where does it rise? | ")
    assert shown[-1].endswith("| no answer here")
