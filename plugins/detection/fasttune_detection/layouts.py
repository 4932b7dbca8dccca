"""Layouts of detection data that are no table, as rows: COCO's JSON, YOLO's folders, Pascal VOC's XML.

A row is {"image": path relative to the root, "objects": {"boxes", "labels", "format", …}}; the boxes stay in the
layout's own numbers and `format` names them, but for VOC's, whose corners count from 1. Nothing is guessed: what
can be read in two ways is refused, or said in a note.
"""

from __future__ import annotations

from fasttune.layouts import Opened, Place
from fasttune_detection import coco, voc, yolo


def open_layout(place: Place) -> Opened | None:
    """The rows of a place in one of these layouts; None if it is in none of them.

    Raises DataError(None, why) if it is broken as a whole, or names files outside its root.
    """
    if place.document is not None:
        return coco.open_coco(place) if coco.is_coco(place.document) else None
    opened = yolo.open_yolo(place) or voc.open_voc(place)
    if opened is None:
        coco.must_name_a_file(place.path)
    return opened
