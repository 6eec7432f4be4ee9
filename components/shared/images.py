"""Images: bounded decoding to upright RGB, and the signatures by which near-duplicates are known.

Every room decodes through `decode`, so that what was labelled, trained on, evaluated and served are the same pixels.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from .errors import InputError

__all__ = [
    "EXTENSIONS",
    "IMAGE_SUFFIXES",
    "MAX_BYTES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "ImageHeader",
    "NearDuplicates",
    "Signature",
    "decode",
    "encode_jpeg",
    "read_header",
    "signature",
    "sniff",
]

Pixels = NDArray[np.uint8]

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 80_000_000  # a 20,000×20,000 picture (1.2 GB of RGB) is refused from its header alone
MAX_SIDE = 65_535  # of a JPEG; Pillow keeps a pointer a row and pads rows, so that 1×40,000,000 would take 1 GB

# Formats that cameras and labelling tools write, and the extension under which their frames are kept.
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "WEBP": "webp", "TIFF": "tif"}
# Names that files of these formats have in folders of images.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# The plugins' classes instead of Image.open: that one warns through process-wide filters, which is no business for
# threads, and takes a camera's JPEG with a second picture in it (MPO, HDR gain map) for an animation.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
# Encoders write about ten; thousands of empty ones make a small file cost minutes.
_MAX_SCANS = 100
# Pixels that are decoded at the same time, all threads together: on the way to RGB some formats take 12 bytes each.
_TOGETHER = 48_000_000
_BAND = 2**20  # pixels that are converted at a time
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_RUN_LENGTHS = (1, 2)  # BITMAPINFOHEADER's biCompression: BI_RLE8 and BI_RLE4
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
        frames: 1, or 2 for more: an animation or a multi-page file.
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


def sniff(data: bytes) -> str | None:
    """The format that the first bytes announce, as in EXTENSIONS; None for any other."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"BM"):
        return "BMP"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return "TIFF" if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else None


def read_header(data: bytes) -> ImageHeader:
    """Read format, size, orientation and capture time without decoding pixels.

    Raises:
        InputError: empty, not an image of a known format, or larger than MAX_BYTES.
    """
    with _opened(data) as image:
        width, height = image.size
        orientation, taken = _exif(image)
        # Pillow turns a TIFF by itself and tells the turned size.
        if orientation >= 5 and image.format != "TIFF":
            width, height = height, width
        return ImageHeader(str(image.format), width, height, _frames(image), orientation, taken)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode an encoded image to upright RGB.

    Args:
        data: JPEG, PNG, BMP, WebP or TIFF bytes; grey, palette, RGBA, 16-bit (its high byte) and CMYK become RGB;
            alpha is dropped.
        max_pixels: refuse larger images from their header; MAX_PIXELS at most.

    Returns:
        uint8 array of shape (height, width, 3), EXIF orientation applied.

    Raises:
        InputError: not an image, truncated, animated, or too large.
    """
    header = read_header(data)
    limit = min(max_pixels, MAX_PIXELS)
    if header.width * header.height > limit:
        raise InputError(
            f"the image is {header.width}x{header.height}, more than {limit} pixels", "Scale it down before sending."
        )
    if max(header.width, header.height) > MAX_SIDE:
        raise InputError(f"the image is {header.width}x{header.height}", f"Send sides of up to {MAX_SIDE} pixels.")
    if header.frames > 1:
        raise InputError("the image has more than one frame", "Send single frames, not animations or pages.")
    # Sequential ones too: a component may be sent again and again.
    if header.format == "JPEG" and _too_many_scans(data):
        raise InputError(f"the JPEG has more than {_MAX_SCANS} scans", "Save it again with an ordinary encoder.")
    with _turns.of(header.width * header.height):
        pixels = _decode_jpeg(data, limit) if header.format == "JPEG" else None
        if header.format == "WEBP":
            pixels = _decode_webp(data)
        if pixels is None:
            pixels = _decode_any(data, limit)
        if header.format != "TIFF":
            pixels = _upright(pixels, header.orientation)
    if pixels.shape != (header.height, header.width, 3):
        raise InputError("the image's header and its pixels disagree in size", "Upload the frame again.")
    return pixels


class _Turns:
    """Lets threads decode side by side as long as their pictures are small, and large ones one after the other."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._order = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Wait for room; in turn, so that small pictures do not keep a large one waiting for ever."""
        with self._order, self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= self._most)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify()


_turns = _Turns(_TOGETHER)


