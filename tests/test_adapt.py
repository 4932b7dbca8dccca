"""Strategies: what is trained, what is frozen, what is merged; dropout on the instance."""

import pytest
import torch
import transformers as hf
from torch import nn

from fasttune.adapt import (
    CounterDropout,
    LoRALinear,
    adapt,
    block_depths,
    inject_lora,
    lora_scale,
    merge_lora,
    native_precision,
)
from fasttune.config import Full, Head, Lora
from fasttune.errors import ConfigError, ModelError
from fasttune.features import cache_features
from fasttune.task import Bundle

BLOCKS = ("bert.encoder.layer.0", "bert.encoder.layer.1")


def bert(**settings):
    config = hf.BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
        **settings,
    )
    torch.manual_seed(3)
    model = hf.BertForSequenceClassification(config)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(BLOCKS)]
    return Bundle(model, None, ("classifier",), BLOCKS, tuple(linear))


def inputs(rows=5, tokens=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, tokens - row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_lora_starts_at_the_pretrained_model_and_merges_to_the_same_outputs():
    bundle = bert()
    bundle.model.eval()
    before = bundle.model(**inputs()).logits
    adapted = adapt(bundle, Lora(rank=4))
    bundle.model.eval()
    torch.testing.assert_close(bundle.model(**inputs()).logits, before)
    for name, parameter in adapted.trained.items():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.05)
    changed = bundle.model(**inputs()).logits
    assert not torch.allclose(changed, before, atol=1e-4)
    merge_lora(bundle.model)
    torch.testing.assert_close(bundle.model(**inputs()).logits, changed, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, LoRALinear) for module in bundle.model.modules())


def test_lora_on_conv1d_is_lora_on_the_transposed_weight():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(2)
    conv = Conv1D(6, 10)  # 10 in, 6 out
    layer = LoRALinear(conv, Lora(rank=2, alpha=4.0, dropout=0.0))
    nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 10)
    expected = x @ conv.weight + conv.bias + 2.0 * (x @ layer.lora_a.t()) @ layer.lora_b.t()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merged()(x), expected)


def test_lora_scale():
    assert lora_scale(Lora(rank=16)) == 2.0
    assert lora_scale(Lora(rank=16, alpha=8.0)) == 0.5
    assert lora_scale(Lora(rank=16, alpha=8.0, rslora=True)) == 2.0


def test_targets_are_found_by_their_last_parts_and_never_in_the_head():
    bundle = bert()
    names = inject_lora(bundle, Lora(rank=2, targets=("query", "output.dense")))
    assert len(names) == 6  # query, attention.output.dense and output.dense of two layers
    assert all(not name.startswith("classifier") for name in names)
    with pytest.raises(ConfigError, match=r"strategy.targets.*'quary'.*'query'"):
        inject_lora(bert(), Lora(targets=("quary",)))


def test_a_model_without_linear_layers_is_no_model_for_lora():
    bundle = bert()
    bundle.lora_targets = ()
    with pytest.raises(ModelError, match="no linear layers"):
        adapt(bundle, Lora())


@pytest.mark.parametrize("strategy", [Full(), Head(), Lora(rank=2)])
def test_only_what_the_strategy_trains_requires_a_gradient(strategy):
    bundle = bert()
    adapted = adapt(bundle, strategy, dtype=torch.bfloat16)
    names = {name for name, p in bundle.model.named_parameters() if p.requires_grad}
    assert names == set(adapted.trained) == set(adapted.masters)
    head = {"classifier.weight", "classifier.bias"}
    if isinstance(strategy, Head):
        assert names == head
    elif isinstance(strategy, Lora):
        assert head < names
        assert all(name in head or name.endswith(("lora_a", "lora_b")) for name in names)
    else:
        assert names == {name for name, _ in bundle.model.named_parameters()}
    assert {p.dtype for p in bundle.model.parameters()} == {torch.bfloat16}
    assert {master.dtype for master in adapted.masters.values()} == {torch.float32}


def test_masters_hold_what_the_cast_to_bf16_rounds_away():
    bundle = bert()
    exact = {name: p.detach().clone() for name, p in bundle.model.named_parameters()}
    adapted = adapt(bundle, Full(), dtype=torch.bfloat16)
    for name, master in adapted.masters.items():
        assert torch.equal(master, exact[name])


def test_batch_norms_of_a_new_head_learn_their_statistics_beside_lora():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)))
    bundle = Bundle(model, None, head=("2",), blocks=(), lora_targets=("0",))
    adapted = adapt(bundle, Lora(rank=2))
    adapted.train_mode()
    model(torch.randn(4, 6) + 3)
    assert model[1].running_mean.abs().max() == 0
    assert model[2][0].running_mean.abs().max() > 0
    assert {"2.0.running_mean", "2.0.running_var"} <= adapted.buffers().keys()


