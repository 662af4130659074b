"""Pictures and videos as files, as pixels, and as the flattened patches that the MLLM takes.

The patches, grids and pixel values are those of transformers' Qwen2VLImageProcessorPil, of which
a video's frames are the pictures: one size for all of them, two to a temporal patch, the last one
repeated where they are odd.
"""

import contextlib
import dataclasses
import math
import pathlib
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from einops import rearrange
from PIL import ExifTags, Image, ImageOps

from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.mllm.positions import Grid
from metacanvas_jax.types import InputError

# CLIP's, as every preprocessor_config.json of Qwen2.5-VL has them.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

PIXELS = 64_000_000  # more than that is an accident or an attack
ASPECT = 200  # Qwen's own limit
_START = 64  # bytes that tell what a file is

# Ours is lower, and an error.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


@dataclasses.dataclass(frozen=True)
class Media:
    """A picture, or a video if it has a time between two temporal patches, in patches (n, X)."""

    patches: np.ndarray
    grid: Grid
    tokens: int  # vision tokens: patches after merging
    seconds_per_grid: float | None


# ------------------------------------------------------------ files


def read_image(path: str | pathlib.Path) -> np.ndarray:
    """(H, W, 3) uint8, upright, transparent parts on white."""
    try:
        with open(path, 'rb') as file:
            return decode_image(file, path)
    except OSError as error:
        raise InputError(f'cannot read {path}: {error.strerror}') from error


def decode_image(file: BinaryIO, name: str | pathlib.Path) -> np.ndarray:
    """The picture in an open file, as `read_image` gives it; `name` is for messages."""
    _check_start(file.read(_START), name)
    file.seek(0)
    try:
        with Image.open(file) as image:
            _check_size(name, image.width, image.height)
            return _rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f'{name} is no picture that Pillow knows') from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f'cannot read {name}: {error}') from error


def picture_size(file: BinaryIO, name: str | pathlib.Path) -> tuple[int, int]:
    """Height and width of the picture in an open file, upright; only its header is read."""
    _check_start(file.read(_START), name)
    file.seek(0)
    try:
        with Image.open(file) as image:
            lies = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # on its side
            return (image.width, image.height) if lies else (image.height, image.width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f'cannot read {name}: {error}') from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith('I'):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return np.asarray(image.convert('RGB'))


def read_video(path: str | pathlib.Path, frames: int) -> tuple[np.ndarray, float]:
    """So many frames, evenly spread (all of a shorter video): (F, H, W, 3) uint8 and their rate."""
    try:
        with open(path, 'rb') as file:
            _check_start(file.read(_START), path)
    except OSError as error:
        raise InputError(f'cannot read {path}: {error.strerror}') from error
    found, read, total = [], 0, 0
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise InputError(f'{path} holds no video')
            stream = container.streams.video[0]
            _check_size(path, stream.width, stream.height)
            total, rate = stream.frames or _count(path), stream.average_rate
            if not total or not rate:
                raise InputError(f'{path} has no frames, or no frame rate; is it cut off?')
            wanted = set(spread(total, frames).tolist())
            stream.thread_type = 'AUTO'
            for frame in container.decode(stream):
                if read in wanted:
                    found.append(_upright(frame))
                read += 1
    except FFmpegError as error:
        if total:
            raise InputError(f'{path} is cut off: {read} of its {total} frames read') from error
        raise InputError(f'{path} is no video, or cut off: {error.strerror}') from error
    if len(found) < len(wanted):
        raise InputError(f'{path} is cut off: {read} of its {total} frames read')
    return np.stack(found), float(rate) * len(wanted) / total


def read_clip(path: str | pathlib.Path, frames: int, fps: float) -> np.ndarray:
    """The first frames at this rate, fewer of a shorter video: (F, H, W, 3) uint8."""
    try:
        with open(path, 'rb') as file:
            return decode_clip(file, path, frames, fps)
    except OSError as error:
        raise InputError(f'cannot read {path}: {error.strerror}') from error


