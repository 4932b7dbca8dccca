"""COCO's JSON (cocodataset.org/#format-data): images, categories and annotations, joined to a row an image.

`bbox` is [left, top, width, height] in pixels and stays so. Category ids may have gaps and start anywhere: rows
bear names. Neither `area` nor a numeric id is asked for. `segmentation` is handed on as it stands.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fasttune.errors import DataError, nearest
from fasttune.layouts import SPLITS, Opened, Place, named_splits
from fasttune_detection.places import listed, notes_on_absent, notes_on_names, objects_or_fault

_LOOKED_FOR = 64  # image files, spread over all, by which the images' folder is found
_IDS = (int, str, float)


def is_coco(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("images"), list) and not document.keys().isdisjoint(
        {"annotations", "categories"}
    )


def open_coco(place: Place) -> Opened:
    """A row an image, in the file's order, those without annotations too; then a bad one for each annotation that
    is of no image. Without "annotations" (a test set) rows have no objects.

    Raises DataError if a list that all depends on is missing or broken, or if no image's file is found.
    """
    document = place.document or {}
    images = _objects(document, "images")
    root = _root_of_images(place, [image.get("file_name") for image in images])
    notes = [f"images: {root}"]
    rows: list[dict[str, Any]] = [
        {"image": _file_name(image, number)} for number, image in enumerate(images, start=1)
    ]
    if "annotations" not in document:
        return Opened(rows, root, notes=(*notes, "the file has no annotations"))
    names = _names(_objects(document, "categories"))
    found = [_Image(image) for image in images]
    by_id: dict[Any, _Image] = {}
    for row, image in zip(rows, found, strict=True):
        if image.id in by_id or not isinstance(image.id, _IDS):
            fault = "given to an image before it" if isinstance(image.id, _IDS) else "expected a number or text"
            row["image"] = DataError("image", f"{image.said}: id {image.id!r:.40}: {fault}")
        else:
            by_id[image.id] = image
    strays: list[dict[str, Any]] = []
    for number, annotation in enumerate(_list(document, "annotations"), start=1):
        said, image_of = _place_of(annotation, number, by_id)
        if isinstance(image_of, DataError):
            strays.append({"image": image_of, "objects": image_of})
        else:
            image_of.add(annotation, said, names)
    for row, image in zip(rows, found, strict=True):
        row["objects"] = image.objects()
    seen = {label for image in found for label in image.labels}
    notes += [*notes_on_names(names), *notes_on_absent(names.values(), seen, place.split)]
    return Opened([*rows, *strays], root, notes=tuple(notes))


def must_name_a_file(path: Path) -> None:
    """Raises DataError for a folder of COCO files: which of them is meant, only the user can say."""
    patterns = ("annotations/*.json", "_annotations.coco.json", "*/_annotations.coco.json")
    found = [file for pattern in patterns for file in sorted(path.glob(pattern))] if path.is_dir() else []
    if found:
        raise DataError(None, f"is a folder of COCO files; name one: {', '.join(map(str, found))}")


class _Image:
    """One image's annotations, as they are met: lists with an entry each, and what is wrong."""

    def __init__(self, image: Mapping[str, Any]):
        self.id = image.get("id")
        self.said = f"image {image.get('file_name')!r:.80}"
        size = [side for name in ("width", "height") if type(side := image.get(name)) is int and side > 0]
        self.size = size if len(size) == 2 else None
        self.boxes: list[Any] = []
        self.labels: list[str] = []
        self.more: dict[str, list[Any]] = {"crowd": [], "area": [], "masks": []}
        self.faults: list[str] = []

    def add(self, annotation: Mapping[str, Any], said: str, names: Mapping[Any, str]) -> None:
        category = annotation.get("category_id")
        crowd = annotation.get("iscrowd")
        if not isinstance(category, _IDS) or category not in names:
            self.faults.append(f"{said}: category_id {category!r:.40} is not among {listed(names)}")
        if crowd not in (None, 0, 1):
            self.faults.append(f"{said}: iscrowd: expected 0 or 1, found {crowd!r:.40}")
        if fault := _fault_of(annotation.get("bbox"), self.size):
            self.faults.append(f"{said}: {fault}")
        if self.faults:
            return
        self.boxes.append(annotation["bbox"])
        self.labels.append(names[category])
        self.more["crowd"].append(bool(crowd))
        self.more["area"].append(annotation.get("area"))
        self.more["masks"].append(annotation.get("segmentation") or None)

    def objects(self) -> Mapping[str, Any] | DataError:
        stated = {
            name: values
            for name, values in self.more.items()
            if any(value is not None and value is not False for value in values)
        }
        size = {"size": self.size} if self.size else {}
        whole = {"boxes": self.boxes, "labels": self.labels, "format": "xywh", **stated, **size}
        return objects_or_fault(whole, self.faults)


