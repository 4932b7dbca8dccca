"""Batch norms that are replaced, convolutions in channels_last: what changes, and what must not."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import fasttune
from fasttune import adapt as adapting
from fasttune import run as runs
from fasttune.adapt import adapt
from fasttune.config import SGD, AdamW, Full, Head, Train
from fasttune.convolutions import FusedBatchNorm2d, lay_out, replace_batch_norms
from fasttune.errors import Stopped
from fasttune.ops import backend
from fasttune.optim import Optimizer
from fasttune.task import Bundle

CPU = torch.device("cpu")


def network(**settings: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12, **settings),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),  # depthwise
        nn.Conv2d(12, 8, 1, bias=False),
        nn.BatchNorm2d(8, **settings),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def bundle_of(model: nn.Module) -> Bundle:
    return Bundle(model, None, ("8",), (), ("8",))


def images(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 3, 9, 7, generator=torch.Generator().manual_seed(2))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.7},
    {"affine": False},
    {"track_running_stats": False},
    {"eps": 0.1},
]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replaced_batch_norm_is_what_it_was(settings: dict[str, Any], layout: str) -> None:
    stock, ours = nn.Sequential(nn.BatchNorm2d(12, **settings)), nn.Sequential(nn.BatchNorm2d(12, **settings))
    replace_batch_norms(ours)
    assert type(ours[0]) is FusedBatchNorm2d
    assert isinstance(ours[0], nn.BatchNorm2d)
    assert repr(ours[0]) == repr(stock[0]).replace("BatchNorm2d", "FusedBatchNorm2d")
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for step in range(4):
        x = (3 * torch.randn(3, 12, 5, 4) + 1).contiguous(memory_format=LAYOUTS[layout])
        for model in (stock, ours):
            model.train(step < 3)
        found = [model(x.clone().requires_grad_()) for model in (stock, ours)]
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        for key, value in stock.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_parameters_buffers_hooks_and_mode_stay() -> None:
    model = network()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    seen: list[str] = []
    model[1].register_forward_hook(lambda *_: seen.append("hook"))
    model[5].eval()
    replace_batch_norms(model)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    model(images())
    assert seen == ["hook"]
    assert (model[1].training, model[5].training) == (True, False)
    copied = copy.deepcopy(model)
    assert copied[1].weight is not model[1].weight


def test_other_batch_norms_are_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Own(3), nn.SyncBatchNorm(3), nn.BatchNorm1d(3))
    replace_batch_norms(model)
    assert [type(module) for module in model] == [Own, nn.SyncBatchNorm, nn.BatchNorm1d]


def test_activations_follow_the_weights() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = network().to(dtype)
        lay_out(model, dtype, CPU)
        for part in model[:6]:
            x = part(images().to(dtype) if part is model[0] else x)  # noqa: F821
            assert x.is_contiguous(memory_format=torch.channels_last)


def test_which_models_change_their_layout() -> None:
    def strides(model: nn.Module) -> list[tuple[int, ...]]:
        return [parameter.stride() for parameter in model.parameters()]

    def patches() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.Linear(8, 2))

    for model in (patches(), nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 3))):
        before = strides(model)
        assert lay_out(model, torch.bfloat16, CPU) is None
        assert strides(model) == before
    cuda = torch.device("cuda")
    for dtype, device, expected in (
        (torch.float32, CPU, "channels_last"),
        (torch.bfloat16, CPU, "channels_last"),
        (torch.bfloat16, cuda, "channels_last"),
        (torch.float32, cuda, "contiguous"),
    ):
        model = network()
        chosen = lay_out(model, dtype, device)
        assert chosen is not None
        assert chosen.startswith(expected)
        assert model[0].weight.is_contiguous() == (expected == "contiguous")
    assert adapt(bundle_of(network()), Full()).layout == lay_out(network(), torch.float32, CPU)
    assert adapt(bundle_of(nn.Sequential(*[nn.Identity()] * 8, nn.Linear(3, 2))), Full()).layout is None


def steps(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, settings: Train, *, ours: bool, count: int = 4
) -> tuple[Optimizer, nn.Module]:
    """Training steps of the engine, with both changes or with neither."""
    with monkeypatch.context() as patch:
        if not ours:
            patch.setattr(adapting, "replace_batch_norms", lambda model: None)
            patch.setattr(adapting, "lay_out", lambda *arguments: None)
        adapted = adapt(bundle_of(network()), Full(), dtype=dtype)
    model, optimizer = adapted.bundle.model, Optimizer(adapted, settings, 10)
    adapted.train_mode()
    for step in range(count):
        for part in images(8).chunk(2):
            model(part).float().square().sum().backward()
            optimizer.collect()
        assert optimizer.step(step, 8).taken
    return optimizer, model


KINDS = {"adamw": AdamW(), "sgd": SGD(momentum=0.9)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_agrees_with_pytorchs_batch_norm_and_layout(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str
) -> None:
    settings = Train(lr=1e-2, head_lr=1e-2, optimizer=KINDS[kind])
    ours, theirs = (steps(monkeypatch, dtype, settings, ours=which) for which in (True, False))
    assert not ours[1][0].weight.is_contiguous()
    assert theirs[1][0].weight.is_contiguous()
    if backend("batch_norm").name == "cpu":
        assert type(ours[1][1]) is FusedBatchNorm2d
    for (name, master), start in zip(ours[0].masters.items(), network().parameters(), strict=True):
        moved = float((theirs[0].masters[name] - start.detach()).norm())
        apart = float((master - theirs[0].masters[name]).norm())
        assert moved > 0
        # In bfloat16 convolutions round as their layout has it; a wrong gradient is off by its own size.
        assert apart <= (1e-3 if dtype == torch.float32 else 0.6) * moved, name
    for (name, one), (_, other) in zip(ours[1].named_buffers(), theirs[1].named_buffers(), strict=True):
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 1e-2}
        torch.testing.assert_close(one, other, **close, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_masters_gradients_and_state_lie_as_their_parameters(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    settings = Train(lr=1e-2, head_lr=1e-2, optimizer=KINDS[kind])
    optimizer, model = steps(monkeypatch, torch.bfloat16, settings, ours=True)
    for name, parameter in model.named_parameters():
        master = optimizer.masters[name]
        assert master.stride() == parameter.stride()
        assert torch.equal(master.bfloat16() if "weight" in name and master.dim() > 1 else parameter, parameter)
        for value in optimizer.torch.state[master].values():
            assert value.dim() == 0 or value.stride() == master.stride()
    model(images()).float().sum().backward()
    weight = model[0].weight
    assert weight.grad is not None
    weight.grad = weight.grad.contiguous()  # as a hook may leave it
    expected = weight.grad.float()
    optimizer.collect()
    found = optimizer.masters["0.weight"].grad
    assert found is not None
    assert torch.equal(found, expected)
    assert found.stride() == optimizer.masters["0.weight"].stride()


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_optimizer_goes_on_bit_by_bit(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Through what a file keeps: contiguous tensors."""
    settings = Train(lr=1e-2, head_lr=1e-2, optimizer=KINDS[kind])
    whole, model = steps(monkeypatch, torch.float32, settings, ours=True)
    masters = {name: master.detach().contiguous() for name, master in whole.masters.items()}
    state = {name: value.contiguous().clone() for name, value in whole.state().items()}
    restored, other = steps(monkeypatch, torch.float32, settings, ours=True, count=0)
    restored.load_state(masters, state)
    other.load_state_dict(model.state_dict())
    for optimizer, network in ((whole, model), (restored, other)):
        network(images()).square().sum().backward()
        optimizer.collect()
        assert optimizer.step(4, 4).taken
    for name, master in whole.masters.items():
        assert torch.equal(restored.masters[name], master), name
        for key, value in whole.torch.state[master].items():
            assert torch.equal(restored.torch.state[restored.masters[name]][key], value), (name, key)


