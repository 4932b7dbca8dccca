"""Our attention inside transformers' models: the same numbers, dropout, weights, caches, and when it is chosen."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

from fasttune import attention
from fasttune.attention import choose, plain_attention
from fasttune.errors import ModelError
from fasttune.ops import library

CPU = torch.device("cpu")
BF16 = torch.bfloat16
needs_kernel = pytest.mark.skipif(library._C is None, reason=f"no kernel: {library.MISSING}")
COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.15,  # so that attention has something to choose between
}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5["feed_forward_proj"] = "gated-gelu"  # with ReLU a few flips, left to chance, are most of the error
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL = {**TOKENS, "cls_token_id": 1, "sep_token_id": 2}
ATTENTION_DROPOUT = {
    "bert": "attention_probs_dropout_prob",
    "roberta": "attention_probs_dropout_prob",
    "gpt2": "attn_pdrop",
    "llama": "attention_dropout",
    "vit": "attention_probs_dropout_prob",
    "modernbert": "attention_dropout",
    "t5": "dropout_rate",  # its only one: other dropouts are taken out of the model
    "t5 frozen": "dropout_rate",  # its relative positions as LoRA leaves them, without gradient
}
KINDS = list(ATTENTION_DROPOUT)


def config(kind: str, p: float = 0.0):
    """Every other dropout is off."""
    drop = {ATTENTION_DROPOUT[kind]: p}
    kind = kind.split()[0]
    hidden = {"hidden_dropout_prob": 0.0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    image = {"image_size": 32, "patch_size": 8}
    return {
        "bert": lambda: hf.BertConfig(**COMMON, **hidden, **drop),
        "roberta": lambda: hf.RobertaConfig(**COMMON, **hidden, **TOKENS, **drop),
        "gpt2": lambda: hf.GPT2Config(vocab_size=40, initializer_range=0.15, **gpt2, **TOKENS, **drop),
        "llama": lambda: hf.LlamaConfig(num_key_value_heads=2, **COMMON, **TOKENS, **drop),
        "vit": lambda: hf.ViTConfig(**COMMON, **hidden, **image, **drop),
        "modernbert": lambda: hf.ModernBertConfig(local_attention=4, **COMMON, **SPECIAL, **drop),
        "t5": lambda: hf.T5Config(**T5, **drop),
    }[kind]()


def build(kind: str, dtype=BF16, p: float = 0.0, make=None):
    torch.manual_seed(4)
    model = (make or hf.AutoModel.from_config)(config(kind, p)).to(dtype)
    for name, module in model.named_modules():
        if kind.startswith("t5") and isinstance(module, nn.Dropout):
            module.p = 0.0
        if kind == "t5 frozen" and name.endswith("relative_attention_bias"):
            module.requires_grad_(False)
    return model


def batch(kind: str, dtype=BF16):
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator).to(dtype)}
    ids = torch.randint(3, 40, (5, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(5):
        mask[row, 9 - row :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind.startswith("t5"):
        inputs |= {f"decoder_{name}": tensor for name, tensor in inputs.items()}
    return inputs


def ours(model):
    model.set_attn_implementation("sdpa")
    assert choose(model, "auto", BF16, CPU).startswith("fasttune")
    return model


def states(model, inputs):
    """The hidden states of what is no padding: what padding attends to is nobody's business."""
    out = model(**inputs).last_hidden_state
    mask = inputs.get("attention_mask")
    return out if mask is None else out[mask.bool()]