def test_batch_norms_keep_fp32_and_frozen_ones_their_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    bundle = Bundle(model, None, ("3",), (), ("3",))
    adapted = adapt(bundle, Head(), dtype=torch.bfloat16)
    adapted.train_mode()
    before = model[1].running_mean.clone()
    output = model(torch.randn(5, 3, 4, 4))
    assert output.dtype == torch.bfloat16
    assert model[1].weight.dtype == model[1].running_mean.dtype == torch.float32
    assert torch.equal(model[1].running_mean, before)


def test_dropout_is_replaced_on_the_instance_alone():
    bundle = bert()
    adapt(bundle, Full())
    assert not any(type(module) is nn.Dropout for module in bundle.model.modules())
    assert any(isinstance(module, CounterDropout) and module.p == 0.1 for module in bundle.model.modules())
    assert any(type(module) is nn.Dropout for module in bert().model.modules())


def test_a_frozen_base_stays_in_eval_mode_while_the_head_has_its_dropout():
    bundle = bert()
    adapt(bundle, Head()).train_mode()
    assert not bundle.model.bert.training
    assert bundle.model.dropout.training
    assert bundle.model.classifier.training


def test_depths_count_from_the_head_down():
    bundle = bert()
    names = [name for name, _ in bundle.model.named_parameters()]
    depths = block_depths(bundle, names)
    assert depths["classifier.weight"] == 0
    assert depths["bert.pooler.dense.weight"] == 0
    assert depths["bert.encoder.layer.1.output.dense.weight"] == 1
    assert depths["bert.encoder.layer.0.output.dense.weight"] == 2
    assert depths["bert.embeddings.word_embeddings.weight"] == 3


def test_native_precision_is_a_precision():
    assert native_precision(torch.device("cpu")) in ("bf16", "fp32")


def test_cached_features_give_the_same_gradients_and_run_the_base_once():
    batch = inputs()
    labels = torch.tensor([0, 1, 2, 0, 1])
    plain, cached_bundle = bert(hidden_dropout_prob=0.0), bert(hidden_dropout_prob=0.0)
    for bundle in (plain, cached_bundle):
        adapt(bundle, Head()).train_mode()
    cached = cache_features(cached_bundle, limit_gb=1.0)
    runs = []
    cached.base.register_forward_hook(lambda *_: runs.append(1))

    def gradient(bundle, keys=None):
        bundle.model.zero_grad()
        if keys is not None:
            cached.expect(keys)
        loss = nn.functional.cross_entropy(bundle.model(**batch).logits, labels)
        loss.backward()
        return bundle.model.classifier.weight.grad.clone()

    expected = gradient(plain)
    for _ in range(3):
        torch.testing.assert_close(gradient(cached_bundle, range(5)), expected)
    assert len(runs) == 1
    held = cached.bytes
    assert held == 5 * 32 * 4, "of the base's outputs only the pooled one is kept: the head reads no other"


def test_cached_features_stop_at_their_limit_and_still_give_the_same():
    bundle = bert(hidden_dropout_prob=0.0)
    adapt(bundle, Head()).train_mode()
    batch = inputs()
    expected = bundle.model(**batch).logits.detach()
    cached = cache_features(bundle, limit_gb=1e-9)
    for _ in range(3):
        cached.expect(range(5))
        logits = bundle.model(**batch).logits
        torch.testing.assert_close(logits.detach(), expected)
        logits.sum().backward()
    assert cached.full


def test_no_cache_where_the_head_is_inside_the_base():
    bundle = bert()
    bundle.head = ("bert.pooler", "classifier")
    assert cache_features(bundle, 1.0) is None


def test_activation_checkpointing_changes_no_gradient():
    """Dropout included: its mask is drawn again from the same seed when a block is computed again."""
    gradients = []
    for checkpointing in (False, True):
        bundle = bert()
        adapted = adapt(bundle, Lora(rank=2, dropout=0.2), checkpointing=checkpointing)
        adapted.train_mode()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            torch.manual_seed(9)
            loss = bundle.model(**inputs()).logits.square().sum()
        loss.backward()
        gradients.append(({n: p.grad for n, p in adapted.trained.items() if p.grad is not None}, sum(kept)))
    (plain, more), (checkpointed, less) = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
    assert less < more


def test_activation_checkpointing_where_a_model_has_none_is_an_error():
    bundle = Bundle(nn.Sequential(nn.Linear(2, 2)), None, ("0",), (), ())
    with pytest.raises(ModelError, match="activation_checkpointing"):
        adapt(bundle, Full(), checkpointing=True)
