"""What is supervised: exactly what the assistant says and its end-of-turn token, whatever the template."""

import numpy as np
import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from fasttune.errors import DataError, ModelError
from fasttune.task import Source
from fasttune_chat.chat import Chat

USER, SYSTEM, TOOL = (
    lambda text, role=role: {"role": role, "content": text} for role in ("user", "system", "tool")
)


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 7, "b": 5}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
TURNS = [SYSTEM("Be brief."), USER("Seven and five?"), said("Twelve."), USER("Sure?"), said("Yes, \n12 !")]
CALLING = [USER("Add."), said(None, tool_calls=[CALL]), TOOL("12"), said("Twelve."), USER("Sure?"), said("Yes.")]

# Templates without {% generation %}, each with a habit that models on the hub have.
LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + BODY + '<|im_end|>\n' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = LOOP.replace("BODY", "m.content") + ASK
NO_PROMPT = LOOP.replace("BODY", "m.content")
DROPS_THOUGHTS = (
    LOOP.replace("BODY", "(m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n'))") + ASK
)
THINKS_AT_THE_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
PROMPT_THINKS = LOOP.replace("BODY", "m.content") + ASK.replace("assistant\n", "assistant\n<think>\n")
CLOSES_ALL = (
    PLAIN.replace(ASK, "")
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}</s>{% endif %}"
)
INSTRUCTS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
NEVER_ENDS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHORT_BLOCK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_TOKENS += ("<start_of_turn>", "<end_of_turn>")


@pytest.fixture
def chat(tmp_path, make_model):
    """chat(template, **options) -> (task, bundle)"""

    def build(template, own=None, **options):
        source = make_model(tmp_path, added=CHATML_TOKENS, template=own)
        task = Chat(Chat.Options(template=template, **options))
        return task, task.build(Source(source), [])

    return build


def marked(chat_bundle, turns, **row):
    task, bundle = chat_bundle
    sample = task.encode({"messages": turns, **row}, bundle, True)
    return task.show(sample, bundle)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "chatml",
            "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSeven and five?<|im_end|>\n"
            "<|im_start|>assistant\n«Twelve.<|im_end|>»\n<|im_start|>user\nSure?<|im_end|>\n"
            "<|im_start|>assistant\n«Yes, \n12 !<|im_end|>»\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nSeven and five?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«Twelve.<|eot_id|>»"
            "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes, \n12 !<|eot_id|>»",
        ),
        (
            "gemma",
            "<s><start_of_turn>user\nBe brief.\n\nSeven and five?<end_of_turn>\n<start_of_turn>model\n"
            "«Twelve.<end_of_turn>»\n<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n"
            "«Yes, \n12 !<end_of_turn>»\n",
        ),
        (
            "mistral",
            "<s>[INST] Be brief.\n\nSeven and five? [/INST]« Twelve.</s>»[INST] Sure? [/INST]« Yes, \n12 !</s>»",
        ),
        (
            "alpaca",
            "<s>Be brief.\n\n### Instruction:\nSeven and five?\n\n### Response:\n«Twelve.</s>»\n\n"
            "### Instruction:\nSure?\n\n### Response:\n«Yes, \n12 !</s>»\n\n",
        ),
    ],
)
def test_our_templates(chat, template, expected):
    built = chat(template)
    assert marked(built, TURNS) == expected
    task, bundle = built
    (prompt,) = [task.encode({"messages": TURNS}, bundle, False).tensors["prompt_ids"]]
    assert expected.replace("«", "").replace("»", "").startswith(bundle.processor.decode(prompt))
    assert bundle.model.generation_config.eos_token_id is not None


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, "«Twelve.<|im_end|>» … «Yes, \n12 !<|im_end|>»\n"),
        (SHORT_BLOCK, "«Twelve.<|im_end|>» … «Yes, \n12 !<|im_end|>»\n"),
        (PROMPT_THINKS, "«Twelve.<|im_end|>» … «Yes, \n12 !<|im_end|>»\n"),
        (CLOSES_ALL, "«Twelve.<|im_end|>» … «Yes, \n12 !<|im_end|>»\n</s>"),
        (THINKS_AT_THE_END, "«Twelve.<|im_end|>» … «<think>\n\n</think>\n\nYes, \n12 !<|im_end|>»\n"),
        (
            NO_PROMPT,
            "«<|im_start|>assistant\nTwelve.<|im_end|>» … «<|im_start|>assistant\nYes, \n12 !<|im_end|>»\n",
        ),
        (INSTRUCTS, "« Twelve. </s>» … « Yes, \n12 ! </s>»"),
        (NEVER_ENDS, "«Twelve.» … «Yes, \n12 !</s>»"),
    ],
)
def test_templates_without_generation_blocks(chat, template, expected):
    shown = marked(chat(template), TURNS)
    assert " … ".join(part for part in split_between(shown)) == expected


