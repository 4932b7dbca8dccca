"""Layouts of detection and segmentation data that are no table, as rows: COCO's JSON, YOLO's folders, Pascal VOC's
XML, folders of masks.

Where boxes are wanted, a row is {"image": path relative to the root, "objects": {"boxes", "labels", "format", …}};
the boxes stay in the layout's own numbers and `format` names them, but for VOC's, whose corners count from 1.
Where masks are wanted, rows are in the forms that `segments` names. Nothing is guessed: what can be read in two
ways is refused, or said in a note.
"""

from __future__ import annotations

from fasttune.errors import DataError
from fasttune.layouts import Opened, Place
from fasttune_detection import coco, maskfolders, panoptic, voc, yolo


def open_layout(place: Place) -> Opened | None:
    """The rows of a place in one of these layouts, with boxes; None if it is in none of them.

    Raises DataError(None, why) if it is broken as a whole, or names files outside its root.
    """
    if place.document is not None:
        return coco.open_coco(place) if coco.is_coco(place.document) else None
    opened = yolo.open_yolo(place) or voc.open_voc(place)
    if opened is None:
        coco.must_name_a_file(place.path)
    return opened


def open_segments(place: Place) -> Opened | None:
    """The rows of a place in one of these layouts, with masks; None if it is in none of them.

    Raises what `open_layout` does, and DataError(None, why) for a folder that holds boxes alone.
    """
    document = place.document
    if document is not None:
        if panoptic.is_panoptic(document):
            return panoptic.open_panoptic(place)
        return coco.open_coco(place, "masks") if coco.is_coco(document) else None
    opened = maskfolders.open_mask_folders(place) or yolo.open_yolo(place, "masks")
    if opened is None:
        coco.must_name_a_file(place.path)
        if any((place.path / "Annotations").glob("*.xml")):
            raise DataError(None, "has boxes (Annotations/*.xml) and no masks; expected SegmentationClass")
    return opened
