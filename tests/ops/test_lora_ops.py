"""The low-level ops of a LoRA linear layer, and the faults that others had with LoRA and dropout, one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fasttune.adapt import LoRALinear
from fasttune.config import Lora
from fasttune.ops import backend, library, lora_linear
from fasttune.ops.dropout import mask_reference
from fasttune.ops.lora_linear import lora_input_backward_reference

ops = torch.ops.fasttune
needs_kernel = pytest.mark.skipif(library._C is None, reason=f"no kernel: {library.MISSING}")
SEED = torch.tensor(-99887766554433)
# rows, in, rank, out: one element, no multiple of 4 or 16, more than one piece of 4096 elements, empty.
SIZES = [(1, 1, 1, 1), (13, 7, 3, 5), (98, 123, 5, 252), (257, 384, 16, 98), (0, 123, 5, 252)]
# Relative to float64, in norm: about a tenth of what one rounding to the dtype costs.
EPSILON = {torch.float64: 1e-14, torch.float32: 1e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}
DTYPES = list(EPSILON)


def make(rows, ins, rank, outs, dtype=torch.float64):
    """x [rows, in], a [r, in], b [out, r], dy [rows, out], dlow [rows, r], dx [rows, in]."""
    generator = torch.Generator().manual_seed(rows + ins)
    shapes = {"x": (rows, ins), "a": (rank, ins), "b": (outs, rank), "dy": (rows, outs), "dlow": (rows, rank)}
    shapes["dx"] = (rows, ins)
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def drop(x, p):
    """In x's dtype, as a model's own code has it."""
    kept = mask_reference(x.shape, p, SEED)
    return torch.where(kept, x / (1 - p), 0) if p < 1 else torch.zeros_like(x)


def assert_error_at_most(found, plain, exact, dtype):
    assert found.shape == exact.shape
    allowed = (plain.double() - exact).norm() + EPSILON[dtype] * exact.norm()
    assert (found.double() - exact).norm() <= allowed


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_op_against_float64_and_plain_products(size, p, dtype):
    seed = SEED if p else None
    t = make(*size, dtype=dtype)
    e = {name: tensor.double() for name, tensor in t.items()}

    low = ops.lora_down(t["x"], t["a"], p, seed)
    assert low.dtype == dtype
    assert_error_at_most(low, drop(t["x"], p) @ t["a"].t(), drop(e["x"], p) @ e["a"].t(), dtype)

    dlow, db = ops.lora_up_backward(t["dy"], t["dlow"], t["b"])
    assert (dlow.dtype, db.dtype) == (dtype, wide(dtype))
    assert_error_at_most(dlow, t["dy"] @ t["b"], e["dy"] @ e["b"], dtype)
    assert_error_at_most(db, t["dy"].t() @ t["dlow"], e["dy"].t() @ e["dlow"], dtype)

    da = ops.lora_down_backward(t["x"], t["dlow"], p, seed)
    assert da.dtype == wide(dtype)
    exact_da = e["dlow"].t() @ drop(e["x"], p)
    assert_error_at_most(da, t["dlow"].t() @ drop(t["x"], p), exact_da, dtype)

    plain_dx = t["dx"] + drop(t["dlow"] @ t["a"], p)
    exact_dx = e["dx"] + drop(e["dlow"] @ e["a"], p)
    dx = t["dx"].clone()
    assert ops.lora_add_(dx, t["dlow"], t["a"], p, seed) is None
    assert_error_at_most(dx, plain_dx, exact_dx, dtype)

    dx = t["dx"].clone()
    both = ops.lora_input_backward(t["x"], t["dlow"], t["a"], dx, p, seed)
    assert both.dtype == wide(dtype)
    assert_error_at_most(both, t["dlow"].t() @ drop(t["x"], p), exact_da, dtype)
    assert_error_at_most(dx, plain_dx, exact_dx, dtype)
    assert torch.equal(ops.lora_input_backward(t["x"], t["dlow"], t["a"], None, p, seed), both)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_plain_kernel_is_its_reference_bitwise(size, p, dtype):
    """The products are PyTorch's on both sides, of the same operands: same elements dropped, same roundings."""
    t = make(*size, dtype=dtype)
    ours, theirs = t["dx"].clone(), t["dx"].clone()
    with torch.backends.mkldnn.flags(enabled=False):  # as where oneDNN has no small products
        assert library._C.lora_block_types() == []
        found = ops.lora_input_backward(t["x"], t["dlow"], t["a"], ours, p, SEED)
        expected = lora_input_backward_reference(t["x"], t["dlow"], t["a"], theirs, p, SEED)
    assert torch.equal(found, expected)
    assert torch.equal(ours, theirs)