def decode_clip(
    file: BinaryIO,
    name: str | pathlib.Path,
    frames: int,
    fps: float,
    *,
    start: float = 0.0,
    fit: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
) -> np.ndarray:
    """Frames of the video in an open file at this rate, from so many seconds on, each `fit`.

    Only a clip from the beginning may find fewer.
    """
    found, read, last, until = [], 0, None, 0.0
    try:
        with _video(file, name) as (container, stream):
            total, rate = stream.frames, stream.average_rate
            tick = stream.time_base or Fraction(1, av.time_base)
            began = float((stream.start_time or 0) * tick)
            stream.thread_type = 'AUTO'
            if start:
                container.seek(int((began + start) / tick), stream=stream)
            for frame in container.decode(stream):
                if frame.time is None or not rate:
                    raise InputError(f'{name} does not say when its frames are shown')
                time = frame.time - began - start
                # A moment shows the frame that began last; half a millisecond is rounding.
                while last is not None and len(found) / fps < time - 5e-4:
                    found.append(fit(_upright(last)))
                if len(found) >= frames:
                    return np.stack(found[:frames])
                last, until, read = frame, time + float(1 / rate), read + 1
    except FFmpegError as error:
        if read:
            raise InputError(f'{name} is cut off after {read} frames') from error
        raise InputError(f'{name} is no video, or cut off: {error.strerror}') from error
    while last is not None and len(found) / fps < until - 5e-4:
        found.append(fit(_upright(last)))
    if last is None or (len(found) < frames if start else read < total):
        raise InputError(f'{name} is cut off: {read} of its {total} frames read')
    return np.stack(found[:frames])


def video_seconds(file: BinaryIO, name: str | pathlib.Path) -> float:
    """How long the video in an open file is, as it says itself."""
    try:
        with _video(file, name) as (container, stream):
            if stream.duration is not None and stream.time_base is not None:
                return float(stream.duration * stream.time_base)
            return (container.duration or 0) / av.time_base
    except FFmpegError as error:
        raise InputError(f'{name} is no video, or cut off: {error.strerror}') from error


@contextlib.contextmanager
def _video(
    file: BinaryIO, name: str | pathlib.Path
) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """The container in an open file, and its first stream of pictures."""
    file.seek(0)
    _check_start(file.read(_START), name)
    file.seek(0)
    with av.open(file, 'r') as container:
        if not container.streams.video:
            raise InputError(f'{name} holds no video')
        stream = container.streams.video[0]
        _check_size(name, stream.width, stream.height)
        yield container, stream


def _count(path: str | pathlib.Path) -> int:
    """For containers that do not say, such as Matroska."""
    with av.open(path) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format='rgb24'), round(frame.rotation / 90))


def spread(total: int, frames: int) -> np.ndarray:
    """Indices of `frames` frames out of `total`, as transformers samples them."""
    frames = min(frames, total)
    return np.arange(frames) * total // frames


def _check_size(path: str | pathlib.Path, width: int, height: int) -> None:
    """Before anything is decoded."""
    if width * height > PIXELS:
        raise InputError(
            f'{path} has {width} x {height} pixels, more than {PIXELS // 10**6} million; shrink it'
        )


def _check_start(start: bytes, name: str | pathlib.Path) -> None:
    """What often comes in place of a picture or a video."""
    if not start:
        raise InputError(f'{name} is empty')
    if start.lstrip().lower().startswith((b'<!doctype html', b'<html')):
        raise InputError(f'{name} is no picture or video: it looks like HTML')
    if start.startswith(b'version https://git-lfs'):
        raise InputError(f'{name} is a git-lfs pointer; fetch the file itself with git lfs pull')


# ------------------------------------------------------------ patches


def see_image(
    pixels_HWC: np.ndarray, config: QwenConfig, *, min_pixels: int, max_pixels: int
) -> Media:
    """A picture, its shape kept, scaled to between so many pixels."""
    return _media(pixels_HWC[None], config, None, min_pixels, max_pixels)


