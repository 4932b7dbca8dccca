"""COCO's JSON (cocodataset.org/#format-data): images, categories and annotations, joined to a row an image.

`bbox` is [left, top, width, height] in pixels and stays so. Category ids may have gaps and start anywhere: rows
bear names. Neither `area` nor a numeric id is asked for. `segmentation` is handed on as it stands: what is wrong
with polygons and run lengths shows when the row is read. Where masks are wanted, boxes are not looked at.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fasttune.errors import DataError, nearest
from fasttune.layouts import SPLITS, Opened, Place, named_splits
from fasttune_detection.places import listed, notes_on_absent, notes_on_names, objects_or_fault
from fasttune_detection.stated import Wanted

IDS = (int, str, float)
_Of = TypeVar("_Of")  # what is gathered of an image
_NOT_PANOPTIC = "{} holds segments_info: a panoptic file; expected boxes (instances_*.json)"
_LOOKED_FOR = 64  # files, spread over all, by which their folder is found


def is_coco(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("images"), list) and not document.keys().isdisjoint(
        {"annotations", "categories"}
    )


def open_coco(place: Place, wanted: Wanted = "boxes") -> Opened:
    """A row an image, in the file's order, those without annotations too; then a bad one for each annotation that
    is of no image. Without "annotations" (a test set) rows have no objects.

    Raises DataError if a list that all depends on is missing or broken, or if no image's file is found.
    """
    document = place.document or {}
    images = objects_in(document, "images")
    root = root_of_images(place, images)
    notes = [f"images: {root}"]
    rows: list[dict[str, Any]] = [
        {"image": file_name_of(image, f"images[{number}]")} for number, image in enumerate(images)
    ]
    if "annotations" not in document:
        return Opened(rows, root, notes=(*notes, "the file has no annotations"))
    names = names_of(objects_in(document, "categories"))
    found = [_Image(image, wanted) for image in images]
    by_id: dict[Any, _Image] = {}
    for row, image in zip(rows, found, strict=True):
        if fault := fault_of_id(image.id, by_id):
            row["image"] = DataError("image", f"{image.said}: {fault}")
        else:
            by_id[image.id] = image
    strays: list[dict[str, Any]] = []
    for number, annotation in enumerate(list_in(document, "annotations"), start=1):
        if isinstance(annotation, dict) and "segments_info" in annotation:
            raise DataError(None, _NOT_PANOPTIC.format(said_of(annotation, number)))
        said, image_of = place_of(annotation, number, by_id)
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

    def __init__(self, image: Mapping[str, Any], wanted: Wanted):
        self.wanted = wanted
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
        if not isinstance(category, IDS) or category not in names:
            self.faults.append(f"{said}: category_id {category!r:.40} is not among {listed(names)}")
        if crowd not in (None, 0, 1):
            self.faults.append(f"{said}: iscrowd: expected 0 or 1, found {crowd!r:.40}")
        if self.wanted == "boxes" and (fault := _fault_of(annotation.get("bbox"), self.size)):
            self.faults.append(f"{said}: {fault}")
        if self.wanted == "masks" and not annotation.get("segmentation"):
            self.faults.append(f"{said}: segmentation: expected polygons or run lengths, found none")
        if self.faults:
            return
        self.boxes.append(annotation.get("bbox"))
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
        if self.wanted == "masks":
            return objects_or_fault({"masks": [], "labels": self.labels, **stated, **size}, self.faults)
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


def fault_of_id(key: Any, known: Container[Any]) -> str | None:
    """What is wrong with an image's id."""
    if not isinstance(key, IDS):
        return f"id {key!r:.40}: expected a number or text"
    return f"id {key!r:.40}: given to an image before it" if key in known else None


def said_of(annotation: Mapping[str, Any], number: int) -> str:
    """What messages call an annotation."""
    return f"annotation {annotation['id']}" if "id" in annotation else f"annotation number {number}"


