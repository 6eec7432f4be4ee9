"""Images: bounded decoding to upright RGB, and the signatures by which near-duplicates are known.

Every room decodes through `decode`, so that what was labelled, trained on, evaluated and served are the same pixels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError

__all__ = [
    "EXTENSIONS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "ImageHeader",
    "NearDuplicates",
    "Signature",
    "decode",
    "encode_jpeg",
    "read_header",
    "signature",
]

Pixels = NDArray[np.uint8]

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 100_000_000  # a 20,000×20,000 picture (1.2 GB of RGB) is refused from its header alone

# Formats that cameras and labelling tools write, and the extension under which their frames are kept.
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "WEBP": "webp", "TIFF": "tif"}
_EXIF_ORIENTATION = 0x0112
_EXIF_DATETIME = 0x0132
_EXIF_IFD = 0x8769
_EXIF_DATETIME_ORIGINAL = 0x9003


@dataclass(frozen=True)
class ImageHeader:
    """What an image's header says, before any pixel is decoded.

    Attributes:
        format: Pillow's name, such as `JPEG`.
        width, height: pixels as displayed, that is after the EXIF orientation.
        frames: more than 1 for an animation or a multi-page file.
        orientation: EXIF orientation, 1 to 8; 1 where absent.
        captured_at: EXIF capture time (taken as UTC), or None.
    """

    format: str
    width: int
    height: int
    frames: int
    orientation: int
    captured_at: datetime | None

    @property
    def extension(self) -> str:
        """File extension without the dot."""
        return EXTENSIONS[self.format]


def read_header(data: bytes) -> ImageHeader:
    """Read format, size, orientation and capture time without decoding pixels.

    Raises:
        InputError: empty, not an image of a known format, or larger than MAX_BYTES.
    """
    if not data:
        raise InputError("the file is empty", "Upload the frame again.")
    if len(data) > MAX_BYTES:
        raise InputError(f"the file has {len(data)} bytes, more than {MAX_BYTES}", "Send a smaller image.")
    try:
        with _open(data) as image:
            exif = image.getexif()
            orientation = int(exif.get(_EXIF_ORIENTATION, 1) or 1)
            width, height = image.size if orientation < 5 else image.size[::-1]
            frames = int(getattr(image, "n_frames", 1))
            taken = _exif_time(exif.get_ifd(_EXIF_IFD).get(_EXIF_DATETIME_ORIGINAL) or exif.get(_EXIF_DATETIME))
            return ImageHeader(
                str(image.format), width, height, frames, orientation if 1 <= orientation <= 8 else 1, taken
            )
    except InputError:
        raise
    # Pillow's parsers raise nearly anything on hostile headers; each means the same to us.
    except Exception as error:
        raise InputError(f"not an image that can be read ({error})", f"Send one of {', '.join(EXTENSIONS)}.") from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode an encoded image to upright RGB.

    Args:
        data: JPEG, PNG, BMP, WebP or TIFF bytes; grey, palette, RGBA, 16-bit and CMYK become RGB.
        max_pixels: refuse larger images from their header.

    Returns:
        uint8 array of shape (height, width, 3), EXIF orientation applied.

    Raises:
        InputError: not an image, truncated, animated, or too large.
    """
    header = read_header(data)
    if header.width * header.height > max_pixels:
        raise InputError(
            f"the image is {header.width}x{header.height}, more than {max_pixels} pixels",
            "Scale it down before sending.",
        )
    if header.frames > 1:
        raise InputError(f"the image has {header.frames} frames", "Send single frames, not animations.")
    if header.format == "JPEG":
        fast = _decode_jpeg(data)
        if fast is not None:
            return _upright(fast, header.orientation)
    return _decode_any(data)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # The pixel bound is ours (MAX_PIXELS), checked from the header by decode().
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=list(EXTENSIONS))
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            if isinstance(error, Image.DecompressionBombError):
                raise InputError(f"the image is too large ({error})", "Scale it down before sending.") from error
            raise InputError("not an image of a known format", f"Send one of {', '.join(EXTENSIONS)}.") from error


def _decode_jpeg(data: bytes) -> Pixels | None:
    """libjpeg-turbo's decode; None for what it cannot make RGB of (CMYK), which Pillow then tries."""
    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("CMYK", "YCCK"):
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return pixels
    except ValueError as error:
        raise InputError(f"the JPEG is damaged ({error})", "Upload the frame again.") from error


def _decode_any(data: bytes) -> Pixels:
    try:
        with _open(data) as image:
            if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
                wide = np.asarray(image, dtype=np.float64)
                image = Image.fromarray(np.clip(wide / 257.0 if wide.max() > 255 else wide, 0, 255).astype(np.uint8))
            return np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the image is damaged ({error})", "Upload the frame again.") from error


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation (TIFF 6.0 / EXIF 2.32, tag 0x0112)."""
    if orientation in (2, 3):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4):
        pixels = pixels[::-1]
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
        if orientation in (6, 7):
            pixels = pixels[:, ::-1]
        if orientation in (7, 8):
            pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def encode_jpeg(pixels: Pixels, quality: int = 90) -> bytes:
    """Encode RGB pixels (height, width, 3) as JPEG."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorspace="RGB"))


def _exif_time(text: Any) -> datetime | None:
    try:
        return datetime.strptime(str(text).strip(), "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        return None


@dataclass(frozen=True)
class Signature:
    """How a frame looks, small enough to keep for every frame ever seen.

    Attributes:
        phash: 64 signs of the low frequencies of the picture's DCT (Zauner 2010, "pHash"), for a quick search.
        thumb: 256 bytes, the picture as 16×16 grey means, by which a local change (someone at the door) is told
            from sensor noise, which a global hash cannot.
    """

    phash: int
    thumb: bytes


def signature(pixels: Pixels) -> Signature:
    """The signature of RGB pixels (height, width, 3)."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    thumb = cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA)
    return Signature(int(np.packbits(bits).view(">u8")[0]), thumb.tobytes())


class NearDuplicates:
    """An index of signatures that answers which earlier frames look the same.

    Two frames are near-duplicates when their hashes differ in at most `bits` of 64 and no one of the 16×16 grey
    means differs by more than `levels` of 255.
    """

    def __init__(self, bits: int = 8, levels: int = 16) -> None:
        self.bits = bits
        self.levels = levels
        self._size = 0
        self._hashes = np.empty(1024, dtype=np.uint64)
        self._thumbs = np.empty((1024, 256), dtype=np.uint8)

    def __len__(self) -> int:
        return self._size

    def add(self, item: Signature) -> int:
        """Add a signature; its index."""
        if self._size == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.empty_like(self._hashes)])
            self._thumbs = np.concatenate([self._thumbs, np.empty_like(self._thumbs)])
        self._hashes[self._size] = item.phash
        self._thumbs[self._size] = np.frombuffer(item.thumb, dtype=np.uint8)
        self._size += 1
        return self._size - 1

    def find(self, item: Signature) -> NDArray[np.intp]:
        """Indices of all near-duplicates of `item`, oldest first."""
        distance = np.bitwise_count(self._hashes[: self._size] ^ np.uint64(item.phash))
        close = np.flatnonzero(distance <= self.bits)
        thumb = np.frombuffer(item.thumb, dtype=np.uint8).astype(np.int16)
        worst = np.abs(self._thumbs[close].astype(np.int16) - thumb).max(axis=1, initial=0)
        near: NDArray[np.intp] = close[worst <= self.levels]
        return near
