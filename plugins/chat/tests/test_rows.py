"""Rows in every layout, and every fault with its column and turn; end to end with file and row."""

import json

import pytest

import fasttune
from fasttune.errors import BadRows, ConfigError, DataError, ModelError
from fasttune.task import Source
from fasttune_chat.chat import Chat
from fasttune_chat.messages import layout_of, read_messages, read_pair, read_tools


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


GOOD = [user("Seven and five?"), said("Twelve.")]


def test_sharegpt():
    row = {
        "messages": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Add."},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 7}}'},
            {"from": "observation", "value": "12"},
            {"from": "gpt", "value": "Twelve."},
        ]
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 7}}}
    assert read_messages(row, answered=True) == [
        {"role": "system", "content": "Be brief."},
        user("Add."),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
        said("Twelve."),
    ]


def test_openais_calls_have_arguments_in_json():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    turns = read_messages(
        {"messages": [user("Add."), said(None, tool_calls=[call]), {"role": "tool", "content": "12"}, said("12")]},
        answered=True,
    )
    assert turns[1]["tool_calls"][0] == {
        "id": "c1",
        "type": "function",
        "function": {"name": "add", "arguments": {"a": 7}},
    }


@pytest.mark.parametrize(
    "value",
    [
        json.dumps(GOOD),
        {"role": ["user", "assistant"], "content": ["Seven and five?", "Twelve."]},
        [{**turn, "tool_calls": None, "name": None} for turn in GOOD],
        [user([{"type": "text", "text": "Seven and "}, {"type": "text", "text": "five?"}]), GOOD[1]],
    ],
    ids=["JSON in a text", "lists of columns", "nulls of a table", "parts"],
)
def test_the_same_conversation(value):
    assert read_messages({"messages": value}, answered=True) == GOOD


def test_system_column():
    row = {"messages": GOOD, "system": "Be brief."}
    assert read_messages(row, answered=True) == [{"role": "system", "content": "Be brief."}, *GOOD]
    assert read_messages({"messages": GOOD, "system": ""}, answered=True) == GOOD


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "Add.", "input": "7, 5", "output": "12"}, [user("Add.\n\n7, 5"), said("12")]),
        ({"instruction": "Add.", "input": "", "output": "12"}, [user("Add."), said("12")]),
        ({"input": "7, 5", "output": "12"}, [user("7, 5"), said("12")]),
        ({"instruction": [user("Add.")], "output": [said("12")]}, [user("Add."), said("12")]),
        ({"instruction": [user("Add.")], "output": "12"}, [user("Add."), said("12")]),
    ],
)
def test_pairs(row, turns):
    assert read_pair(row, answered=True) == turns
    assert read_pair({**row, "output": None}, answered=False) == turns[:1]


def test_the_first_layout_that_has_a_value_counts():
    assert layout_of({"messages": GOOD, "instruction": "a", "output": "b", "text": "c"}) == "messages"
    assert layout_of({"messages": None, "instruction": "a", "output": "b", "text": "c"}) == "pair"
    assert layout_of({"input": "", "text": "c"}) == "text"