def test_frozen_convolutions_change_their_layout_too() -> None:
    model = network()
    adapt(bundle_of(model), Head(), dtype=torch.bfloat16).train_mode()
    assert not model[0].weight.is_contiguous()
    before = model[1].running_mean.clone()
    model(images()).float().sum().backward()
    assert model[0].weight.grad is None
    assert torch.equal(model[1].running_mean, before)


@pytest.fixture(scope="module")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-resnet"
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    torch.manual_seed(3)
    hf.ResNetModel(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in brightness."""
    folder = tmp_path_factory.mktemp("pictures")
    chance = np.random.default_rng(4)
    for index in range(24):
        name = ("dark", "light")[index % 2]
        path = folder / name / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = chance.integers(0, 128, (32, 32, 3)) + 127 * (index % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def start(model: Path, pictures: Path, output: Path, **sections: Any) -> Any:
    sections = {"strategy": "full", "train": {}, **sections}
    train = {"epochs": 2, "batch": 8, "lr": 1e-3, "precision": "fp32", **sections.pop("train")}
    return fasttune.finetune(
        task="image-classification",
        model=str(model),
        data={"train": str(pictures), "valid": 0.25, "workers": 0},
        train=train,
        output=str(output),
        quiet=True,
        **sections,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_of_a_resnet_ends_bit_by_bit_as_a_whole_one(
    tiny_resnet: Path, pictures: Path, tmp_path: Path, assert_same_run: Any, monkeypatch: Any, precision: str
) -> None:
    train = {"precision": precision}
    start(tiny_resnet, pictures, tmp_path / "whole", train=train)
    log = runs._Run._log

    def log_and_signal(self: Any, record: Any) -> None:
        log(self, record)
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(runs._Run, "_log", log_and_signal)
        with pytest.raises(Stopped):
            start(tiny_resnet, pictures, tmp_path / "pieces", train=train)
    start(tiny_resnet, pictures, tmp_path / "pieces", resume=True, train=train)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_a_run_is_saved_and_exported_as_one_without_channels_last(
    tiny_resnet: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SGD: AdamW blows the rounding of a gradient near zero up to a whole step."""
    train = {"optimizer": {"kind": "sgd"}, "lr": 1e-2}
    start(tiny_resnet, pictures, tmp_path / "ours", train=train)
    with monkeypatch.context() as patch:
        patch.setattr(adapting, "replace_batch_norms", lambda model: None)
        patch.setattr(adapting, "lay_out", lambda *arguments: None)
        start(tiny_resnet, pictures, tmp_path / "theirs", train=train)
    weights = {}
    for name in ("ours", "theirs"):
        run = tmp_path / name
        fasttune.load(run).export(tmp_path / f"{name}-exported")
        exported = load_file(tmp_path / f"{name}-exported" / "model.safetensors")
        best = load_file(run / "best" / "model.safetensors")
        assert all(torch.equal(value, best[key]) for key, value in exported.items())
        weights[name] = load_file(run / "last" / "model.safetensors")
    begun = load_file(tiny_resnet / "model.safetensors")
    assert weights["ours"].keys() == weights["theirs"].keys()
    moved = 0.0
    for key, value in weights["theirs"].items():
        torch.testing.assert_close(weights["ours"][key], value, rtol=1e-4, atol=1e-5, msg=key)
        if key.removeprefix("resnet.") in begun and value.dim() == 4:
            moved = max(moved, float((value - begun[key.removeprefix("resnet.")]).abs().max()))
    assert moved > 1e-3, "weights that stay where they were prove nothing"
    notes = [(tmp_path / name / "report.html").read_text() for name in ("ours", "theirs")]
    assert ["layout: channels_last" in note for note in notes] == [True, False]
    pipeline = hf.pipeline("image-classification", str(tmp_path / "ours-exported"))
    assert {found["label"] for found in pipeline(str(next((pictures / "dark").iterdir())))} == {"dark", "light"}
