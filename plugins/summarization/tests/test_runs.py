"""Runs from end to end: what is written opens with transformers and peft, and writes the same text."""

import json
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf

import fasttune
from fasttune.errors import DataError

PROMPT = "{document}\n\nSummary: "
TRAIN = {"epochs": 3, "batch": 4, "lr": 3e-3, "precision": "fp32"}


@pytest.fixture
def run(tmp_path, rows, write_model):
    """run(kind, strategy, **sections) -> the run folder."""

    def start(kind, strategy, table=rows, columns=None, **sections):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in table))
        model = write_model(kind, tmp_path / "model")
        fasttune.finetune(
            **{
                "task": "summarization",
                "model": model,
                "data": {"train": str(data), "valid": str(data), "columns": columns or {}},
                "strategy": strategy,
                "train": TRAIN,
                "output": str(tmp_path / "run"),
                "quiet": True,
                **sections,
            }
        )
        return tmp_path / "run"

    return start


def written_by_transformers(model, folder, rows, most, before="", after="", **settings):
    """What `generate` of a plain model makes of the rows, all in one batch."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(
        [before + row["document"] + after for row in rows], padding=True, return_tensors="pt", truncation=True
    )
    ids = model.eval().generate(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, **settings)
    if not model.config.is_encoder_decoder:
        ids = ids[:, inputs["input_ids"].shape[1] :]
    assert ids.shape[1] <= most + 1
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


@pytest.mark.parametrize("strategy", ["full", "head", "lora"])
@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_what_a_run_leaves_writes_the_same_with_transformers_and_peft(kind, strategy, run, rows, tmp_path):
    beams = 2 if kind in ("bart", "llama") else 1
    # After a few steps the model has changed, but not so far yet that it writes nothing but an end.
    train = {**TRAIN, "steps": 4, "lr": 1e-3}
    folder = run(kind, strategy, options={"max_new_tokens": 7, "beams": beams}, train=train)
    model = fasttune.load(folder)
    expected = [prediction["summary"] for prediction in model.predict(rows)]
    assert any(expected), "the model writes something"
    encodes = kind in ("t5", "bart")
    auto = hf.AutoModelForSeq2SeqLM if encodes else hf.AutoModelForCausalLM
    after = "" if encodes else PROMPT.rstrip(" ").removeprefix("{document}")

    model.export(tmp_path / "plain")
    plain = auto.from_pretrained(tmp_path / "plain")
    assert written_by_transformers(plain, tmp_path / "plain", rows, 7, after=after) == expected
    if strategy == "lora":
        assert json.loads((folder / "best" / "adapter_config.json").read_text())["task_type"] == (
            "SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM"
        )
        opened = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "model"), folder / "best")
        how = {"generation_config": hf.GenerationConfig.from_pretrained(folder / "best")}
        assert written_by_transformers(opened, folder / "best", rows, 7, after=after, **how) == expected
    else:
        best = auto.from_pretrained(folder / "best")
        assert written_by_transformers(best, folder / "best", rows, 7, after=after) == expected


def test_the_readmes_code_writes_what_predict_does(run, rows, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    folder = run("t5", "full", train={**TRAIN, "epochs": 20, "lr": 1e-2}, options={"prefix": "summarize: "})
    expected = fasttune.load(folder).predict(rows[:1])[0]["summary"]
    capsys.readouterr()
    exec(
        compile(code, "README.md", "exec"),
        {"folder": folder / "best", "prefix": "summarize: ", "document": rows[0]["document"]},
    )
    assert expected
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_run_learns_its_rows_by_heart_and_says_so(run, rows):
    train = {**TRAIN, "epochs": 60, "lr": 1e-2}
    folder = run("t5", "full", train=train, eval={"every": 90, "samples": 2})
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["valid"]["rougeL"] > 0.9
    assert metrics["valid"]["length_ratio"] == pytest.approx(1.0, abs=0.2)
    assert metrics["primary"] == "rougeL"
    assert metrics["samples"][0]["holds"].keys() == {"document", "summary"}
    assert fasttune.load(folder).evaluate(rows)["rougeL"] == pytest.approx(metrics["valid"]["rougeL"])


def test_translation_pairs_by_dotted_columns(run, rows):
    pairs = [{"translation": {"en": row["document"], "xx": row["summary"]}} for row in rows]
    folder = run(
        "t5",
        "full",
        pairs,
        task="text2text-generation",
        columns={"source": "translation.en", "target": "translation.xx"},
        options={"prefix": "Answer : ", "max_new_tokens": 5},
    )
    model = fasttune.load(folder)
    by_pair = model.predict([{"translation": {"en": row["document"]}} for row in rows])
    assert by_pair == model.predict([{"source": row["document"]} for row in rows])
    assert by_pair[0].keys() == {"target"}
    assert 0 <= model.evaluate(pairs)["rouge1"] <= 1


def test_max_rows_caps_what_is_generated(run, monkeypatch):
    from fasttune_summarization.tasks import Summarization

    written = []
    decode = Summarization._write

    def counted(self, model, batch, *rest, **more):
        written.append(len(batch["input_ids"]))
        return decode(self, model, batch, *rest, **more)

    monkeypatch.setattr(Summarization, "_write", counted)
    folder = run("t5", "head", train={**TRAIN, "steps": 1}, eval={"max_rows": 4, "samples": 0})
    assert sum(written) == 8, "4 rows at the end of the run, and 4 by what best/ holds"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["valid_rows_measured"], metrics["valid_rows"]) == (4, 9)
    assert "4 of its 9 rows" in (folder / "report.html").read_text()


def test_features_of_an_untied_encoder_decoder_are_not_mixed_up(run, tmp_path, write_model):
    """Strategy head keeps the features of a frozen base, but a decoder's are as long as the batch's target."""
    untied = write_model("bart", tmp_path / "untied", tie_word_embeddings=False)
    folder = run("bart", "head", model=untied, options={"max_new_tokens": 4})
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in losses if "loss" in record)


BAD = [
    ({"document": "rain", "summary": ""}, "summary", "expected text, found an empty string"),
    ({"document": None, "summary": "wet"}, "document", "expected text, found nothing"),
    ({"document": " \n", "summary": "wet"}, "document", "only blanks"),
    ({"document": "rain", "summary": ["wet"]}, "summary", "expected text, found list"),
]


def test_bad_rows_stop_the_run_before_its_first_step(run, rows, tmp_path):
    table = [dict(row) for row in rows]
    for place, (row, _, _) in enumerate(BAD):
        table.insert(2 * place, row)
    with pytest.raises(DataError) as stopped:
        run("t5", "full", table)
    found = [(bad.row, bad.column) for bad in stopped.value.rows]
    assert set(found) == {(2 * place + 1, column) for place, (_, column, _) in enumerate(BAD)}
    for _, _, why in BAD:
        assert why in str(stopped.value)
    assert not (tmp_path / "run").exists()


def fasttune_says(*arguments):
    done = subprocess.run([sys.executable, "-m", "fasttune", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_command_line(run, rows, tmp_path):
    folder = run("gpt2", "lora", options={"max_new_tokens": 4})
    data = tmp_path / "rows.jsonl"
    common = ("summarization", "--data", data, "--model", tmp_path / "model", "--set", "data.valid=0.3")
    status, out, errors = fasttune_says("check", *common)
    assert status == 0, errors
    assert "⟦ fox runs</s>⟧" in out
    assert "document <- document, summary <- summary" in out
    assert "prompt '…\\n\\nSummary: '" in out
    status, out, errors = fasttune_says("predict", folder, "--input", rows[0]["document"])
    assert status == 0, errors
    assert json.loads(out) == fasttune.load(folder).predict(rows[:1])[0]
    status, out, errors = fasttune_says("evaluate", folder, "--data", data, "--json")
    assert status == 0, errors
    assert {"loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "length_ratio"} <= json.loads(out).keys()
    data.write_text(data.read_text() + '{"document": "rain", "summary": \n')
    status, _, errors = fasttune_says("check", *common)
    assert status == 2
    assert "Traceback" not in errors
    assert "rows.jsonl" in errors
