"""The task contract, and how installed tasks are found. Importing this module imports no torch.

A plugin package declares one entry point a task, in the group of the contract's version:

    [project.entry-points."fasttune.tasks.v1"]
    text-classification = "fasttune_classification.text:TextClassification"

The host owns columns, splits, loading, collation, precision, strategies, the optimizer, checkpoints and reports.
A task says what a row means, what the loss is, and what a prediction looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from fasttune.errors import PluginError, nearest
from fasttune.layouts import Opened, Place

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor, nn

GROUP = "fasttune.tasks.v1"
_GROUP_STEM = "fasttune.tasks."

Kind = Literal["text", "label", "labels", "number", "image", "audio", "json", "mask"]
"""What a column holds, and what the host hands to `encode`:

text    str, neither null nor blank
label   str, the class name; the host collects the classes of train, sorts them and hands them to `build`
labels  list[str], any number of class names (multi label)
number  float, finite
image   PIL.Image.Image in RGB, EXIF rotation applied
audio   fasttune.media.Audio: float32 mono samples [frames] and their rate in Hz
mask    PIL.Image.Image of the size of its row's image, whose pixels are ids, neither scaled nor converted, EXIF
        rotation applied: L, I;16 or I, P (the indices are the ids) or RGB. `classes_of`, `count` and the meter get
        it opened, too
json    any JSON value, as it stands in the file; class ids that the file's own features name become those names
"""


_FILES = ("file", "file_name", "filename", "filepath", "path")
MEDIA_ALIASES: Mapping[str, tuple[str, ...]] = {
    "image": ("img", "image_path", "image_file", *_FILES, "picture", "photo", "pixels"),
    "audio": (
        *("audio_path", "audio_file", "audio_filepath", "clip", "wav", "wav_path", "speech", "sound", "recording"),
        *_FILES,
    ),
}
"""What columns of images and of audio are found by, whatever the task."""


@dataclass(frozen=True)
class Column:
    """A column that the task reads.

    role: its key in the row. aliases: other names it is found by, before MEDIA_ALIASES. required: False if data
    may lack it.
    target: it supervises, so that rows to predict may lack it; labels and numbers always do.
    """

    role: str
    kind: Kind
    aliases: tuple[str, ...] = ()
    required: bool = True
    target: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What it is found by in a table, the first one first."""
        return tuple(dict.fromkeys((self.role, *self.aliases, *MEDIA_ALIASES.get(self.kind, ()))))

    @property
    def supervises(self) -> bool:
        return self.target or self.kind in ("label", "labels", "number")


@dataclass(frozen=True)
class Metric:
    """A number in the meter's result. The primary one picks `best/` and stops early."""

    name: str
    best: Literal["max", "min"]
    primary: bool = False


@dataclass
class Bundle:
    """A pretrained model with the task's head, and its processor.

    head: names of the modules that strategy head trains (as in `model.named_modules()`).
    head_is_new: the head starts from random weights, so that every strategy trains and saves it. False for a head
        that was pretrained with the model, such as a language model's output projection: LoRA leaves it frozen.
    blocks: names of the repeated layers in depth order, input first: layer-wise rates, gradual unfreezing and
        activation checkpointing go by them.
    lora_targets: names of the modules that LoRA adapts when the user names none.
    padding: the value that fills a tensor up when samples differ in length, by tensor name; 0 if not named.
    notes: what the user should know, such as "head replaced: 2 classes became 5".
    rates: a factor on the learning rate of modules, by name: a pretrained backbone under a transformer that learns
        faster. The longest name that fits a parameter counts.
    clip: the norm that such models have their gradient clipped to, where the run file names none; None: 1.
    cacheable: False if what the head reads of a sample is more than the base's output has rows for it (one tensor
        a layer, [layers, N, ...]), so that the features of a frozen base can't be kept a sample.
    """

    model: nn.Module
    processor: Any
    head: tuple[str, ...]
    blocks: tuple[str, ...]
    lora_targets: tuple[str, ...]
    padding: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    head_is_new: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)
    clip: float | None = None
    cacheable: bool = True

    @property
    def writes_text(self) -> bool:
        """Whether the model is a language model: its head is pretrained but for the rows of new tokens."""
        return bool(getattr(self.model, "can_generate", lambda: False)())


