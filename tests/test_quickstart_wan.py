"""The quickstart of six tasks: its autoencoder of clips, its batches, its exam."""

import dataclasses

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import quickstart, quickstart_mllm, quickstart_wan
from metacanvas_jax.build import build_model, size_multiple
from metacanvas_jax.data.loader import Loader
from metacanvas_jax.data.shapes import SPLITS
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.data.tasks import TASKS, Asked, diffusion_batch
from metacanvas_jax.describe import Answer, Describer
from metacanvas_jax.evaluate.shapes_score import EXAMS, examine
from metacanvas_jax.geometry import Geometry
from metacanvas_jax.loading import check_model
from metacanvas_jax.mllm.config import PRESETS
from metacanvas_jax.pipeline import Pipeline
from metacanvas_jax.readers import build_readers
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.pixel import PixelConfig, PixelVae
from tests import tiny
from tests.test_bad_input import script

CONFIG = quickstart.get_config('wan')


@pytest.mark.parametrize('frames', [1, 5])
def test_clips_come_back_to_the_same_bits(frames):
    vae = PixelVae(PixelConfig(stride=2), dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, frames, 6, 4, 3)).astype(np.float32)
    z = vae.encode(jnp.asarray(x))
    assert z.shape == (2, frames, 3, 2, vae.channels)
    np.testing.assert_array_equal(vae.decode(z), x)
    # A latent frame is a frame.
    np.testing.assert_array_equal(vae.encode(jnp.asarray(x[:, -1:])), z[:, -1:])


def test_every_task_has_shapes_of_its_own_and_no_others():
    """A program each: of pictures one latent frame, of clips five."""
    readers, sources = build_readers(CONFIG), SOURCES['shapes'](CONFIG.data)
    loader = Loader(
        sources,
        CONFIG.data.tasks,
        lambda task, records, lots: (task, diffusion_batch(readers, task, records, lots)),
        batch=dict.fromkeys(CONFIG.data.tasks, jax.device_count()),
        accumulate=1,
        seed=0,
        threads=1,
        prefetch=1,
    )
    shapes = {}
    for step in range(60):
        task, batch = loader.batch(step)
        assert task == loader.task(step)
        shapes.setdefault(task, set()).add(str(jax.tree.map(np.shape, batch)))
        frames = batch.visual.clean_BT.shape[1], batch.pixels_BFHWC.shape[1]
        assert frames == ((5, 5) if TASKS[task].video else (1, 1))
        assert (batch.visual.clean_BT[:, 0] == (task == 'i2v')).all()
    assert shapes.keys() == set(CONFIG.data.tasks) == EXAMS['six_tasks'].keys()
    assert {task: len(found) for task, found in shapes.items()} == dict.fromkeys(shapes, 1)


def test_it_starts_from_what_ships():
    """Which is what runs of configs/quickstart_wan.py learn and export."""
    pictures, *later = (quickstart_wan.get_config(v) for v in quickstart_wan.VARIANTS)
    for clips in later:
        assert clips.weights.mllm == CONFIG.weights.mllm
        assert clips.weights.keys() == CONFIG.weights.keys()
        clips.weights.update(CONFIG.weights)
    for config in (CONFIG, pictures, *later):
        check_model(config)
        assert config is CONFIG or config.trainable == ('context/.*', 'backbone/.*')
    clips = later[-1]
    clips.context.hidden += 1
    with pytest.raises(InputError, match=r'context_connector does not fit this config: .* 257'):
        check_model(clips)


def test_pictures_are_drawn_by_what_draws_clips():
    geometry = Geometry(CONFIG, 2, 1, 12, takes_context=False)
    assert size_multiple(CONFIG) == 4
    assert [geometry.frames(None, task) for task in (None, 't2v', 't2i', 'edit')] == [5, 5, 1, 1]
    assert (geometry.frames(5, 't2v'), geometry.frames(1, 't2i')) == (5, 1)
    with pytest.raises(InputError, match="task 'edit' makes pictures, not 5 frames"):
        geometry.frames(5, 'edit')
    with pytest.raises(InputError, match="no task 'walk'"):
        geometry.frames(5, 'walk')


