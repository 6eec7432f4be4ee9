"""Decoding: every format that cameras write gives the same upright RGB, everything else an InputError, memory bounded."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from haechi.components.shared.errors import InputError
from haechi.components.shared.images import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    NearDuplicates,
    Signature,
    _Turns,
    decode,
    encode_jpeg,
    read_header,
    signature,
    sniff,
)

Pixels = NDArray[np.uint8]


def scene(width: int = 48, height: int = 32) -> Pixels:
    """Four flat quarters: red, green, blue, white; enough to see a turn, a flip and a colour swap."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (220, 30, 20)
    pixels[: height // 2, width // 2 :] = (20, 200, 40)
    pixels[height // 2 :, : width // 2] = (30, 40, 210)
    pixels[height // 2 :, width // 2 :] = (240, 240, 240)
    return pixels


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def rgb() -> Image.Image:
    return Image.fromarray(scene())


def exif(orientation: int) -> Image.Exif:
    table = Image.Exif()
    table[0x0112] = orientation
    table[0x0132] = "2026:03:04 05:06:07"
    return table


FORMATS: dict[str, bytes] = {
    "jpeg": encoded(rgb(), "JPEG", quality=95, subsampling=0),
    "progressive": encoded(rgb(), "JPEG", quality=95, progressive=True, subsampling=0),
    "png": encoded(rgb(), "PNG"),
    "rgba": encoded(rgb().convert("RGBA"), "PNG"),
    "palette": encoded(rgb().quantize(8), "PNG"),
    "palette with alpha": encoded(rgb().quantize(8), "PNG", transparency=b"\xff\x80\xff\xff"),
    "bmp": encoded(rgb(), "BMP"),
    "bmp palette": encoded(rgb().quantize(8), "BMP"),
    "webp": encoded(rgb(), "WEBP", lossless=True),
    "webp rgba": encoded(rgb().convert("RGBA"), "WEBP", lossless=True),
    "tiff": encoded(rgb(), "TIFF"),
    "tiff lzw": encoded(rgb(), "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encoded(rgb(), "TIFF", compression="jpeg", quality=95),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rgb(name: str) -> None:
    pixels = decode(FORMATS[name])
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert pixels.shape == (32, 48, 3)
    middles = pixels[8::16, 12::24].reshape(4, 3).astype(int)
    assert np.abs(middles - scene()[8::16, 12::24].reshape(4, 3)).max() <= 6


GREY = np.tile(np.linspace(0, 255, 48, dtype=np.uint8), (32, 1))


@pytest.mark.parametrize(
    ("name", "data", "expected", "within"),
    [
        ("grey jpeg", encoded(Image.fromarray(GREY), "JPEG", quality=98), GREY, 4),
        ("grey png", encoded(Image.fromarray(GREY), "PNG"), GREY, 0),
        ("grey with alpha", encoded(Image.fromarray(GREY).convert("LA"), "PNG"), GREY, 0),
        ("1 bit", encoded(Image.fromarray(GREY).point(lambda v: 255 * (v > 127), "1"), "PNG"), 255 * (GREY > 127), 0),
        ("16 bit png", encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), GREY, 0),
        ("16 bit tiff", encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), GREY, 0),
        # A dark 16-bit picture stays dark: its range is that of its samples, not of what is in it.
        ("dark 16 bit", encoded(Image.fromarray(GREY.astype(np.uint16)), "PNG"), np.zeros_like(GREY), 0),
        ("16 bit colour png", bytes(cv2.imencode(".png", np.dstack([GREY.astype(np.uint16) * 257] * 3))[1]), GREY, 0),
    ],
)
def test_grey_and_deep_samples_become_rgb(name: str, data: bytes, expected: Pixels, within: int) -> None:
    pixels = decode(data).astype(int)
    assert pixels.shape == (32, 48, 3)
    assert np.abs(pixels - np.asarray(expected, dtype=int)[:, :, None]).max() <= within


def test_32_bit_samples_are_refused_since_their_range_is_unknown() -> None:
    with pytest.raises(InputError, match="32-bit samples"):
        decode(encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"))


def test_cmyk_of_adobe_keeps_its_colours() -> None:
    """Photoshop and Pillow write CMYK JPEGs inverted, with an Adobe marker that says so."""
    data = encoded(rgb().convert("CMYK"), "JPEG", quality=98, subsampling=0)
    assert simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK")
    middles = decode(data)[8::16, 12::24].reshape(4, 3).astype(int)
    assert np.abs(middles - scene()[8::16, 12::24].reshape(4, 3)).max() <= 8


def stored_for(orientation: int) -> Pixels:
    """The pixels as a camera stores them so that `orientation` brings them to `scene()` (EXIF 2.32, table 6)."""
    turn: dict[int, Callable[[Pixels], Pixels]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    return np.ascontiguousarray(turn[orientation](scene()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once_and_the_header_agrees(kind: str, orientation: int) -> None:
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(Image.fromarray(stored_for(orientation)), kind, exif=exif(orientation), **options)
    header = read_header(data)
    assert (header.width, header.height, header.orientation) == (48, 32, orientation)
    assert header.captured_at == datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    pixels = decode(data)
    assert pixels.shape == (32, 48, 3)
    assert np.abs(pixels[8::16, 12::24].astype(int) - scene()[8::16, 12::24]).max() <= 8


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_out_of_range_means_none(orientation: int) -> None:
    data = encoded(rgb(), "JPEG", exif=exif(orientation))
    assert (read_header(data).width, read_header(data).orientation) == (48, 1)
    assert decode(data).shape == (32, 48, 3)


def test_16_bit_tiff_turns_too() -> None:
    table = TiffImagePlugin.ImageFileDirectory_v2()
    table[0x0112] = 6
    data = encoded(Image.fromarray(np.rot90(GREY, 1).astype(np.uint16) * 257), "TIFF", tiffinfo=table)
    assert np.array_equal(decode(data)[:, :, 0], GREY)


def test_broken_exif_does_not_spoil_a_good_picture() -> None:
    good = encoded(rgb(), "JPEG", exif=exif(6))
    at = good.index(b"Exif\0\0") + 6
    assert decode(good[:at] + b"\xff" * 12 + good[at + 12 :]).shape == (32, 48, 3)


def test_a_jpeg_with_a_second_picture_in_it_is_one_frame() -> None:
    """Phones and some cameras append a gain map or a second view (MPO)."""
    data = encoded(rgb(), "MPO", save_all=True, append_images=[rgb()])
    header = read_header(data)
    assert (header.format, header.frames, header.extension) == ("JPEG", 1, "jpg")
    assert decode(data).shape == (32, 48, 3)


def test_stray_bytes_before_the_end_marker_are_forgiven() -> None:
    data = FORMATS["jpeg"]
    assert np.array_equal(decode(data[:-2] + b"\0\0\0" + data[-2:]), decode(data))


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)) for level in (0, 120, 250)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def resized_header(data: bytes, kind: str) -> bytes:
    """The same file with 20,000 by 20,000 written into its header."""
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", 20_000, 20_000) + data[at + 4 :]
    if kind == "BMP":
        return data[:18] + struct.pack("<ii", 20_000, 20_000) + data[26:]
    for tag, value in ((256, 48), (257, 32)):
        entry = next(
            form
            for form in (struct.pack("<HHII", tag, 4, 1, value), struct.pack("<HHIHH", tag, 3, 1, value, 0))
            if form in data
        )
        data = data.replace(entry, struct.pack("<HHII", tag, 4, 1, 20_000))
    return data


def bombs() -> dict[str, bytes]:
    return {
        "png": png(20_000, 20_000),
        "jpeg": resized_header(FORMATS["jpeg"], "JPEG"),
        "bmp": resized_header(FORMATS["bmp"], "BMP"),
        "tiff": resized_header(FORMATS["tiff"], "TIFF"),
        "webp": b"RIFF"
        + struct.pack("<I", 22)
        + b"WEBPVP8X"
        + struct.pack("<I", 10)
        + b"\0" * 4
        + (16_382).to_bytes(3, "little") * 2,
    }


REFUSED: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\xff",
    "text": b"hello, camera\n" * 20,
    "html": b"<!doctype html><html><body>404</body></html>",
    "gif": encoded(rgb().quantize(8), "GIF"),
    "animated gif": animation("GIF"),
    "apng": animation("PNG"),
    "animated webp": animation("WEBP"),
    "multi-page tiff": animation("TIFF"),
    "garbage": bytes(range(256)) * 8,
    "zip behind a jpeg magic": b"\xff\xd8\xffPK\x03\x04" + b"\0" * 200,
    "html behind a png magic": b"\x89PNG\r\n\x1a\n<html></html>",
    "magic alone": b"\x89PNG\r\n\x1a\n",
    "pdf": b"%PDF-1.7\n%\xff\xff\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "png of no width": png(0, 8),
    "too many bytes": b"\xff\xd8\xff" + b"\0" * MAX_BYTES,
    **{f"bomb {name}": data for name, data in bombs().items()},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_picture_is_refused_at_once(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        decode(REFUSED[name])
    assert time.perf_counter() - start < 1.0
    assert caught.value.problem and caught.value.remedy


@pytest.mark.parametrize("name", ["png", "jpeg", "bmp", "tiff"])
def test_a_huge_header_is_refused_for_its_size(name: str) -> None:
    with pytest.raises(InputError, match="20000x20000"):
        decode(bombs()[name])


def test_huge_headers_take_no_memory() -> None:
    """In a process that may hold 400 MB beyond what it starts with; the pixels alone would be 1.2 GB."""
    code = (
        "import sys, resource\n"
        "from tests.components.test_images import bombs\n"
        "from haechi.components.shared.images import decode, read_header\n"
        "from haechi.components.shared.errors import InputError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for data in bombs().values():\n"
        "    for work in (read_header, decode):\n"
        "        try: work(data)\n"
        "        except InputError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000, f"{done.stdout} kB more"


def test_the_caller_may_set_a_lower_limit_but_not_a_higher_one() -> None:
    with pytest.raises(InputError, match="48x32, more than 1000 pixels"):
        decode(FORMATS["png"], max_pixels=1000)
    with pytest.raises(InputError, match=f"more than {MAX_PIXELS}"):
        decode(bombs()["png"], max_pixels=10**12)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(name: str, part: float) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    kinds = {"jpeg": "JPEG", "progressive": "JPEG", "png": "PNG", "palette": "PNG", "bmp": "BMP", "tiff": "TIFF"}
    kind = next((kind for start, kind in kinds.items() if name.startswith(start)), "PNG")
    if name.startswith("webp"):
        kind = "WEBP"
    options: dict[str, Any] = {"progressive": True} if name == "progressive" else {}
    if name.startswith("tiff "):
        options = {"compression": {"tiff lzw": "tiff_lzw", "tiff jpeg": "jpeg"}[name]}
    image = Image.fromarray(noise)
    data = encoded(image.quantize(16) if "palette" in name else image, kind, **options)
    with pytest.raises(InputError):
        decode(data[: int(len(data) * part)])


SMALL = [FORMATS[name] for name in FORMATS] + [
    encoded(rgb(), "JPEG", exif=exif(6)),
    encoded(rgb().convert("CMYK"), "JPEG"),
    encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    animation("PNG"),
    animation("WEBP"),
    animation("TIFF"),
]


@settings(max_examples=1500, deadline=None)
@given(data=st.data())
def test_mutated_images_raise_nothing_but_input_error(data: st.DataObject) -> None:
    original = bytearray(data.draw(st.sampled_from(SMALL)))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(original) - 1) | st.integers(0, min(60, len(original) - 1)))
        cut = data.draw(st.sampled_from(["byte", "delete", "insert", "copy"]))
        if cut == "byte":
            original[at] = data.draw(st.integers(0, 255))
        elif cut == "delete":
            del original[at : at + data.draw(st.integers(1, 20))]
        elif cut == "insert":
            original[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            original[at:at] = original[: data.draw(st.integers(1, 64))]
        if not original:
            original = bytearray(b"\0")
    try:
        pixels = decode(bytes(original), max_pixels=4_000_000)
    except InputError:
        return
    header = read_header(bytes(original))
    assert pixels.dtype == np.uint8 and pixels.shape == (header.height, header.width, 3)


@given(data=st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_input_error(data: bytes) -> None:
    for magic in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF\x50\0\0\0WEBP", b"II*\0", b"MM\0*"):
        with pytest.raises(InputError):
            decode(magic + data)


def test_memory_of_the_mutation_tests_stayed_bounded() -> None:
    """Runs after them in this file: the process's peak is far from what any announced size could have taken."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3_000_000


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
def test_the_first_bytes_tell_the_format(kind: str) -> None:
    assert sniff(encoded(rgb(), kind)) == kind
    assert read_header(encoded(rgb(), kind)).format == kind


def test_encode_and_decode_agree() -> None:
    pixels = np.repeat(np.repeat(np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5), 16, 0), 16, 1)
    colour = np.dstack([pixels] * 3)
    assert np.abs(decode(encode_jpeg(colour, 95)).astype(int) - colour).max() <= 12


def test_signature_knows_the_same_view_and_a_visitor() -> None:
    rng = np.random.default_rng(3)
    view = cv2.resize(rng.integers(0, 255, (9, 16, 3), dtype=np.uint8), (640, 360), interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(view.astype(int) + rng.integers(-6, 7, view.shape), 0, 255).astype(np.uint8)
    visitor = view.copy()
    visitor[120:300, 300:380] = 10
    index = NearDuplicates()
    assert index.add(signature(view)) == 0
    assert list(index.find(signature(noisy))) == [0]
    assert list(index.find(signature(visitor))) == []
    assert list(index.find(signature(view[:, ::-1].copy()))) == []


def test_the_index_grows_and_keeps_order() -> None:
    index = NearDuplicates()
    for number in range(3000):
        index.add(Signature(0 if number % 1000 == 7 else (1 << 64) - 1, bytes(256)))
    assert len(index) == 3000
    assert list(index.find(Signature(0, bytes(256)))) == [7, 1007, 2007]


def progressive(scans: int, side: int = 64) -> bytes:
    """A grey progressive JPEG by hand: the means, then scans of which each refines one frequency by nothing at all."""

    def segment(kind: int, data: bytes) -> bytes:
        return bytes([0xFF, kind]) + struct.pack(">H", len(data) + 2) + data

    def scan(first: int, last: int, high: int, low: int, data: bytes) -> bytes:
        return segment(0xDA, bytes([1, 1, 0, first, last, high << 4 | low])) + data

    one_code = bytes([1] + [0] * 15)
    blocks = (side // 8) ** 2
    runs = b"\x00" * 4 * (blocks // 32768 + 1)  # each 15 bits: this and the next 16383 blocks hold nothing
    steps = [(frequency, low) for low in range(13, -1, -1) for frequency in range(1, 64)][:scans]
    return b"".join(
        [
            b"\xff\xd8" + segment(0xDB, b"\x00" + bytes([1] * 64)),
            segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])),
            segment(0xC4, b"\x00" + one_code + b"\x00") + segment(0xC4, b"\x10" + one_code + b"\xe0"),
            scan(0, 0, 0, 0, b"\x00" * (blocks // 8)),
            *(scan(step, step, 0 if low == 13 else low + 1, low, runs) for step, low in steps),
            b"\xff\xd9",
        ]
    )


def test_a_progressive_jpeg_has_so_many_scans_and_no_more() -> None:
    assert decode(progressive(99)).shape == (64, 64, 3)
    # What follows the end is not of the picture: phones write a film there.
    assert decode(progressive(9) + b"\xff\xda" * 1000, 10**6).shape == (64, 64, 3)
    with pytest.raises(InputError, match="more than 100 scans"):
        decode(progressive(100))
    bomb = progressive(63 * 14, 6000)
    assert len(bomb) < 300_000
    begun = time.process_time()
    with pytest.raises(InputError, match="more than 100 scans"):
        decode(bomb)
    assert time.process_time() - begun < 1  # 13 s where it is decoded


def test_a_sequential_jpeg_has_no_thousand_scans_either() -> None:
    plain = encoded(Image.new("RGB", (2000, 2000)), "JPEG", subsampling=0)
    scan = b"\xff\xda" + struct.pack(">H", 8) + bytes([1, 1, 0, 0, 63, 0])  # one colour of three, and nothing of it
    begun = time.process_time()
    with pytest.raises(InputError, match="more than 100 scans"):
        decode(plain[: plain.index(b"\xff\xda")] + scan * 20_000 + b"\xff\xd9")
    assert time.process_time() - begun < 1  # 10 s where it is decoded


def run_length_bmp(width: int, height: int, code: bytes) -> bytes:
    """A BMP of 8 bits with a run-length code for its pixels."""
    start = 14 + 40 + 4 * 256
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(code), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(code), 0, 0, start) + head + bytes(4 * 256) + code


def test_a_kilobyte_of_run_lengths_costs_no_seconds() -> None:
    begun = time.process_time()
    with pytest.raises(InputError, match="run-length"):
        decode(run_length_bmp(5000, 5000, b"\x01\x05\x00\x00" * 5000))
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (MAX_SIDE + 1, 1)], ids=str)
def test_a_line_longer_than_any_jpeg_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"sides of up to {MAX_SIDE} pixels"):
        decode(encoded(Image.new("L", size), "PNG"))
    longest = (min(size[0], MAX_SIDE), min(size[1], MAX_SIDE))
    assert decode(encoded(Image.new("L", longest), "PNG")).shape == (longest[1], longest[0], 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_pictures_of_several_bands_are_whole(mode: str, kind: str) -> None:
    if (kind, mode) == ("TIFF", "LA"):
        return
    noise = np.random.default_rng(7).integers(0, 256, (1500, 900, 4), dtype=np.uint8)
    picture = (
        Image.fromarray(noise).convert("RGB").quantize(50) if mode == "P" else Image.fromarray(noise).convert(mode)
    )
    written = encoded(picture, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode(written), np.asarray(picture.convert("RGB")))


def test_large_pictures_are_decoded_one_after_the_other() -> None:
    turns, most, at_hand, lock = _Turns(10), [0], [0], threading.Lock()

    def work(pixels: int) -> None:
        with turns.of(pixels):
            with lock:
                at_hand[0] += pixels
                most[0] = max(most[0], at_hand[0])
            time.sleep(0.01)
            with lock:
                at_hand[0] -= pixels

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [4, 4, 8, 1, 30, 2, 8, 4, 4, 2] * 3))
    assert most == [30]  # alone, as it would never fit
    with ThreadPoolExecutor(6) as pool:
        most[0] = 0
        list(pool.map(work, [4] * 30))
    assert most == [8]


def test_a_tile_larger_than_any_picture_is_refused() -> None:
    sink = io.BytesIO()
    entries = {256: 32, 257: 32, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 325: 3}
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in entries.items():
        directory[tag] = value
    directory[324] = 8
    sink.write(b"II*\0" + struct.pack("<I", 12) + b"x\x9c\x00\x00")
    directory.save(sink)
    with pytest.raises(InputError, match=r"tiles have more than \d+ pixels"):
        decode(sink.getvalue())