def _fault_of(bbox: Any, size: list[int] | None) -> str | None:
    """What is wrong with [left, top, width, height], but for an image's real size, which only its file tells."""
    numbers = isinstance(bbox, list) and len(bbox) == 4
    if not numbers or not all(type(n) in (int, float) and math.isfinite(n) for n in bbox):
        return f"bbox: expected [left, top, width, height], four finite numbers, found {bbox!r:.60}"
    left, top, width, height = bbox
    if width <= 0 or height <= 0:
        return f"bbox {bbox}: expected a width and a height above 0"
    if size and (min(left, top) < -1 or left + width > size[0] + 1 or top + height > size[1] + 1):
        hint = ""
        if width > left and height > top and width <= size[0] + 1 and height <= size[1] + 1:
            hint = "; is it [left, top, right, bottom]? COCO's is [left, top, width, height]"
        return f"bbox {bbox} leaves the image of {size[0]} x {size[1]}{hint}"
    return None


def _place_of(annotation: Any, number: int, images: Mapping[Any, _Image]) -> tuple[str, _Image | DataError]:
    """(what messages call the annotation, the image that it is of, or what is wrong)."""
    if not isinstance(annotation, dict):
        why = f"annotation number {number}: expected an object, found {type(annotation).__name__}"
        return "", DataError("objects", why)
    said = f"annotation {annotation['id']}" if "id" in annotation else f"annotation number {number}"
    if "segments_info" in annotation:
        raise DataError(None, f"{said} holds segments_info: a panoptic file; expected boxes (instances_*.json)")
    image = annotation.get("image_id")
    if isinstance(image, _IDS) and image in images:
        return said, images[image]
    why = f"{said}: image_id {image!r:.40} is not the id of any of the {len(images)} images"
    if str(image) in map(str, images):
        why += (
            f"; {type(image).__name__} {image!r:.40} is another id than the {type(_twin(image, images)).__name__}"
        )
    return said, DataError("objects", why)


def _twin(key: Any, known: Iterable[Any]) -> Any:
    return next(held for held in known if str(held) == str(key))


def _names(categories: list[dict[str, Any]]) -> dict[Any, str]:
    """Names by category id, in the file's order."""
    names: dict[Any, str] = {}
    for number, category in enumerate(categories):
        key, name = category.get("id"), category.get("name")
        if not isinstance(key, _IDS) or key in names:
            fault = (
                f"id {key!r:.40} is given twice" if isinstance(key, _IDS) else f"expected an id, found {key!r:.40}"
            )
            raise DataError(None, f"categories[{number}]: {fault}")
        if not isinstance(name, str) or not name.strip():
            raise DataError(None, f"categories[{number}]: expected a name, found {name!r:.60}")
        names[key] = name.strip()
    return names


def _file_name(image: Mapping[str, Any], number: int) -> str | DataError:
    name = image.get("file_name")
    if isinstance(name, str) and name:
        return name
    return DataError("image", f"images[{number - 1}]: expected a file_name, found {name!r:.60}")


def _root_of_images(place: Place, names: list[Any]) -> Path:
    """The folder that most of the files are found in.

    Looked in, first ones first: data.root, or else the JSON's folder and the one above; in each, itself, images,
    data, and the folders of the split that the JSON's name ends in (instances_train.json: train, train2017,
    images/train …). Raises DataError with all of them if none holds any of the files.
    """
    files = [name for name in names if isinstance(name, str) and name and "\0" not in name]
    sought = files[:: max(1, len(files) // _LOOKED_FOR)]
    folder = place.path.resolve().parent
    bases = [place.root] if place.root else [folder, folder.parent]
    tried = list(dict.fromkeys(spot for base in bases for spot in _spots(base, place.path.stem)))
    found = [sum(os.path.isfile(spot / name) for name in sought) for spot in tried]
    if sought and not any(found):
        listed = "".join(f"\n  {spot}" for spot in tried)
        raise DataError(
            None,
            f"none of the images' files (the first: {sought[0]!r:.80}) is in any of these folders:{listed}\n"
            "Name the folder that file_name is relative to with data.root",
        )
    return tried[found.index(max(found))] if sought else folder


def _spots(base: Path, stem: str) -> list[Path]:
    words = re.split(r"[\W_]+", stem)
    roles = [role for role in SPLITS if named_splits(role, words)]
    spots = []
    for parent in (base, base / "images", base / "data"):  # "data": FiftyOne's
        if parent.is_dir():
            held = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
            named = [name for role in roles for name in named_splits(role, held)]
            spots += [parent, *(parent / name for name in sorted(named, key=lambda name: name not in words))]
    return spots


def _list(parent: Mapping[str, Any], key: str) -> list[Any]:
    found = parent.get(key)
    if not isinstance(found, list):
        keys = ", ".join(map(repr, parent))
        raise DataError(None, f"expected a list {key!r}, found {keys}.{nearest(key, parent)}")
    return found


def _objects(parent: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = _list(parent, key)
    for number, item in enumerate(found):
        if not isinstance(item, dict):
            raise DataError(None, f"{key}[{number}]: expected an object, found {type(item).__name__}")
    return found