def everything(model, inputs):
    out = states(model, inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(out, trained, upstream, allow_unused=True)
    return out, torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_models_err_no_more_than_with_their_own_attention(kind):
    """Padding, causal masks, grouped heads, sliding windows, images; outputs and gradients against float32, since
    transformers' own softmax is in float32 and makes -inf of float64's lowest number."""
    model = build(kind)
    results = []
    for dtype, implementation in ((torch.float32, "eager"), (BF16, "eager"), (BF16, "ours")):
        one = copy.deepcopy(model).to(dtype)
        one = ours(one) if implementation == "ours" else one
        if implementation == "eager":
            one.set_attn_implementation("eager")
        results.append(everything(one, batch(kind, dtype)))
    for exact, theirs, mine in zip(*results, strict=True):
        allowed = (theirs.double() - exact).norm()
        # A quarter more: the errors are those of some thirty bfloat16 layers, which are the same on both sides.
        assert (mine.double() - exact).norm() <= 1.25 * allowed
        assert allowed <= 0.1 * exact.norm()


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_float32_models_give_what_their_own_attention_gives(kind):
    model = build(kind, torch.float32, p=0.1).eval()
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    assert choose(model, "auto", torch.float32, CPU).startswith("fasttune")
    for mine, expected in zip(*(everything(m, batch(kind, torch.float32)) for m in (model, other)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)  # a dozen layers of float32 roundings


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_on_in_training_and_off_in_eval(kind):
    model = ours(build(kind, p=0.5))
    inputs = batch(kind)

    def run(seed):
        torch.manual_seed(seed)
        return states(model, inputs)

    model.eval()
    still = run(1)
    assert torch.equal(still, run(2))
    model.train()
    one = run(1)
    assert torch.equal(one, run(1))
    assert not torch.equal(one, run(2))
    assert not torch.equal(one, still)


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_attention_weights_are_refused_and_not_left_out(kind):
    model = ours(build(kind)).eval()
    with pytest.raises(ModelError, match=r"^output_attentions: .* set train.attention to eager"):
        model(**batch(kind), output_attentions=True)
    model.set_attn_implementation("eager")
    outputs = model(**batch(kind), output_attentions=True)
    assert len(getattr(outputs, "attentions", None) or outputs.decoder_attentions) == 2


def test_a_config_that_asks_for_weights_keeps_eager_attention():
    settings = config("bert")
    settings.output_attentions = True
    model = hf.AutoModel.from_config(settings).to(BF16).eval()
    assert choose(model, "auto", BF16, CPU).startswith("eager (the model's config asks for")
    assert len(model(**batch("bert")).attentions) == 2


@needs_kernel
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decoding_with_a_cache_gives_the_tokens_of_eager_attention(kind, cache):
    model = build(kind, torch.float32, p=0.1, make=hf.AutoModelForCausalLM.from_config).eval()
    ids = batch(kind)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padding on the left
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    options["eos_token_id"] = None
    tokens = []
    for implementation in ("eager", "ours"):
        model.set_attn_implementation("eager")
        if implementation == "ours":
            assert choose(model, "auto", torch.float32, CPU).startswith("fasttune")
        tokens.append(model.generate(ids, attention_mask=mask, disable_compile=True, **options))
    assert tokens[0].shape == (5, 9 + 12)
    assert torch.equal(*tokens)


@needs_kernel
def test_autocast_over_a_float32_model():
    """Queries are bfloat16 there, and the mask has float32's lowest number, -inf in bfloat16."""
    model = build("bert", torch.float32, p=0.1).eval()
    other = copy.deepcopy(model)
    assert choose(model, "auto", torch.float32, CPU).startswith("fasttune")
    other.set_attn_implementation("eager")
    inputs = batch("bert")
    inputs["attention_mask"][0] = 0  # a row of padding alone
    with torch.autocast("cpu", BF16):
        found, expected = (m(**inputs).last_hidden_state.float() for m in (model, other))
    assert found.isfinite().all()
    assert (found - expected).norm() <= 2**-6 * expected.norm()


@pytest.mark.parametrize("kind", ["[q, k]", "[b, h, q, k]"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_mask_that_is_trained_gets_its_gradient(dtype, kind):
    """Relative positions of Swin and BEiT are such."""
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 4, 7, 8).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.randn({"[q, k]": (7, 7), "[b, h, q, k]": (2, 4, 7, 7)}[kind]).to(dtype).requires_grad_()
    module = SimpleNamespace(training=True)
    out, _ = plain_attention(module, query, key, value, mask, 0.4)
    inputs = (query, key, value, mask)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    weights = (exact[0] @ exact[1].transpose(2, 3) * 0.4 + exact[3]).softmax(-1)
    expected = (weights @ exact[2]).transpose(1, 2)
    upstream = torch.randn_like(expected)
    found = (out, *torch.autograd.grad(out, inputs, upstream.to(dtype)))
    for mine, truth in zip(found, (expected, *torch.autograd.grad(expected, exact, upstream)), strict=True):
        # A few roundings one after the other, each half a unit.
        assert (mine.double() - truth).norm() <= 3 * torch.finfo(dtype).eps * truth.norm()
    torch.manual_seed(3)
    dropped, _ = plain_attention(module, query, key, value, mask, 0.4, dropout=0.5)
    torch.manual_seed(3)
    fused, _ = plain_attention(module, query, key, value, mask.detach(), 0.4, dropout=0.5)
    assert (dropped - fused).norm() <= 3 * torch.finfo(dtype).eps * fused.norm(), "one seed, one mask"


def test_values_of_another_width_than_the_keys():
    """As in DeepSeek's latent attention."""
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 4, 7, 12), torch.randn(2, 2, 9, 12), torch.randn(2, 2, 9, 8)
    out, _ = plain_attention(SimpleNamespace(training=False), query, key, value, None)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_masks_of_another_type_and_of_more_keys_than_there_are(dtype):
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 4, 7, 8).to(dtype) for _ in range(3))
    module = SimpleNamespace(training=False)
    mask = torch.where(torch.rand(2, 1, 7, 20) < 0.5, 0.0, torch.finfo(BF16).min)
    found = [plain_attention(module, query, key, value, mask.to(kind), 0.4)[0] for kind in (torch.float32, BF16)]
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"^mask: expected .* found torch.bool"):
        plain_attention(module, query, key, value, mask == 0, 0.4)


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "p", "device", "said"),
    [
        (BF16, 0.0, "cpu", "fasttune (its own kernel, the fastest on CPU in bf16)"),
        (BF16, 0.1, "cpu", "fasttune (its own kernel, the fastest on CPU in bf16)"),
        (torch.float32, 0.1, "cpu", "fasttune (its own kernel, the fastest on CPU in fp32)"),
        (torch.float32, 0.0, "cpu", "fasttune (its own kernel, the fastest on CPU in fp32)"),
        (torch.float64, 0.0, "cpu", "sdpa (transformers' choice)"),
        (BF16, 0.1, "cuda", "sdpa (transformers' choice)"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_chosen_and_why(kind, dtype, p, device, said):
    model = build(kind, dtype, p)
    assert choose(model, "auto", dtype, torch.device(device)) == said
    assert model.config._attn_implementation == said.split()[0]


def test_what_is_asked_for_is_given():
    model = build("bert")
    assert choose(model, "eager", BF16, CPU) == "eager (asked for)"
    assert choose(nn.Linear(2, 2), "auto", BF16, CPU) == "the model's own (no choice)"


def other(name: str):
    """Models whose attention is no textbook's, though transformers' registry would take ours for it."""
    small = {**COMMON, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 16}
    if name == "gemma2":  # caps its scores
        return hf.Gemma2Config(**small, **heads, **TOKENS)
    # Has sinks, read from the module.
    return hf.GptOssConfig(**small, **heads, **TOKENS, num_local_experts=2, num_experts_per_tok=1)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_attention_with_terms_of_its_own_is_left_alone(name):
    model = hf.AutoModel.from_config(other(name))
    before = model.config._attn_implementation
    said = choose(model, "auto", BF16, CPU)
    assert said == f"{before} (the model's own is not the textbook one, or not exchangeable)"
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("line", "asks"),
    [
        ('if self.config._attn_implementation in ("eager", "sdpa"):', True),
        ('if config._attn_implementation == "sdpa" and mask is None:', True),
        ('if config._attn_implementation != "flash_attention_2":', True),
        ('using_eager = self.config._attn_implementation == "eager"', False),
        ("self.config._attn_implementation, eager_attention_forward", False),
    ],
)
def test_code_that_asks_by_name_is_recognized(line, asks):
    assert bool(attention._ASKS_BY_NAME.search(line)) == asks


CHOOSE = """
import torch, transformers as hf
from fasttune.attention import choose
for p in (0.0, 0.1):
    for dtype in (torch.bfloat16, torch.float32):
        config = hf.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=8, attention_probs_dropout_prob=p)
        print(choose(hf.BertModel(config).to(dtype), "auto", dtype, torch.device("cpu")))
"""


def test_without_kernels_the_choice_is_another():
    """Our reference draws its masks by many int64 operations: five times slower than what there is besides."""
    environment = {**os.environ, "FASTTUNE_REFERENCE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", CHOOSE], env=environment, capture_output=True, text=True, check=True
    )
    eager = "eager (plain products, the fastest on CPU in bf16 without our kernel: FASTTUNE_REFERENCE is set)"
    assert run.stdout.splitlines() == [
        eager,
        "sdpa (transformers' choice; not ours: FASTTUNE_REFERENCE is set)",
        eager,
        "sdpa (transformers' choice; not ours: FASTTUNE_REFERENCE is set)",
    ]