BAD_TURNS = [
    ("hello", "expected a list, found text that is no JSON"),
    (7, "expected a list, found int"),
    ({"role": "user"}, "expected a list, found dict"),
    ([], "the list is empty"),
    (["hello"], r"turn 1 \(index 0\): expected an object"),
    ([user("a"), {"role": "asistant", "content": "b"}], r"turn 2 \(index 1\): role 'asistant' .*mean 'assistant'"),
    ([user("a"), {"content": "b"}], r"turn 2 \(index 1\): no role"),
    ([user("a"), said("")], r"turn 2 \(index 1\), assistant: its content is empty"),
    ([user(" \n"), said("b")], r"turn 1 \(index 0\), user: its content is empty"),
    ([user("a"), said(None)], r"turn 2 \(index 1\), assistant: no content"),
    ([user("a"), said("b"), user(None), said("c")], r"turn 3 \(index 2\), user: no content"),
    ([user("a"), said(7)], r"turn 2 \(index 1\): expected text, found int 7"),
    ([user([{"type": "image", "image": "x"}]), said("b")], r"turn 1 \(index 0\): .* type text, found image"),
    ([said("b")], r"turn 1 \(index 0\): wrong role order: assistant at the beginning"),
    ([user("a"), user("b"), said("c")], r"turn 2 \(index 1\): wrong role order: user after user"),
    ([user("a"), said("b"), said("c")], r"turn 3 \(index 2\): wrong role order: assistant after assistant"),
    ([user("a"), {"role": "system", "content": "b"}, said("c")], r"turn 2 .* system after user"),
    ([user("a"), {"role": "tool", "content": "b"}, said("c")], r"turn 2 .* tool after user"),
    ([{"role": "system", "content": "a"}], r"turn 1 .* nothing follows the turn of the system"),
    ([user("a")], "none of its 1 turns is the assistant's"),
    ([user("a"), said("b", tool_calls=[{"id": "1"}])], r"turn 2 .* a call with a name"),
    ([user("a"), said("b", tool_calls={"name": "f"})], r"turn 2 .* tool_calls to be a list"),
    ([user("a"), said("b", tool_calls=[{"name": "f", "arguments": "{"}])], r"turn 2 .* 'f' are no JSON"),
    ([{**user("a"), "tool_calls": [{"name": "f"}]}, said("b")], r"turn 1 .* only the assistant calls"),
    ([user("a"), {"from": "function_call", "value": "add(1)"}], r"turn 2 .* a call as JSON"),
]


@pytest.mark.parametrize(("value", "why"), BAD_TURNS)
def test_bad_conversations(value, why):
    with pytest.raises(DataError, match=why) as caught:
        read_messages({"messages": value}, answered=True)
    assert caught.value.column == "messages"


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": GOOD, "system": 7}, "system"),
        ({"messages": [{"role": "system", "content": "a"}, *GOOD], "system": "b"}, "system"),
    ],
)
def test_bad_systems(row, column):
    with pytest.raises(DataError) as caught:
        read_messages(row, answered=True)
    assert caught.value.column == column


@pytest.mark.parametrize("value", [None, "", "[]", []])
def test_no_tools(value):
    assert read_tools({"tools": value}) is None


@pytest.mark.parametrize("value", ["add", [7], [{"description": "x"}]])
def test_bad_tools(value):
    with pytest.raises(DataError) as caught:
        read_tools({"tools": value})
    assert caught.value.column == "tools"


@pytest.mark.parametrize(
    ("roles", "good"),
    [
        ({"messages"}, True),
        ({"text"}, True),
        ({"instruction", "output"}, True),
        ({"input", "output"}, True),
        ({"instruction"}, False),
        ({"output", "system"}, False),
        (set(), False),
    ],
)
def test_columns(roles, good):
    if good:
        Chat().check_columns(frozenset(roles))
    else:
        with pytest.raises(DataError, match="messages, for instruction and output, or for text"):
            Chat().check_columns(frozenset(roles))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(tmp_path, model, rows, **more):
    data = {"train": write(tmp_path / "train.jsonl", rows), "valid": 0.2}
    quick = {"steps": 1, "batch": 4, "precision": "fp32"}
    return {
        "task": "text-generation",
        "model": model,
        "data": data,
        "train": quick,
        "output": str(tmp_path / "run"),
        **more,
    }


def numbered(count):
    return [{"conversations": [user(f"Say {i}."), said(f"{i}!")]} for i in range(count)]


def test_all_bad_rows_are_named_before_the_first_step(tmp_path, make_model):
    values = [value for value, _ in BAD_TURNS]
    rows = [*numbered(10), *({"conversations": value} for value in values)]
    with pytest.raises(BadRows) as caught:
        fasttune.finetune(**settings(tmp_path, make_model(tmp_path), rows), quiet=True)
    assert [bad.row for bad in caught.value.rows] == list(range(11, 11 + len(values)))
    assert {bad.column for bad in caught.value.rows} == {"conversations"}


def test_bad_rows_of_valid_are_named_too(tmp_path, make_model):
    given = settings(tmp_path, make_model(tmp_path), numbered(10))
    given["data"]["valid"] = write(tmp_path / "valid.jsonl", [*numbered(2), {"conversations": [user("a")]}])
    with pytest.raises(BadRows, match=r"valid.jsonl, row 3, column 'conversations': none of its 1 turns"):
        fasttune.finetune(**given, quiet=True)


