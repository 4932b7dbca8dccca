"""Folders of images beside folders of masks, pictures whose pixels are class ids: paired by their names.

    images/ masks/                   images/train/ masks/train/             train/images/ train/masks/
    train/ train_labels/             a.jpg a_mask.png in one folder         leftImg8bit/ gtFine/ (Cityscapes)
    JPEGImages/ SegmentationClass/ ImageSets/Segmentation/train.txt (Pascal VOC)

An image without a mask and a mask without an image are bad rows, each named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from fasttune.errors import DataError
from fasttune.layouts import SPLITS, Opened, Place, named_splits
from fasttune_detection.classnames import NAMES_FILES, find_names
from fasttune_detection.places import below, images_in
from fasttune_detection.voc import lists_in

_IMAGES = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
_MASKS = (
    "masks",
    "mask",
    "annotations",
    "annotation",
    "labels",
    "label",
    "segmentationclass",
    "gtfine",
    "segmentations",
    "segmentation",
)
_BESIDE = ("_masks", "_mask", "_labels", "_annotations", "masks", "annot")  # train/ and train_labels/, trainannot/
_LISTS = "ImageSets/Segmentation"
_IMAGE_ENDS = ("_leftImg8bit",)
_CITYSCAPES = "_gtFine_labelIds"
_MARKS = ("_mask", "-mask")  # of a mask that lies in its image's folder
_MASK_ENDS = (_CITYSCAPES, *_MARKS, "_masks", "_seg", "_segmentation", "_label", "_labels", "_gt", "_L")

# github.com/mcordts/cityscapesScripts, helpers/labels.py: the 19 that are evaluated; all others are no truth.
_CITYSCAPES_CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}


@dataclass(frozen=True)
class _Part:
    """A split's images and masks. masks: None if there are none; the folder of the images where they lie beside
    each other. only: the names that the split's list holds; None: all that are there."""

    images: Path
    masks: Path | None
    only: tuple[str, ...] | None = None


def open_mask_folders(place: Place) -> Opened | None:
    """The images of a split, in order, each with its mask; then a bad row for each mask without an image. None if
    the place is no folder with pictures in a folder of masks, or with a mark of masks in their names.

    Raises DataError for folders of which no two files belong together, and for a list or a file of class names
    that is broken.
    """
    folder, root = place.path, place.root or place.path
    if not folder.is_dir():
        return None
    parts = _parts(folder, root)
    if parts is None:
        return None
    splits = tuple(name for name in parts if name is not None)
    split = place.choose(splits) if splits else None
    part = parts[split]
    rows, notes, cityscapes = _rows(part, root)
    beside = [part.masks.parent, part.masks] if part.masks else []
    names, said = find_names([part.images, *beside, folder], root)
    if names is None and cityscapes:
        names = {key: _CITYSCAPES_CLASSES.get(key) for key in range(-1, 34)}
        said = ("class names: Cityscapes' 19 classes; its other ids are no truth",)
    elif names is None:
        said = (f"no file names the ids of masks ({', '.join(NAMES_FILES[:4])} …): they are called by number",)
    if names is not None:
        for row in rows:
            if "mask" in row:
                row["objects"] = {"classes": names}  # one mapping for all rows
    return Opened(rows, root, split, splits, (*notes, *(said if part.masks else ())))


def _parts(folder: Path, root: Path) -> dict[str | None, _Part] | None:
    """Images and masks by split; None as a split where there are none."""
    inside = _by_name(folder)
    both = _both(inside)
    if both:
        images, masks = both
        lists = lists_in(folder / _LISTS, root)
        if lists:
            return {name: _Part(images, masks, tuple(names)) for name, names in sorted(lists.items())}
        found = _splits_of(images)
        if found:
            there = _by_name(masks)
            return {path.name: _Part(path, there.get(path.name.casefold())) for path in found}
        return {None: _Part(images, masks)}
    parts: dict[str | None, _Part] = {}
    for path in _splits_of(folder):
        name = path.name.casefold()
        beside = [inside[name + end] for end in _BESIDE if name + end in inside]
        if deeper := _both(_by_name(path)):
            parts[path.name] = _Part(*deeper)
        elif beside and _holds_pictures(beside[0]):
            parts[path.name] = _Part(path, beside[0])
        elif _has_marks(path):
            parts[path.name] = _Part(path, path)
    if not parts:
        return {None: _Part(folder, folder)} if _has_marks(folder) else None
    for path in _splits_of(folder):  # images to predict, as those of a test set
        if path.name not in parts:
            held = _by_name(path)
            parts[path.name] = _Part(next((held[name] for name in _IMAGES if name in held), path), None)
    return parts