def test_plans_are_written_of_every_task(pipe, monkeypatch):
    """In training and in drawing, by the MLLM that was taught to."""
    readers, planned = pipe._readers, []

    def write(self, prompts, media, *, max_new_tokens, **settings):
        del self, media, settings
        assert max_new_tokens == CONFIG.prompt.plan_tokens
        planned.extend(prompts)
        return [Answer('on white', [])] * len(prompts)

    monkeypatch.setattr(Describer, '__call__', write)
    taught = quickstart_mllm.get_config('clips')
    assert {*taught.data.tasks} == {*CONFIG.data.tasks}
    for task in CONFIG.data.tasks:
        record = readers.fit(task, SOURCES['shapes'](CONFIG.data)[task][0])
        same = SOURCES['shapes_text'](taught.data)[task][0]
        assert (same.text, same.plan) == (record.text, record.plan)
        planned_batch, empty = (
            diffusion_batch(readers, task, [dataclasses.replace(record, plan=plan)], [1])
            for plan in (record.plan, '')
        )
        assert planned_batch.texts.mllm
        assert empty.texts.mllm
        longer = planned_batch.texts.mllm.length_B - empty.texts.mllm.length_B
        assert 0 < longer < CONFIG.prompt.plan_tokens, task
        planned.clear()
        asked = Asked(record.text, shown=readers.show(task, record))
        pipe._texts(task, [asked], [0], 0)
        assert planned == [TASKS[task].prompt(record.text)]


@pytest.mark.parametrize('task', [task for task in EXAMS['six_tasks'] if task != 't2i'])
def test_answers_pass_and_those_to_other_questions_do_not(task):
    exam, each, seed = EXAMS['six_tasks'][task], 2, 5
    asked = [
        [exam.record(one, CONFIG.data).pixels for one in exam.requests(split, each, seed)]
        for split in SPLITS
    ]
    size = len(asked[0])

    def table(shift: int) -> dict:
        splits = iter(asked)
        settings = dict(per_category=each, batch=size, seed=seed)
        return examine(
            exam,
            lambda records, indices: np.roll(np.stack(next(splits)), shift, axis=0),
            CONFIG.data,
            **settings,
        )

    right, wrong = table(0), table(1)
    for split in SPLITS:
        assert right[split]['overall'] == 1
        assert wrong[split]['overall'] <= 0.25
        assert ('flicker_first' in right[split]) == TASKS[task].video


@pytest.fixture(scope='module')
def pipe():
    """Random, with a language model of one layer; all of it matters."""
    vision, config = PRESETS['tiny'].vision, quickstart.get_config('wan')
    assert vision
    vision = dataclasses.replace(vision, depth=2, fullatt_block_indexes=(1,))
    small = dataclasses.replace(PRESETS['tiny'], vision=vision, num_hidden_layers=1)
    config.weights.update(dict.fromkeys(config.weights, 'random'))
    config.mllm.remat = config.backbone.remat = 'none'
    config.backbone.update(num_attention_heads=1, num_layers=1, ffn_dim=32)
    config.sample.steps = 2
    config.prompt.buckets = (256,)  # what it writes as 36 tokens may be read as many more
    config.evaluate.update(per_category=1, batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, 'tiny', small)
        model = tiny.randomised(lambda _: build_model(config, jax.random.key(0)), zero=())
        yield Pipeline(config, *nnx.split(model), tiny.one_device())


def test_sheets_of_clips(pipe, tmp_path, monkeypatch):
    """Of a task that is given the first frame: that of each clip is exactly the given one."""
    task = 'i2v'
    with script('train') as train:
        exams = {task: EXAMS['six_tasks'][task]}
        monkeypatch.setattr(train, 'EXAMS', dict.fromkeys(EXAMS, exams))
        train.draw_samples(pipe, tmp_path, 7)
        (told,) = train.to_draw(pipe.config).values()
        drawn = train.drawing(pipe, task)(told[:4], range(4))
        maps = train.mapping(pipe, task)(told[:4], range(4))
        scores = train.score(pipe)
    folder = tmp_path / 'samples/step_7'
    assert {path.name for path in folder.iterdir()} == {'grid.png', 'grid.mp4', 'canvas.png'}
    with av.open(str(folder / 'grid.mp4')) as video:
        assert len([*video.decode(video=0)]) == pipe.config.data.frames
    assert drawn.shape == (4, 5, 24, 24, 3)
    np.testing.assert_array_equal(drawn[:, 0], [record.first for record in told[:4]])
    assert scores.keys() == set(SPLITS)
    for found in scores.values():  # the given frame stays in its place, whatever comes after
        assert (found['first_frame'], found['first']) == (0, 1)
    # All of that with one solver.
    assert pipe._solve._cache_size() == 1
    assert maps.shape == (4, 5, 6, 6, 3)
    # The canvas leaves the first frame as it is.
    assert maps.any((2, 3, 4)).tolist() == [[False] + [True] * 4] * 4
