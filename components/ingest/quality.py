"""Is this file a frame worth keeping? Decodes it for real, and names the reason where it is not.

Three measures, all on the grey picture of at most 640 pixels a side:

- **black**: the 99.9th percentile of grey is at most `black`; one lamp in a night scene saves it.
- **white**: the 0.1st percentile of grey is at least `white`.
- **blurred**: the 99.5th percentile of |Laplacian of Gaussian, sigma 1|, divided by the contrast (99th minus 1st
  percentile of grey, plus 4), is at most `blur`. The Gaussian keeps JPEG blocks from passing for edges. The usual
  variance of the Laplacian measures how much of the picture has texture, and so refuses empty corridors, smoke and
  night; the sharpest edges alone tell focus, and dividing by contrast makes dark pictures equal to bright ones. A
  picture of one colour has no edge and counts as blurred. The default is low on purpose: smoke that fills the picture is
  nearly as soft as a lens out of focus, and it is what a safety camera is there for.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

import cv2
import numpy as np
from numpy.typing import NDArray

from ..shared.errors import InputError
from ..shared.files import sha256_bytes
from ..shared.images import EXTENSIONS, MAX_BYTES, MAX_PIXELS, Signature, decode, read_header, signature, sniff
from .parameters import Quality

__all__ = ["Examined", "examine", "sharpness"]

_SIDE = 640
_LARGE = 16_000_000
# Decoded pixels are the memory of this step: pictures above 16 megapixels are decoded one at a time.
_LARGE_TURN = threading.Lock()


@dataclass(frozen=True)
class Examined:
    """What a file turned out to be.

    Attributes:
        sha256: of the bytes.
        ext: file extension by content, or the key's own where the content tells none.
        width, height: pixels, upright; 0 where unknown.
        signature: how it looks; None where it is refused.
        captured_at: EXIF capture time, in UTC as written, or None.
        reason: why it is refused, or empty: `empty`, `not_an_image`, `corrupt`, `animated`, `too_large`, `too_small`,
            `black`, `white`, `blurred`.
        detail: the reason in words.
    """

    sha256: str
    ext: str
    width: int = 0
    height: int = 0
    signature: Signature | None = None
    captured_at: datetime | None = None
    reason: str = ""
    detail: str = ""


def examine(data: bytes, key: str, quality: Quality | None) -> Examined:
    """Decode `data` and judge it.

    Args:
        data: the file's bytes.
        key: its key or path, for the extension of what is no image.
        quality: limits for raw frames; None for labelled ones, which a person has already found worth a label:
            they are only refused when they cannot be decoded.
    """
    sha256 = sha256_bytes(data)
    kind = sniff(data)
    ext = EXTENSIONS[kind] if kind else _own_extension(key)
    if not data:
        return Examined(sha256, ext, reason="empty", detail="the file is empty")
    if kind is None:
        return Examined(sha256, ext, reason="not_an_image", detail="not an image of a known format")
    if len(data) > MAX_BYTES:
        return Examined(sha256, ext, reason="too_large", detail=f"{len(data)} bytes, more than {MAX_BYTES}")
    try:
        header = read_header(data)
        found = Examined(sha256, ext, header.width, header.height, captured_at=header.captured_at)
        reason, detail = _by_header(header.width, header.height, header.frames, quality)
        if reason:
            return _refused(found, reason, detail)
        if header.width * header.height > _LARGE:
            with _LARGE_TURN:
                return _by_pixels(found, decode(data), quality)
        return _by_pixels(found, decode(data), quality)
    except InputError as error:
        return Examined(sha256, ext, reason="corrupt", detail=error.problem)


def _by_header(width: int, height: int, frames: int, quality: Quality | None) -> tuple[str, str]:
    if width * height > MAX_PIXELS:
        return "too_large", f"{width}x{height}, more than {MAX_PIXELS} pixels"
    if frames > 1:
        return "animated", "more than one frame or page"
    if quality and min(width, height) < quality.min_side:
        return "too_small", f"{width}x{height}, a side is shorter than {quality.min_side}"
    return "", ""


def _by_pixels(found: Examined, pixels: NDArray[np.uint8], quality: Quality | None) -> Examined:
    reason, detail = _by_look(pixels, quality) if quality else ("", "")
    if reason:
        return _refused(found, reason, detail)
    return Examined(found.sha256, found.ext, found.width, found.height, signature(pixels), found.captured_at)


def _refused(found: Examined, reason: str, detail: str) -> Examined:
    return Examined(found.sha256, found.ext, found.width, found.height, None, found.captured_at, reason, detail)


def _by_look(pixels: NDArray[np.uint8], quality: Quality) -> tuple[str, str]:
    grey = _small_grey(pixels)
    counts = np.bincount(grey.ravel(), minlength=256)
    if _percentile(counts, 99.9) <= quality.black:
        return "black", f"99.9 % of the pixels are at most {_percentile(counts, 99.9)} of 255"
    if _percentile(counts, 0.1) >= quality.white:
        return "white", f"99.9 % of the pixels are at least {_percentile(counts, 0.1)} of 255"
    value = sharpness(grey)
    if value <= quality.blur:
        return "blurred", f"sharpness {value:.4f} is not above {quality.blur:g}"
    return "", ""


def sharpness(grey: NDArray[np.uint8]) -> float:
    """Strength of the sharpest edges relative to contrast (see the module); below 0.004 blurred, 0.01 to 0.5 sharp."""
    # Sixteenths of a grey level in 16 bits: precise enough, and a histogram gives the percentile without sorting.
    smooth = cv2.GaussianBlur(grey.astype(np.int16) * 16, (0, 0), 1)
    edges = np.bincount(np.abs(cv2.Laplacian(smooth, cv2.CV_16S)).ravel())
    counts = np.bincount(grey.ravel(), minlength=256)
    return _percentile(edges, 99.5) / 16 / (_percentile(counts, 99) - _percentile(counts, 1) + 4)


def _small_grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    scale = _SIDE / max(grey.shape)
    if scale < 1:
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return grey.astype(np.uint8, copy=False)


def _percentile(counts: NDArray[np.intp], percent: float) -> int:
    """The least level that at least `percent` of the pixels do not exceed."""
    total = np.cumsum(counts)
    return int(np.searchsorted(total, total[-1] * percent / 100))


def _own_extension(key: str) -> str:
    suffix = PurePosixPath(key).suffix[1:].lower()
    return suffix if re.fullmatch(r"[a-z0-9]{1,5}", suffix) else "bin"
