"""YOLO's folders (docs.ultralytics.com/datasets/detect): data.yaml names splits and classes; each image has a text
file of labels, a line an object, in the twin folder `labels`, or none if there is nothing in it.

A line is `class cx cy w h`, centre and size as fractions of the image; rows keep them so. A line with more points
is a polygon (segmentation, oriented boxes): a mask, or where boxes are wanted, its bounding box.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fasttune.errors import DataError
from fasttune.layouts import SPLITS, Opened, Place
from fasttune_detection.places import (
    IMAGE_SUFFIXES,
    below,
    images_in,
    is_inside,
    listed,
    notes_on_absent,
    notes_on_names,
    objects_or_fault,
    read_text,
)
from fasttune_detection.stated import Wanted

_NAMES = ("data.yaml", "data.yml", "dataset.yaml")
_LINE = "`class cx cy w h`, or a polygon, `class x1 y1 x2 y2 x3 y3 …`"
_BEYOND = 0.01  # of the image, which rounding may leave: as Ultralytics has it; pixels are checked with the image


def open_yolo(place: Place, wanted: Wanted = "boxes") -> Opened | None:
    """The images of a split, sorted in each folder; None if the place is no YAML file and has no data.yaml.

    Paths in the file are relative to its `path`, and that to the folder that the file stands in. Nothing is read
    but images and labels of the split, and `download` never runs. Raises DataError for a file that is broken, or
    that names what isn't there or lies outside the root.
    """
    file = _yaml_of(place.path)
    if file is None:
        return None
    document = _read_yaml(file)
    names = _names(document)
    splits = tuple(
        key for key, value in document.items() if value and any(key in known for known in SPLITS.values())
    )
    if not splits:
        raise DataError(None, f"{file.name}: names no split; expected train, val or test: a folder of images")
    split = place.choose(splits)
    found = _Set(file, place.root, document)
    images = list(found.images(document[split]))
    if not images:
        raise DataError(None, f"{file.name}, {split}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) is there")
    rows, seen, notes = _rows(images, found.root, names, _keypoints(document), wanted)
    if seen is not None:
        notes += notes_on_absent(names.values(), seen, split)
    return Opened(rows, found.root, split, splits, (*found.notes, *notes_on_names(names), *notes))


def _yaml_of(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    if all((path / twin).is_dir() for twin in ("images", "labels")):
        raise DataError(None, f"has YOLO's folders images and labels, and no {_NAMES[0]} that names the classes")
    return None


def _read_yaml(file: Path) -> dict[str, Any]:
    text = read_text(file, file.resolve().parent)  # the user named it, wherever a link leads
    try:
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(None, f"{file.name}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2024-13-45 is a ValueError
        raise DataError(None, f"{file.name}: not valid YAML: {error}") from error
    if not isinstance(document, dict) or "names" not in document:
        keys = ", ".join(map(str, document)) if isinstance(document, dict) else type(document).__name__
        raise DataError(None, f"{file.name}: expected train, val and names, found {keys}")
    return document


def _names(document: Mapping[str, Any]) -> dict[int, str]:
    """Class names by id, from a list or a mapping."""
    held = document["names"]
    pairs = list(held.items() if isinstance(held, dict) else enumerate(held if isinstance(held, list) else []))
    if not pairs:
        raise DataError(None, f"names: expected a list or a mapping of class names, found {_said(held)}")
    names: dict[int, str] = {}
    for key, name in pairs:
        index = int(key) if isinstance(key, str) and key.isdecimal() else key
        if type(index) is not int or index < 0 or index in names:
            raise DataError(None, f"names: expected whole numbers from 0, each once, found {_said(key)}")
        if type(name) not in (str, int) or not str(name).strip():  # YAML reads no, on and 1.5 as something else
            raise DataError(None, f"names: {index}: expected a name, found {_said(name)}; write it in quotes")
        names[index] = str(name).strip()
    count = document.get("nc")
    if count is not None and count != len(names):
        raise DataError(None, f"nc is {_said(count)}, and there are {len(names)} names")
    return names


def _keypoints(document: Mapping[str, Any]) -> int:
    """Numbers a line that follow the box, for a set of poses: kpt_shape, [points, 2 or 3]."""
    shape = document.get("kpt_shape")
    if shape is None:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise DataError(None, f"kpt_shape: expected two whole numbers, found {_said(shape)}")
    return shape[0] * shape[1]


def _said(value: Any) -> str:
    """A value for a message. Not a list's or a mapping's: with YAML's aliases, a short file holds endless ones."""
    return f"{value!r:.60}" if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


