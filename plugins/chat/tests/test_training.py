"""Training: transformers' own losses, packed rows, and a model that learns to stop."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as hf

import fasttune
from fasttune.task import Source
from fasttune_chat.chat import Chat
from fasttune_chat.packing import plan

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def conversation(i, turns=1):
    found = []
    for turn in range(turns):
        found.append({"role": "user", "content": f"After {DAYS[(i + turn) % 7]}?"})
        found.append({"role": "assistant", "content": DAYS[(i + turn + 1) % 7]})
    return {"messages": found}


ROWS = [conversation(i, 1 + i % 3) for i in range(24)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_losses_are_transformers_trainers_for_50_steps(tmp_path, make_model, collate, kind):
    """The same batches, fp32, no dropout, AdamW with the same settings."""
    source = Source(make_model(tmp_path / "m", kind))
    task = Chat(Chat.Options(template="alpaca"))
    bundle = task.build(source, [])
    samples = [task.encode(row, bundle, True) for row in ROWS]
    batches = [[(4 * step + i) % len(ROWS) for i in range(4)] for step in range(50)]
    settings = dict(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)

    model = bundle.model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    ours = []
    for batch in batches:
        loss = task.loss(model, collate([samples[i] for i in batch], bundle.padding))
        mean = loss.total / loss.count
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ours.append(float(mean.detach()))

    class SameBatches(hf.Trainer):
        def get_train_dataloader(self):
            return [collate([samples[i] for i in batch], bundle.padding) for batch in batches]

    twin = Chat(Chat.Options(template="alpaca")).build(source, []).model.float()
    arguments = hf.TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=50,
        per_device_train_batch_size=4,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    adamw = torch.optim.AdamW(twin.parameters(), **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda _: 1.0)
    trainer = SameBatches(twin, arguments, train_dataset=[{}] * 200, optimizers=(adamw, schedule))
    trainer.train()
    theirs = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(theirs) == 50
    assert theirs[-1] < 0.7 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "phi3", "gpt2", "gemma2"])
def test_packed_rows_have_the_losses_and_gradients_of_rows_alone(
    tmp_path, make_model, collate, kind, dtype, attention
):
    """bf16 rounds what is summed in another order: its tolerance is the distance of bf16 from fp32."""
    task = Chat(Chat.Options(template="alpaca", packing=True, max_length=512))
    bundle = task.build(Source(make_model(tmp_path, kind)), [])
    samples = [task.encode(row, bundle, True) for row in ROWS[:6]]
    model = bundle.model.to(dtype)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("this model has no sdpa")
    model.set_attn_implementation(attention)
    packed = task.pack(samples)
    assert task.packs
    assert len(packed) < 3
    results = []
    for some in (samples, packed):
        model.zero_grad()
        loss = task.loss(model, collate(some, bundle.padding))
        loss.total.backward()
        gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((float(loss.total.detach()), float(loss.count), gradients))
    (total, count, alone), (packed_total, packed_count, together) = results
    assert packed_count == count
    assert packed_total == pytest.approx(total, rel=1e-5 if dtype == torch.float32 else 5e-3)
    largest = max(float(gradient.norm()) for gradient in alone.values())
    for name, gradient in alone.items():
        # Some are 0 but for rounding: a bias of the keys changes no softmax.
        near = 1e-4 if dtype == torch.float32 else 0.1
        assert float((together[name] - gradient).norm()) < near * (float(gradient.norm()) + 0.01 * largest), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_and_unpacked_runs_are_alike_with_our_attention(tmp_path, make_model, kind):
    """In bf16 on CPU, where fasttune's own kernel computes attention: the same losses, step by step."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    losses = []
    for packing in (False, True):
        report = fasttune.finetune(
            task="text-generation",
            model=make_model(tmp_path / "m", kind),
            data={"train": str(path), "valid": str(path)},
            strategy="full",
            options={"packing": packing, "template": "alpaca", "max_length": 512, "max_new_tokens": 4},
            train={"steps": 8, "batch": len(ROWS), "lr": 1e-3, "head_lr": 1e-3, "precision": "bf16"},
            output=str(tmp_path / f"run-{packing}"),
            quiet=True,
        )
        assert "attention, bfloat16" in report.metrics["ops"]
        records = [json.loads(line) for line in (report.folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
    alone, packed = losses
    assert len(alone) == 8
    assert packed == pytest.approx(alone, rel=5e-3)


def test_a_row_that_is_not_kept_apart_would_show(tmp_path, make_model, collate):
    """Without the positions the same rows give another loss: the test above can fail."""
    task = Chat(Chat.Options(template="alpaca", packing=True, max_length=256))
    bundle = task.build(Source(make_model(tmp_path)), [])
    packed = collate(task.pack([task.encode(row, bundle, True) for row in ROWS[:6]]), bundle.padding)
    right = float(task.loss(bundle.model, packed).total.detach())
    packed["position_ids"] = torch.arange(packed["input_ids"].shape[1]).expand_as(packed["input_ids"])
    assert abs(float(task.loss(bundle.model, packed).total.detach()) - right) > 1e-3 * right


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_full_and_alike(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 120, random.integers(1, 60)).tolist()
    rows = plan(lengths, 128)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 128
    # First fit decreasing needs at most 11/9 of the fewest rows that there can be, and 6/9 of one.
    assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / 128) + 1


def test_samples_that_are_longer_stand_alone():
    assert plan([300, 10, 20], 128) == [[0], [2, 1]]


def test_models_that_do_not_keep_samples_apart_are_not_packed(tmp_path, make_tokenizer):
    made = make_tokenizer(tmp_path)
    small = dict(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=len(made), pad_token_id=0)
    hf.MambaForCausalLM(hf.MambaConfig(**small)).save_pretrained(tmp_path)
    task = Chat(Chat.Options(packing=True, template="alpaca"))
    bundle = task.build(Source(tmp_path), [])
    assert not task.packs
    assert any(note.startswith("packing: off, as MambaForCausalLM") for note in bundle.notes)


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_without_padding_token_learns_to_stop(tmp_path, make_model, packing):
    """It writes an answer and nothing behind it: greedy search ends by itself, long before the cap."""
    path = tmp_path / "train.jsonl"
    asked = [{"role": "user", "content": f"After {i}?"} for i in range(9)]
    rows = [{"messages": [turn, {"role": "assistant", "content": f"{i + 1}!"}]} for i, turn in enumerate(asked)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    fasttune.finetune(
        task="text-generation",
        model=make_model(tmp_path / "m", "llama", pad=False),
        data={"train": str(path), "valid": str(path)},
        strategy="full",
        options={"max_new_tokens": 40, "packing": packing, "template": "alpaca"},
        train={"steps": 60, "batch": 18, "lr": 5e-3, "head_lr": 5e-3, "precision": "fp32"},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    replies = fasttune.load(tmp_path / "run").predict([{"messages": [turn]} for turn in asked])
    assert {found["reply"] for found in replies} <= {f"{i + 1}!" for i in range(9)}


_PEAK = """
import re, sys, torch, transformers as hf
from fasttune_chat.chat import Chat

tokens, vocabulary = 2048, 65536
torch.set_num_threads(1)
config = hf.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                        vocab_size=vocabulary)
model = hf.LlamaForCausalLM(config).train()
# Not ru_maxrss, which starts at what the parent process had.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024
def step(tokens):
    ids = torch.randint(0, vocabulary, (1, tokens))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if sys.argv[1] == "ours":
        Chat().loss(model, batch).total.backward()
    else:
        model(**batch).loss.backward()
step(64)
before = peak()
step(tokens)
print((peak() - before) / (tokens * vocabulary * 4 / 2**20))
"""


def test_logits_of_a_batch_never_exist():
    """The growth of the process over a step, in units of the fp32 logits: transformers' own loss takes several."""
    grown = {}
    for whose in ("ours", "transformers"):
        path = {"PYTHONPATH": ":".join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _PEAK, whose]
        done = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
        grown[whose] = float(done.stdout)
    assert grown["transformers"] > 1.5
    assert grown["ours"] < 0.4
