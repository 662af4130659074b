"""Rows of the task table: what the MLLM sees, what the DiT is given, and what is refused."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import quickstart, wan_stage1, wan_stage2, wan_stage3
from metacanvas_jax.build import build_model, build_part
from metacanvas_jax.data import visuals
from metacanvas_jax.data.media import cover, letterbox, opaque, see_image, see_video
from metacanvas_jax.data.records import Record
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.data.tasks import TASKS, Readers, diffusion_batch
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.readers import build_readers
from metacanvas_jax.train.objective import OBJECTIVES
from metacanvas_jax.types import Batch, InputError
from tests import tiny_wan
from tests.tiny_wan import FRAMES, HEIGHT, WIDTH, Clips

LOTS = np.array([0.9, 0.1])  # the second one loses its text
RECORDS = [Clips()[0], Clips()[1]]
VIDEO = 'Please generate video based on the following caption: {}'
IMAGE = 'Please generate image based on the following caption: {}'
ANIMATE = '\nPlease animate the given image into a video based on the following caption: {}'
USERS = {
    't2i': IMAGE,
    'recon': '\nPlease reconstruct the given image.',
    'edit': '\n{}',
    't2v': VIDEO,
    'i2v': ANIMATE,
    'v2v': '\n{}',
    'r2v': '\n{}',
}


@pytest.fixture(scope='module')
def readers() -> Readers:
    return build_readers(tiny_wan.shrink(wan_stage3.get_config()))


@pytest.fixture(scope='module')
def batches(readers) -> dict[str, Batch]:
    return {name: diffusion_batch(readers, name, RECORDS, LOTS) for name in TASKS}


def covered(frames, count: int = FRAMES) -> np.ndarray:
    return np.stack([cover(frame, HEIGHT, WIDTH) for frame in frames[:count]])


def floats(*pixels) -> np.ndarray:
    return np.stack(pixels).astype(np.float32) / 127.5 - 1


def squares(pictures) -> list[np.ndarray]:
    """As Pillow makes them."""
    size = (32, 32)
    return [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures]


def seen(name: str, record: Record, config) -> list:
    """What the MLLM shall see, spelled out row by row."""
    limits = dict(min_pixels=32 * 32, max_pixels=32 * 32)
    assert record.pixels is not None
    assert record.source is not None
    if name == 'v2v':  # all five frames, as there are no eight
        clip = np.stack(squares(covered(record.source)))
        return [see_video(clip, config, fps=12.0, **limits)]
    pictures = {
        'recon': covered(record.pixels, 1),
        'edit': covered(record.source, 1),
        'i2v': covered(record.pixels, 1),
        'r2v': record.references,
    }.get(name, [])
    return [see_image(p, config, **limits) for p in squares(pictures)]


def test_every_row_has_a_template():
    assert {name: task.template for name, task in TASKS.items()} == USERS


@pytest.mark.parametrize('name', TASKS)
def test_what_the_mllm_sees(name, readers, batches):
    """Also where the text was dropped; the pictures stay (spec.md section 6.1)."""
    encoder, prompt = readers.mllm, batches[name].texts.mllm
    media = [seen(name, record, encoder.mllm) for record in RECORDS]
    users = [USERS[name].replace('{}', text) for text in (RECORDS[0].text, '')]
    chats = [
        encoder.tokenizer.chat(user, media=shown)[0]
        for user, shown in zip(users, media, strict=True)
    ]
    expected = encoder.prompts(chats, media if any(media) else None)
    assert (prompt.vision is None) == (name in ('t2i', 't2v'))
    for ours, theirs in zip(jax.tree.leaves(prompt), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('name', TASKS)
def test_what_the_dit_is_given(name, batches):
    batch, video = batches[name], TASKS[name].video
    count = FRAMES if video else 1
    target = floats(*(covered(r.pixels, count) for r in RECORDS))
    np.testing.assert_array_equal(batch.pixels_BFHWC, target)
    clean_BT = np.zeros((2, count))
    clean_BT[:, 0] = name == 'i2v'
    np.testing.assert_array_equal(batch.visual.clean_BT, clean_BT)
    expected = dict(clean_BT=clean_BT)
    if name in ('edit', 'v2v'):
        source = floats(*(covered(r.source, count) for r in RECORDS))
        np.testing.assert_array_equal(batch.visual.condition_BTHWC, source)
        expected['condition_BTHWC'] = source
    if name == 'r2v':  # two slots: the first record has one reference, the second one two
        shown = [[r.references[slot % len(r.references)] for slot in (0, 1)] for r in RECORDS]
        slots = [np.stack([letterbox(p, HEIGHT, WIDTH) for p in pictures]) for pictures in shown]
        np.testing.assert_array_equal(batch.visual.references_BRHWC, floats(*slots))
        expected['references_BRHWC'] = slots
    given = {f.name for f in dataclasses.fields(batch.visual)} - {'context_images'}
    given = {field for field in given if getattr(batch.visual, field) is not None}
    assert given == set(expected)


def test_frames_of_a_strided_autoencoder():
    """Wan's own: 17 frames are 5 latent frames."""
    config = tiny_wan.shrink(wan_stage3.get_config())
    config.vae = dict(kind='wan_vae', size='wan2.2')
    config.data.frames = 17
    readers = build_readers(config)
    records = [Clips(frames=20)[0]] * 2
    for name in ('t2v', 'i2v', 'v2v'):
        batch = diffusion_batch(readers, name, records, LOTS)
        assert batch.visual.clean_BT.shape == (2, 5)
        assert np.shape(batch.pixels_BFHWC) == (2, 17, HEIGHT, WIDTH, 3)
    assert diffusion_batch(readers, 'edit', records, LOTS).visual.clean_BT.shape == (2, 1)