def place_of(annotation: Any, number: int, images: Mapping[Any, _Of]) -> tuple[str, _Of | DataError]:
    """(what messages call the annotation, the image that it is of, or what is wrong)."""
    if not isinstance(annotation, dict):
        why = f"annotation number {number}: expected an object, found {type(annotation).__name__}"
        return "", DataError("objects", why)
    said = said_of(annotation, number)
    image = annotation.get("image_id")
    if isinstance(image, IDS) and image in images:
        return said, images[image]
    why = f"{said}: image_id {image!r:.40} is not the id of any of the {len(images)} images"
    if str(image) in map(str, images):
        why += (
            f"; {type(image).__name__} {image!r:.40} is another id than the {type(_twin(image, images)).__name__}"
        )
    return said, DataError("objects", why)


def _twin(key: Any, known: Iterable[Any]) -> Any:
    return next(held for held in known if str(held) == str(key))


def names_of(categories: list[dict[str, Any]]) -> dict[Any, str]:
    """Names by category id, in the file's order."""
    names: dict[Any, str] = {}
    for number, category in enumerate(categories):
        key, name = category.get("id"), category.get("name")
        if not isinstance(key, IDS) or key in names:
            fault = (
                f"id {key!r:.40} is given twice" if isinstance(key, IDS) else f"expected an id, found {key!r:.40}"
            )
            raise DataError(None, f"categories[{number}]: {fault}")
        if not isinstance(name, str) or not name.strip():
            raise DataError(None, f"categories[{number}]: expected a name, found {name!r:.60}")
        names[key] = name.strip()
    return names


def file_name_of(held: Mapping[str, Any], said: str, role: str = "image") -> str | DataError:
    name = held.get("file_name")
    if isinstance(name, str) and name:
        return name
    return DataError(role, f"{said}: expected a file_name, found {name!r:.60}")


def root_of_images(place: Place, images: list[dict[str, Any]]) -> Path:
    """The folder that most of the images are found in.

    Looked in, first ones first: data.root, or else the JSON's folder and the one above; in each, itself, images,
    data, and the folders of the split that the JSON's name ends in (instances_train.json: train, train2017,
    images/train …). Raises DataError with all of them if none holds any of the files.
    """
    tried = [spot for base in bases_of(place) for spot in spots_in(base, place.path.stem)]
    return folder_with([image.get("file_name") for image in images], tried, "images' files")


def bases_of(place: Place) -> list[Path]:
    folder = place.path.resolve().parent
    return [place.root] if place.root else [folder, folder.parent]


def folder_with(names: list[Any], tried: list[Path], what: str) -> Path:
    """The one of these folders that most of the files are found in; the first if there are no files. Raises
    DataError with all of them if none holds any."""
    files = [name for name in names if isinstance(name, str) and name and "\0" not in name]
    sought = files[:: max(1, len(files) // _LOOKED_FOR)]
    tried = list(dict.fromkeys(tried))
    found = [sum(os.path.isfile(spot / name) for name in sought) for spot in tried]
    if sought and not any(found):
        listed = "".join(f"\n  {spot}" for spot in tried)
        raise DataError(
            None,
            f"none of the {what} (the first: {sought[0]!r:.80}) is in any of these folders:{listed}\n"
            "Name the folder that file_name is relative to with data.root",
        )
    return tried[found.index(max(found))]


def spots_in(base: Path, stem: str) -> list[Path]:
    """Where files of a base may lie; see `root_of_images`."""
    words = re.split(r"[\W_]+", stem)
    roles = [role for role in SPLITS if named_splits(role, words)]
    spots = []
    for parent in (base, base / "images", base / "data"):  # "data": FiftyOne's
        if parent.is_dir():
            held = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
            named = [name for role in roles for name in named_splits(role, held)]
            spots += [parent, *(parent / name for name in sorted(named, key=lambda name: name not in words))]
    return spots


def list_in(parent: Mapping[str, Any], key: str) -> list[Any]:
    found = parent.get(key)
    if not isinstance(found, list):
        keys = ", ".join(map(repr, parent))
        raise DataError(None, f"expected a list {key!r}, found {keys}.{nearest(key, parent)}")
    return found


def objects_in(parent: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = list_in(parent, key)
    for number, item in enumerate(found):
        if not isinstance(item, dict):
            raise DataError(None, f"{key}[{number}]: expected an object, found {type(item).__name__}")
    return found
