"""The settings of detection and segmentation, as they stand in a run file under `options`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fasttune_detection.augment import AugmentOptions
from fasttune_detection.segments import Reading, SegmentKind

Edge = Annotated[int, Field(ge=16, le=8192)]


class DetectionOptions(BaseModel):
    """Settings of object-detection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    box_format: Literal["xyxy", "xywh", "cxcywh"] | None = Field(
        None,
        description="Format of the data's boxes; null is what each row says, else xywh for a key named bbox and "
        "xyxy for boxes. xyxy and xywh are pixels, cxcywh fractions of width and height.",
    )
    size: tuple[Edge, Edge] | None = Field(
        None,
        description="What images are resized to: [shortest edge, longest edge at most] for models that heed masks "
        "(DETR, Conditional, DAB and Deformable DETR, Table Transformer), [height, width] for all others. null is "
        "the checkpoint's own size, at most the median of train's.",
    )
    augment: AugmentOptions | None = Field(
        None, description="What is done to images of train and their boxes, anew in each epoch; null is nothing."
    )
    threshold: float = Field(
        0.5, ge=0, lt=1, description="predict names boxes that score above this; evaluate looks at all of them."
    )
    image_size: tuple[int, int] | None = Field(
        None, description="Median width and height of the images of train; written out by the run."
    )
    edges: tuple[int, int] | None = Field(
        None, description="Median shortest and longest edge of the images of train; written out by the run."
    )
    boxes_per_image: float | None = Field(
        None,
        gt=0,
        description="DETR, YOLOS and Table Transformer: the class loss of a batch is divided as if it had so many "
        "boxes an image. null is train's mean, written out by the run.",
    )


class SegmentationOptions(BaseModel):
    """Settings of image-segmentation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: SegmentKind = Field(
        "semantic",
        description="semantic: a class a pixel. instance: objects, which may overlap. panoptic: things one by "
        "one, and stuff, each pixel in one segment at most.",
    )
    classes: dict[int, str] | None = Field(
        None, description="Names of a mask's ids; null is what the data say, else the ids themselves."
    )
    ignore: tuple[int, ...] = Field((255,), description="Ids of a mask that are no truth.")
    background: str | None = Field(
        None,
        description="Class of the pixels that no object covers, where objects have masks (kinds semantic and "
        "panoptic); null: there is no truth.",
    )
    stuff: tuple[str, ...] | None = Field(
        None,
        description="Kind panoptic: the classes that are stuff; null is what the data say (COCO's isthing), and "
        "is written out by the run.",
    )
    size: tuple[Edge, Edge] | None = Field(
        None,
        description="[height, width] that images are resized to; null is the checkpoint's own size, at most the "
        "median of train's. BEiT, Data2Vec and EoMT take the one size of their configuration.",
    )
    augment: AugmentOptions | None = Field(
        None, description="What is done to images of train and their masks, anew in each epoch; null is nothing."
    )
    threshold: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Instance: predict names objects that score above this, evaluate looks at all of them. "
        "Panoptic: segments of a lower score are dropped, by both.",
    )
    image_size: tuple[int, int] | None = Field(
        None, description="Median width and height of the images of train; written out by the run."
    )
    edges: tuple[int, int] | None = Field(
        None, description="Median shortest and longest edge of the images of train; written out by the run."
    )
    segments_per_image: float | None = Field(
        None,
        gt=0,
        description="MaskFormer, Mask2Former, EoMT: the class loss of a batch is divided as if it had so many "
        "segments an image. null is train's mean, written out by the run.",
    )

    @property
    def reading(self) -> Reading:
        return Reading(self.kind, self.classes, self.ignore, self.background, self.stuff)