@pytest.mark.parametrize(('frames', 'nearest'), [(120, 121), (122, 121), (18, 17), (0, 1), (4, 5)])
def test_frames_that_are_not_4_n_and_1(frames, nearest):
    config = wan_stage3.get_config()
    config.data.frames = frames
    with pytest.raises(InputError, match=rf'frames {frames} is not 1 more .*nearest: {nearest}\)'):
        build_readers_of(config)
    assert visuals.latent_frames(121, 4) == 31


def build_readers_of(config: ConfigDict) -> Readers:
    config.prompt.tokenizer = 'tiny_qwen'
    return build_readers(config)


def test_a_clip_that_is_shorter_than_asked(readers):
    short = Clips(frames=3)[0]
    message = 'a clip has 3 frames, config.data.frames asks for 5'
    with pytest.raises(InputError, match=message):
        diffusion_batch(readers, 't2v', [short], [1.0])
    diffusion_batch(readers, 'edit', [short], [1.0])  # a picture is long enough
    config = tiny_wan.shrink(wan_stage3.get_config())
    config.data.short_clips = 'hold'
    batch = diffusion_batch(build_readers(config), 'v2v', [short], [1.0])
    found = batch.pixels_BFHWC, batch.visual.condition_BTHWC
    for ours, frames in zip(found, (short.pixels, short.source), strict=True):
        held = covered(frames, 3)
        np.testing.assert_array_equal(ours, floats(np.stack([*held, held[2], held[2]])))
    config.data.short_clips = 'loop'
    with pytest.raises(InputError, match="short_clips 'loop' is unknown; there are: refuse, hold"):
        build_readers(config)


def test_more_references_than_slots(readers):
    record = dataclasses.replace(RECORDS[0], references=RECORDS[1].references * 2)
    with pytest.raises(InputError, match=r'4 references are given, and .* has 2 slots'):
        diffusion_batch(readers, 'r2v', [record], [1.0])


def test_transparent_parts_are_white(readers):
    """As those of files."""
    pixels = np.zeros((6, 6, 4), np.uint8)
    pixels[:3, :, 3] = 255  # black above, nothing below
    shown = opaque(pixels)
    np.testing.assert_array_equal(shown[:3], 0)
    np.testing.assert_array_equal(shown[3:], 255)
    pixels[0, 0] = 200, 100, 0, 128
    blended = [np.round(255 - (255 - c) * 128 / 255) for c in (200, 100, 0)]
    np.testing.assert_allclose(opaque(pixels)[0, 0], blended, atol=1)
    batches = [
        diffusion_batch(
            readers, 'r2v', [dataclasses.replace(RECORDS[0], references=(picture,))], [1.0]
        )
        for picture in (pixels, opaque(pixels))
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, batches), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ('size', 'box'), [((4, 12), (2, 6, 0, 12)), ((16, 8), (0, 8, 4, 8)), ((8, 12), (0, 8, 0, 12))]
)
def test_letterbox_keeps_the_whole_picture(size, box):
    framed = letterbox(np.full((*size, 3), 200, np.uint8), 8, 12)
    top, bottom, left, right = box
    expected = np.zeros((8, 12, 3))
    expected[top:bottom, left:right] = 200
    np.testing.assert_array_equal(framed, expected)


