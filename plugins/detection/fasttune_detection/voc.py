"""Pascal VOC's folders (host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf): an XML file an image.

VOC's corners are pixels, counted from 1, the last one included: xmin 1 and xmax W span an image W wide. Here a box
is xyxy with edges between pixels, the first pixel from 0 to 1, so that left = xmin - 1, top = ymin - 1, and right
and bottom stay. `difficult` objects, which VOC's own scores leave out, become crowd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from fasttune.errors import DataError
from fasttune.layouts import Opened, Place
from fasttune_detection.places import below, images_in, objects_or_fault, read_bytes, read_text

_ANNOTATIONS = ("Annotations", "annotations", "annotations/xmls", ".")
_IMAGES = ("JPEGImages", "images", ".")
_LISTS = "ImageSets/Main"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SLACK = 1.0  # pixel beyond the stated size, as rounding leaves it


def open_voc(place: Place) -> Opened | None:
    """A row a name in the split's list, ImageSets/Main/SPLIT.txt, or where there are no lists, a row an XML file.
    None if the place is no folder with XML files beside images.

    Raises DataError for a folder of several VOC sets, and for a list that is broken or can't be chosen.
    """
    folder = place.path
    annotations = next((folder / name for name in _ANNOTATIONS if any((folder / name).glob("*.xml"))), None)
    if annotations is None:
        several = sorted(set(folder.glob("*/Annotations"))) if folder.is_dir() else []
        if several:
            raise DataError(
                None, f"is a folder of VOC sets; name one: {', '.join(str(at.parent) for at in several)}"
            )
        return None
    found = _Set(folder, annotations, place.root or folder)
    lists = lists_in(folder / _LISTS, found.root)
    if lists:
        split = place.choose(sorted(lists))
        names = lists[split]
    else:
        split, names = None, sorted(file.stem for file in annotations.glob("*.xml"))
    rows = [found.row(name) for name in names]
    if not any("objects" in row for row in rows):
        found.notes.append(f"no image of {split} has an XML file in {below(annotations, folder)}")
    else:
        for row, name in zip(rows, names, strict=True):
            row.setdefault("objects", DataError("objects", f"no {below(annotations / name, folder)}.xml"))
    return Opened(rows, found.root, split, tuple(sorted(lists)), (*found.notes, *found.counted(set(names), split)))


def lists_in(folder: Path, root: Path) -> dict[str, list[str]]:
    """Image names by split. Lists of one class (aeroplane_train.txt) hold a flag beside each name: no splits."""
    found = {}
    for file in sorted(folder.glob("*.txt")):
        lines = [line.split() for line in read_text(file, root).splitlines() if line.strip()]
        if lines and all(len(line) == 1 for line in lines):
            found[file.stem] = [line[0] for line in lines]
    return found


class _Set:
    """One VOC folder: where its files lie, and what was met in them."""

    def __init__(self, folder: Path, annotations: Path, root: Path):
        self.folder, self.annotations, self.root = folder, annotations, root
        where = next(folder / name for name in _IMAGES if (folder / name).is_dir())
        self.images: dict[str, list[Path]] = {}
        for image in images_in(where):
            self.images.setdefault(image.stem, []).append(image)
        self.where = below(where, folder)
        self.notes = ["corners are VOC's: pixels counted from 1, the last one included"]
        self.boxes = self.from_zero = self.difficult = 0

    def row(self, name: str) -> dict[str, Any]:
        """Without objects if there is no XML file of this name."""
        file = self.annotations / f"{name}.xml"
        if not file.exists():
            return {"image": self._image(name, None)}
        try:
            tree = _parse(read_bytes(file, self.root), below(file, self.folder))
        except DataError as error:
            return {"image": self._image(name, None), "objects": DataError("objects", error.why)}
        return {"image": self._image(name, tree.findtext("filename")), "objects": self._objects(tree, file)}

    def _image(self, name: str, stated: str | None) -> str | DataError:
        """The image that bears the XML file's name: what `filename` states is often another tool's or computer's.
        It decides where several do."""
        found = self.images.get(name, [])
        if len(found) != 1:
            last = (stated or "").strip().replace("\\", "/").rpartition("/")[2]
            named = [image for image in found or self.images.get(Path(last).stem, []) if image.name == last]
            if len(named) != 1:
                fault = f"{len(found)} images are" if found else "no image is"
                return DataError("image", f"{fault} named {name} in {self.where}, and filename is {stated!r:.80}")
            found = named
        return below(found[0], self.root)

    def _objects(self, tree: ElementTree.Element, file: Path) -> Mapping[str, Any] | DataError:
        said = below(file, self.folder)
        size = [_pixels(tree.findtext(f"size/{side}")) for side in ("width", "height")]
        known = all(size)
        boxes, labels, crowd, faults = [], [], [], []
        for number, item in enumerate(tree.findall("object"), start=1):
            label = (item.findtext("name") or "").strip()
            try:
                box = _corners(item.find("bndbox"), size if known else None)
                if not label:
                    raise ValueError("has no name")
            except ValueError as error:
                faults.append(f"{said}: object {number}{f' ({label})' if label else ''}: {error}")
                continue
            self.from_zero += min(box[:2]) < 1
            boxes.append([box[0] - 1, box[1] - 1, box[2], box[3]])
            labels.append(label)
            crowd.append((item.findtext("difficult") or "").strip() == "1")
        self.boxes, self.difficult = self.boxes + len(boxes), self.difficult + sum(crowd)
        whole = {"boxes": boxes, "labels": labels, "format": "xyxy"}
        return objects_or_fault(
            whole | ({"crowd": crowd} if any(crowd) else {}) | ({"size": size} if known else {}), faults
        )

    def counted(self, named: set[str], split: str | None) -> Iterator[str]:
        if self.difficult:
            yield f"{self.difficult:,} of {self.boxes:,} objects are difficult: handled as crowd"
        if self.from_zero:
            count = f"{self.from_zero:,} of {self.boxes:,} boxes begin at 0"
            yield f"{count}, though VOC counts from 1: all are read as VOC's, one pixel to the left and up"
        if split is None and (without := self.images.keys() - named):
            yield f"{len(without):,} images without an XML file are left out, such as {min(without)}"


def _parse(data: bytes, said: str) -> ElementTree.Element:
    """Raises DataError for what is not well formed or no annotation, and for any document type: only that can
    declare entities, which expand without end or name files."""

    def refuse(*_: Any) -> None:
        raise DataError(None, f"{said}: holds a document type (DTD), which annotations don't need: not read")

    guard = expat.ParserCreate()
    guard.StartDoctypeDeclHandler = refuse
    try:
        guard.Parse(data, True)
        tree = ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(None, f"{said}: not well-formed XML: {error}") from error
    if tree.tag != "annotation":
        raise DataError(None, f"{said}: expected <annotation>, found <{tree.tag:.40}>")
    return tree


def _corners(box: ElementTree.Element | None, size: list[int] | None) -> list[float]:
    """xmin, ymin, xmax, ymax as they stand. Raises ValueError."""
    if box is None:
        raise ValueError("has no bndbox")
    found = []
    for name in _CORNERS:
        text = (box.findtext(name) or "").strip()
        number = _number(text)
        if number is None:
            raise ValueError(f"{name}: expected a number, found {text!r:.40}")
        found.append(number)
    left, top, right, bottom = found
    if right < left or bottom < top:
        raise ValueError(f"bndbox {found}: a maximum is less than its minimum")
    if min(left, top) < 0 or (size and (right > size[0] + _SLACK or bottom > size[1] + _SLACK)):
        of = f" of {size[0]} x {size[1]}" if size else ""
        raise ValueError(f"bndbox {found} leaves the image{of}")
    return found


def _number(text: str) -> float | None:
    try:
        number = float(text) if "_" not in text else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _pixels(text: str | None) -> int:
    """A side of the image; 0 where it isn't stated, as some tools write it."""
    number = _number((text or "").strip())
    return int(number) if number and number > 0 else 0