def see_video(
    frames_FHWC: np.ndarray, config: QwenConfig, *, fps: float, min_pixels: int, max_pixels: int
) -> Media:
    """Frames with `fps` of them in a second, each scaled to between so many pixels."""
    seconds = config.tower.temporal_patch_size / fps
    return _media(frames_FHWC, config, seconds, min_pixels, max_pixels)


def smart_resize(
    height: int, width: int, factor: int, *, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size with multiples of `factor` and a number of pixels in the range, shape kept."""
    if max(height, width) > ASPECT * min(height, width):
        raise InputError(f'a picture of {width} x {height} pixels is longer than {ASPECT} to 1')
    h, w = (round(side / factor) * factor for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h, w


def _media(frames_FHWC, config: QwenConfig, seconds, min_pixels: int, max_pixels: int) -> Media:
    """(t h w, X): squares of merge x merge patches in raster order; values channel, frame, y, x."""
    patch, merge = config.tower.patch_size, config.spatial_merge_size
    time = config.tower.temporal_patch_size
    _, height, width, _ = frames_FHWC.shape
    h, w = smart_resize(height, width, patch * merge, min_pixels=min_pixels, max_pixels=max_pixels)
    x_FHWC = np.stack([_resize(frame, h, w) for frame in frames_FHWC])
    x_FHWC = np.concatenate([x_FHWC, np.repeat(x_FHWC[-1:], -len(x_FHWC) % time, 0)])
    x_FHWC = (x_FHWC / np.float32(255) - MEAN) / STD
    patches = rearrange(
        x_FHWC,
        '(t f) (h a p) (w b q) C -> (t h w a b) (C f p q)',
        f=time,
        a=merge,
        b=merge,
        p=patch,
        q=patch,
    )
    return Media(
        patches=patches,
        grid=(len(x_FHWC) // time, h // patch, w // patch),
        tokens=len(patches) // merge**2,
        seconds_per_grid=seconds,
    )


def _resize(frame_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(frame_HWC).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def cover(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest middle part of this shape, resized to (height, width)."""
    H, W, _ = pixels_HWC.shape
    scale = min(H / height, W / width)
    h, w = min(H, scale * height), min(W, scale * width)  # rounding may not leave the picture
    box = ((W - w) / 2, (H - h) / 2, (W + w) / 2, (H + h) / 2)
    image = Image.fromarray(pixels_HWC)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def letterbox(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The whole picture, as large as fits, in the middle of a black one of (height, width)."""
    H, W, _ = pixels_HWC.shape
    scale = min(height / H, width / W)
    h, w = (max(1, round(scale * side)) for side in (H, W))
    top, left = (height - h) // 2, (width - w) // 2
    framed = np.zeros((height, width, 3), np.uint8)
    framed[top : top + h, left : left + w] = _resize(pixels_HWC, h, w)
    return framed


def square(pixels_HWC: np.ndarray, side: int) -> np.ndarray:
    """The whole picture, its shape not kept."""
    return _resize(pixels_HWC, side, side)


def opaque(pixels_HWC: np.ndarray) -> np.ndarray:
    """A picture with an alpha channel on white, as one that is read; others as they are."""
    return pixels_HWC if pixels_HWC.shape[-1] == 3 else _rgb(Image.fromarray(pixels_HWC))


def encode_video(file: BinaryIO, frames_FHWC: np.ndarray, *, fps: float, comment: str) -> None:
    """uint8 frames as an mp4 that every player opens (H.264, even sizes)."""
    height, width = (side - side % 2 for side in frames_FHWC.shape[1:3])
    with av.open(file, 'w', format='mp4', options={'movflags': 'use_metadata_tags'}) as container:
        container.metadata['comment'] = comment
        stream = container.add_stream('libx264', rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
        stream.options = {'crf': '16'}
        for pixels in frames_FHWC[:, :height, :width]:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format='rgb24')
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