def _by_name(folder: Path) -> dict[str, Path]:
    return {path.name.casefold(): path for path in sorted(folder.iterdir()) if path.is_dir()}


def _both(inside: dict[str, Path]) -> tuple[Path, Path] | None:
    images = next((inside[name] for name in _IMAGES if name in inside), None)
    masks = next((inside[name] for name in _MASKS if name in inside and _holds_pictures(inside[name])), None)
    return (images, masks) if images and masks else None


def _holds_pictures(folder: Path) -> bool:
    return next(images_in(folder), None) is not None


def _has_marks(folder: Path) -> bool:
    return any(path.stem.endswith(_MARKS) for path in images_in(folder))


def _splits_of(folder: Path) -> list[Path]:
    named = {name for role in SPLITS for name in named_splits(role, (path.name for path in folder.iterdir()))}
    return [path for path in sorted(folder.iterdir()) if path.name in named and path.is_dir()]


@dataclass
class _Pair:
    """What bears one name, below the folders of images and of masks."""

    images: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)


def _rows(part: _Part, root: Path) -> tuple[list[dict[str, Any]], list[str], bool]:
    """(rows, notes, whether the masks are Cityscapes')."""
    pictures = list(images_in(part.images))
    masks = list(_masks_of(part, pictures))
    taken = set(masks)
    images = [path for path in pictures if path not in taken]
    where = (below(part.images, root), below(part.masks, root) if part.masks else "")
    pairs = _paired(images, masks, part)
    if masks and images and not _fit(pairs):
        pairs = _paired(images, masks, None)
        if not _fit(pairs):
            first = f"the first image is {below(images[0], root)}, the first mask {below(masks[0], root)}"
            raise DataError(None, f"no mask in {where[1]} bears the name of an image in {where[0]}: {first}")
    names = list(pairs) if part.only is None else list(part.only)
    rows = [_row(name, pairs.get(name, _Pair()), root, where, bool(masks)) for name in names]
    strays = [row for row in rows if isinstance(row["image"], DataError)]
    rows = [row for row in rows if not isinstance(row["image"], DataError)] + strays
    notes = [] if masks else [f"{where[0]}: no masks; its images are to be predicted"]
    return rows, notes, bool(masks) and all(mask.stem.endswith(_CITYSCAPES) for mask in masks)


def _paired(images: list[Path], masks: list[Path], part: _Part | None) -> dict[str, _Pair]:
    """Files by name: below the part's folders, or if no part is given wherever they lie (Oxford's pets have theirs
    in annotations/trimaps)."""
    pairs: dict[str, _Pair] = {}
    of_images, of_masks = (part.images, part.masks) if part else (None, None)
    for image in images:
        pairs.setdefault(_key(image, of_images, _IMAGE_ENDS), _Pair()).images.append(image)
    for mask in masks:
        whole = _key(mask, of_masks, ())
        key = whole if whole in pairs else _key(mask, of_masks, _MASK_ENDS)
        pairs.setdefault(key, _Pair()).masks.append(mask)
    return pairs


def _fit(pairs: dict[str, _Pair]) -> bool:
    return any(pair.images and pair.masks for pair in pairs.values())


def _masks_of(part: _Part, pictures: list[Path]) -> Iterator[Path]:
    """Of Cityscapes only the ids of classes: beside them lie colours and the ids of instances."""
    if part.masks is None:
        return
    if part.masks == part.images:
        yield from (path for path in pictures if path.stem.endswith(_MARKS))
        return
    found = list(images_in(part.masks))
    of_classes = [path for path in found if path.stem.endswith(_CITYSCAPES)]
    yield from of_classes or found


def _key(path: Path, folder: Path | None, ends: tuple[str, ...]) -> str:
    """The path below its folder, without its suffix and the first of these ends that it has."""
    stem = next((path.stem.removesuffix(end) for end in ends if path.stem.endswith(end)), path.stem)
    return str(PurePath(path.relative_to(folder).parent, stem)) if folder else stem


def _row(name: str, pair: _Pair, root: Path, where: tuple[str, str], has_masks: bool) -> dict[str, Any]:
    image = _one(pair.images, "image", name, where[0], root)
    if isinstance(image, DataError) and pair.masks:
        image = DataError("image", f"{below(pair.masks[0], root)}: {image.why}")
    if not has_masks:
        return {"image": image}
    return {"image": image, "mask": _one(pair.masks, "mask", name, where[1], root)}


def _one(files: list[Path], kind: str, name: str, where: str, root: Path) -> str | DataError:
    if len(files) == 1:
        return below(files[0], root)
    if not files:
        return DataError(kind, f"no {kind} is named {name} in {where}")
    return DataError(
        kind, f"{len(files)} {kind}s are named {name}: {', '.join(below(file, root) for file in files)}"
    )
