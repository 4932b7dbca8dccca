"""Language models: opening one, and its loss without the logits of a whole batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune.errors import ModelError
from fasttune.models import structure
from fasttune.models.loading import check_backbone, pretrained, random_model
from fasttune.ops import cross_entropy, linear_cross_entropy
from fasttune.task import Loss, Source

IGNORED = -100
"""A label that is not supervised."""
_ROWS = 256  # whose logits exist at a time when predictions are counted
_WHOLE = "_fasttune_whole_logits"
_PROBE = 8  # tokens


@dataclass(frozen=True)
class Opened:
    """A language model, and the names that `Bundle` wants.

    head: the modules that own the output projection's parameters, pretrained with the rest (`Bundle.head_is_new`
    is False): the embeddings, where the two are tied.
    """

    model: Any
    head: tuple[str, ...]
    blocks: tuple[str, ...]
    lora_targets: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Projection:
    """From the last hidden states to the logits: softcap · tanh((scale · h Wᵀ + b) / softcap), or without the cap.

    weight: [V, H]. bias: [V] or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


def open_language_model(source: Source, config: Any, auto: Any) -> Opened:
    """The model of an auto class (causal or sequence to sequence), in eval mode.

    Raises ModelError if the checkpoint can't be opened or lacks weights.
    """
    loaded = random_model(source, config, auto) if source.random_weights else pretrained(source, config, auto)
    model = loaded.model.eval()
    base = structure.base_name(model)
    blocks = structure.block_names(model, base)
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    lacking = {name for name in loaded.missing if name not in tied}
    head = _owners(model, projection_name(model))
    notes = ["random weights: nothing is pretrained"] if source.random_weights else []
    if lacking:
        check_backbone(source, loaded, base, blocks, lacking)
        raise ModelError(f"model {str(source)!r}: {min(lacking)} is not in the checkpoint, and can't be made up")
    note = settle_projection(model)
    targets = structure.linear_names(model, blocks, head)
    return Opened(model, head, blocks, targets, (*notes, *([note] if note else [])))


def _owners(model: Any, module: str) -> tuple[str, ...]:
    """The modules under whose names `named_parameters` lists a module's parameters: it lists a shared one once."""
    own = {id(parameter) for parameter in model.get_submodule(module).parameters()}
    names = (name for name, parameter in model.named_parameters() if id(parameter) in own)
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))


def projection_name(model: Any) -> str:
    """The name of the output projection in the model. Raises ModelError if it has none."""
    module = model.get_output_embeddings()
    name = next((name for name, child in model.named_modules() if child is module), None)
    if module is None or not name or not isinstance(getattr(module, "weight", None), Tensor):
        raise ModelError(f"{type(model).__name__} has no linear output projection; it is no language model")
    return name


def projection_of(model: Any) -> Projection:
    """Weight, bias and what the model does to its logits: Gemma's cap, Cohere's and Granite's scales, the bias
    buffer of BART and its kin."""
    module = model.get_output_embeddings()
    text = model.config.get_text_config(decoder=True)
    bias = getattr(module, "bias", None)
    buffer = getattr(model, "final_logits_bias", None)
    if isinstance(buffer, Tensor):  # mostly zeros, but to see that the host would wait for the device in each step
        bias = buffer.flatten().to(module.weight.dtype) + (0 if bias is None else bias)
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    return Projection(module.weight, bias, scale, getattr(text, "final_logit_softcapping", None))


