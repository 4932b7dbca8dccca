"""`fasttune.ops.deformable_attention` in the place of transformers' forms of it, on a model's instance.

transformers 5 has three forms, copied from family to family:

| form                                 | for example in                                            |
|--------------------------------------|-----------------------------------------------------------|
| a module without parameters          | Deformable DETR, RT-DETR, Grounding DINO, LW-DETR, OmDet  |
| a function in an attribute           | D-FINE, DEIMv2                                            |
| a function among a forward's globals | RT-DETRv2, Mask2Former, OneFormer                         |

Replaced are the module, the attribute, or the forward of that one instance: the same code over other globals.
A form is recognized by its name and arguments and believed by example: where its answer to a small random question
is not the op's, it is left alone, and that is said.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.ops import backend, deformable_attention

_MODULE = "MultiScaleDeformableAttention"
_FUNCTION = "multi_scale_deformable_attention"  # and its v2
_Shapes = Tensor | Sequence[tuple[int, int]]


class DeformableAttention(nn.Module):
    """transformers' MultiScaleDeformableAttention, by our op."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return deformable_attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _levels_alike(
    value: Tensor, value_spatial_shapes: _Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return deformable_attention(value, _sizes(value_spatial_shapes), sampling_locations, attention_weights)


def _points_by_level(
    value: Tensor,
    value_spatial_shapes: _Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
    *,
    theirs: Callable[..., Tensor],
) -> Tensor:
    """Other methods than the default, as RT-DETRv2's "discrete", are theirs."""
    if method != "default":
        arguments = value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list
        return theirs(*arguments, method=method)
    shapes = _sizes(value_spatial_shapes)
    return deformable_attention(value, shapes, sampling_locations, attention_weights, points=num_points_list)


def _sizes(shapes: _Shapes) -> Sequence[tuple[int, int]]:
    return shapes.tolist() if isinstance(shapes, Tensor) else shapes


def replace(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    """Puts our op where the model has one of the three forms. Says what was done, "" where there is none."""
    found = [(module, *form) for module in model.modules() for form in _forms(module)]
    if not found:
        return ""
    if device.type != "cpu":
        return "deformable attention: the model's own"
    kernel = backend("deformable_attention", torch.empty(0, dtype=dtype))
    if kernel.name == "reference":
        return f"deformable attention: the model's own (not ours: {kernel.why})"
    ours: dict[Any, Any] = {}  # by their form: layers share them
    left = []
    for module, name, theirs, put in found:
        key = type(theirs) if isinstance(theirs, nn.Module) else theirs
        if key not in ours:
            ours[key] = _ours(theirs)
        if ours[key] is None:
            left.append(f"{type(module).__module__}.{name}")
        else:
            put(ours[key])
    said = f"deformable attention: fasttune (its own kernel, in {len(found) - len(left)} places)"
    if left:
        names = ", ".join(sorted(set(left)))
        said += f", left alone where its answers or arguments are others: {names}"
    return said


def _forms(module: nn.Module) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Name, form and what replaces it, of the forms that stand in this module itself."""
    for name, child in module.named_children():
        if type(child).__name__ == _MODULE and not any(child.parameters()):
            yield _MODULE, child, functools.partial(setattr, module, name)
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__name__.startswith(_FUNCTION):
            yield name, value, functools.partial(setattr, module, name)
    forward = type(module).forward
    for name in getattr(getattr(forward, "__code__", None), "co_names", ()):
        value = forward.__globals__.get(name)
        if inspect.isfunction(value) and name.startswith(_FUNCTION):
            yield name, value, functools.partial(_put_global, module, name)


def _put_global(module: nn.Module, name: str, ours: Callable[..., Tensor]) -> None:
    """The class's forward on this instance, with another function under one of its global names."""
    theirs: Any = type(module).forward
    known = {**theirs.__globals__, name: ours}
    forward = types.FunctionType(theirs.__code__, known, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    forward.__kwdefaults__ = theirs.__kwdefaults__
    module.forward = types.MethodType(functools.update_wrapper(forward, theirs), module)


def _ours(theirs: Any) -> Any:
    """What takes the place of a form, or None where it is another than it seems."""
    form: Callable[..., Tensor] = theirs.forward if isinstance(theirs, nn.Module) else theirs
    candidates: list[Any] = [
        DeformableAttention(),
        _levels_alike,
        functools.partial(_points_by_level, theirs=form),
    ]
    for ours in candidates:
        signature = inspect.signature(ours.forward if isinstance(ours, nn.Module) else ours)
        wanted = [name for name in signature.parameters if name != "theirs"]
        if list(inspect.signature(form).parameters) == wanted:
            return ours if _agree(theirs, ours, wanted) else None
    return None


def _agree(theirs: Callable[..., Tensor], ours: Callable[..., Tensor], names: list[str]) -> bool:
    random = torch.Generator().manual_seed(1)
    shapes, levels = [(3, 5), (2, 3)], (2, 2)
    locations = torch.rand(2, 3, 2, *levels, 2, generator=random, device="cpu") * 1.4 - 0.2
    weights = torch.rand(2, 3, 2, *levels, generator=random, device="cpu")
    known = {
        "value": torch.randn(2, 21, 2, 4, generator=random, device="cpu"),
        "value_spatial_shapes": shapes,
        "value_spatial_shapes_list": shapes,
        "sampling_locations": locations,
        "attention_weights": weights,
        "num_points_list": [3, 1],
    }
    if "num_points_list" in names:
        known |= {"sampling_locations": locations.flatten(3, 4), "attention_weights": weights.flatten(3)}
    question = {name: known.get(name) for name in names if name != "method"}
    with torch.no_grad():
        right = ours(**question)
        try:
            found = theirs(**question)
        except (AttributeError, TypeError, ValueError, RuntimeError):  # it wants other things than the names tell
            return False
    return found.shape == right.shape and torch.allclose(found, right, rtol=1e-4, atol=1e-5)
