"""Images and audio of every kind come out in one form; what can't be read is refused with a reason."""

from __future__ import annotations

import io
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from fasttune.errors import DataError
from fasttune.media import Limits, image_size, open_audio, open_image

LIMITS = Limits()


def opened(folder: Path, name: str, limits: Limits = LIMITS) -> np.ndarray:
    image = open_image(name, "image", folder, limits)
    assert image.mode == "RGB"
    return np.asarray(image)


def ramp(top: int, dtype: Any) -> np.ndarray:
    return np.linspace(0, top, 64, dtype=np.float64).reshape(8, 8).astype(dtype)


@pytest.mark.parametrize(
    ("array", "top"),
    [
        (ramp(65535, np.uint16), 65535),
        (ramp(4095, np.uint16), 65535),
        (ramp(65535, np.int32), 65535),
        (ramp(255, np.uint8), 255),
    ],
    ids=["16 bit", "12 of 16 bit", "32 bit integers", "8 bit"],
)
def test_grey_values_keep_their_range(tmp_path: Path, array: np.ndarray, top: int) -> None:
    """Pillow's own conversion would clip 16 bits at 255 and make the picture white."""
    Image.fromarray(array).save(tmp_path / "grey.tif")
    expected = array.astype(np.float64) * 255 / top
    found = opened(tmp_path, "grey.tif")
    assert (found[..., 0] == found[..., 1]).all()
    assert np.abs(found[..., 0] - expected).max() <= 1


def test_sixteen_bit_png(tmp_path: Path) -> None:
    Image.fromarray(ramp(65535, np.uint16)).save(tmp_path / "grey.png")
    assert opened(tmp_path, "grey.png")[..., 0].max() == 255
    assert len(np.unique(opened(tmp_path, "grey.png"))) > 50


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "LA", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    left = np.zeros((8, 8, 3), dtype=np.uint8)
    left[:, :4] = 255
    Image.fromarray(left).convert(mode).save(tmp_path / "picture.tif")
    found = opened(tmp_path, "picture.tif").astype(int)
    assert np.abs(found - left).max() <= 3


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "picture.png", transparency=0)
    found = opened(tmp_path, "picture.png")
    assert found[1, 1].tolist() == [0, 0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_was_turned(tmp_path: Path, orientation: int) -> None:
    """Whatever the tag says, the red corner is at the top left of the picture as it is seen."""
    seen = np.zeros((6, 10, 3), dtype=np.uint8)
    seen[0, 0] = (255, 0, 0)
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: seen.transpose(1, 0, 2)[::-1],
        7: seen.transpose(1, 0, 2)[::-1, ::-1],
        8: seen.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(opened(tmp_path, "turned.png"), seen)


def test_the_first_picture_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert opened(tmp_path, "moving.gif")[0, 0].tolist() == [255, 0, 0]


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "lime").save(tmp_path / "dot.png")
    assert opened(tmp_path, "dot.png").tolist() == [[[0, 255, 0]]]


def refused_image(value: Any, folder: Path | None, limits: Limits = LIMITS) -> str:
    with pytest.raises(DataError) as refused:
        open_image(value, "image", folder, limits)
    assert refused.value.column == "image"
    return refused.value.why


def test_a_decompression_bomb_is_refused_before_it_expands(tmp_path: Path) -> None:
    for side in (10_000, 20_000):
        Image.new("1", (side, side)).save(tmp_path / "bomb.png", compress_level=9)
        assert (tmp_path / "bomb.png").stat().st_size < 100_000
        why = refused_image("bomb.png", tmp_path, Limits(max_pixels=1_000_000))
        assert f"{side} x {side} pixels" in why
        assert "data.max_pixels 1000000" in why


def test_the_limit_is_the_users_and_not_pillows(tmp_path: Path) -> None:
    """Pillow refuses above 2 x 89 million pixels whatever it is told; data.max_pixels may allow more."""
    Image.new("1", (15_000, 15_000)).save(tmp_path / "map.png", compress_level=9)
    assert opened(tmp_path, "map.png", Limits(max_pixels=300_000_000)).shape == (15_000, 15_000, 3)


