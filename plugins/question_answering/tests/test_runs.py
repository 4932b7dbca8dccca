"""Whole runs: what is written opens with transformers and peft, and gives the same answers; bad input."""

import csv
import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from click.testing import CliRunner

import fasttune
from fasttune.cli import main
from fasttune.errors import BadRows, DataError

OPTIONS = {"max_length": 32, "doc_stride": 10, "max_answer_length": 6, "no_answer_threshold": 0.0}
CITIES = ("dresden", "magdeburg", "hamburg")


def squad(words, count, unanswerable=True):
    """Rows (text, offset) of a rule that a tiny model learns: the answer is the one city of the context."""
    chance, found = random.Random(3), []
    others = [word for word in words if word not in CITIES]
    for i in range(count):
        tokens = [chance.choice(others) for _ in range(chance.randint(8, 40))]
        answers = []
        if not (unanswerable and i % 5 == 0):
            city, place = CITIES[i % 3], chance.randrange(len(tokens))
            tokens[place] = city
            answers = [(city, len(" ".join(["", *tokens[:place]])) if place else 0)]
        found.append({"question": "which city burned?", "context": " ".join(tokens), "answers": answers})
    return found


@pytest.fixture(scope="module")
def words(text):
    return sorted({word.strip(",.?").lower() for word in text.split() if word.strip(",.?").isalpha()})


@pytest.fixture
def files(words, nested, tmp_path):
    """SQuAD 2.0, indented and not."""
    train, valid = tmp_path / "train-v2.0.json", tmp_path / "dev-v2.0.json"
    train.write_text(json.dumps(nested(squad(words, 60)), indent=1))
    valid.write_text(json.dumps(nested(squad(words, 25))))
    return {"train": str(train), "valid": str(valid)}


def finetune(model, data, output, **settings):
    return fasttune.finetune(
        task="question-answering",
        model=model,
        data=data,
        options=OPTIONS,
        output=str(output),
        quiet=True,
        **{"train": {"epochs": 1, "precision": "fp32", "batch": 16}, **settings},
    )


def answers_of(model, tokenizer, rows):
    """(best span, its score, null score) a row, by the model's own logits and a look at every pair of tokens."""
    found = []
    first = tokenizer.padding_side == "right"
    for row in rows:
        pair = (row["question"], row["context"]) if first else (row["context"], row["question"])
        encoding = tokenizer(
            *pair,
            truncation="only_second" if first else "only_first",
            max_length=OPTIONS["max_length"],
            stride=OPTIONS["doc_stride"],
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        best, null = (-float("inf"), 0, 0), float("inf")
        for i, offsets in enumerate(encoding["offset_mapping"]):
            names = [name for name in tokenizer.model_input_names if name in encoding]
            with torch.no_grad():
                out = model(**{name: torch.tensor([encoding[name][i]]) for name in names})
            start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
            ids = encoding["input_ids"][i]
            mark = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
            at = ids.index(mark) if mark in ids else 0
            null = min(null, start[at] + end[at])
            inside = [k for k, part in enumerate(encoding.sequence_ids(i)) if part == int(first)]
            inside = [k for k in inside if offsets[k][1] > offsets[k][0]]
            for a in inside:
                for b in (k for k in inside if a <= k < a + OPTIONS["max_answer_length"]):
                    best = max(best, (start[a] + end[b], offsets[a][0], offsets[b][1]))
        found.append((row["context"][best[1] : best[2]].strip(), best[0], null))
    return found


def agree(predictions, found):
    """Whether predictions of a model that may answer nothing are those of `answers_of`."""
    for prediction, (answer, best, null) in zip(predictions, found, strict=True):
        assert prediction["no_answer"] == pytest.approx(null - best, abs=1e-4)
        assert prediction["answer"] == ("" if null - best > OPTIONS["no_answer_threshold"] else answer)
    assert len({answer for answer, _, _ in found}) > 2


def bare(rows):
    return [{"question": row["question"], "context": row["context"]} for row in rows]


def test_a_run_learns_and_reports(make_model, files, tmp_path):
    report = finetune(
        make_model(tmp_path / "bert", "bert"),
        files,
        tmp_path / "run",
        strategy="full",
        train={"epochs": 12, "lr": 3e-3, "head_lr": 3e-3, "batch": 16},
    )
    valid = report.metrics["valid"]
    assert valid["f1"] > 90
    assert valid["NoAns_exact"] > 90
    assert valid["HasAns_exact"] > 90
    assert (valid["HasAns_total"], valid["NoAns_total"]) == (20, 5)
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "unanswerable: true" in text
    run = fasttune.load(tmp_path / "run")
    assert run.evaluate(files["valid"]) == pytest.approx(valid, rel=1e-6)
    predictions = run.predict(files["valid"])
    assert all(prediction.keys() == {"answer", "score", "start", "end", "no_answer"} for prediction in predictions)
    assert [bool(p["answer"]) for p in predictions] == [p["no_answer"] <= 0 for p in predictions]


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("bert", "full"), ("roberta", "head"), ("t5", "head"), ("xlnet", "full")]
    + [(kind, "lora") for kind in ("bert", "distilbert", "modernbert", "gpt2", "llama", "t5", "xlnet")],
)
def test_what_is_written_opens_elsewhere_with_the_same_answers(kind, strategy, make_model, files, words, tmp_path):
    base = make_model(tmp_path / "base", kind)
    finetune(base, files, tmp_path / "run", strategy=strategy)
    rows = bare(squad(words, 12))
    run = fasttune.load(tmp_path / "run")
    predictions = run.predict(rows)
    for row, prediction in zip(rows, predictions, strict=True):
        assert row["context"][prediction["start"] : prediction["end"]] == prediction["answer"]
    best = tmp_path / "run" / "best"
    tokenizer = hf.AutoTokenizer.from_pretrained(best)
    plain = best
    if strategy == "lora":
        import peft

        record = json.loads((best / "adapter_config.json").read_text())
        # peft's own class for answers drops token types: adapters of models that have some open without it.
        typed = kind in ("bert", "xlnet")
        assert record["task_type"] == (None if typed else "QUESTION_ANS")
        adapted = peft.PeftModel.from_pretrained(hf.AutoModelForQuestionAnswering.from_pretrained(base), best)
        agree(predictions, answers_of(adapted.eval(), tokenizer, rows))
        plain = tmp_path / "merged"
        run.export(plain)
    model = hf.AutoModelForQuestionAnswering.from_pretrained(plain).eval()
    agree(predictions, answers_of(model, tokenizer, rows))


