"""Losses step by step against transformers' Trainer on features that run_qa's arithmetic makes."""

import json
import random

import pytest
import torch
import transformers as hf

import fasttune

STEPS, LENGTH, STRIDE, QUESTION = 50, 32, 8, 5
ROOM = LENGTH - QUESTION - 3  # tokens of context in a window


def rows(words):
    """Whole words whose windows are all full: transformers' loss has padding in its denominator."""
    chance = random.Random(5)
    found = []
    for i in range(12):
        tokens = [chance.choice(words) for _ in range(ROOM + (i % 3) * (ROOM - STRIDE))]
        context, first = " ".join(tokens), chance.randrange(len(tokens) - 2)
        answer, start = " ".join(tokens[first : first + 2]), len(" ".join(["", *tokens[:first]]))
        question = " ".join(chance.choice(words) for _ in range(QUESTION))
        answers = {"text": [answer], "answer_start": [start]} if i % 4 else {"text": [], "answer_start": []}
        found.append({"question": question, "context": context, "answers": answers})
    return found


def features(data, tokenizer):
    """prepare_train_features of run_qa.py, written anew."""
    found = []
    for row in data:
        encoding = tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=LENGTH,
            stride=STRIDE,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for i, ids in enumerate(encoding["input_ids"]):
            offsets, parts = encoding["offset_mapping"][i], encoding.sequence_ids(i)
            start = end = 0
            if row["answers"]["text"]:
                begin = row["answers"]["answer_start"][0]
                finish = begin + len(row["answers"]["text"][0])
                inside = [k for k, part in enumerate(parts) if part == 1]
                if offsets[inside[0]][0] <= begin and offsets[inside[-1]][1] >= finish:
                    start = max(k for k in inside if offsets[k][0] <= begin)
                    end = min(k for k in inside if offsets[k][1] >= finish)
            found.append(
                {
                    "input_ids": ids,
                    "attention_mask": encoding["attention_mask"][i],
                    "token_type_ids": encoding["token_type_ids"][i],
                    "start_positions": start,
                    "end_positions": end,
                }
            )
    return found


@pytest.fixture
def without_dropout(make_model, tmp_path):
    return make_model(
        tmp_path / "bert", "bert", head=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def test_fifty_losses_are_those_of_transformers_trainer(without_dropout, text, tmp_path):
    words = sorted({word for word in text.lower().split() if word.isascii() and word.isalpha()})
    data = rows(words)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    tokenizer = hf.AutoTokenizer.from_pretrained(without_dropout)
    windows = features(data, tokenizer)
    assert {len(window["input_ids"]) for window in windows} == {LENGTH}
    placed = [window["start_positions"] > 0 for window in windows]
    assert 4 < sum(placed) < len(windows) - 4 > 10

    path = str(tmp_path / "rows.jsonl")
    fasttune.finetune(
        task="question-answering",
        model=without_dropout,
        data={"train": path, "valid": path},
        options={"max_length": LENGTH, "doc_stride": STRIDE},
        strategy="full",
        train={
            "steps": STEPS,
            "batch": len(windows),
            "lr": 0.05,
            "head_lr": 0.05,
            "clip": 0.0,
            "precision": "fp32",
            "optimizer": {"kind": "sgd", "momentum": 0.9},
            "schedule": {"kind": "constant", "warmup": 0},
        },
        eval={"every": STEPS},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines if "loss" in line]

    model = hf.AutoModelForQuestionAnswering.from_pretrained(without_dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = hf.Trainer(
        model,
        hf.TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=len(windows),
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=windows,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert len(ours) == len(theirs) == STEPS
    assert ours[-1] < 0.5 * ours[0], "losses that stay where they are prove nothing"
    # fp32 sums in another order, over fifty steps; the trainer rounds what it logs.
    assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-4)
    assert ours[:5] == pytest.approx(theirs[:5], rel=2e-5, abs=1e-4)
