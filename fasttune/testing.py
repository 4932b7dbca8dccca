"""TaskConformance: the kit that a plugin's author runs with pytest.

class TestMyTask(TaskConformance):
    task = MyTask
    labels = ["no", "yes"]
    rows = [{"text": "a short one", "label": "no"}, ...]        # eight or more, of different sizes
    bad_rows = [({"text": "", "label": "no"}, "text")]          # a row, and the column at fault

    def model(self, folder):                                    # writes a tiny model, returns its directory
        ...

    def perfect(self, row):                                     # the prediction that is right for a row
        return {"label": row["label"], ...}
"""

from __future__ import annotations

import copy
import json
import operator
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fasttune.adapt import Adapted, LoRALinear, adapt, merge_lora
from fasttune.batching import collate
from fasttune.config import Full, Head, Lora
from fasttune.data import Encoded, check
from fasttune.errors import BadRow
from fasttune.media import Limits
from fasttune.prepare import build_bundle, looks
from fasttune.readers import MixedRows, Table
from fasttune.rows import Rows, open_rows
from fasttune.task import Bundle, Sample, Source, Task, overrides, primary_metric

__all__ = ["Full", "Head", "Lora", "TaskConformance", "check_demo_model", "collate"]

_SEED = 7
_DEMO_BYTES = 6_000_000
_RELATIVE = 2e-4  # of the largest value: fp32 sums over another padding are taken in another order
_NOTHING = 1e-6  # in a gradient of the mean: that of a key's bias is 0, and what is left of rounding adds up