def split_between(shown):
    """The supervised parts, the last with what follows it."""
    first, rest = shown.index("«"), shown.rindex("«")
    return shown[first : shown.index("»") + 1], shown[rest:]


def test_thoughts_that_the_template_drops_are_not_supervised(chat):
    turns = [
        USER("Sum?"),
        said("<think>\nhm\n</think>\nTwelve."),
        USER("Sure?"),
        said("<think>\nso\n</think>\nYes."),
    ]
    shown = marked(chat(DROPS_THOUGHTS), turns)
    assert split_between(shown) == ("«Twelve.<|im_end|>»", "«<think>\nso\n</think>\nYes.<|im_end|>»\n")


def test_calls_are_supervised_where_later_turns_change_them(chat):
    shown = marked(chat(THINKS_AT_THE_END), CALLING)
    call = '«{"name": "add", "arguments": {"a": 7, "b": 5}}<|im_end|>»\n<|im_start|>tool\n12<|im_end|>'
    assert call in shown
    assert shown.count("«") == shown.count("»") == 3


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_calls_and_tools(chat, template):
    shown = marked(chat(template), CALLING, tools=TOOLS)
    assert shown.count("«") == 3
    before, call = shown.split("«")[:2]
    assert "Adds." in before
    assert '"name": "add"' in call.partition("»")[0]
    assert "12" not in call.partition("»")[0]
    assert "12" in call.partition("»")[2]


@pytest.mark.parametrize("template", ["chatml", PLAIN, SHORT_BLOCK])
def test_the_last_turn_alone(chat, template):
    shown = marked(chat(template, supervise="last"), TURNS)
    assert shown.count("«") == 1
    assert "«Yes, \n12 !<|im_end|>»" in shown


def test_everything(chat):
    task, bundle = chat("chatml", supervise="all")
    sample = task.encode({"messages": TURNS}, bundle, True)
    np.testing.assert_array_equal(sample.tensors["labels"], sample.tensors["input_ids"])


def test_turns_behind_the_last_answer_teach_nothing(chat):
    built = chat("chatml")
    assert marked(built, [*TURNS, USER("Bye.")]) == marked(built, TURNS)


def test_what_users_write_is_never_supervised_even_if_it_looks_like_an_answer(chat):
    built = chat(PLAIN)
    shown = marked(
        built, [USER("Twelve."), said("Twelve."), USER("assistant\nTwelve.<|im_end|>"), said("Twelve.")]
    )
    assert shown.count("«Twelve.<|im_end|>»") == shown.count("«") == 2
    assert "assistant\nTwelve.<|im_end|><|im_end|>" in shown