# rows, in, rank, out: blocks have 32 rows and strips 256 columns, sums 512 rows from 4096 rows on.
BLOCKS = [(31, 257, 1, 513), (97, 33, 3, 7), (64, 256, 8, 512), (1000, 515, 16, 31), (330, 48, 17, 300)]
BLOCKS += [(160, 129, 64, 96), (9000, 7, 3, 5)]
in_blocks = pytest.mark.skipif(
    library._C is None or len(library._C.lora_block_types()) < 2, reason="no small products on this machine"
)


def whole(rows, ins, rank, outs, dtype):
    """What `make` gives, in numbers so small and whole that every product is exact in float32."""
    generator = torch.Generator().manual_seed(rows)
    return {
        name: torch.randint(-3, 4, tensor.shape, generator=generator).to(dtype)
        for name, tensor in make(rows, ins, rank, outs).items()
    }


@in_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("size", BLOCKS, ids=str)
def test_blocks_round_once(size, p, dtype):
    """Sums are whole and below 2^24, and 1 / (1 - p) is 2: each result is the exact one, rounded."""
    seed = SEED if p else None
    t = whole(*size, dtype=dtype)
    e = {name: tensor.double() for name, tensor in t.items()}
    dropped = drop(e["x"], p)

    assert torch.equal(ops.lora_down(t["x"], t["a"], p, seed), (dropped @ e["a"].t()).to(dtype))
    dlow, db = ops.lora_up_backward(t["dy"], t["dlow"], t["b"])
    assert torch.equal(dlow, (e["dy"] @ e["b"]).to(dtype))
    assert torch.equal(db, (e["dy"].t() @ e["dlow"]).float())
    dx = t["dx"].clone()
    da = ops.lora_input_backward(t["x"], t["dlow"], t["a"], dx, p, seed)
    assert torch.equal(da, (e["dlow"].t() @ dropped).float())
    assert torch.equal(dx, (e["dx"] + drop(e["dlow"] @ e["a"], p)).to(dtype))


