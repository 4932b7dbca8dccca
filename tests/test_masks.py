"""Masks, whose pixels are ids: every id comes out as the file holds it, or the file is refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fasttune.data import Encoded, check
from fasttune.errors import DataError
from fasttune.media import Limits, open_image, open_mask
from fasttune.readers import MixedRows, Table, read
from fasttune.rows import Rows, map_columns, media_kind, open_rows
from fasttune.task import Bundle, Column, Sample, Task

LIMITS = Limits()
COLUMNS = (
    Column("image", "image"),
    Column("mask", "mask", ("annotation", "label"), required=False, target=True),
    Column("objects", "json", ("annotation",), required=False, target=True),
)
IDS = np.arange(42, dtype=np.uint8).reshape(6, 7)


def opened(folder: Path, name: str) -> np.ndarray:
    return np.asarray(open_mask(name, "mask", folder, LIMITS))


def refused(value: Any, folder: Path | None, limits: Limits = LIMITS) -> str:
    with pytest.raises(DataError) as error:
        open_mask(value, "mask", folder, limits)
    assert error.value.column == "mask"
    return error.value.why


def grey_png(path: Path, ids: np.ndarray, bits: int) -> None:
    """A grey PNG with fewer bits a pixel than 8, which Pillow reads but doesn't write."""
    height, width = ids.shape
    rows = np.zeros((height, -(-width * bits // 8) * 8 // bits), dtype=np.uint8)
    rows[:, :width] = ids
    packed = np.packbits(np.unpackbits(rows[..., None], axis=-1)[..., 8 - bits :].reshape(height, -1), axis=1)
    lines = b"".join(b"\0" + line.tobytes() for line in packed)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(lines))]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in [*chunks, (b"IEND", b"")]
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_pixels_of_few_bits_are_not_spread_to_255(tmp_path: Path, bits: int) -> None:
    ids = IDS & (2**bits - 1)
    grey_png(tmp_path / "mask.png", ids, bits)
    assert opened(tmp_path, "mask.png").tolist() == ids.tolist()
    if bits > 1:
        assert open_mask("mask.png", "mask", tmp_path, LIMITS).mode == "L"


@pytest.mark.parametrize(
    ("dtype", "name", "mode"),
    [
        (np.uint16, "mask.png", "I;16"),
        (np.uint16, "mask.tif", "I;16"),
        (">u2", "mask.tif", "I;16"),
        (np.int32, "mask.tif", "I"),
    ],
)
def test_ids_above_255(tmp_path: Path, dtype: Any, name: str, mode: str) -> None:
    ids = (IDS.astype(np.int64) * 1500).astype(dtype)
    Image.fromarray(ids).save(tmp_path / name)
    mask = open_mask(name, "mask", tmp_path, LIMITS)
    assert (mask.mode, np.asarray(mask).tolist()) == (mode, ids.tolist())


@pytest.mark.parametrize("transparent", [False, True])
def test_ids_of_a_palette_are_its_indices(tmp_path: Path, transparent: bool) -> None:
    mask = Image.fromarray(IDS % 4)
    mask.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 224, 224, 192])
    mask.save(tmp_path / "mask.png", **({"transparency": 0} if transparent else {}))
    found = open_mask("mask.png", "mask", tmp_path, LIMITS)
    assert (found.mode, np.asarray(found).tolist()) == ("P", (IDS % 4).tolist())
    assert found.convert("RGB").getpixel((1, 0)) == (200, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_channel_is_left_out_and_any_other_refused(tmp_path: Path, mode: str) -> None:
    mask = Image.fromarray(IDS).convert(mode)
    mask.save(tmp_path / "mask.png")
    found = open_mask("mask.png", "mask", tmp_path, LIMITS)
    assert found.mode == mode[:-1]
    assert np.asarray(found).reshape(6, 7, -1)[..., 0].tolist() == IDS.tolist()
    mask.putpixel((2, 3), (*mask.getpixel((2, 3))[:-1], 254))
    mask.save(tmp_path / "mask.png")
    assert "transparent pixels" in refused("mask.png", tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
def test_a_mask_is_turned_as_its_image_is(tmp_path: Path, orientation: int, dtype: Any) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    ids = (IDS % 2).astype(dtype)
    Image.fromarray(ids).save(tmp_path / "mask.png", exif=exif)
    Image.fromarray(ids.astype(np.uint8) * 100).convert("RGB").save(tmp_path / "image.png", exif=exif)
    seen = np.asarray(open_image("image.png", "image", tmp_path, LIMITS))[..., 0]
    assert (opened(tmp_path, "mask.png") * 100).tolist() == seen.tolist()


def test_lossy_formats_are_refused(tmp_path: Path) -> None:
    for name, options in (("mask.jpg", {}), ("mask.webp", {}), ("mask.tif", {"compression": "jpeg"})):
        Image.fromarray(IDS).save(tmp_path / name, **options)
        assert "save masks as PNG" in refused(name, tmp_path)
    Image.fromarray(IDS).save(tmp_path / "mask.tif", compression="tiff_lzw")
    assert opened(tmp_path, "mask.tif").tolist() == IDS.tolist()


def test_pixels_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    Image.fromarray(IDS.astype(np.float32)).save(tmp_path / "mask.tif")
    assert "mode F" in refused("mask.tif", tmp_path)
    Image.fromarray(IDS).convert("CMYK").save(tmp_path / "mask.tif")
    assert "mode CMYK" in refused("mask.tif", tmp_path)
    (tmp_path / "mask.pgm").write_bytes(b"P5 7 6 41\n" + IDS.tobytes())
    assert "another number than 255" in refused("mask.pgm", tmp_path)
    (tmp_path / "mask.pgm").write_bytes(b"P5 7 6 255\n" + IDS.tobytes())
    assert opened(tmp_path, "mask.pgm").tolist() == IDS.tolist()


def test_colours_of_sixteen_bits_are_not_cut(tmp_path: Path) -> None:
    """Pillow would open them as 8 bits a colour, without a word."""
    line = b"\0" + struct.pack(">6H", 257, 1, 2, 258, 3, 4)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(line)),
        (b"IEND", b""),
    ]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert "colours of 16 bits" in refused("mask.png", tmp_path)