@dataclass
class Sample:
    """One encoded row, without the batch dimension.

    tensors: arrays by name; samples of a batch are padded to the longest in every dimension.
    cost: what the sample costs to compute, in tokens, frames or pixels; drives buckets and the padding share.
    truncated: how many units of cost were cut off; by role where a task reads several columns.
    sides: height and width, whose product is the cost, where samples are padded along both: a batch is made of
        like shapes, and its padding is told by them.
    """

    tensors: dict[str, np.ndarray]
    cost: int
    truncated: int | Mapping[str, int] = 0
    sides: tuple[int, int] | None = None


@dataclass
class Loss:
    """A SUM over what is supervised, and its COUNT: never a mean, so that the host can normalise once over
    micro-batches and ranks. total: 0-d, fp32, differentiable. count: number of supervised items; where a whole
    step has none and yet a loss (pictures without objects), it is divided by one. parts: further sums over the
    same items by name, such as how many were right; an evaluation reports each divided by count."""

    total: Tensor
    count: Tensor | float
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Demo:
    """What `fasttune demo TASK` trains and compares.

    title: one line that says what is learned from what.
    model: directory of the embedded pretrained model.
    train, valid: rows by role; an image is a PIL.Image.
    variants: (name, run-file settings as a nested mapping), in the order they are shown.
    baselines: the primary metric of trivial answers, such as the majority class, by name.
    before: whether the model of the last variant is measured before it is trained, too, its new head included.
    picture: makes one picture of those that `Task.draw` makes of the first rows of valid, by the best variant.
    """

    title: str
    model: str
    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]
    variants: tuple[tuple[str, Mapping[str, Any]], ...]
    baselines: Mapping[str, float] = field(default_factory=dict)
    before: bool = False
    picture: Callable[[Sequence[Image.Image]], Image.Image] | None = None