@contextmanager
def _opened(data: bytes) -> Iterator[ImageFile.ImageFile]:
    """Open an image's header; whatever goes wrong with it, there or in the block, is an InputError."""
    if not data:
        raise InputError("the file is empty", "Upload the frame again.")
    if len(data) > MAX_BYTES:
        raise InputError(f"the file has {len(data)} bytes, more than {MAX_BYTES}", "Send a smaller image.")
    kind = sniff(data)
    if kind is None:
        raise InputError("not an image of a known format", f"Send one of {', '.join(EXTENSIONS)}.")
    try:
        with _READERS[kind](io.BytesIO(data)) as image:
            if min(image.size) < 1:
                raise InputError("the image has no pixels", "Upload the frame again.")
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"the image is too large ({error})", "Scale it down before sending.") from error
    # Pillow's parsers raise nearly anything on hostile bytes; each means the same to us.
    except Exception as error:
        raise InputError(f"the {kind} is damaged ({error})", "Upload the frame again.") from error


def _frames(image: ImageFile.ImageFile) -> int:
    """1, or 2 for more than one: counting the pages of a TIFF would walk through all of them."""
    if image.format != "TIFF":
        return min(2, int(getattr(image, "n_frames", 1)))
    try:
        image.seek(1)
    except EOFError:
        return 1
    return 2


def _exif(image: Image.Image) -> tuple[int, datetime | None]:
    """Orientation (1 where absent or nonsense) and capture time; broken EXIF does not spoil a good picture."""
    try:
        # The base class's method: that of PNG would decode the whole picture to look behind it.
        exif = Image.Image.getexif(image)
        orientation = int(exif.get(_EXIF_ORIENTATION, 1))
        taken = _exif_time(exif.get_ifd(_EXIF_IFD).get(_EXIF_DATETIME_ORIGINAL) or exif.get(_EXIF_DATETIME))
    except Exception:
        return 1, None
    return (orientation if 1 <= orientation <= 8 else 1), taken


def _decode_jpeg(data: bytes, limit: int) -> Pixels | None:
    """libjpeg-turbo's decode; None for what it cannot make RGB of (CMYK), which Pillow then tries."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("CMYK", "YCCK"):
            return None
        if height * width > limit:
            raise InputError("the image's header and its pixels disagree in size", "Upload the frame again.")
        return _strict_jpeg(data)
    except ValueError as error:
        raise InputError(f"the JPEG is damaged ({error})", "Upload the frame again.") from error


def _strict_jpeg(data: bytes) -> Pixels:
    """Decode, refusing all damage but stray bytes after the last row, which many IP cameras write."""
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError as error:
        if "extraneous bytes before marker 0xd9" not in str(error):
            raise
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)
    return pixels


def _decode_webp(data: bytes) -> Pixels:
    """libwebp's decode through OpenCV: the same pixels as through Pillow, in a third of the memory."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise InputError(f"the WEBP is damaged ({error})", "Upload the frame again.") from error
    if pixels is None:
        raise InputError("the WEBP is damaged", "Upload the frame again.")
    return np.asarray(pixels, dtype=np.uint8)


def _too_many_scans(data: bytes) -> bool:
    """Whether a JPEG's pixels are gone through too often; embedded pictures and what follows the end do not count."""
    # The bytes of a marker also occur by chance, but seldom a hundred times.
    if data.count(b"\xff\xda") <= _MAX_SCANS:
        return False
    scans, at = 0, 2
    for _ in range(100 * _MAX_SCANS):
        marker = _MARKER.search(data, at)
        if marker is None or marker[0] == b"\xff\xd9":
            return scans > _MAX_SCANS
        scans += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return True


def _decode_any(data: bytes, limit: int) -> Pixels:
    with _opened(data) as image:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # A tile is decoded whole, however little of it the picture shows.
            tile = image.tag_v2.get(_TILE_WIDTH, 0) * image.tag_v2.get(_TILE_LENGTH, 0)
            if tile > limit:
                raise InputError(f"the TIFF's tiles have more than {limit} pixels", "Write smaller tiles, or none.")
        if image.format == "BMP" and image.info.get("compression") in _RUN_LENGTHS:
            # Pillow decodes them in Python, and a kilobyte of line ends keeps it busy for seconds.
            raise InputError("the BMP is run-length coded", "Save it without compression, or as PNG.")
        if image.mode in ("I", "F"):
            raise InputError("the image has 32-bit samples, whose range is unknown", "Send 8 or 16 bits a sample.")
        if image.mode.startswith("I;16"):
            # The high byte, as Pillow takes it of 16-bit colour.
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        return _rgb(image)


def _rgb(image: Image.Image) -> Pixels:
    """A picture of any other mode as RGB, band by band: Pillow needs several copies of what it converts."""
    image.load()  # turns a TIFF, so its size is told afterwards
    width, height = image.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows)))
        # Straight to RGB, Pillow warns of a palette with transparency.
        band = band.convert("RGBA") if band.mode in ("P", "PA") else band
        pixels[top : top + rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return pixels


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
