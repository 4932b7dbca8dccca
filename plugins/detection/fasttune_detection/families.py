"""What differs between detectors: padding, losses, processors. Names are those of transformers' configurations."""

HEED_PADDING = frozenset({"detr", "conditional_detr", "deformable_detr", "dab-detr", "table-transformer"})
"""Their boxes are fractions of the image inside the padding mask, and padding is no key of their attention. The
others see padding as a black border, or boxes as fractions of the padded batch: their images get one size."""

SOFTMAX_LOSS = "ForObjectDetectionLoss"
"""Cross-entropy with a class "no object", divided by the sum of its weights; all others divide by the boxes."""

SIGMOID_LOSSES = frozenset(
    {"DeformableDetrForObjectDetectionLoss", "RTDetrForObjectDetectionLoss", "LwDetrForObjectDetectionLoss"}
)

LOSSES_BY_IMAGE = frozenset({"DFineForObjectDetectionLoss", "Deimv2ForObjectDetectionLoss"})
"""They hold a term (distillation between layers) that is no sum over boxes, and are summed image by image."""

PROCESSORS = {
    "detr": "DetrImageProcessorPil",
    "table-transformer": "DetrImageProcessorPil",
    "conditional_detr": "ConditionalDetrImageProcessorPil",
    "dab-detr": "ConditionalDetrImageProcessorPil",
    "deformable_detr": "DeformableDetrImageProcessorPil",
    "lw_detr": "DeformableDetrImageProcessorPil",
    "rf_detr": "DeformableDetrImageProcessorPil",
    "yolos": "YolosImageProcessorPil",
    "rt_detr": "RTDetrImageProcessorPil",
    "rt_detr_v2": "RTDetrImageProcessorPil",
    "d_fine": "RTDetrImageProcessorPil",
    "deimv2": "RTDetrImageProcessorPil",
}
"""By model type: the image processor, on Pillow, whose post-processing is the family's."""

NOISY_CLASSES = "denoising_class_embed"
"""An embedding of the classes, for the denoising queries that only training has."""

CLASS_LAYERS = frozenset(
    {"class_labels_classifier", "class_embed", "enc_score_head", "enc_out_class_embed", NOISY_CLASSES}
)
BOX_LAYERS = frozenset({"bbox_predictor", "bbox_embed", "enc_bbox_head", "enc_out_bbox_embed"})

BACKBONES = ("backbone", "conv_encoder")

PER_PIXEL = {
    "segformer": "SegformerImageProcessorPil",
    "upernet": "SegformerImageProcessorPil",
    "beit": "BeitImageProcessorPil",
    "data2vec-vision": "BeitImageProcessorPil",
    "dpt": "DPTImageProcessorPil",
    "mobilenet_v2": "MobileNetV2ImageProcessorPil",
    "mobilevit": "MobileViTImageProcessorPil",
    "mobilevitv2": "MobileViTImageProcessorPil",
}
"""Segmenters that give each pixel a class, with their image processors."""

UNIVERSAL = {
    "maskformer": "MaskFormerImageProcessorPil",
    "mask2former": "Mask2FormerImageProcessorPil",
    "eomt": "Mask2FormerImageProcessorPil",
    "eomt_dinov3": "Mask2FormerImageProcessorPil",
}
"""Segmenters that find segments by queries. EoMT's own processor cuts an image in windows or pads it, and each of
its ways of reading predictions fits only one of the two; Mask2Former's reads the same outputs, and resizes to one
size."""

ONE_SIZE = frozenset({"beit", "data2vec-vision", "eomt", "eomt_dinov3"})
"""Their position embeddings are for the `image_size` of their configuration."""

POOL_ALL = frozenset({"upernet", "beit", "data2vec-vision", "mobilenet_v2", "mobilevit", "mobilevitv2"})
"""Their heads pool a whole image into one value, and normalise it over the batch."""

QUERY_CLASSES = frozenset({"class_predictor"})
QUERY_MASKS = frozenset({"mask_embedder", "mask_head"})
"""What makes a class and a mask of a query."""