def test_without_unanswerable_rows_every_question_is_answered(make_model, words, nested, tmp_path):
    path = tmp_path / "train-v1.1.json"
    path.write_text(json.dumps(nested(squad(words, 40, unanswerable=False), versions=1)))
    report = finetune(make_model(tmp_path / "bert", "bert"), {"train": str(path), "valid": 0.25}, tmp_path / "run")
    assert "unanswerable: false" in (tmp_path / "run" / "config.yaml").read_text()
    assert report.metrics["valid"].keys() >= {"f1", "exact_match"}
    assert not any(name.startswith("NoAns") for name in report.metrics["valid"])
    run = fasttune.load(tmp_path / "run")
    rows = bare(squad(words, 10))
    found = run.predict(rows)
    assert all(prediction["answer"] for prediction in found)
    best = tmp_path / "run" / "best"
    base = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "bert")
    import peft

    model = peft.PeftModel.from_pretrained(base, best).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(best)
    assert [prediction["answer"] for prediction in found] == [a for a, _, _ in answers_of(model, tokenizer, rows)]


def as_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["qid", "query", "passage", "answer", "answer_start"])
        writer.writeheader()
        for number, row in enumerate(rows):
            text, start = row["answers"][0] if row["answers"] else ("", "")
            own = {"qid": number, "query": row["question"], "passage": row["context"]}
            writer.writerow({**own, "answer": text, "answer_start": start})


def as_parquet(path, rows):
    import datasets

    datasets.disable_progress_bars()
    columns = {
        "text": lambda answers: [t for t, _ in answers],
        "answer_start": lambda answers: [s for _, s in answers],
    }
    flat = [{**row, "answers": {name: of(row["answers"]) for name, of in columns.items()}} for row in rows]
    datasets.Dataset.from_list(flat).to_parquet(path)


def as_lines(path, rows):
    answers = [{"answers": [{"text": t, "answer_start": s} for t, s in row["answers"]]} for row in rows]
    path.write_text("".join(json.dumps({**r, **a}) + "\n" for r, a in zip(rows, answers, strict=True)))


@pytest.mark.parametrize(("write", "name"), [(as_csv, "r.csv"), (as_parquet, "r.parquet"), (as_lines, "r.jsonl")])
def test_every_layout_gives_the_same_run(write, name, make_model, files, words, tmp_path):
    write(tmp_path / name, squad(words, 60))
    base = make_model(tmp_path / "bert", "bert")
    metrics = []
    for number, train in enumerate((files["train"], str(tmp_path / name))):
        report = finetune(base, {**files, "train": train}, tmp_path / f"run-{number}")
        metrics.append((report.metrics["valid"], report.metrics["train_loss"]))
    assert metrics[0] == metrics[1]


