"""Images and audio: opened within limits, in one form, with a clear reason where they can't be."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fasttune.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au"})
_UNKNOWN_SIZE = 0x7FFFFFFF  # and above: what programs write that stream and can't go back
MEDIA_SUFFIXES = {"image": IMAGE_SUFFIXES, "audio": AUDIO_SUFFIXES}


@dataclass(frozen=True)
class Audio:
    """samples: float32 [frames], mono, -1 to 1. rate: in Hz."""

    samples: np.ndarray
    rate: int


@dataclass(frozen=True)
class Limits:
    """What one file may expand to. max_seconds: of audio."""

    max_pixels: int = 178_956_970
    max_seconds: float = 3600.0


def locate(value: Any, column: str, root: Path | None) -> Path | io.BytesIO:
    """The file that a media column names, or the bytes that it holds.

    value: a path (relative to `root`), or {"path", "bytes"} as `datasets` stores media. Raises DataError if a
    path leads out of `root` or to no file.
    """
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        value = value.get("path")
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise DataError(column, f"expected a path, found {value!r}")
    path = Path(value) if root is None else root / value
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise DataError(column, f"the path {str(value)!r} leads out of {root} (data.root names another folder)")
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise DataError(column, f"no file {str(value)!r}" + (f" in {root}" if root else ""))
    if path.stat().st_size == 0:
        raise DataError(column, f"the file {str(value)!r} is empty")
    return path


def open_image(value: Any, column: str, root: Path | None, limits: Limits) -> Image.Image:
    """A PIL image in RGB with its EXIF rotation applied; 16-bit values are scaled down to 8 bits.

    Raises DataError for a file that is empty, truncated, no image, or larger than `limits.max_pixels`.
    """
    from PIL import Image, ImageOps

    source = locate(value, column, root)
    named = f"the file {source.name!r}" if isinstance(source, Path) else "the image"
    try:
        with _pillows_limit_off(), warnings.catch_warnings(), Image.open(source) as image:
            warnings.simplefilter("ignore", UserWarning)  # broken metadata around pixels that are whole
            width, height = image.size
            if width * height > limits.max_pixels:  # before any pixel is decoded
                limit = f"more than data.max_pixels {limits.max_pixels}"
                raise DataError(column, f"{named} has {width} x {height} pixels, {limit}")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        raise DataError(column, f"{named} is not an image that Pillow can read") from error
    # Pillow's decoders raise these on truncated and corrupt files.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        raise DataError(column, f"{named} can't be decoded: {error}") from error


def image_size(value: Any, column: str, root: Path | None) -> tuple[int, int]:
    """Width and height of the image as `open_image` gives it, EXIF rotation applied, from the file's header alone.

    Raises DataError for a file that is empty or no image; what is wrong with its pixels shows when it is opened.
    """
    from PIL import ExifTags, Image

    source = locate(value, column, root)
    named = f"the file {source.name!r}" if isinstance(source, Path) else "the image"
    try:
        with _pillows_limit_off(), warnings.catch_warnings(), Image.open(source) as image:
            warnings.simplefilter("ignore", UserWarning)
            lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            width, height = image.size
    except Image.UnidentifiedImageError as error:
        raise DataError(column, f"{named} is not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        raise DataError(column, f"{named} can't be decoded: {error}") from error
    return (height, width) if lies_on_its_side else (width, height)


@contextlib.contextmanager
def _pillows_limit_off() -> Iterator[None]:
    """Pillow's own limit on pixels is one of the process; ours, checked instead, is the run's."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # convert("RGB") would clip 16-bit values at 255 and turn nearly every pixel white.
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def open_audio(value: Any, column: str, root: Path | None, limits: Limits) -> Audio:
    """Samples mixed down to mono, at the file's own rate.

    Raises DataError for a file that is empty, truncated, no audio, or longer than `limits.max_seconds`.
    """
    import soundfile

    if isinstance(value, Mapping) and value.get("array") is not None:
        samples, rate = np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
        if samples.ndim == 2:
            samples = samples.mean(axis=int(np.argmin(samples.shape)))  # there are fewer channels than frames
        _check_length(len(samples), rate, column, "the audio", limits)
        return _checked(samples, rate, column, "the audio")
    source = locate(value, column, root)
    named = f"the file {source.name!r}" if isinstance(source, Path) else "the audio"
    try:
        with soundfile.SoundFile(source) as file:
            _check_length(file.frames, file.samplerate, column, named, limits)
            stated, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise DataError(column, f"{named} is not audio that libsndfile can read: {error.error_string}") from error
    missing = _missing_bytes(source)
    if len(samples) < stated or missing:
        found = f"{missing} bytes of its samples are missing" if missing else f"{len(samples)} of {stated} frames"
        raise DataError(column, f"{named} is truncated, or its header lies: {found}")
    return _checked(samples, rate, column, named)


def _check_length(frames: int, rate: int, column: str, named: str, limits: Limits) -> None:
    if frames > limits.max_seconds * rate:
        limit = f"more than data.max_audio_seconds {limits.max_seconds:g}"
        raise DataError(column, f"{named} lasts {frames / rate:.0f} s, {limit}")


def _missing_bytes(source: Path | io.BytesIO) -> int:
    """Bytes that the header of a WAV or AIFF file promises and the file doesn't hold: libsndfile reads on without
    a word."""
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getvalue()) as file:
        form, kind = file.read(4), file.read(8)[4:]
        if (form, kind) not in ((b"RIFF", b"WAVE"), (b"FORM", b"AIFF"), (b"FORM", b"AIFC")):
            return 0
        order, samples = ("little", b"data") if form == b"RIFF" else ("big", b"SSND")
        while len(header := file.read(8)) == 8:
            name, size = header[:4], int.from_bytes(header[4:], order)  # type: ignore[arg-type]
            if name == samples:
                start = file.tell()
                held = file.seek(0, io.SEEK_END) - start
                return 0 if size >= _UNKNOWN_SIZE else max(0, size - held)
            file.seek(size + size % 2, io.SEEK_CUR)
    return 0


def _checked(samples: np.ndarray, rate: int, column: str, named: str) -> Audio:
    if samples.size == 0:
        raise DataError(column, f"{named} holds no samples")
    if not np.isfinite(samples).all():
        raise DataError(column, f"{named} holds values that are not finite")
    return Audio(samples, rate)