@in_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1000, 515, 16, 31), (9000, 7, 3, 5)], ids=str)
def test_blocks_give_the_same_bits_with_any_number_of_threads(size, dtype):
    t = make(*size, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        dx = t["dx"].clone()
        low = ops.lora_down(t["x"], t["a"], 0.3, SEED)
        up = ops.lora_up_backward(t["dy"], t["dlow"], t["b"])
        da = ops.lora_input_backward(t["x"], t["dlow"], t["a"], dx, 0.3, SEED)
        results.append((low, *up, da, dx))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@in_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dropped_element_is_zero_whatever_it_holds(dtype):
    t = whole(97, 33, 3, 7, dtype)
    kept = mask_reference(t["x"].shape, 0.5, SEED)
    clean = torch.where(kept, t["x"], 0)
    for value in (torch.inf, torch.nan):
        x = torch.where(kept, t["x"], value)
        assert torch.equal(ops.lora_down(x, t["a"], 0.5, SEED), ops.lora_down(clean, t["a"], 0.5, SEED))
        found, expected = (ops.lora_input_backward(of, t["dlow"], t["a"], None, 0.5, SEED) for of in (x, clean))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_operands_of_any_stride(p):
    seed = SEED if p else None
    t = make(98, 123, 5, 252, dtype=torch.float32)
    turned = {name: tensor.t().contiguous().t() for name, tensor in t.items()}
    for name, arguments in (
        ("lora_down", ("x", "a", p, seed)),
        ("lora_up_backward", ("dy", "dlow", "b")),
        ("lora_down_backward", ("x", "dlow", p, seed)),
        ("lora_input_backward", ("x", "dlow", "a", None, p, seed)),
    ):
        results = [getattr(ops, name)(*(of.get(a, a) if isinstance(a, str) else a for a in arguments))
                   for of in (t, turned)]  # fmt: skip
        torch.testing.assert_close(*results)  # float32 sums in another order


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_draw_one_mask(dtype):
    """Recovered from each op by products with ones and identities; the mask is that of x's elements."""
    rows, ins, p = 57, 13, 0.4
    kept = mask_reference(torch.Size([rows, ins]), p, SEED)
    ones, identity = torch.ones(rows, ins, dtype=dtype), torch.eye(ins, dtype=dtype)
    assert torch.equal(ops.lora_down(ones, identity, p, SEED) != 0, kept)
    each_row = torch.eye(rows, dtype=dtype)
    assert torch.equal(ops.lora_down_backward(ones, each_row, p, SEED) != 0, kept)
    dx = torch.zeros_like(ones)
    ops.lora_add_(dx, ones, identity, p, SEED)
    assert torch.equal(dx != 0, kept)
    dx = torch.zeros_like(ones)
    ops.lora_input_backward(ones, ones, identity, dx, p, SEED)
    assert torch.equal(dx != 0, kept)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(p, dtype):
    seed = SEED if p else None
    t = make(6, 5, 2, 3, dtype=dtype)
    torch.library.opcheck(ops.lora_down, (t["x"], t["a"], p, seed))
    torch.library.opcheck(ops.lora_up_backward, (t["dy"], t["dlow"], t["b"]))
    torch.library.opcheck(ops.lora_down_backward, (t["x"], t["dlow"], p, seed))
    torch.library.opcheck(ops.lora_add_, (t["dx"], t["dlow"], t["a"], p, seed))
    for dx in (None, t["dx"]):
        torch.library.opcheck(ops.lora_input_backward, (t["x"], t["dlow"], t["a"], dx, p, seed))


@needs_kernel
def test_kernels_check_what_they_are_given():
    t = make(6, 5, 2, 3, dtype=torch.float32)
    weight = torch.ones(3, 5)
    calls = {
        "lora_down": lambda c: ops.lora_down(c["x"], c["a"], 0.3, SEED),
        "lora_up_backward": lambda c: ops.lora_up_backward(c["dy"], c["dlow"], c["b"]),
        "lora_input_backward": lambda c: ops.lora_input_backward(c["x"], c["dlow"], c["a"], c["dx"], 0.3, SEED),
        "lora_linear": lambda c: ops.lora_linear(c["x"], c["weight"], None, c["a"], c["b"], 1.0, 0.0, None),
        "lora_linear_backward": lambda c: ops.lora_linear_backward(
            c["dy"], c["x"], c["dlow"], c["weight"], c["a"], c["b"], 1.0, 0.0, None, [True] * 3
        ),
    }
    good = {**t, "weight": weight}
    for op, name, wrong, message in (
        ("lora_down", "x", t["x"][0], "x: expected two dimensions"),
        ("lora_down", "a", t["a"][:, 1:], "a: expected Float of shape"),
        ("lora_down", "a", t["a"].double(), "a: expected Float of shape"),
        ("lora_up_backward", "dlow", t["dlow"][1:], "low: expected Float of shape"),
        ("lora_up_backward", "b", t["b"][1:], "b: expected Float of shape"),
        ("lora_input_backward", "dlow", t["dlow"][1:], "dlow: expected Float of shape"),
        ("lora_input_backward", "a", t["a"][:1], "dlow: expected Float of shape"),
        ("lora_input_backward", "dx", t["dx"][1:], "dx: expected Float of shape"),
        ("lora_input_backward", "dx", t["dx"].double(), "dx: expected Float of shape"),
        ("lora_input_backward", "dx", t["dx"].t().contiguous().t(), "dx must be contiguous"),
        ("lora_linear", "b", t["b"][1:], "do not fit, or weight is not of x's type"),
        ("lora_linear", "weight", weight.double(), "do not fit, or weight is not of x's type"),
        ("lora_linear_backward", "dy", t["dy"][1:], "dy: expected Float of shape"),
        ("lora_linear_backward", "dlow", t["dlow"][:, 1:], "low: expected Float of shape"),
    ):
        calls[op](good)
        with pytest.raises(ValueError, match=f"{op}: .*{message}"):
            calls[op]({**good, name: wrong})
    with pytest.raises(TypeError, match="expected float64"):
        ops.lora_down(t["x"].long(), t["a"].long(), 0.0, None)
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match="p must be in"):
            ops.lora_linear(t["x"], weight, None, t["a"], t["b"], 1.0, p, SEED)