LACKING = {
    'recon': (dict(pixels=None), 'wants a first frame'),
    'edit': (dict(source=None), 'wants a source to edit'),
    'i2v': (dict(pixels=None), 'wants a first frame'),
    'v2v': (dict(fps=None), 'wants the frames per second of its source'),
    'r2v': (dict(references=()), 'wants references'),
}


@pytest.mark.parametrize('name', LACKING)
def test_what_is_missing_is_said(name, readers):
    changes, message = LACKING[name]
    record = dataclasses.replace(RECORDS[0], **changes)
    with pytest.raises(InputError, match=f"task '{name}' {message}; none is given"):
        diffusion_batch(readers, name, [record], [1.0])


def test_a_sampler_has_no_target(readers):
    """The same function sees to its prompt and to what the DiT is given."""
    assert RECORDS[0].pixels is not None
    first = RECORDS[0].pixels[0]
    record = Record(RECORDS[0].text, first=first)
    whole = diffusion_batch(readers, 'i2v', [RECORDS[0]], [1.0])
    asked = diffusion_batch(readers, 'i2v', [record], [1.0])
    assert asked.pixels_BFHWC is None
    np.testing.assert_array_equal(asked.visual.clean_BT, whole.visual.clean_BT)
    for ours, theirs in zip(
        jax.tree.leaves(asked.texts), jax.tree.leaves(whole.texts), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ('config', 'task', 'legal'),
    [
        (quickstart.get_config(), 'edit', 't2i, recon'),
        (quickstart.get_config(), 't2v', 't2i, recon'),
        (tiny_wan.shrink(wan_stage1.get_config()), 'edit', 't2i, recon'),
        (tiny_wan.shrink(wan_stage2.get_config()), 'v2v', 't2i, recon, t2v, i2v'),
    ],
)
def test_tasks_that_a_system_cannot_do(config, task, legal):
    """A SANA sees nothing, stage 1 has no videos, and before stage 3 there is no condition."""
    with pytest.raises(InputError, match=f"has no task '{task}'; it has: {legal}$"):
        diffusion_batch(build_readers(config), task, RECORDS, LOTS)


def test_flux_sees_a_source_beside_its_target(readers):
    bucket = dataclasses.replace(readers.visuals.bucket, frames=1, latent_frames=1)
    flux = dataclasses.replace(readers, visuals=visuals.Visuals(bucket, visuals.FLUX))
    assert flux.tasks() == ['t2i', 'recon', 'edit']
    batch = diffusion_batch(flux, 'edit', RECORDS, LOTS)
    (context,) = batch.visual.context_images
    np.testing.assert_array_equal(context, floats(*(covered(r.source, 1)[0] for r in RECORDS)))
    assert diffusion_batch(flux, 't2i', RECORDS, LOTS).visual.context_images == ()


def test_shapes_can_be_edited():
    class Data:
        seed, size = 3, 16

    sources = SOURCES['shapes'](Data)
    for index in range(4):
        record = sources['edit'][index]
        assert record.pixels.shape == record.source.shape == (1, 16, 16, 3)
        assert np.any(record.pixels != record.source)
        assert record.text
        assert record.plan
        assert sources['recon'][index].text == sources['t2i'][index].text


def test_every_row_trains(batches):
    """Through one function of arrays: in shapes alone, whatever the row."""
    config = tiny_wan.shrink(wan_stage3.get_config())
    model = jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))
    loss = OBJECTIVES['flow'](config)
    for name, batch in batches.items():
        assert jax.eval_shape(loss, model, batch, jax.random.key(0)).shape == (), name


def test_what_is_seen_becomes_latents(batches):
    """References one by one, a source as the video that it is."""
    config = tiny_wan.shrink(wan_stage3.get_config())
    vae = build_part(config, 'vae', jax.random.key(0))
    others: list[Any] = [None] * 6
    model = MetaCanvas(*others, vae=vae)
    references: Any = batches['r2v'].visual.references_BRHWC
    found: Any = model.look(batches['r2v'].visual)
    assert found.condition_BTHWC is None
    for row, slot in np.ndindex(2, 2):
        alone = vae.encode(references[row, slot][None, None])[0, 0]
        np.testing.assert_array_equal(found.references_BRHWC[row, slot], alone)
    source: Any = batches['v2v'].visual.condition_BTHWC
    found = model.look(batches['v2v'].visual).condition_BTHWC
    np.testing.assert_array_equal(found, vae.encode(source))