def every_strategy(
    train: Mapping[str, Mapping[str, Any]], **shared: Any
) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Variants of a demo: the model from random weights, then the pretrained one by every strategy.

    train: `train` settings of "from scratch", "head", "lora" and "full". shared: settings that all of them have.
    """
    variants = []
    for name, kind in {"from scratch": "full", "head": "head", "lora": "lora", "full": "full"}.items():
        weights = {"weights": "random"} if name == "from scratch" else {}
        variants.append((name, {**weights, "strategy": {"kind": kind}, "train": train[name], **shared}))
    return tuple(variants)


class Meter(Protocol):
    """Streaming metrics: no logits are kept."""

    def update(self, prediction: Any, reference: Mapping[str, Any]) -> None:
        """prediction: one item of `Task.decode`. reference: the row, by role, of its media only masks opened."""

    def merge(self, other: Any) -> None:
        """Takes in what another rank has seen."""

    def result(self) -> dict[str, Any]:
        """Metrics by name; JSON-able."""


class NoOptions(BaseModel):
    """For a task without settings of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(str):
    """A local directory or hub id, as text, with what `from_pretrained` needs beside it."""

    remote_code_revision: str | None = None
    random_weights: bool = False  # build from the configuration alone: what training from scratch starts from

    @property
    def load_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`: weights only as safetensors, and remote code only at the
        one revision that the user named."""
        arguments: dict[str, Any] = {"use_safetensors": True}
        if self.remote_code_revision:
            arguments |= {"trust_remote_code": True, "revision": self.remote_code_revision}
        return arguments


class Task:
    """One class and one entry point a task. Subclass, set the class attributes and write the methods.

    `columns` and `metrics` may be properties where they depend on `self.options`. A task object must pickle.
    """

    columns: tuple[Column, ...] = ()
    metrics: tuple[Metric, ...] = ()
    Options: ClassVar[type[BaseModel]] = NoOptions
    packs: bool = False  # whether `pack` does something; may be a property

    def __init__(self, options: Any = None):
        self.options: Any = self.Options() if options is None else options

    def build(self, source: Source, labels: list[str]) -> Bundle:
        """Loads the pretrained model with a head for `labels` (empty if the task has no label column), and the
        processor. Raises ModelError if the model is of another family."""
        raise NotImplementedError

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample | list[Sample]:
        """Turns a row, by role, into one or several samples. Pure and picklable. Roles that supervise may be
        missing (prediction). Raises DataError(column, why) for a row that can't be used."""
        raise NotImplementedError

    def vary(self, row: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """The row as training is to see it this once, for `encode`: flipped, cropped, recoloured. row: by role,
        media opened; it is not changed. random: this row's own in this epoch, the same after a resume and in any
        worker. What `encode` makes of it must cost what the row itself does, and be as many samples. Called for
        training batches only: rows are checked, and evaluated, as they are."""
        return row

    def to_predict(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as `encode` is to get it where a prediction is all that is wanted, columns that supervise left
        out. Override it where one column holds both what is given and what is to be predicted: a conversation."""
        return row

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """The loss of a padded batch [N, ...], through `fasttune.ops`."""
        raise NotImplementedError

    def decode(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> list[Any]:
        """One JSON-able prediction a sample: the one path of evaluate, predict and demo."""
        raise NotImplementedError

    def score(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> tuple[Loss, list[Any] | None]:
        """Loss and predictions of a batch. Override it where one forward pass gives both, or where the loss and
        its parts are all that is measured: None then takes the place of predictions, and no meter sees them."""
        return self.loss(model, batch), self.decode(model, batch, bundle)

    def join(self, predictions: list[Any], row: Mapping[str, Any]) -> Any:
        """The prediction of a row from those of its samples, in their order. Override it where `encode` returns
        several. row: by role, as `encode` got it, media not opened."""
        (prediction,) = predictions
        return prediction

    def pack(self, samples: list[Sample]) -> list[Sample]:
        """The samples of a training micro-batch, put together so that less of it is padding; loss, count and
        gradients must stay what they are. Called only where `packs` is true."""
        return samples

    def show(self, sample: Sample, bundle: Bundle) -> str | None:
        """A sample for `fasttune check`, as the loss sees it, with what is supervised marked; None: the host's
        own way."""
        return None

    def sheet(self, samples: list[Sample], bundle: Bundle) -> Image.Image:
        """The first samples of train on one picture, as the loss sees them, for `fasttune check`. Override it
        where there is something to see."""
        raise NotImplementedError

    def draw(self, row: Mapping[str, Any], prediction: Any, bundle: Bundle) -> Image.Image:
        """A row with its prediction drawn in, for `fasttune predict --draw`. row: by role, media opened, columns
        that supervise left out. Override it where there is something to see."""
        raise NotImplementedError

    def check_columns(self, roles: frozenset[str]) -> None:
        """Raises DataError(None, why) if the roles that the data have a column for can't make a row together."""

    @classmethod
    def open(cls, place: Place) -> Opened | None:
        """The rows of data that are no table: a nested JSON document such as SQuAD's, a folder of images beside
        their boxes or masks. None if this task doesn't know the layout: the host then goes on by itself (tables
        beside media files, a folder a class). Called for folders and for files that are no table.

        A path that the data name must not lead out of `Opened.root`: images and audio are checked by the host,
        whatever else is read, here. Raises DataError(None, why) for a layout that is known and broken as a whole;
        a fault of one row is a DataError in its place.
        """
        return None

    def classes_of(self, row: Mapping[str, Any]) -> Iterable[str] | None:
        """The classes that a row names where they don't stand in a label column: those of its boxes, each as often
        as it occurs. The host collects and sorts them as it does a column's, and a row of valid that names one
        that train lacks is a bad row. row: as for `count`. None: a task without such classes. Raises
        DataError(column, why) for a row that can't be used."""
        return None

    def count(self, row: Mapping[str, Any]) -> Iterable[str]:
        """Names under which `resolve` is to find this row counted, beside the classes. row: by role, values
        checked, masks opened, audio not, of an image its (width, height). Raises DataError(column, why) for a row
        that can't be used."""
        return ()

    def meter(self) -> Meter:
        raise NotImplementedError

    def finish(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics of an evaluation, with what follows from them as a whole: a perplexity from "loss"."""
        return metrics

    def resolve(self, counts: Mapping[str, int]) -> Any:
        """The options with everything written out that depends on the classes of train, such as class weights.

        counts: rows a class, sorted by class name, then rows a name that `count` gave, in all of train; empty if
        there is neither. Raises DataError(column, why) if these classes can't be learned. The host makes a new
        task of it.
        """
        return self.options

    @classmethod
    def demo(cls) -> Demo | None:
        """The embedded model and data of `fasttune demo`, offline; None if the task has none."""
        return None


def overrides(task: Task, method: str) -> bool:
    """Whether the task has a method of its own in the place of one that does nothing here."""
    return getattr(type(task), method) is not getattr(Task, method)


@dataclass(frozen=True)
class Plugin:
    """An entry point as its distribution's metadata states it; nothing is imported."""

    name: str
    value: str
    distribution: str
    version: str
    group: str


def installed() -> list[Plugin]:
    """All tasks that installed distributions declare, for any version of the contract, sorted by name."""
    found = {
        Plugin(point.name, point.value, dist.name, dist.version, point.group)
        for dist in metadata.distributions()
        for point in dist.entry_points
        if point.group.startswith(_GROUP_STEM)
    }
    return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))


def find(name: str) -> Plugin:
    """The plugin that serves a task: `name`, or `distribution:name` where two distributions claim one name.

    Raises PluginError if there is none (with the nearest name), if several claim it, or if it was made for
    another version of the contract.
    """
    wanted, _, task_name = name.rpartition(":")
    everything = installed()
    matches = [p for p in everything if p.name == task_name and wanted in ("", p.distribution)]
    current = [p for p in matches if p.group == GROUP]
    if len(current) == 1:
        return current[0]
    if len(current) > 1:
        claims = ", ".join(f"{p.distribution}:{p.name}" for p in current)
        raise PluginError(f"task {name!r} is claimed by {len(current)} distributions; name one of: {claims}")
    if matches:
        other = matches[0]
        raise PluginError(
            f"task {name!r} of {other.distribution} {other.version} was made for contract "
            f"{other.group.removeprefix(_GROUP_STEM)}; this fasttune speaks {GROUP.removeprefix(_GROUP_STEM)}. "
            "Install a release of that package for this contract, or another fasttune."
        )
    names = sorted({p.name for p in everything if p.group == GROUP})
    listed = ", ".join(names) or "none"
    raise PluginError(f"no installed task is named {name!r}.{nearest(task_name, names)} Installed: {listed}.")


def load(plugin: Plugin) -> type[Task]:
    """Imports the task's class. Raises PluginError, with the cause, if the plugin is broken."""
    where = f"task {plugin.name!r} of {plugin.distribution} {plugin.version}"
    point = metadata.EntryPoint(plugin.name, plugin.value, plugin.group)
    try:
        loaded = point.load()
    # A plugin is foreign code: whatever it raises at import, sys.exit() included, must cost only itself.
    except (Exception, SystemExit) as error:
        raise PluginError(f"{where} is broken: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Task)):
        raise PluginError(f"{where} is broken: {plugin.value} is not a subclass of fasttune.task.Task")
    return loaded


def primary_metric(task: Task) -> Metric:
    """The metric that picks `best/`; the loss on valid if the task names none."""
    return next((metric for metric in task.metrics if metric.primary), Metric("loss", "min", primary=True))