class TaskConformance:
    """Subclass it in a test module of the plugin; each test method checks one clause of the contract."""

    task: ClassVar[type[Task]]
    labels: ClassVar[Sequence[str]] = ()
    rows: ClassVar[Sequence[Mapping[str, Any]]] = ()
    bad_rows: ClassVar[Sequence[tuple[Mapping[str, Any], str]]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    perfect_score: ClassVar[float] = 1.0
    """The primary metric's value when every prediction is right."""
    learning_rate: ClassVar[float] = 3e-3
    steps: ClassVar[int] = 400
    """Steps within which eight rows are learned by heart, at `learning_rate`."""
    learned: ClassVar[float] = 0.2
    """Share of the first loss that is left when they are."""
    strategies: ClassVar[Sequence[Any]] = (Full(), Head(), Lora(rank=4, dropout=0.0))
    """Leave Lora out for models without linear layers."""

    def model(self, folder: Path) -> str:
        """Writes a tiny pretrained model with its processor into `folder`; returns the directory."""
        raise NotImplementedError

    def perfect(self, row: Mapping[str, Any]) -> Any:
        """What `decode` gives for a row when the model is right. row: as meters get it."""
        raise NotImplementedError

    def comparable(self, prediction: Any) -> Any:
        """A prediction as two of them are compared, numbers to a tolerance. Override it where rounding shows
        otherwise: a pixel near the edge of a mask turns, and the mask is written as text."""
        return prediction

    def table(self, folder: Path) -> Sequence[Mapping[str, Any]]:
        """The rows; override it where they name files, which go into `folder`."""
        return self.rows

    # What the tests share.

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        folder = tmp_path / "model"
        folder.mkdir()
        return Source(self.model(folder))

    @pytest.fixture
    def subject(self) -> Task:
        counts = dict.fromkeys(self.labels, 8)
        options = self.task.Options.model_validate(dict(self.options))
        return self.task(self.task(options).resolve(counts))

    @pytest.fixture
    def bundle(self, subject: Task, source: Source) -> Bundle:
        bundle = build_bundle(subject, source, list(self.labels), _SEED)
        bundle.model.float().eval()
        return bundle

    @pytest.fixture
    def encoded(self, subject: Task, bundle: Bundle, tmp_path: Path) -> Encoded:
        rows = self._rows(subject, self.table(tmp_path))
        assert len(rows) >= 8, "the kit needs eight rows or more"
        encoded = Encoded(rows, subject, bundle, train=False).fill()
        assert not encoded.bad, f"rows of the kit must be good: {encoded.bad}"
        return encoded

    @staticmethod
    def _rows(task: Task, rows: Sequence[Mapping[str, Any]]) -> Rows:
        return open_rows(Table("rows", MixedRows(map(dict, rows))), task.columns, {}, Limits())

    @staticmethod
    def _batch(encoded: Encoded, indices: Sequence[int]) -> dict[str, Tensor]:
        return collate([encoded[i] for i in indices], encoded.bundle.padding)

    # The clauses.

    def test_importing_the_module_imports_no_torch(self) -> None:
        code = f"import sys, {self.task.__module__}; sys.exit('torch' in sys.modules)"
        path = {"PYTHONPATH": ":".join(filter(None, sys.path))}
        done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"importing {self.task.__module__} imports torch, or fails: {done.stderr}"

    def test_columns_and_metrics_are_declared(self, subject: Task) -> None:
        roles = [column.role for column in subject.columns]
        assert roles, "a task needs at least one column"
        names = [name for column in subject.columns for name in (column.role, *column.aliases)]
        assert len(names) == len(set(names)), "a name belongs to one role"
        assert sum(metric.primary for metric in subject.metrics) == 1, "one metric is the primary one"

    def test_encode_is_pure_and_pickles(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        pickle.loads(pickle.dumps(subject))
        for position in range(len(encoded.rows)):
            row = encoded.rows.read(position, media=True)
            before = copy.deepcopy(row)
            first, second = (_as_list(subject.encode(row, bundle, True)) for _ in range(2))
            assert _same(row, before), "encode changed its row"
            for one, other in zip(first, pickle.loads(pickle.dumps(second)), strict=True):
                assert one.cost == other.cost > 0
                assert one.tensors.keys() == other.tensors.keys()
                for name, array in one.tensors.items():
                    np.testing.assert_array_equal(array, other.tensors[name])

    def test_prediction_needs_no_target(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        targets = {column.role for column in subject.columns if column.supervises}
        row = encoded.rows.read(0, media=True)
        bare = {role: value for role, value in row.items() if role not in targets}
        assert _as_list(subject.encode(bare, bundle, False))

    def test_loss_and_gradients_add_up(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        """Loss and gradients of A and B together are those of A plus those of B, padded differently."""
        for parameter in bundle.model.parameters():
            parameter.requires_grad_(True)
        order = sorted(range(len(encoded)), key=encoded.costs.__getitem__)
        half = len(order) // 2

        def run(indices: Sequence[int]) -> tuple[float, float, dict[str, Tensor]]:
            bundle.model.zero_grad()
            loss = subject.loss(bundle.model, self._batch(encoded, indices))
            loss.total.backward()
            gradients = {n: p.grad.clone() for n, p in bundle.model.named_parameters() if p.grad is not None}
            return float(loss.total.detach()), float(loss.count), gradients

        together, short, long = run(order), run(order[:half]), run(order[half:])
        assert together[1] == pytest.approx(short[1] + long[1]), "the counts don't add up"
        assert together[0] == pytest.approx(short[0] + long[0], rel=_RELATIVE), "the losses don't add up"
        for name, gradient in together[2].items():
            parts = [part[2][name] for part in (short, long) if name in part[2]]
            largest = max(float(gradient.abs().max()), *(float(part.abs().max()) for part in parts))
            error = float((sum(parts) - gradient).abs().max())
            assert error <= _RELATIVE * largest + _NOTHING * max(1.0, together[1]), (
                f"gradients of {name} don't add up: {error:g} of {largest:g}"
            )

    def test_packing_changes_neither_loss_nor_gradients(
        self, subject: Task, bundle: Bundle, encoded: Encoded
    ) -> None:
        samples = [encoded[i] for i in range(len(encoded))]
        packed = subject.pack(samples)
        if not subject.packs:
            same = len(packed) == len(samples) and all(map(operator.is_, packed, samples))
            assert same, "a task that does not pack leaves the samples as they are"
            return
        assert len(packed) < len(samples), "pack put nothing together"
        results = []
        for some in (samples, packed):
            bundle.model.zero_grad()
            loss = subject.loss(bundle.model, collate(some, bundle.padding))
            loss.total.backward()
            gradients = {n: p.grad.clone() for n, p in bundle.model.named_parameters() if p.grad is not None}
            results.append((float(loss.total.detach()), float(loss.count), gradients))
        (total, count, plain), (packed_total, packed_count, together) = results
        assert packed_count == pytest.approx(count), "packing changes the count"
        assert packed_total == pytest.approx(total, rel=_RELATIVE), "packing changes the loss"
        for name, gradient in plain.items():
            error = float((together[name] - gradient).abs().max())
            noise = _NOTHING * max(1.0, count)
            assert error <= _RELATIVE * float(gradient.abs().max()) + noise, f"packing changes gradients of {name}"

    def test_predictions_do_not_depend_on_the_batch(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        everything = range(len(encoded))
        together = self._decode(subject, bundle, encoded, list(everything))
        alone = [self._decode(subject, bundle, encoded, [i])[0] for i in everything]
        assert self._agree(together, alone), "a row's prediction depends on the rows beside it"

    @torch.no_grad()
    def _decode(self, task: Task, bundle: Bundle, encoded: Encoded, indices: list[int]) -> list[Any]:
        bundle.model.eval()
        predictions = task.decode(bundle.model, self._batch(encoded, indices), bundle)
        assert len(predictions) == len(indices), "decode gives one prediction a sample"
        return predictions

    def _agree(self, some: Sequence[Any], others: Sequence[Any], tolerance: float = _RELATIVE) -> bool:
        return _close([*map(self.comparable, some)], [*map(self.comparable, others)], tolerance)

    def test_only_the_intended_parameters_get_gradients(
        self, subject: Task, source: Source, encoded: Encoded
    ) -> None:
        for adapted in self._adapted(subject, source):
            adapted.train_mode()
            loss = subject.loss(adapted.bundle.model, self._batch(encoded, range(4)))
            loss.total.backward()
            model = adapted.bundle.model
            got = {name for name, p in model.named_parameters() if p.grad is not None}
            head = {
                name for name in adapted.trained if name.startswith(tuple(f"{h}." for h in adapted.bundle.head))
            }
            kind = adapted.strategy.kind
            assert got <= set(adapted.trained), (
                f"{kind}: {sorted(got - set(adapted.trained))[:3]} should be frozen"
            )
            if adapted.bundle.head_is_new or kind != "lora":
                assert head, f"{kind}: the head has no trained parameters"
            assert head <= got, f"{kind}: the loss doesn't reach {sorted(head - got)[:3]} of the head"
            if isinstance(adapted.strategy, Lora):
                assert any(name.endswith("lora_b") for name in got), "the loss reaches no LoRA matrix"

    def _adapted(self, task: Task, source: Source) -> Iterator[Adapted]:
        for strategy in self.strategies:
            bundle = build_bundle(task, source, list(self.labels), _SEED)
            bundle.model.float()
            yield adapt(bundle, strategy)

    def test_eight_rows_can_be_learned_by_heart(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        adapted = adapt(bundle, Full())
        optimizer = torch.optim.AdamW(adapted.trained.values(), lr=self.learning_rate)
        batch = self._batch(encoded, range(8))
        bundle.model.eval()  # no dropout: this is about the loss, not about generalisation
        first = None
        for _ in range(self.steps):
            optimizer.zero_grad()
            loss = subject.loss(bundle.model, batch)
            mean = loss.total / loss.count
            mean.backward()
            optimizer.step()
            now = float(mean.detach())
            first = now if first is None else first
            if now < self.learned * first:
                return
        pytest.fail(f"the loss went from {first:.3f} to {now:.3f} only")

    def test_perfect_predictions_score_perfectly(self, subject: Task, encoded: Encoded) -> None:
        whole, first, second = subject.meter(), subject.meter(), subject.meter()
        for index in range(len(encoded.rows)):
            reference = encoded.rows.with_masks(encoded.rows.read(index))
            whole.update(self.perfect(reference), reference)
            (first if index % 3 else second).update(self.perfect(reference), reference)
        name = primary_metric(subject).name
        if name in whole.result():  # or it follows from the loss
            assert whole.result()[name] == pytest.approx(self.perfect_score)
        first.merge(second)
        assert _close(first.result(), whole.result()), "a merged meter differs from one that saw everything"
        parts = subject.loss(encoded.bundle.model, self._batch(encoded, range(2))).parts
        finished = subject.finish({"loss": 0.0, **dict.fromkeys(parts, 0.0), **whole.result()})
        missing = {metric.name for metric in subject.metrics} - finished.keys()
        assert not missing, f"the meter's result lacks {missing}"
        json.dumps(whole.result(), allow_nan=False)

    def test_what_it_draws_are_pictures(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        """Of samples, where the task has a sheet; of a row without its targets, where it draws predictions."""
        if overrides(subject, "sheet"):
            first = [encoded[i] for i in range(8)]
            for samples in (first, first[:1]):
                assert min(subject.sheet(samples, bundle).size) > 0, "the sheet is empty"
        if overrides(subject, "draw"):
            targets = {column.role for column in subject.columns if column.supervises}
            for position in range(len(encoded.rows)):
                row = encoded.rows.read(position, media=True)
                bare = {role: value for role, value in row.items() if role not in targets}
                before = copy.deepcopy(bare)
                found = self.perfect(encoded.rows.with_masks(encoded.rows.read(position)))
                picture = subject.draw(bare, found, bundle)
                assert min(picture.size) > 0, "the picture is empty"
                assert _same(bare, before), "draw changed its row"

    def test_saved_and_loaded_predicts_the_same(
        self, subject: Task, bundle: Bundle, encoded: Encoded, tmp_path: Path
    ) -> None:
        before = self._decode(subject, bundle, encoded, list(range(len(encoded))))
        model: Any = bundle.model
        model.save_pretrained(tmp_path / "saved")
        if hasattr(bundle.processor, "save_pretrained"):
            bundle.processor.save_pretrained(tmp_path / "saved")
        loaded = build_bundle(subject, Source(tmp_path / "saved"), list(self.labels), _SEED + 1)
        loaded.model.float()
        after = self._decode(subject, loaded, encoded, list(range(len(encoded))))
        assert self._agree(before, after), "the saved model predicts something else"

    def test_lora_merged_equals_unmerged(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        strategy = next((s for s in self.strategies if isinstance(s, Lora)), None)
        if strategy is None:
            pytest.skip("this model has no linear layers for LoRA")
        adapt(bundle, strategy)
        generator = torch.Generator().manual_seed(_SEED)
        for module in bundle.model.modules():
            if isinstance(module, LoRALinear):
                noise = torch.randn(module.lora_b.shape, generator=generator)
                module.lora_b.data.copy_(0.02 * noise)
        indices = list(range(len(encoded)))
        unmerged = self._decode(subject, bundle, encoded, indices)
        merge_lora(bundle.model)
        assert not any(isinstance(module, LoRALinear) for module in bundle.model.modules())
        assert self._agree(unmerged, self._decode(subject, bundle, encoded, indices), 1e-3)

    def test_a_bad_row_names_its_row_and_column(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        assert self.bad_rows, "give the kit bad rows"
        good = dict(encoded.rows.raw(0))
        for row, column in self.bad_rows:
            found = self._find_bad(subject, bundle, [good, {**good, **row}])
            assert [(bad.row, bad.column) for bad in found] == [(2, column)], f"{row}: found {found}"
            assert found[0].why

    def _find_bad(self, task: Task, bundle: Bundle, rows: list[dict[str, Any]]) -> list[BadRow]:
        table = self._rows(task, rows)
        known = set(self.labels) or None
        seen = check(table, known, classes_of=looks(task)[1])
        return [*seen.bad, *Encoded(table.take(seen.good), task, bundle, train=True).fill().bad]

    def test_predictions_are_json(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        json.dumps(self._decode(subject, bundle, encoded, list(range(len(encoded)))), allow_nan=False)

    def test_score_is_loss_and_decode(self, subject: Task, bundle: Bundle, encoded: Encoded) -> None:
        batch = self._batch(encoded, range(len(encoded)))
        with torch.no_grad():
            loss, predictions = subject.score(bundle.model, batch, bundle)
            plain = subject.loss(bundle.model, batch)
        assert float(loss.total) == pytest.approx(float(plain.total), rel=1e-5)
        assert float(loss.count) == pytest.approx(float(plain.count))
        if predictions is not None:
            assert self._agree(predictions, self._decode(subject, bundle, encoded, list(range(len(encoded)))))


def check_demo_model(folder: Path, script: str) -> None:
    """What the model that a demo brings is held to: 6 MB in all, weights in bfloat16, and a card that names the
    script of the plugin which made it."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= _DEMO_BYTES, f"{folder}: {size:,} bytes, more than {_DEMO_BYTES:,}"
    weights = load_file(folder / "model.safetensors").values()
    types = {tensor.dtype for tensor in weights if tensor.is_floating_point()}
    assert types == {torch.bfloat16}, f"{folder}: weights are {sorted(map(str, types))}, not all bfloat16"
    assert script in (folder / "README.md").read_text(encoding="utf-8"), f"{folder}: its card names no {script}"


def _as_list(samples: Sample | list[Sample]) -> list[Sample]:
    return samples if isinstance(samples, list) else [samples]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if hasattr(one, "samples"):
        return np.array_equal(one.samples, other.samples)
    return np.array_equal(np.asarray(one), np.asarray(other))


def _close(one: Any, other: Any, tolerance: float = _RELATIVE) -> bool:
    """Whether two JSON values are equal, numbers to a tolerance."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_close(one[key], other[key], tolerance) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, (int, float)) and not isinstance(one, bool):
        return one == pytest.approx(other, rel=tolerance, abs=tolerance)
    return one == other