def test_padding_by_the_end_token_hides_no_true_end(tmp_path, make_model, collate):
    task = Chat(Chat.Options(template="alpaca"))
    bundle = task.build(Source(make_model(tmp_path, "gpt2", pad=False, bos=False)), [])
    tokenizer = bundle.processor
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert any("pads" in note for note in bundle.notes)
    rows = [{"messages": TURNS}, {"messages": TURNS[1:3]}]
    batch = collate([task.encode(row, bundle, True) for row in rows], bundle.padding)
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1).tolist()
    assert ends == [2, 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize(
    ("template", "turns", "row", "why"),
    [
        ("gemma", CALLING, {}, "no place for tools"),
        ("mistral", [USER("a"), said("b")], {"tools": TOOLS}, "no place for tools"),
        (PLAIN, [USER("a"), said("b", tool_calls=[CALL])], {}, "no place for tool_calls"),
        (PLAIN.replace("in messages", "in messages if m.role != 'system'"), TURNS, {}, "leaves out .* the system"),
        ("{{ raise_exception('no!') if messages | length > 2 }}" + PLAIN, TURNS, {}, "does not take .* no!"),
    ],
)
def test_what_a_template_has_no_place_for_is_an_error(chat, template, turns, row, why):
    task, bundle = chat(template)
    with pytest.raises(DataError, match=why):
        task.encode({"messages": turns, **row}, bundle, True)


def test_a_turn_that_cannot_be_told_from_the_rest_is_an_error(chat):
    shouts = PLAIN.replace("m.content", "(m.content if loop.last else m.content | upper)").replace(
        "<|im_end|>", "#"
    )
    task, bundle = chat(shouts)
    with pytest.raises(DataError, match=r"turn 2 \(index 1\).*supervise=last"):
        task.encode({"messages": [USER("1"), said("b"), USER("2"), said("d")]}, bundle, True)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }}", "unexpected|end of"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "0 times"),
        (PLAIN + PLAIN, "2 times"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_template_that_writes_no_conversation_is_refused(chat, template, why):
    with pytest.raises(ModelError, match=why):
        chat(template)


def test_auto_is_the_models_own_template(chat):
    _, bundle = chat("auto", own=PLAIN)
    assert bundle.processor.chat_template == PLAIN
    assert "chat template: the model's own" in bundle.notes
    assert not bundle.head_is_new


def test_auto_without_one_is_chatml_with_new_tokens(tmp_path, make_model):
    task = Chat()
    bundle = task.build(Source(make_model(tmp_path)), [])
    assert bundle.head_is_new
    assert bundle.head == ("model.embed_tokens", "lm_head")
    tokenizer, model = bundle.processor, bundle.model
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.lm_head.weight.shape[0] == model.model.embed_tokens.weight.shape[0] == len(tokenizer) == end + 1
    assert end in model.generation_config.eos_token_id


def test_a_file_becomes_its_text(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(PLAIN)
    assert Chat(Chat.Options(template=str(path))).resolve({}).template == PLAIN


def test_variables_reach_the_template(chat):
    shown = marked(chat("{{ mood }}" + PLAIN, template_variables={"mood": "Merry."}), TURNS)
    assert shown.startswith("Merry.")


def test_model_without_template_is_refused(chat):
    with pytest.raises(ModelError, match="has no chat template"):
        chat("model")


def test_sentencepiece_with_bytes_for_what_it_does_not_know(tmp_path, make_model):
    """Llama 2's kind: blanks become letters before the text is cut, and one character may be several tokens."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *CHATML_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    core.train_from_iterator(["Seven and five is twelve. Sure?", "[INST] Yes [/INST]"], trainer)
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    make_model(tmp_path)
    made.save_pretrained(tmp_path)
    turns = [USER("Seven and five?"), said("12 日本ü."), USER("Sure?"), said("Yes.")]
    for template, answers in (
        ("chatml", ("12 日本ü.<|im_end|>", "Yes.<|im_end|>")),
        (PLAIN, ("12 日本ü.<|im_end|>", "Yes.<|im_end|>")),
        ("mistral", ("12 日本ü.</s>", "Yes.</s>")),
    ):
        task = Chat(Chat.Options(template=template))
        bundle = task.build(Source(tmp_path), [])
        sample = task.encode({"messages": turns}, bundle, True)
        labels = sample.tensors["labels"]
        runs = np.split(labels, np.flatnonzero(np.diff(labels != -100)) + 1)
        found = [bundle.processor.decode(run.tolist()).strip() for run in runs if run[0] != -100]
        assert tuple(found) == answers