class _Set:
    """Where the files of a data.yaml lie."""

    def __init__(self, file: Path, root: Path | None, document: Mapping[str, Any]):
        self.own, self.said = file.parent.resolve(), file.name
        self.root = root.resolve() if root else self.own
        self.notes: list[str] = []
        self.base = self._base(document.get("path"))

    def _base(self, stated: Any) -> Path:
        if stated is None or stated == "":
            return self.own
        if not isinstance(stated, str):
            raise DataError(None, f"path: expected a folder, found {_said(stated)}")
        if not (self.own / stated).is_dir():
            self.notes.append(f"path {stated!r} is no folder here; that of {self.said} is taken")
            return self.own
        self._check(self.own / stated, f"path {stated!r}")
        return self.own / stated

    def _check(self, path: Path, said: str) -> None:
        if not is_inside(path, self.root):
            raise DataError(
                None, f"{said} leads out of {self.root}; data.root names the folder that holds all data"
            )

    def images(self, stated: Any) -> Iterator[Path]:
        """Image files of what a split names: folders, lists of images (.txt), or several of them."""
        for entry in stated if isinstance(stated, list) else [stated]:
            if not isinstance(entry, str):
                raise DataError(None, f"expected a folder of images, found {_said(entry)}")
            path = self._find(entry)
            if path.is_dir():
                yield from images_in(path)
            elif path.suffix.lower() == ".txt":
                yield from self._of_list(path)
            else:
                raise DataError(
                    None, f"expected a folder of images or a .txt file that lists them, found {entry!r}"
                )

    def _find(self, entry: str) -> Path:
        """Roboflow writes `../train/images` for what lies in `train/images`."""
        spots = list(dict.fromkeys([self.base / entry, self.base / re.sub(r"^(\.\./)+", "", entry)]))
        there = [spot for spot in spots if spot.exists()]
        for spot in there:
            if is_inside(spot, self.root):
                if spot != spots[0]:
                    self.notes.append(f"{entry!r} is not there; {below(spot, self.root)} is taken")
                return spot
        if not there:
            raise DataError(None, f"no such folder or file: {', '.join(map(str, spots))}")
        self._check(there[0], repr(entry))
        return there[0]

    def _of_list(self, file: Path) -> Iterator[Path]:
        """A line a path, relative to the set's folder, or with `./` to the list's own."""
        for line in read_text(file, self.root).splitlines():
            if name := line.strip():
                yield file.parent / name if name.startswith("./") else self.base / name


def _rows(
    images: list[Path], root: Path, names: Mapping[int, str], keypoints: int, wanted: Wanted
) -> tuple[list[dict[str, Any]], set[str] | None, list[str]]:
    """(a row an image, the classes that are seen, notes). Without a single file of labels, rows have no objects:
    images to predict."""
    rows: list[dict[str, Any]] = [{"image": below(image, root)} for image in images]
    files = [_labels_of(image, root) for image in images]
    there = [os.path.lexists(file) for file in files]
    if not any(there):
        return rows, None, [f"no image has a file of labels; the first would be {below(files[0], root)}"]
    polygons = lines = 0
    seen: set[str] = set()
    for row, file, exists in zip(rows, files, there, strict=True):
        labels = _Labels(below(file, root), names, keypoints, wanted)
        if exists:
            labels.read(file, root)
        row["objects"] = objects_or_fault(
            {wanted: labels.shapes, "labels": labels.labels, "format": "cxcywh"}, labels.faults
        )
        seen.update(labels.labels)
        polygons, lines = polygons + labels.polygons, lines + labels.lines
    notes = []
    if polygons and wanted == "boxes":
        notes.append(f"{polygons:,} of {lines:,} lines are polygons; their bounding boxes are taken")
    if not all(there):
        notes.append(f"{there.count(False):,} of {len(files):,} images have no file of labels: no {wanted}")
    return rows, seen, notes


def _labels_of(image: Path, root: Path) -> Path:
    """The last folder `images` below the root becomes `labels`; without one the labels stand beside the image."""
    inside = Path(below(image, root))
    parts = list(inside.parts[:-1])
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return root.joinpath(*parts, inside.stem + ".txt")


class _Labels:
    """One image's lines: boxes as cxcywh fractions or masks as polygons [[x1, y1, …]] of fractions, names, and
    what is wrong with them."""

    def __init__(self, said: str, names: Mapping[int, str], keypoints: int, wanted: Wanted):
        self.said, self.names, self.keypoints, self.wanted = said, names, keypoints, wanted
        self.shapes: list[Any] = []
        self.labels: list[str] = []
        self.faults: list[str] = []
        self.polygons = self.lines = 0

    def read(self, file: Path, root: Path) -> None:
        try:
            text = read_text(file, root)
        except DataError as error:
            self.faults.append(error.why)
            return
        for number, line in enumerate(text.splitlines(), start=1):
            if values := line.split():
                self.lines += 1
                try:
                    self._add(values)
                except ValueError as error:
                    self.faults.append(f"{self.said}, line {number}: {error}")

    def _add(self, values: list[str]) -> None:
        numbers = [_number(value) for value in values]
        if len(numbers) in (5, 5 + self.keypoints):
            if self.wanted == "masks":
                raise ValueError("expected a polygon, `class x1 y1 x2 y2 x3 y3 …`, found a box")
            box = numbers[1:5]
        elif len(numbers) >= 7 and len(numbers) % 2:
            self.polygons += 1
            across, down = numbers[1::2], numbers[2::2]
            ends = min(across), min(down), max(across), max(down)
            box = [(ends[0] + ends[2]) / 2, (ends[1] + ends[3]) / 2, ends[2] - ends[0], ends[3] - ends[1]]
        else:
            raise ValueError(f"expected {_LINE}; found {len(values)} values")
        if numbers[0] not in self.names:
            raise ValueError(f"class {values[0]:.40} is not among {listed(self.names)}")
        bound = max(abs(number) for number in box)
        if bound > 1 + _BEYOND:
            raise ValueError(
                f"expected fractions of the image, 0 to 1, found {bound:g}; pixels must be divided by it"
            )
        if min(box) < -_BEYOND or min(box[2:]) <= 0:
            raise ValueError(f"expected a centre inside the image and a size above 0, found {box}")
        self.shapes.append(box if self.wanted == "boxes" else [numbers[1:]])
        self.labels.append(self.names[int(numbers[0])])


def _number(text: str) -> float:
    try:
        number = float(text) if "_" not in text else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected {_LINE}, all numbers; found {text!r:.40}")
    return number