@pytest.mark.filterwarnings("ignore")  # Pillow's own, on what it reads nevertheless
def test_damaged_images_are_refused_whatever_the_decoder_raises(tmp_path: Path) -> None:
    chance = np.random.default_rng(6)
    picture = Image.fromarray(chance.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "gif", "webp", "tif", "bmp"):
        whole = io.BytesIO()
        picture.save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
        data = whole.getvalue()
        for cut in (1, 10, 40, len(data) // 2):
            (tmp_path / f"cut.{suffix}").write_bytes(data[:cut])
            assert refused_image(f"cut.{suffix}", tmp_path)
        for _ in range(40):
            damaged = bytearray(data)
            for place in chance.integers(0, min(len(data), 400), 8):
                damaged[place] = chance.integers(0, 256)
            (tmp_path / f"damaged.{suffix}").write_bytes(damaged)
            try:
                open_image(f"damaged.{suffix}", "image", tmp_path, LIMITS)
            except DataError as error:
                assert error.column == "image"  # noqa: PT017


@pytest.mark.parametrize("value", ["../out.png", "deep/../../out.png", "link.png", "linked/out.png"])
def test_paths_stay_inside_the_folder(tmp_path: Path, value: str) -> None:
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "out.png")
    (inside / "link.png").symlink_to(tmp_path / "out.png")
    (inside / "linked").symlink_to(tmp_path)
    assert f"the path {value!r} leads out of" in refused_image(value, inside)


@pytest.mark.parametrize("value", ["n" * 5000, "no/such/folder.png", "in.png/other.png"])
def test_names_of_no_file(tmp_path: Path, value: str) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "in.png")
    assert f"no file {value!r}" in refused_image(value, tmp_path)


def test_absolute_paths_stay_inside_too(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "out.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "inside" / "in.png")
    assert "leads out of" in refused_image(str(tmp_path / "out.png"), tmp_path / "inside")
    assert opened(tmp_path / "inside", str(tmp_path / "inside" / "in.png")).shape == (2, 2, 3)


@pytest.mark.parametrize("value", [None, "", 3, {"path": None, "bytes": None}, ".", "a\0b.png"])
def test_values_that_are_no_path(tmp_path: Path, value: Any) -> None:
    assert refused_image(value, tmp_path)


def test_bytes_as_datasets_stores_them(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3), "red").save(buffer, "png")
    value = {"path": "gone.png", "bytes": buffer.getvalue()}
    assert open_image(value, "image", tmp_path, LIMITS).size == (2, 3)
    assert refused_image({"bytes": buffer.getvalue()[:40]}, tmp_path)
    assert refused_image({"bytes": b""}, tmp_path)


def tone(rate: int = 8000, frames: int = 400) -> np.ndarray:
    return (0.5 * np.sin(np.arange(frames) * 2 * np.pi * 440 / rate)).astype(np.float32)


@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_16")])
def test_stereo_is_mixed_down_at_its_own_rate(tmp_path: Path, suffix: str, subtype: str) -> None:
    left, right = tone(), np.zeros(400, dtype=np.float32)
    soundfile.write(tmp_path / f"two.{suffix}", np.stack([left, right], axis=1), 8000, subtype=subtype)
    audio = open_audio(f"two.{suffix}", "audio", tmp_path, LIMITS)
    assert audio.rate == 8000
    assert audio.samples.dtype == np.float32
    np.testing.assert_allclose(audio.samples, left / 2, atol=1e-4)


def refused_audio(value: Any, folder: Path, limits: Limits = LIMITS) -> str:
    with pytest.raises(DataError) as refused:
        open_audio(value, "audio", folder, limits)
    assert refused.value.column == "audio"
    return refused.value.why


def write_wav(path: Path, frames: int = 400) -> bytes:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((tone(frames=frames) * 32767).astype("<i2").tobytes())
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "ogg"])
def test_a_truncated_recording(tmp_path: Path, suffix: str) -> None:
    soundfile.write(tmp_path / f"whole.{suffix}", np.tile(tone(), 40), 8000)
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
    assert refused_audio(f"cut.{suffix}", tmp_path)
    assert len(open_audio(f"whole.{suffix}", "audio", tmp_path, LIMITS).samples) == 16000


def test_a_header_that_states_more_than_there_is(tmp_path: Path) -> None:
    data = bytearray(write_wav(tmp_path / "lying.wav"))
    data[40:44] = struct.pack("<I", 2**30)
    (tmp_path / "lying.wav").write_bytes(data)
    assert "truncated" in refused_audio("lying.wav", tmp_path)


def test_a_header_written_before_the_length_was_known(tmp_path: Path) -> None:
    """As programs write that stream into a pipe: the greatest number stands for "until the end"."""
    data = bytearray(write_wav(tmp_path / "piped.wav"))
    data[4:8] = data[40:44] = b"\xff" * 4
    (tmp_path / "piped.wav").write_bytes(data)
    assert len(open_audio("piped.wav", "audio", tmp_path, LIMITS).samples) == 400


