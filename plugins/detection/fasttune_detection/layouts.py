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
from fasttune_detection.stated import Wanted


def open_layout(place: Place, wanted: Wanted = "boxes") -> Opened | None:
    """The rows of a place in one of these layouts; None if it is in none of them.

    Raises DataError(None, why) if it is broken as a whole, holds boxes where masks are wanted, or names files
    outside its root.
    """
    if place.document is not None:
        if wanted == "masks" and panoptic.is_panoptic(place.document):
            return panoptic.open_panoptic(place)
        return coco.open_coco(place, wanted) if coco.is_coco(place.document) else None
    if wanted == "boxes":
        opened = yolo.open_yolo(place) or voc.open_voc(place)
    else:
        opened = maskfolders.open_mask_folders(place) or yolo.open_yolo(place, wanted)
    if opened is None:
        coco.must_name_a_file(place.path)
        if wanted == "masks" and any((place.path / "Annotations").glob("*.xml")):
            raise DataError(None, "has boxes (Annotations/*.xml) and no masks; expected SegmentationClass")
    return opened
