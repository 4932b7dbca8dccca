"""Training: the loss is the model's own, step by step that of transformers' Trainer, without a batch's logits."""

import json

import pytest
import torch
import transformers as hf
from torch.profiler import ProfilerActivity, profile

import fasttune
from fasttune.task import Source
from fasttune_summarization.tasks import Summarization

STEPS = 50
EXACT = dict(dropout_rate=0.0, decoder_start_token_id=0)
SAME_AS_LLAMA = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
)


@pytest.fixture
def table(tmp_path, rows):
    """45 rows: each text alone, and behind those before it."""
    path = tmp_path / "rows.jsonl"
    joined = [
        {name: " ".join(row[name] for row in rows[first : last + 1]) for name in rows[0]}
        for last in range(len(rows))
        for first in range(last + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in joined))
    return str(path)


def batches_of(monkeypatch):
    """What the engine feeds to the loss in training, in order."""
    seen = []
    own = Summarization.loss

    def noting(self, model, batch):
        if model.training:
            seen.append({name: tensor.clone() for name, tensor in batch.items()})
        return own(self, model, batch)

    monkeypatch.setattr(Summarization, "loss", noting)
    return seen


@pytest.mark.parametrize(("kind", "settings"), [("t5", EXACT), ("llama", {})])
def test_losses_are_those_of_transformers_trainer_for_fifty_steps(
    kind, settings, table, tmp_path, write_model, monkeypatch
):
    model = write_model(kind, tmp_path / "model", **settings)
    seen = batches_of(monkeypatch)
    train = {"steps": STEPS, "batch": 3, "lr": 1e-3, "precision": "fp32"}
    train |= {"schedule": {"kind": "linear", "warmup": 0}, "clip": 1.0, "optimizer": {"weight_decay": 0.0}}
    fasttune.finetune(
        task="summarization",
        model=model,
        data={"train": table, "valid": table},
        strategy="full",
        train=train,
        eval={"every": STEPS, "samples": 0, "max_rows": 1},
        options={"max_new_tokens": 2},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [record["loss"] for record in records if "loss" in record]
    assert len(seen) == len(ours) == STEPS
    assert len({tuple(batch["input_ids"].flatten().tolist()) for batch in seen}) > 20, "the batches differ"

    theirs = losses_of_trainer(model, seen, tmp_path)
    assert sum(ours[-10:]) < 0.9 * sum(ours[:10]), "something is learned"
    # Sums over another order of the same numbers, carried through fifty steps of AdamW.
    assert ours == pytest.approx(theirs, rel=2e-4)


def losses_of_trainer(model, batches, folder):
    """The loss of each step of transformers' own loop over the same batches, one a step, in order."""
    encodes = hf.AutoConfig.from_pretrained(model).is_encoder_decoder
    auto = hf.AutoModelForSeq2SeqLM if encodes else hf.AutoModelForCausalLM
    kind, arguments = (
        (hf.Seq2SeqTrainer, hf.Seq2SeqTrainingArguments) if encodes else (hf.Trainer, hf.TrainingArguments)
    )
    trainer_kind = type("InOrder", (kind,), {"_get_train_sampler": lambda self, *_: None})
    trainer = trainer_kind(
        model=auto.from_pretrained(model, dtype=torch.float32),
        args=arguments(
            output_dir=str(folder / "theirs"),
            per_device_train_batch_size=1,
            num_train_epochs=1,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_num_workers=0,
        ),
        train_dataset=batches,
        data_collator=lambda found: found[0],
    )
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


FAMILIES = {
    "qwen2": lambda size: hf.Qwen2Config(vocab_size=size, **SAME_AS_LLAMA, tie_word_embeddings=True),
    "gemma2, soft cap": lambda size: hf.Gemma2Config(
        vocab_size=size, **SAME_AS_LLAMA, head_dim=8, final_logit_softcapping=2.0
    ),
}


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama", *FAMILIES])
def test_the_loss_is_the_models_own(kind, rows, tmp_path, write_model):
    folder = write_model(kind if kind not in FAMILIES else "llama", tmp_path)
    if kind in FAMILIES:
        size = hf.AutoConfig.from_pretrained(folder).vocab_size + 8  # Qwen2's tokenizer adds tokens of its own
        hf.AutoModelForCausalLM.from_config(FAMILIES[kind](size)).save_pretrained(folder)
    task = Summarization()
    bundle = task.build(Source(folder), [])
    batch = stack([task.encode(row, bundle, True) for row in rows], bundle.padding)
    loss = task.loss(bundle.model, batch)
    own = bundle.model(**batch).loss
    assert int(loss.count) == int((batch["labels"] != -100).sum())
    assert float((loss.total / loss.count).detach()) == pytest.approx(float(own.detach()), rel=5e-6)


def stack(samples, padding):
    """A batch as the host makes it, for tensors of one dimension."""
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(sample.tensors[name]) for sample in samples],
            batch_first=True,
            padding_value=padding.get(name, 0),
        )
        for name in samples[0].tensors
    }


VOCABULARY, TOKENS, ROWS = 32_000, 512, 8


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_training_step_never_holds_the_logits_of_its_batch(kind, tmp_path, write_model):
    """At a vocabulary of 32,000 the logits of 8 x 512 tokens are 524 MB; the whole step takes less than half."""
    settings = {"vocab_size": VOCABULARY}
    if kind == "llama":
        settings |= {"max_position_embeddings": 2 * TOKENS}
    config = {"t5": hf.T5Config, "llama": hf.LlamaConfig}[kind]
    size = dict(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
    size = size if kind == "t5" else {**SAME_AS_LLAMA, "num_hidden_layers": 1}
    folder = write_model(kind, tmp_path)
    auto = hf.AutoModelForSeq2SeqLM if kind == "t5" else hf.AutoModelForCausalLM
    auto.from_config(config(**size, **settings)).save_pretrained(folder)
    task = Summarization(Summarization.Options(max_source_length=16, max_target_length=TOKENS))
    bundle = task.build(Source(folder), [])
    bundle.model.train()
    labels = torch.randint(4, VOCABULARY, (ROWS, TOKENS))
    batch = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
    if kind == "t5":
        batch |= {name: batch[name][:, :16] for name in ("input_ids", "attention_mask")}

    def ours():
        loss = task.loss(bundle.model, batch)
        (loss.total / loss.count).backward()

    def theirs():
        bundle.model(**batch).loss.backward()

    logits = 4 * VOCABULARY * TOKENS * ROWS
    assert peak_of(theirs) > logits, "the measure sees logits where there are some"
    bundle.model.zero_grad()
    assert peak_of(ours) < logits / 2


def peak_of(step):
    """Bytes that torch's CPU allocator holds at most during the step, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    changes = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