def test_recordings_without_sound(tmp_path: Path) -> None:
    write_wav(tmp_path / "none.wav", frames=0)
    assert "holds no samples" in refused_audio("none.wav", tmp_path)
    (tmp_path / "empty.wav").write_bytes(b"")
    assert "is empty" in refused_audio("empty.wav", tmp_path)
    (tmp_path / "text.wav").write_bytes(b"these are words")
    assert "is not audio" in refused_audio("text.wav", tmp_path)


def test_a_recording_that_is_too_long(tmp_path: Path) -> None:
    write_wav(tmp_path / "long.wav", frames=16001)
    assert "lasts 2 s, more than data.max_audio_seconds 1.5" in refused_audio(
        "long.wav", tmp_path, Limits(max_seconds=1.5)
    )


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    samples = tone()
    samples[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 8000, subtype="FLOAT")
    assert "not finite" in refused_audio("nan.wav", tmp_path)


def test_samples_as_datasets_decodes_them(tmp_path: Path) -> None:
    audio = open_audio({"array": tone().tolist(), "sampling_rate": 8000}, "audio", tmp_path, LIMITS)
    np.testing.assert_array_equal(audio.samples, tone())
    stereo = {"array": np.stack([tone(), tone()]), "sampling_rate": 8000}
    assert open_audio(stereo, "audio", tmp_path, LIMITS).samples.ndim == 1
    long = {"array": np.zeros(16001), "sampling_rate": 8000}
    assert "data.max_audio_seconds" in refused_audio(long, tmp_path, Limits(max_seconds=1.5))


def chunks(png: bytes) -> list[bytes]:
    found, at = [], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        found.append(png[at:end])
        at = end
    return found


def last_but_one(png: bytes, name: bytes) -> bytes:
    """The PNG with its chunk of this name behind the pixels."""
    parts = chunks(png)
    (moved,) = (part for part in parts if part[4:8] == name)
    rest = [part for part in parts if part is not moved]
    return png[:8] + b"".join([*rest[:-1], moved, rest[-1]])


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("form", ["jpg", "png", "late.png", "webp", "tif"])
def test_a_size_is_that_of_the_opened_image(tmp_path: Path, orientation: int | None, form: str) -> None:
    """Its pixels not decoded, EXIF rotation applied, wherever its tags stand."""
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    path = tmp_path / f"picture.{form}"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    if form == "late.png" and orientation:
        path.write_bytes(last_but_one(path.read_bytes(), b"eXIf"))
    expected = opened(tmp_path, path.name).shape[1::-1]
    assert image_size(path.name, "image", tmp_path, LIMITS) == expected
    data = {"bytes": path.read_bytes()}
    assert image_size(data, "image", None, LIMITS) == expected
    assert expected == ((20, 30) if orientation in (5, 6, 7, 8) else (30, 20))


@pytest.mark.parametrize("late", [False, True])
def test_a_rotation_in_xmp(tmp_path: Path, late: bool) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>')
    path = tmp_path / "picture.png"
    Image.new("RGB", (30, 20)).save(path, pnginfo=info)
    if late:
        path.write_bytes(last_but_one(path.read_bytes(), b"iTXt"))
    assert opened(tmp_path, path.name).shape[:2] == (30, 20)
    assert image_size(path.name, "image", tmp_path, LIMITS) == (20, 30)


@pytest.mark.parametrize("form", ["jpg", "png", "bmp"])
def test_a_size_is_told_without_pixels(tmp_path: Path, form: str) -> None:
    """Of a file that has lost most of them."""
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    path = tmp_path / f"picture.{form}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError):
        opened(tmp_path, path.name)
    assert image_size(path.name, "image", tmp_path, LIMITS) == (120, 90)


def test_a_size_above_the_limit_is_refused(tmp_path: Path) -> None:
    Image.new("L", (30, 20)).save(tmp_path / "picture.png")
    with pytest.raises(DataError, match=r"30 x 20 pixels, more than data\.max_pixels 599"):
        image_size("picture.png", "image", tmp_path, Limits(max_pixels=599))


@pytest.mark.parametrize(("content", "why"), [(b"", "is empty"), (b"no picture", "is not an image")])
def test_what_has_no_size_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=why):
        image_size("broken.png", "image", tmp_path, LIMITS)
