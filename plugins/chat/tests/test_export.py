"""What a run leaves opens with transformers and peft, and says the same."""

import json

import pytest
import torch
import transformers as hf
from peft import PeftModel

import fasttune

WORDS = ("Monday", "Tuesday", "seven", "twelve", "tool", "user")
OWN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED = [
    [{"role": "user", "content": "Say seven."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say Monday, please!"}],
    [
        {"role": "user", "content": "Say tool."},
        {"role": "assistant", "content": "tool!"},
        {"role": "user", "content": "And twelve?"},
    ],
]


@pytest.fixture
def run(tmp_path, make_model):
    """run(kind, strategy, tokenizer settings, **options) -> (base, folder of the run)"""

    def go(kind, strategy, tokenizer=None, **options):
        base = make_model(tmp_path / "base", kind, **(tokenizer or {}))
        path = tmp_path / "train.jsonl"
        rows = [
            {"messages": [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": f"{w}!"}]}
            for w in WORDS
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
        fasttune.finetune(
            task="text-generation",
            model=base,
            data={"train": str(path), "valid": str(path)},
            strategy={"kind": strategy, **({"rank": 4, "dropout": 0.0} if strategy == "lora" else {})},
            options={"max_new_tokens": 12, **options},
            train={"steps": 20, "batch": 8, "lr": 1e-2, "head_lr": 1e-2, "precision": "fp32"},
            eval={"samples": 1},
            output=str(tmp_path / "run"),
            quiet=True,
        )
        return base, tmp_path / "run"

    return go


def replies(folder):
    return [found["reply"] for found in fasttune.load(folder).predict([{"messages": turns} for turns in ASKED])]


def piped(folder):
    pipe = hf.pipeline("text-generation", str(folder), device="cpu")
    found = [pipe(turns, max_new_tokens=12, do_sample=False)[0]["generated_text"] for turns in ASKED]
    return [turns[-1]["content"] for turns in found]


@pytest.mark.parametrize("template", ["alpaca", "auto"])
@pytest.mark.parametrize("kind", ["llama", "llama tied", "gpt2", "phi3"])
@pytest.mark.parametrize("strategy", ["full", "head", "lora"])
def test_the_pipeline_says_what_predict_says(run, tmp_path, kind, strategy, template):
    """auto adds tokens here: their embeddings are trained and saved by every strategy."""
    _, folder = run(kind, strategy, template=template)
    ours = replies(folder)
    assert any(ours)
    model = fasttune.load(folder)
    model.export(tmp_path / "plain")
    assert piped(tmp_path / "plain") == ours
    if strategy != "lora":
        assert piped(folder / "best") == ours


@pytest.mark.parametrize(
    ("kind", "tokenizer", "options"),
    [
        ("llama", {"added": ("<|im_start|>", "<|im_end|>"), "template": OWN}, {}),
        ("llama tied", {}, {"template": "mistral"}),
        ("gpt2", {"pad": False}, {"template": "alpaca"}),
        ("phi3", {}, {"template": "alpaca"}),
        ("gemma2", {}, {"template": "alpaca"}),
        ("llama", {}, {}),
        ("llama tied", {}, {}),
        ("gpt2", {}, {}),
    ],
)
def test_peft_says_what_predict_says(run, kind, tokenizer, options):
    """Where tokens are new, the base has to be given room for them first."""
    base, folder = run(kind, "lora", tokenizer, **options)
    made = hf.AutoTokenizer.from_pretrained(folder / "best")
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    if not options:
        model.resize_token_embeddings(len(made))
    model = PeftModel.from_pretrained(model, folder / "best").eval()
    settings = hf.GenerationConfig.from_pretrained(folder / "best")
    found = []
    for turns in ASKED:
        asked = made.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            written = model.generate(
                input_ids=asked["input_ids"],
                attention_mask=asked["attention_mask"],
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=settings.eos_token_id,
                pad_token_id=made.pad_token_id,
            )
        found.append(made.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    assert found == replies(folder)


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_template_of_ones_own_is_kept_with_the_run(run, tmp_path, strategy):
    """Its file may go: the run has its text, and the tokens that it needs."""
    path = tmp_path / "own.jinja"
    path.write_text(OWN.replace("<|im_end|>", "<end>") + "\n")
    _, folder = run("llama", strategy, template=str(path), add_tokens=("<end>", "<|im_start|>"))
    path.unlink()
    model = fasttune.load(folder)
    assert model.bundle.processor.chat_template == OWN.replace("<|im_end|>", "<end>") + "\n"
    end = model.bundle.processor.convert_tokens_to_ids("<end>")
    assert end in model.bundle.model.generation_config.eos_token_id
    model.export(tmp_path / "plain")
    assert piped(tmp_path / "plain") == replies(folder)
