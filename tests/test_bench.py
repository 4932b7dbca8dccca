"""`fasttune bench` at tiny sizes, and the checks that stand before every clock. Nothing here looks at a time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from fasttune import bench, contests, ops
from fasttune.adapt import native_precision
from fasttune.cli import main

ROOT = Path(__file__).parent.parent
TINY = {
    "dropout": (70, 48),
    "lora_linear": (70, 48, 40),
    "attention": (2, 3, 40, 16),
    "batch_norm": (2, 3, 9, 7),
    "deformable_attention": (2, 3, 16, 9, 16, 2),
    "cross_entropy": (70, 130),
    "linear_cross_entropy": (70, 48, 130),
    "training_step": (4, 12, 64, 1),
}


@pytest.fixture
def tiny(monkeypatch):
    """Tiny sizes, few rounds, and the process's allocator as it is."""
    monkeypatch.setattr(bench, "SIZES", {"cpu": TINY, "cuda": TINY})
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "TURN", 0.0)
    monkeypatch.setattr(bench, "keep_pages", lambda: False)


def test_the_table_and_the_json_have_a_line_for_each_op_and_type(tiny, tmp_path):
    before = torch.get_rng_state()
    result = CliRunner().invoke(main, ["bench", "--json", str(tmp_path / "bench.json")])
    assert result.exit_code == 0, result.output
    assert torch.equal(torch.get_rng_state(), before)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    types = ["bf16", "fp32"] if native_precision(device) == "bf16" else ["fp32"]
    expected = [(op, dtype) for op in TINY for dtype in types]

    found = json.loads((tmp_path / "bench.json").read_text())
    assert [(line["op"], line["dtype"]) for line in found["results"]] == expected
    assert torch.__version__ in found["machine"]
    assert re.search(r"\d{4}-\d\d-\d\d", found["machine"])
    for line in found["results"]:
        assert tuple(line["size"]) == TINY[line["op"]]
        assert line["ratio"] == pytest.approx(min(line["stock_ms"].values()) / line["ms"])
        if line["op"] != "training_step":
            assert line["backend"] == ops.backend(line["op"], torch.empty(0, device=device)).name

    head, titles, *table = result.output.splitlines()
    assert torch.__version__ in head
    assert {"ms", "stock", "ratio"} <= set(titles.split())
    assert [line[:21].strip() for line in table] == [op for op, _ in expected]


def test_only_the_ops_asked_for_run(tiny):
    result = CliRunner().invoke(main, ["bench", "--op", "dropout", "--op", "cross_entropy"])
    assert result.exit_code == 0, result.output
    assert {line.split()[0] for line in result.output.splitlines()[2:]} == {"dropout", "cross_entropy"}


def test_an_op_that_is_none_is_answered_before_anything_runs(tiny):
    result = CliRunner().invoke(main, ["bench", "--op", "dropout", "--op", "cross_entropi"])
    assert result.exit_code == 2
    assert "'cross_entropi'" in result.output
    assert "Did you mean 'cross_entropy'?" in result.output
    assert "ratio" not in result.output


def scaled(function, factor):
    return lambda *arguments: function(*arguments) * factor


class TwoMasks(torch.autograd.Function):
    """A dropout whose backward draws a mask of its own."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx, grad):
        return F.dropout(grad, ctx.p), None


def lora_with(drop):
    def lora(x, weight, bias, a, b, p):
        return F.linear(x, weight, bias) + drop(x, p) @ a.t() @ b.t() * contests.SCALE

    return lora


def attention_without_dropout(q, k, v, mask, p):
    return contests.plain_attention(q, k, v, mask, 0.0)


def attention_with_two_masks(q, k, v, mask, p):
    """The result has one mask, the gradient of v another."""
    other = contests.plain_attention(q.detach(), k.detach(), v, mask, p)
    return contests.plain_attention(q, k, v.detach(), mask, p) + other - other.detach()


def half_a_pixel_off(value, locations, weights, _):
    maps = contests.maps_of(value)
    sides = torch.tensor(maps)[:, :1, None]
    return ops.deformable_attention(value, maps, locations + 0.5 / sides, weights)


def no_dropout(x, p):
    return x


WRONG = {
    "dropout, unscaled": ("dropout", lambda x, p: F.dropout(x, p) * (1 - p)),
    "dropout, two masks": ("dropout", TwoMasks.apply),
    "dropout, another rate": ("dropout", lambda x, p: F.dropout(x, 2 * p) * (1 - 2 * p) / (1 - p)),
    "lora, scale": ("lora_linear", scaled(contests.OURS["lora_linear"], 1.01)),
    "lora, two masks": ("lora_linear", lora_with(TwoMasks.apply)),
    "lora, no dropout": ("lora_linear", lora_with(no_dropout)),
    "attention, scale": ("attention", scaled(contests.OURS["attention"], 1.01)),
    "attention, two masks": ("attention", attention_with_two_masks),
    "attention, no dropout": ("attention", attention_without_dropout),
    "batch norm, scale": ("batch_norm", scaled(contests.OURS["batch_norm"], 1.01)),
    "deformable, scale": ("deformable_attention", scaled(contests.OURS["deformable_attention"], 1.01)),
    "deformable, centres at the edges": ("deformable_attention", half_a_pixel_off),
    "cross entropy, scale": ("cross_entropy", scaled(contests.OURS["cross_entropy"], 1.01)),
    "linear, scale": ("linear_cross_entropy", scaled(contests.OURS["linear_cross_entropy"], 1.01)),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_result_is_not_timed(fault):
    torch.manual_seed(0)
    op, function = WRONG[fault]
    contest = getattr(contests, op)(bench.SIZES["cpu"][op] if op == "dropout" else TINY[op], torch.float32, "cpu")
    contest.checked(lora_with(F.dropout) if op == "lora_linear" else next(iter(contests.STOCK[op].values())))
    with pytest.raises(AssertionError, match=r"not worth timing|dropout 0|were kept"):
        contest.checked(function)


def test_a_race_gives_every_contender_its_turns():
    called = []
    race = bench.Race({name: lambda name=name: called.append(name) for name in "ab"})
    for _ in range(3):
        race.round()
    assert {name: len(found) for name, found in race.seconds.items()} == {"a": 3, "b": 3}
    turns = "".join(called)
    assert re.fullmatch(r"(a+b+){4}", turns)  # the warm-up, and three rounds


def test_make_bench_collects_a_file_for_every_op():
    dry = subprocess.run(
        ["make", "-n", "-o", "setup", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = re.findall(r"bench/\w+\.py", dry.stdout)
    assert {Path(file).stem for file in files} == set(ops.library.OPS)
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert collected.returncode == 0, collected.stdout
    for file in files:
        assert f"{file}::test_time[" in collected.stdout