def test_damaged_files_and_paths_are_refused_as_images_are(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 99, (64, 64), dtype=np.uint8)).save(whole, "png")
    (tmp_path / "outside.png").write_bytes(whole.getvalue())
    (tmp_path / "data" / "cut.png").write_bytes(whole.getvalue()[:2000])
    (tmp_path / "data" / "text.png").write_text("no mask")
    (tmp_path / "data" / "empty.png").touch()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    for name, why in {
        "cut.png": "can't be decoded",
        "text.png": "not an image",
        "empty.png": "is empty",
        "none.png": "no file",
        "../outside.png": "leads out of",
        "link.png": "leads out of",
    }.items():
        assert why in refused(name, tmp_path / "data"), name
    assert "64 x 64 pixels, more than data.max_pixels 1000" in refused(
        "outside.png", tmp_path, Limits(max_pixels=1000)
    )
    assert "the mask is not an image" in refused({"path": None, "bytes": b"none"}, None)


class Masks(Task):
    """Classes are the ids of the mask."""

    columns = COLUMNS

    def classes_of(self, row: Any) -> list[str]:
        assert isinstance(row["image"], tuple)
        return [str(key) for key in np.unique(np.asarray(row["mask"]))] if "mask" in row else []

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample:
        return Sample({"ids": np.asarray(row["mask"]) if "mask" in row else np.zeros(1)}, cost=1)


def rows_of(folder: Path, *rows: dict[str, Any]) -> Rows:
    return open_rows(Table("rows", MixedRows(rows), folder), COLUMNS, {}, LIMITS)


