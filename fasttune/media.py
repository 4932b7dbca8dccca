"""Images, masks and audio: opened within limits, in one form, with a clear reason where they can't be."""

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
_KEEPS_IDS = ("PNG", "TIFF", "BMP", "GIF", "PPM")  # formats that give back every pixel as it was
_SPREAD = {"L;2": 85, "L;4": 17}  # what Pillow multiplies pixels of 2 and 4 bits by, so that the last one is white
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
    from PIL import ImageOps

    with _decoding(value, column, root) as (image, named):
        _check_pixels(image, column, named, limits)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def open_mask(value: Any, column: str, root: Path | None, limits: Limits) -> Image.Image:
    """A PIL image whose pixels are ids as the file holds them, with its EXIF rotation applied: L, I;16, I, P (the
    indices are the ids, whatever their colours) or RGB. One bit becomes L with 0 and 1; an alpha channel that is
    opaque everywhere is left out.

    Raises what `open_image` does, and DataError for a format that may have changed pixels (JPEG), for transparent
    pixels, and for pixels that are no ids (CMYK, fractions, colours of 16 bits).
    """
    from PIL import ImageOps

    with _decoding(value, column, root, "the mask") as (image, named):
        _check_pixels(image, column, named, limits)
        codec, packed = _how_it_is_packed(image)
        if image.format not in _KEEPS_IDS or image.info.get("compression") in ("jpeg", "webp"):
            kind = image.format if image.format not in _KEEPS_IDS else "TIFF that is compressed as JPEG"
            raise DataError(column, f"{named} is a {kind}, which may have smeared its ids; save masks as PNG")
        if codec == "ppm" or (image.mode.startswith("RGB") and ";16" in packed):
            # Pillow spreads the values of the one to 8 or 16 bits, and cuts those of the other down to 8.
            found = "values up to another number than 255" if codec == "ppm" else "colours of 16 bits"
            raise DataError(column, f"{named} holds {found}; expected ids of 8 or 16 bits, or colours of 8")
        image.load()
        return _ids_of(ImageOps.exif_transpose(image), packed, column, named)


def _how_it_is_packed(image: Image.Image) -> tuple[str, str]:
    """(codec, raw mode) of a file that is not decoded yet, as Pillow calls them: ("zip", "L;4")."""
    tiles: Any = getattr(image, "tile", None)
    codec, _, _, arguments = tiles[0] if tiles else ("", (), 0, "")
    return codec, str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _ids_of(image: Image.Image, packed: str, column: str, named: str) -> Image.Image:
    from PIL import Image

    mode = image.mode
    if mode in ("LA", "PA", "RGBA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise DataError(column, f"{named} has transparent pixels, whose ids can't be told; expected none")
        return image.convert("RGB") if mode == "RGBA" else image.getchannel(0)
    if mode == "1":
        return Image.fromarray(np.asarray(image).astype(np.uint8))
    if mode == "L" and packed[:3] in _SPREAD:
        return Image.fromarray(np.asarray(image) // np.uint8(_SPREAD[packed[:3]]))
    if mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if mode in ("L", "P", "I", "RGB"):
        return image
    raise DataError(column, f"{named} is of mode {mode}; expected ids (grey or palette) or colours (RGB)")


def _check_pixels(image: Image.Image, column: str, named: str, limits: Limits) -> None:
    """Before any pixel is decoded."""
    width, height = image.size
    if width * height > limits.max_pixels:
        limit = f"more than data.max_pixels {limits.max_pixels}"
        raise DataError(column, f"{named} has {width} x {height} pixels, {limit}")


@contextlib.contextmanager
def _decoding(
    value: Any, column: str, root: Path | None, otherwise: str = "the image"
) -> Iterator[tuple[Image.Image, str]]:
    """The image, its header read, and what messages call it (`otherwise` if it is no file). What Pillow raises
    inside becomes a DataError."""
    from PIL import Image

    source = locate(value, column, root)
    named = f"the file {source.name!r}" if isinstance(source, Path) else otherwise
    try:
        with _pillows_limit_off(), warnings.catch_warnings(), Image.open(source) as image:
            warnings.simplefilter("ignore", UserWarning)  # broken metadata around pixels that are whole
            yield image, named
    except Image.UnidentifiedImageError as error:
        raise DataError(column, f"{named} is not an image that Pillow can read") from error
    # Pillow's decoders raise these on truncated and corrupt files.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        raise DataError(column, f"{named} can't be decoded: {error}") from error


def image_size(value: Any, column: str, root: Path | None, limits: Limits) -> tuple[int, int]:
    """Width and height of the image as `open_image` gives it, EXIF rotation applied, without its pixels.

    Raises DataError for a file that is empty, no image or larger than `limits.max_pixels`; what is wrong with its
    pixels shows when it is opened.
    """
    from PIL import ExifTags, Image

    with _decoding(value, column, root) as (image, named):
        _check_pixels(image, column, named, limits)
        if image.format == "PNG" and not _tags_follow_pixels(image.fp):  # type: ignore[attr-defined]
            tags = Image.Image.getexif(image)  # PngImageFile's own decodes all pixels, in case tags follow them
        else:
            tags = image.getexif()
        # Pillow turns the size of a TIFF itself, as it does its pixels.
        width, height = (tags[256], tags[257]) if image.format == "TIFF" else image.size
    return (height, width) if tags.get(ExifTags.Base.Orientation) in (5, 6, 7, 8) else (width, height)


def _tags_follow_pixels(png: Any) -> bool:
    """Whether a PNG has EXIF tags, or text (XMP may hold a rotation too), after its pixels. Its place stays."""
    place, seen = png.tell(), False
    png.seek(8)
    found = False
    while not found and len(header := png.read(8)) == 8:
        seen = seen or header[4:] == b"IDAT"
        found = seen and header[4:] in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        png.seek(int.from_bytes(header[:4]) + 4, io.SEEK_CUR)  # its bytes, and a checksum
    png.seek(place)
    return found


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
