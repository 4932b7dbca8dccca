"""Pretrain the detection plugin's small RT-DETR on handwritten digits that its demo doesn't have.

Pictures are sheets of paper with digits of scikit-learn's set on them (fasttune_detection/demo/digits.py); the
detector learns where they are and which. Its classes bear other names than the demo's, which therefore begins with
new class layers, as with any detector whose classes are not the user's.

    python plugins/detection/tools/pretrain_detector.py --out model --steps 5000 --threads 1 --seed 0
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForObjectDetection, RTDetrConfig, RTDetrImageProcessorPil, RTDetrResNetConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretraining import VALID, parser, pretrain

from fasttune_detection.demo.digits import SIZE, load, rows

PICTURES = 8_000
AUGMENT = {"flip": 0.0, "crop": 0.0}
WIDTHS = [16, 32, 64, 96]  # of the backbone's stages
WIDTH = 64  # of encoder and decoder
WHAT = """\
An RT-DETR (a ResNet of four basic blocks, 16 to 96 channels; one encoder and two decoder layers of width 64; 20
queries) with"""
DATA = """\
{pictures:,} pictures of 128 x 96 pixels, drawn from the seed: one to six of {digits} handwritten digits on a sheet
  of paper. These digits are the first six forms of the set that scikit-learn carries, the demo's are from the
  others. The rows left out show the same digits, elsewhere. Nothing was downloaded."""
OBJECTIVE = """\
boxes and classes of the digits, by RT-DETR's own loss, from random weights; size and colours varied. The
  classes are named "digit 0" to "digit 9", so that the demo, whose names are others, begins with new class layers:
  where digits are and what tells them apart is pretrained, their names are not."""
LICENCE = """\
The digits (E. Alpaydin, C. Kaynak: Optical Recognition of
Handwritten Digits, UCI, 1998) are not contained here."""


def main() -> None:
    found = parser(__doc__ or "", steps=5_000)
    found.add_argument("--pictures", type=int, default=PICTURES, help=f"default: {PICTURES}")
    options = found.parse_args()
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(
            embedding_size=WIDTHS[0],
            hidden_sizes=WIDTHS,
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=WIDTHS[1:],
        encoder_hidden_dim=WIDTH,
        encoder_layers=1,
        encoder_ffn_dim=2 * WIDTH,
        encoder_attention_heads=4,
        d_model=WIDTH,
        num_queries=20,
        decoder_in_channels=[WIDTH] * 3,
        decoder_ffn_dim=2 * WIDTH,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_denoising=10,
        hidden_expansion=0.5,
        feat_strides=[8, 16, 32],
    )
    width, height = SIZE
    pictures = rows("pretraining", VALID + options.pictures, options.seed)
    for picture in pictures:
        picture["objects"]["labels"] = [f"digit {label}" for label in picture["objects"]["labels"]]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        RTDetrImageProcessorPil(size={"height": height, "width": width}).save_pretrained(folder)
        pretrain(
            options,
            task="object-detection",
            model=Path(folder),
            auto=AutoModelForObjectDetection,
            rows=pictures,
            settings={"weights": "random", "options": {"augment": AUGMENT}, "eval": {"every": 2500}},
            train={"batch": 16, "lr": 1e-3, "schedule": {"kind": "cosine", "warmup": 300}},
            processor=("preprocessor_config.json",),
            metrics=("loss", "mAP", "mAP50", "mAP75"),
            card={
                "tag": "pipeline_tag: object-detection",
                "title": "Small digit detector",
                "what": WHAT,
                "domain": "handwritten digits on paper",
                "data": DATA.format(pictures=options.pictures, digits=len(load("pretraining")[0])),
                "objective": OBJECTIVE,
                "licence": LICENCE,
            },
        )


if __name__ == "__main__":
    main()