def test_all_bad_rows_are_named_with_file_row_and_question(make_model, words, nested, tmp_path):
    document = nested(squad(words, 20))
    questions = [q for article in document["data"] for part in article["paragraphs"] for q in part["qas"]]
    questions[2]["answers"][0]["answer_start"] += 1
    questions[6]["answers"] = []
    questions[8]["question"] = None
    questions[11]["answers"][0]["text"] = "atlantis"
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document, indent=2))
    with pytest.raises(BadRows) as caught:
        finetune(make_model(tmp_path / "bert", "bert"), {"train": str(path), "valid": 0.2}, tmp_path / "run")
    assert [(bad.row, bad.column) for bad in caught.value.rows] == [
        (3, "answers"),
        (7, "answers"),
        (9, "question"),
        (12, "answers"),
    ]
    message = str(caught.value)
    assert "train.json, row 3, column 'answers': expected 'hamburg' at answer_start" in message
    assert "(question id 'q2')" in message
    assert "there is no answer, but is_impossible is false (question id 'q6')" in message
    assert "it is nowhere in the context (question id 'q11')" in message


def test_answers_that_no_window_holds_are_bad_rows(make_model, words, tmp_path):
    rows = [{"question": "what?", "context": " ".join(words[:40]), "answers": words[i]} for i in range(12)]
    rows[4]["answers"] = " ".join(words[:35])
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        BadRows, match=r"row 5, column 'answers': .* is whole in none of \d+ windows of at most 32"
    ):
        finetune(make_model(tmp_path / "bert", "bert"), {"train": str(path), "valid": str(path)}, tmp_path / "run")


def test_broken_files(make_model, files, tmp_path):
    base = make_model(tmp_path / "bert", "bert")
    whole = Path(files["train"]).read_text(encoding="utf-8")
    for text, why in (
        (whole[:-40], r"cut\.json, line \d+: broken JSON"),
        (whole.replace('"qas"', '"qsa"', 1), r"cut\.json: data\[0\]\.paragraphs\[0\]: expected a list 'qas'"),
        ('{"data": []}', r"cut\.json: has no rows"),
        ('{"version": 1, "rows": []}', "no column for 'question'"),
    ):
        (tmp_path / "cut.json").write_text(text)
        with pytest.raises(DataError, match=why):
            finetune(base, {"train": str(tmp_path / "cut.json"), "valid": 0.2}, tmp_path / "run")


def test_rows_to_score_need_answers_and_rows_to_predict_do_not(make_model, files, words, tmp_path):
    finetune(make_model(tmp_path / "bert", "bert"), files, tmp_path / "run")
    run = fasttune.load(tmp_path / "run")
    with pytest.raises(DataError, match="no column for 'answers'"):
        run.evaluate(bare(squad(words, 3)))
    with pytest.raises(BadRows, match="row 2, column 'context': expected text, found only blanks"):
        run.predict([*bare(squad(words, 1)), {"question": "what?", "context": " "}])
    wrong = [{**row, "answers": "nothing of the kind"} for row in bare(squad(words, 3))]
    assert len(run.predict(wrong)) == 3, "answers are not looked at"


def command(*arguments):
    done = CliRunner().invoke(main, arguments)
    return done.exit_code, done.stdout, done.stderr


def test_the_command_line_takes_squad_files(make_model, files, tmp_path):
    data = ["--data", files["train"], "--valid", files["valid"], "--model", make_model(tmp_path / "bert", "bert")]
    settings = [f"--set=options.{name}={value}" for name, value in OPTIONS.items()]
    status, out, _ = command("check", "question-answering", *data, *settings)
    assert status == 0
    assert "rows: 60 train, 25 valid" in out
    assert "which city burned ? | " in out
    assert re.findall(r"^ *row (\d+):", out, re.MULTILINE) == ["1", "2", "3"], "not three windows of one row"
    assert "«hamburg»" in out or "«magdeburg»" in out or "no answer here" in out
    run = str(tmp_path / "run")
    assert command("run", "question-answering", *data, *settings, "--set=train.epochs=1", "--output", run)[0] == 0
    status, out, _ = command("evaluate", run, "--data", files["valid"], "--json")
    assert status == 0
    assert {"f1", "exact_match", "HasAns_f1", "NoAns_exact"} <= json.loads(out).keys()
    status, out, _ = command("predict", run, "--data", files["valid"])
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 25
    assert all({"answer", "score", "start", "end"} <= line.keys() for line in lines)
    broken = json.loads(Path(files["train"]).read_text(encoding="utf-8"))
    broken["data"][0]["paragraphs"][1]["qas"][0]["answers"][0]["answer_start"] = 9999
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    data[1] = str(tmp_path / "broken.json")
    status, _, err = command("run", "question-answering", *data)
    assert status == 2
    assert "broken.json, row 2, column 'answers'" in err
    assert "Traceback" not in err