@needs_kernel
def test_backend_tells_who_makes_the_products():
    x = torch.ones(2, 5, dtype=torch.bfloat16)
    assert "no small products of float16" in backend("lora_linear", x.half()).why
    with torch.backends.mkldnn.flags(enabled=False):
        assert "no small products of bfloat16" in backend("lora_linear", x).why
    if "bfloat16" in library._C.lora_block_types():
        assert "in blocks" in backend("lora_linear", x).why


def masks_of(layers: int, steps: int, rows: int = 256, ins: int = 64, p: float = 0.3) -> torch.Tensor:
    """[layers x steps, rows, in]: what each layer keeps in each step, by an adapter that shows it."""
    torch.manual_seed(11)
    weight, eye, ones = torch.zeros(ins, ins), torch.eye(ins), torch.ones(rows, ins)
    shown = [
        lora_linear(ones, weight, None, eye, eye, scale=1.0, dropout=p, training=True)
        for _ in range(layers * steps)
    ]
    return torch.stack(shown) != 0


def test_keep_rate_is_within_four_sigma():
    masks, p = masks_of(layers=2, steps=3), 0.3
    n = masks.numel()
    assert abs(masks.sum().item() - n * (1 - p)) < 4 * (n * p * (1 - p)) ** 0.5


def test_masks_of_layers_steps_and_rows_are_independent():
    """Any two draws agree as often as chance has it; with one seed for all they would agree throughout."""
    masks, p = masks_of(layers=3, steps=3), 0.3
    pairs = [(masks[i], masks[j]) for i in range(9) for j in range(i)]
    pairs += [(masks[:, :-1], masks[:, 1:]), (masks[:, :-64], masks[:, 64:]), (masks[..., :-4], masks[..., 4:])]
    both = (1 - p) ** 2
    for one, other in pairs:
        n = one.numel()
        # Shifted pairs of one mask overlap: the variance is at most three times the binomial one. With 39 pairs
        # five sigma are what four are for one.
        assert abs((one & other).sum().item() - n * both) < 5 * (3 * n * both * (1 - both)) ** 0.5


def parameters(ins=24, outs=20, rank=4, dtype=torch.float32):
    torch.manual_seed(2)
    weight, bias = torch.randn(outs, ins).to(dtype), torch.randn(outs).to(dtype)
    return weight, bias, nn.Parameter(torch.randn(rank, ins)), nn.Parameter(torch.randn(outs, rank))


def test_fms_acceleration_97_the_input_gradient_is_masked():
    """fms-acceleration#97: dX took the adapter's share of elements that dropout had zeroed in the forward."""
    weight, bias, a, b = parameters()
    x = torch.randn(30, 24, requires_grad=True)
    torch.manual_seed(3)
    y = lora_linear(x, weight, bias, a, b, scale=2.0, dropout=0.5, training=True)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    share = x.grad - upstream @ weight
    torch.manual_seed(3)
    shown = lora_linear(torch.ones(30, 24), torch.zeros(24, 24), None, torch.eye(24), torch.eye(24), scale=1.0,
                        dropout=0.5, training=True)  # fmt: skip
    expected = torch.where(shown != 0, 2 * 2.0 * upstream @ b @ a, 0.0)
    torch.testing.assert_close(share, expected.detach(), rtol=1e-4, atol=1e-4)  # a difference of numbers near 100


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_unsloth_2319_and_1265_the_fast_path_serves_dropout_and_bias(p, bias):
    """unsloth#2319, #1265: with dropout or a bias the slow path ran instead, and nothing said so."""
    weight, b0, a, b = parameters()
    b0 = b0 if bias else None
    assert backend("lora_linear", torch.ones(3, 24), weight, b0, a, b).name == (
        "cpu" if library._C is not None else "reference"
    )
    x = torch.randn(3, 24, requires_grad=True)
    with Called() as called:
        lora_linear(x, weight, b0, a, b, scale=1.0, dropout=p, training=True).sum().backward()
    assert {"fasttune.lora_linear.default", "fasttune.lora_linear_backward.default"} <= called.names