def save(folder: Path, name: str, ids: np.ndarray, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(ids.astype(np.uint8)).save(folder / name, exif=exif)


def test_masks_are_opened_for_classes_samples_and_the_meter(tmp_path: Path) -> None:
    save(tmp_path, "image.png", np.zeros((6, 7)))
    save(tmp_path, "turned.png", np.zeros((6, 7)), orientation=6)
    save(tmp_path, "mask.png", IDS % 3)
    save(tmp_path, "high.png", IDS.reshape(7, 6) % 2)
    rows = rows_of(
        tmp_path,
        {"image": "image.png", "mask": "mask.png"},
        {"image": "turned.png", "mask": "mask.png"},
        {"image": "turned.png", "mask": "high.png"},
        {"image": "image.png", "mask": None},
        {"image": "image.png", "mask": "none.png"},
    )
    task = Masks()
    seen = check(rows, classes_of=task.classes_of)
    assert seen.classes == {"0": 2, "1": 2, "2": 1}
    assert seen.good.tolist() == [0, 2, 3]
    assert [(bad.row, bad.column) for bad in seen.bad] == [(2, "mask"), (5, "mask")]
    assert "the mask has 7 x 6 pixels; the image has 6 x 7" in seen.bad[0].why
    encoded = Encoded(rows, task, Bundle(torch.nn.Linear(1, 1), None, (), (), ()), train=False).fill()
    assert [(bad.row, bad.column) for bad in encoded.bad] == [(2, "mask"), (5, "mask")]
    assert encoded[0].tensors["ids"].tolist() == (IDS % 3).tolist()
    reference = encoded.reference(0)
    assert reference["image"] == "image.png"
    assert np.asarray(reference["mask"]).tolist() == (IDS % 3).tolist()
    assert set(encoded.reference(2)) == {"image"}


def test_rows_to_predict_need_no_mask(tmp_path: Path) -> None:
    save(tmp_path, "image.png", np.zeros((6, 7)))
    inputs = [column for column in COLUMNS if not column.supervises]
    rows = open_rows(
        Table("r", MixedRows([{"image": "image.png", "mask": "none.png"}]), tmp_path), inputs, {}, LIMITS
    )
    assert set(rows.read(0, media=True)) == {"image"}


def test_equal_images_are_duplicates_whatever_their_masks(tmp_path: Path) -> None:
    """As with boxes: what supervises is no part of what tells rows apart. An input mask is, by its bytes."""
    for name, ids in (("image.png", IDS), ("copy.png", IDS), ("a.png", IDS % 2), ("b.png", IDS % 3)):
        save(tmp_path, name, ids)
    raws = [
        {"image": "image.png", "mask": "a.png"},
        {"image": "copy.png", "mask": "b.png"},
        {"image": "image.png", "mask": {"path": None, "bytes": (tmp_path / "a.png").read_bytes()}},
    ]
    seen = check(rows_of(tmp_path, *raws))
    assert len(set(seen.keys)) == 1
    assert check(rows_of(tmp_path, raws[0])).fingerprint != check(rows_of(tmp_path, raws[1])).fingerprint
    inputs = (COLUMNS[0], Column("mask", "mask"))
    keys = check(open_rows(Table("rows", MixedRows(raws), tmp_path), inputs, {}, LIMITS)).keys
    assert keys[0] == keys[2] != keys[1]


def test_a_saved_dataset_of_images_and_masks(tmp_path: Path) -> None:
    """A mask is found by what its column's type can hold: not the class that is called label."""
    save(tmp_path, "image.png", np.zeros((6, 7)))
    save(tmp_path, "mask.png", IDS)
    features = datasets.Features(
        image=datasets.Image(), annotation=datasets.Image(), label=datasets.ClassLabel(names=["in", "out"])
    )
    row = {"image": str(tmp_path / "image.png"), "annotation": str(tmp_path / "mask.png"), "label": 1}
    for taken, mask in (
        (features, "annotation"),
        ({**features, "annotation": datasets.Value("string")}, "annotation"),
    ):
        held = datasets.Dataset.from_list([row], features=datasets.Features(taken))
        assert map_columns(Table("rows", held), COLUMNS, {}) == {"image": "image", "mask": mask}
    without = held.remove_columns("annotation")
    assert map_columns(Table("rows", without), COLUMNS, {}) == {"image": "image"}
    listed = without.add_column("annotation", [[{"id": 1}]])
    assert map_columns(Table("rows", listed), COLUMNS, {}) == {"image": "image", "objects": "annotation"}
    datasets.Dataset.from_list([row], features=features).save_to_disk(str(tmp_path / "saved"))
    rows = open_rows(read(str(tmp_path / "saved"), "image"), COLUMNS, {}, LIMITS)
    assert np.asarray(rows.read(0, media=True)["mask"]).tolist() == IDS.tolist()


def test_a_file_name_is_an_image_and_never_a_mask() -> None:
    table = Table("rows", MixedRows([{"file_name": "a.png", "path": "b.png"}]))
    assert map_columns(table, COLUMNS, {}) == {"image": "file_name"}
    assert media_kind(COLUMNS[::-1]) == "image"
