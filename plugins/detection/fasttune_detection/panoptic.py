"""COCO's panoptic JSON (cocodataset.org/#format-data): an annotation an image, with a PNG whose colours are ids of
segments, R + 256 G + 256² B, and `segments_info` with the class of each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasttune.errors import DataError
from fasttune.layouts import Opened, Place
from fasttune_detection.coco import (
    IDS,
    bases_of,
    fault_of_id,
    file_name_of,
    folder_with,
    list_in,
    names_of,
    objects_in,
    place_of,
    root_of_images,
    spots_in,
)
from fasttune_detection.places import is_inside, listed, notes_on_absent, notes_on_names, objects_or_fault


def is_panoptic(document: Mapping[str, Any]) -> bool:
    annotations = document.get("annotations")
    return isinstance(annotations, list) and any(
        isinstance(annotation, dict) and "segments_info" in annotation for annotation in annotations
    )


def open_panoptic(place: Place) -> Opened:
    """A row an image, in the file's order; then a bad one for each annotation that is of no image. An image
    without an annotation is a bad row: its pixels are no truth, and not nothing.

    The masks are looked for in the folder that is called as the JSON is, and where images are. Raises DataError
    if a list that all depends on is missing or broken, or if none of the images or of the masks is found.
    """
    document = place.document or {}
    images, annotations = objects_in(document, "images"), list_in(document, "annotations")
    categories = objects_in(document, "categories")
    names, things = names_of(categories), _things(categories)
    of_images = root_of_images(place, images).resolve()
    of_masks = _root_of_masks(place, annotations).resolve()
    root = Path(os.path.commonpath([of_images, of_masks]))
    rows: list[dict[str, Any]] = []
    by_id: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(images):
        row: dict[str, Any] = {"image": _file(image, f"images[{number}]", "image", of_images, root)}
        rows.append(row)
        if fault := fault_of_id(image.get("id"), by_id):
            row["image"] = DataError("image", f"images[{number}]: {fault}")
        else:
            by_id[image["id"]] = row
    strays: list[dict[str, Any]] = []
    for number, annotation in enumerate(annotations, start=1):
        said, row_of = place_of(annotation, number, by_id)
        if isinstance(row_of, DataError):
            strays.append({"image": row_of, "mask": row_of, "objects": row_of})
        elif "mask" in row_of:
            row_of["mask"] = DataError("mask", f"{said}: its image has an annotation before it")
        else:
            row_of["mask"] = _file(annotation, said, "mask", of_masks, root)
            row_of["objects"] = _segments(annotation, said, names, things)
    for row in rows:
        if "mask" not in row:
            row["mask"] = row["objects"] = DataError("mask", "no annotation is of this image")
    stated = [row["objects"] for row in rows if isinstance(row["objects"], Mapping)]
    seen = {segment["label"] for objects in stated for segment in objects["segments"]}
    notes = (f"images: {of_images}", f"masks: {of_masks}", *notes_on_names(names))
    notes += notes_on_absent(names.values(), seen, place.split)
    return Opened([*rows, *strays], root, notes=notes)


def _root_of_masks(place: Place, annotations: list[Any]) -> Path:
    beside = place.path.resolve().parent
    tried = [beside / place.path.stem]
    for base in bases_of(place):
        tried += [base / place.path.stem, base / "masks", *spots_in(base, place.path.stem)]
    files = [annotation.get("file_name") for annotation in annotations if isinstance(annotation, dict)]
    return folder_with(files, tried, "masks' files")


def _file(held: Mapping[str, Any], said: str, role: str, folder: Path, root: Path) -> str | DataError:
    """A file's path relative to the root, which holds images and masks and more: it must not leave its folder."""
    name = file_name_of(held, said, role)
    if isinstance(name, DataError):
        return name
    if "\0" in name or not is_inside(folder / name, folder):
        return DataError(role, f"{said}: the path {name!r:.80} leads out of {folder}")
    return str((folder / name).relative_to(root))


def _things(categories: list[dict[str, Any]]) -> dict[Any, bool | None]:
    """Whether a class is of things, by category id; None where the file doesn't say."""
    for number, category in enumerate(categories):
        if category.get("isthing") not in (None, 0, 1):
            raise DataError(
                None, f"categories[{number}]: isthing: expected 0 or 1, found {category['isthing']!r:.40}"
            )
    return {
        category["id"]: None if category.get("isthing") is None else bool(category["isthing"])
        for category in categories
    }


def _segments(
    annotation: Mapping[str, Any], said: str, names: Mapping[Any, str], things: Mapping[Any, bool | None]
) -> Mapping[str, Any] | DataError:
    stated = annotation.get("segments_info")
    if not isinstance(stated, list):
        return DataError("objects", f"{said}: segments_info: expected a list, found {stated!r:.40}")
    segments: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, item in enumerate(stated, start=1):
        category = item.get("category_id") if isinstance(item, dict) else None
        if not isinstance(item, dict):
            faults.append(f"{said}, segment {number}: expected an object, found {item!r:.40}")
        elif not isinstance(category, IDS) or category not in names:
            faults.append(f"{said}, segment {number}: category_id {category!r:.40} is not among {listed(names)}")
        else:
            crowd, thing = item.get("iscrowd"), things[category]
            segments.append({"id": item.get("id"), "label": names[category], "thing": thing, "crowd": crowd})
    return objects_or_fault({"segments": segments}, faults)