def test_missing_columns_are_named_with_what_was_found(tmp_path, make_model):
    given = settings(tmp_path, make_model(tmp_path), [{"prompt": "a", "reply": "b"}] * 8)
    with pytest.raises(DataError, match=r"train.jsonl: .* only a column for instruction\. Columns: prompt, reply"):
        fasttune.finetune(**given, quiet=True)


def test_rows_whose_targets_are_all_cut_are_bad(tmp_path, make_model):
    rows = [*numbered(10), {"conversations": [user("long " * 100), said("a")]}]
    given = settings(tmp_path, make_model(tmp_path), rows, options={"max_length": 40})
    with pytest.raises(BadRows, match="row 11, column 'conversations': nothing that is supervised is within 40"):
        fasttune.finetune(**given, quiet=True)


def test_what_is_cut_is_reported(tmp_path, make_model):
    rows = [*numbered(10), *({"conversations": [user(str(i)), said("long " * 100)]} for i in range(10))]
    given = settings(tmp_path, make_model(tmp_path), rows, options={"max_length": 40, "max_new_tokens": 4})
    report = fasttune.finetune(**given, quiet=True)
    assert report.metrics["truncated_train"]["messages"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_length": 9000}, "9000 is more than the model's 512 positions"),
        ({"template": "chatlm"}, "Did you mean 'chatml'"),
        ({"max_lenght": 9}, "Did you mean|unknown key"),
        ({"beams": 0}, "beams"),
    ],
)
def test_options_that_do_not_fit(tmp_path, make_model, options, why):
    given = settings(tmp_path, make_model(tmp_path, "gpt2"), numbered(10), options=options)
    with pytest.raises(ConfigError, match=why):
        fasttune.finetune(**given, quiet=True)


def test_models_that_are_no_decoders_are_refused(tmp_path, make_tokenizer):
    import transformers as hf

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=400)
    hf.BertLMHeadModel(hf.BertConfig(**small)).save_pretrained(tmp_path / "bert")
    bart = hf.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    hf.BartForConditionalGeneration(bart).save_pretrained(tmp_path / "bart")
    for kind, why in (("bert", "no decoder"), ("bart", "has an encoder")):
        make_tokenizer(tmp_path / kind)
        with pytest.raises(ModelError, match=why):
            Chat().build(Source(tmp_path / kind), [])


def test_vocabulary_that_the_model_lacks_is_refused(tmp_path, make_model, make_tokenizer):
    source = make_model(tmp_path)
    make_tokenizer(tmp_path, added=("<a>", "<b>"))
    with pytest.raises(ModelError, match="don't belong together"):
        Chat().build(Source(source), [])


def test_long_texts_become_pieces_in_which_every_token_is_a_target_once(tmp_path, make_model):
    task = Chat(Chat.Options(max_length=5))
    bundle = task.build(Source(make_model(tmp_path)), [])
    text = "Tuesday comes after Monday, and Wednesday after that."
    samples = task.encode({"text": text}, bundle, True)
    assert len(samples) > 2
    assert max(sample.cost for sample in samples) == 5
    targets = [token for sample in samples for token in sample.tensors["labels"][1:].tolist()]
    whole = bundle.processor(text)["input_ids"] + [bundle.processor.eos_token_id]
    assert targets == whole[1:]
    assert not any(sample.truncated for sample in samples)


def test_what_is_to_be_predicted(tmp_path, make_model):
    """Conversations that end with a question or an answer, instructions, a bare question, texts."""
    report = fasttune.finetune(
        **settings(tmp_path, make_model(tmp_path, "gpt2"), numbered(10), options={"max_new_tokens": 3}), quiet=True
    )
    model = fasttune.load(report.folder)
    asked = [user("Say 1.")]
    replies = model.predict(
        [
            {"messages": asked},
            {"messages": [*asked, said("1!")]},
            {"instruction": "Say 1."},
            {"messages": "Say 1."},
            {"text": "Tuesday comes"},
            {"text": "Tuesday comes" * 2000},
        ]
    )
    assert replies[0] == replies[1] == replies[2] == replies[3]
    assert set(replies[0]) == {"reply"}
    assert set(replies[4]) == {"continuation"}
    assert replies[5]["cut"] > 0
    with pytest.raises(BadRows, match="row 1: the row holds neither messages"):
        model.predict([{"question?": "a"}])