@pytest.mark.parametrize("lead", [(), (7,), (2, 7)])
def test_lorafusion_no_dropout_and_any_number_of_dimensions(lead):
    """LoRAFusion: the backward crashed at p = 0, and inputs of two dimensions crashed."""
    weight, bias, a, b = parameters()
    x = torch.randn(*lead, 24, requires_grad=True)
    y = lora_linear(x, weight, bias, a, b, scale=0.5, dropout=0.0, training=True)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, a, b), upstream)
    expected = F.linear(x, weight + 0.5 * b @ a, bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for mine, other in zip(found, torch.autograd.grad(expected, (x, a, b), upstream), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lorafusion_checkpointing_recomputes_the_mask(reentrant):
    """LoRAFusion: the recomputed forward drew another mask, and the gradients belonged to no forward."""
    weight, bias, a, b = parameters(outs=24)

    def block(x):
        for _ in range(2):
            x = lora_linear(x, weight, bias, a, b, scale=0.5, dropout=0.4, training=True).tanh()
        return x

    results = []
    for wrapped in (False, True):
        x = torch.randn(9, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(8)
        y = checkpoint(block, x, use_reentrant=reentrant) if wrapped else block(x)
        a.grad = b.grad = None
        y.square().sum().backward()
        results.append((x.grad, a.grad, b.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def layer(size=64):
    """An adapter whose update is about a bit of the bfloat16 weight, all of whose elements are near 0.1."""
    torch.manual_seed(5)
    built = LoRALinear(nn.Linear(size, size, bias=False, dtype=torch.bfloat16), Lora(rank=4, dropout=0.0))
    with torch.no_grad():
        built.base.weight.uniform_(0.07, 0.12)
        built.lora_b.normal_(std=1e-3)
    return built


def units_off(merged, exact):
    """The worst error, in units of the last of bfloat16's eight bits."""
    unit = exact.abs().log2().floor().exp2() * 2**-7
    return ((merged.double() - exact).abs() / unit).max().item()


def test_peft_1388_and_2502_merging_rounds_once():
    """peft#1388, #2502: the update in bfloat16, then the sum in bfloat16, drifts from what was trained."""
    built = layer()
    weight, a, b = (t.detach().clone() for t in (built.weight, built.lora_a, built.lora_b))
    exact = weight.double() + built.scale * b.double() @ a.double()
    assert units_off(built.merged().weight.detach(), exact) <= 0.5 + 2**-12  # ties that float32's rounding breaks
    drifted = weight + built.scale * (b.bfloat16() @ a.bfloat16())
    assert units_off(drifted, exact) > 0.5 + 2**-10, "or this test says nothing"


def test_peft_2502_training_never_merges():
    """An update below the weight's last bit vanishes from a merged weight; the layer must still train on it."""
    built = layer()
    with torch.no_grad():
        built.base.weight.fill_(0.09375)
        built.lora_b.mul_(1e-2)
    update = built.scale * (built.lora_b @ built.lora_a).detach()
    assert torch.equal(built.weight + update.bfloat16(), built.weight), "or this test says nothing"
    half = torch.randint(-3, 4, (200, 32)).bfloat16()
    x = torch.cat((half, -half), dim=1)  # the base gives exactly 0
    found, expected = built(x).float(), x.float() @ update.t()
    # Three roundings to bfloat16: of A and S, of scale B, and of the result.
    assert (found - expected).norm() <= 2**-7 * expected.norm()