def language_loss(
    model: Any, inputs: dict[str, Tensor], labels: Tensor, *, shift: bool, accuracy: bool = False
) -> Loss:
    """The summed cross entropy of the labels, by `fasttune.ops.linear_cross_entropy`: the model computes its last
    hidden states, and the logits never exist as a whole.

    inputs: what the model takes, without labels. labels: int64 [N, T]; IGNORED where nothing is supervised.
    shift: a decoder's labels are its own inputs: position t predicts label t + 1.
    accuracy: adds the number of labels that the model finds most likely, as the part "token_accuracy".
    """
    supervised = labels[..., 1:] if shift else labels
    count = (supervised != IGNORED).sum()
    if getattr(model, _WHOLE, False):
        logits = model(**inputs, use_cache=False).logits
        if shift:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        total = cast(Tensor, cross_entropy(logits, labels, reduction="sum"))
        parts = {"token_accuracy": _correct(logits, labels)} if accuracy else {}
        return Loss(total, count, parts)
    hidden = last_hidden_states(model, inputs)
    out = projection_of(model)
    hidden = hidden if out.scale == 1.0 else hidden * out.scale
    total = cast(
        Tensor,
        linear_cross_entropy(
            hidden, out.weight, labels, bias=out.bias, softcap=out.softcap, shift=shift, reduction="sum"
        ),
    )
    parts = {}
    if accuracy:
        if shift:
            hidden, labels = hidden[..., :-1, :], labels[..., 1:]
        parts["token_accuracy"] = _hits(hidden, labels, out)
    return Loss(total, count, parts)


def last_hidden_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[N, T, H], what the output projection is given; the projection itself is not computed."""
    with _skipped(model.get_output_embeddings()) as seen:
        model(**inputs, use_cache=False)
    return seen[-1]


@contextmanager
def _skipped(projection: Any) -> Iterator[list[Tensor]]:
    """The module notes its input, and gives the logits of no row: what the model goes on to do to them (a cap, a
    bias) costs nothing, whatever it is."""
    seen: list[Tensor] = []
    own = projection.__dict__.get("forward")

    def note(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden.new_empty(0, *hidden.shape[1:-1], projection.weight.shape[0])

    projection.forward = note
    try:
        yield seen
    finally:
        if own is None:
            del projection.forward
        else:
            projection.forward = own


@torch.no_grad()
def _hits(hidden: Tensor, labels: Tensor, out: Projection) -> Tensor:
    """How many labels are the most likely ones. hidden [..., H], labels [...]. The cap changes no order."""
    wanted = labels != IGNORED
    hidden, labels = hidden[wanted], labels[wanted]
    pieces = zip(hidden.split(_ROWS), labels.split(_ROWS), strict=True)
    hits = [(F.linear(h, out.weight, out.bias).argmax(-1) == y).sum() for h, y in pieces]
    return torch.stack(hits).sum() if hits else labels.new_zeros(())


@torch.no_grad()
def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Labels [N, T] moved one to the right behind the model's start token, padding where they are IGNORED: what an
    encoder-decoder reads while it learns to write the labels."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    config = model.config
    start = getattr(config, "decoder_start_token_id", None)
    moved = torch.roll(labels, 1, dims=-1)
    moved[..., 0] = start if start is not None else config.pad_token_id
    return moved.masked_fill(moved == IGNORED, config.pad_token_id)


@torch.no_grad()
def settle_projection(model: Any) -> str | None:
    """Tries `projection_of` on a few tokens against the model's own logits. Where they differ, the model does more
    to its logits than we know: the loss is then taken from the whole logits, and the returned note says so."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(_PROBE).remainder(vocabulary).unsqueeze(0)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    own = model(**inputs, use_cache=False).logits.float()
    hidden, out = last_hidden_states(model, inputs), projection_of(model)
    ours = F.linear(
        (hidden * out.scale).float(), out.weight.float(), None if out.bias is None else out.bias.float()
    )
    if out.softcap is not None:
        ours = out.softcap * torch.tanh(ours / out.softcap)
    tolerance = 1e-4 if out.weight.dtype == torch.float32 else 3e-2
    if own.shape == ours.shape and torch.allclose(
        own, ours, rtol=tolerance, atol=tolerance * float(own.abs().max())
    ):
        return None
    setattr(model, _WHOLE, True)
    return f"{type(model).__name__} changes its logits in a way of its own: they are computed whole in training"
