"""Trains one config, resumes by itself, and scores what it made.

python train.py --config configs/FILE.py[:variant] --workdir DIR [--config.key=value ...]
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from metacanvas_jax.build import (
    COMPONENTS,
    PARTS,
    check_size,
    choose,
    part_sizes,
    picture_size,
    size_multiple,
)
from metacanvas_jax.caching import cached_readers, fill, from_cache, open_caches
from metacanvas_jax.canvas.pca import pca_map
from metacanvas_jax.checkpoint import RunCheckpoints, save_weights
from metacanvas_jax.command import compilation_cache, config_from_flags, define_config, run
from metacanvas_jax.data.captioned import Captioned
from metacanvas_jax.data.feature_cache import FeatureCache
from metacanvas_jax.data.kontext_sizes import context_size
from metacanvas_jax.data.loader import Loader, process_rows
from metacanvas_jax.data.media import encode_video
from metacanvas_jax.data.records import Record
from metacanvas_jax.data.shapes import SPLITS
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.data.tasks import BATCHES, TASKS
from metacanvas_jax.evaluate.shapes_score import EXAMS, Draw, examine, in_batches, unanswered
from metacanvas_jax.evaluate.sheet import moving_sheet, sheet
from metacanvas_jax.loading import check_model, inherit, starting_model
from metacanvas_jax.pipeline import Pipeline
from metacanvas_jax.readers import READERS
from metacanvas_jax.sharding import make_mesh, put_batch
from metacanvas_jax.train.log import MetricLog
from metacanvas_jax.train.objective import OBJECTIVES
from metacanvas_jax.train.optim import OptimizerConfig, make_optimizer
from metacanvas_jax.train.preemption import Preemption
from metacanvas_jax.train.state import TrainState, abstract, start
from metacanvas_jax.train.step import make_train_step
from metacanvas_jax.train.trainable import trainable_table
from metacanvas_jax.train.workdir import open_workdir, write, write_text
from metacanvas_jax.types import InputError

FLAGS = flags.FLAGS
flags.DEFINE_string('workdir', None, 'Folder of the run; a run in it is resumed.', required=True)
flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, when there are several.')
flags.DEFINE_integer('processes', None, 'How many processes there are.')
flags.DEFINE_integer('process', None, 'Which one this is, from 0.')
define_config()

STOP_AFTER = 10  # steps in a row without a finite gradient


def main() -> None:
    if FLAGS.coordinator:
        jax.distributed.initialize(FLAGS.coordinator, FLAGS.processes, FLAGS.process)
    config = config_from_flags()
    compilation_cache()
    check(config)
    with open_workdir(FLAGS.workdir, config) as workdir:
        train(config, workdir)


def check(config: ConfigDict) -> None:
    """Refuses what cannot work before there is a workdir and before anything is compiled."""
    counts = {
        'video_batch_size': config.get('video_batch_size', 1),
        'steps': config.steps,
        'batch_size': config.batch_size,
        'accumulate': config.accumulate,
        'log.every': config.log.every,
        'checkpoint.every': config.checkpoint.every,
    }
    for name, count in counts.items():
        if count < 1:
            raise InputError(f'config.{name} must be at least 1, got {count}')
    make_mesh(**config.mesh)
    OptimizerConfig(**config.optimizer)
    check_model(config)
    if config.objective == 'flow':
        check_size(config, *picture_size(config))
    if config.data.get('cache') is not None:
        if config.sample.every:
            raise InputError(
                f'config.sample.every is {config.sample.every}, but a run from config.data.cache '
                'has no autoencoder to draw with; set it to 0, and draw with sample.py'
            )
        open_caches(config)
    loader = make_loader(config)
    loader.try_tasks()
    loader.batch(0)


def make_loader(config: ConfigDict, caches: Mapping[str, FeatureCache] | None = None) -> Loader:
    """The data: a batch is a function of its step."""
    if caches is None:
        sources = choose(SOURCES, config.data.source, 'config.data.source')(config.data)
        readers = READERS[config.objective](config)
    else:
        sources, readers = caches, cached_readers(config, caches)
    names = {name: _batch_size(config, name) for name in config.data.tasks}
    for name in {*names.values()}:
        process_rows(config[name], config.accumulate, name)
    if config.data.get('sizes') == 'kontext':
        nearest = functools.partial(context_size, multiple=size_multiple(config))
        for source in {*sources.values()}:
            if isinstance(source, Captioned):  # others are of one size
                source.group(config.batch_size, nearest)
    return Loader(
        sources,
        config.data.tasks,
        functools.partial(BATCHES[config.objective], readers),
        batch={task: config[name] for task, name in names.items()},
        accumulate=config.accumulate,
        seed=config.data.seed,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )


def _batch_size(config: ConfigDict, task: str) -> str:
    """Videos have their own where there are any."""
    video = config.objective == 'flow' and task in TASKS and TASKS[task].video
    return 'video_batch_size' if video else 'batch_size'


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    began = time.monotonic()
    mesh = make_mesh(**config.mesh)
    show = print if jax.process_index() == 0 else _silent

    # The model, split into what learns and what is frozen; only the former has optimizer state.
    show(config)
    caches = None
    if config.data.get('cache') is not None:
        caches = open_caches(config)
        fill(config, caches, show)
        config = from_cache(config)
    graphdef, trainable, frozen = starting_model(config, mesh)
    trainable = inherit(config, trainable)
    show(trainable_table(config.trainable, nnx.merge(graphdef, trainable, frozen)))
    optimizer = OptimizerConfig(**config.optimizer)
    tx = make_optimizer(optimizer, config.steps)
    state, where = start(trainable, tx, ema=optimizer.ema > 0, mesh=mesh)
    step_fn = make_train_step(
        graphdef,
        OBJECTIVES[config.objective](config),
        tx,
        accumulate=config.accumulate,
        ema_decay=optimizer.ema,
        where=where,
    )

    # Where an earlier run stopped.
    checkpoints = RunCheckpoints(
        workdir / 'checkpoints',
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )
    first, before = 0, 0.0
    if found := checkpoints.restore(abstract(state)):
        first, state, record = found
        before = record['seconds']
        show(f'resumed from step {first}')

    def seconds() -> float:
        return before + time.monotonic() - began

    def draw() -> Pipeline:
        return Pipeline(config, graphdef, merge(state, frozen), mesh)

    pipe = None  # its programs are compiled when it first draws
    loader = make_loader(config, caches)
    several = len(config.data.tasks) > 1
    key = jax.random.key(config.seed)
    with (
        checkpoints,
        Preemption() as preemption,
        MetricLog(
            workdir,
            every=config.log.every,
            total=config.steps,
            resume_step=first,
            tensorboard=config.log.tensorboard,
        ) as log,
        jax.set_mesh(mesh),
    ):
        batches = loader.iterate(first, config.steps)
        for step, batch in enumerate(batches, start=first + 1):
            state, metrics = step_fn(state, frozen, put_batch(batch, mesh), key)
            if several:
                metrics |= {f'loss_{loader.task(step - 1)}': metrics['loss']}
            log.write(step, metrics)
            if step % config.log.every == 0 and int(metrics['skipped']) >= STOP_AFTER:
                raise FloatingPointError(
                    f'no finite gradient in the {int(metrics["skipped"])} steps up to {step}; '
                    f'step {checkpoints.latest()} is saved'
                )
            stopping = preemption.requested(step)
            if stopping or step % config.checkpoint.every == 0 or step == config.steps:
                log.flush()
                checkpoints.save(step, state, {'seconds': seconds()})
            if stopping:
                checkpoints.wait()
                show(f'preempted at step {step}; the same command goes on from there')
                return
            if config.sample.every and step % config.sample.every == 0:
                pipe = pipe.with_state(merge(state, frozen)) if pipe else draw()
                draw_samples(pipe, workdir, step)

    if config.evaluate.kind in EXAMS and not (workdir / 'score.json').exists():
        scores = score(pipe.with_state(merge(state, frozen)) if pipe else draw())
        scores |= {'steps': config.steps, 'seconds': round(seconds(), 1)}
        if jax.process_index() == 0:
            write_text(workdir / 'score.json', json.dumps(scores, indent=2) + '\n')
        show('score', json.dumps(overall(scores)))
    if config.evaluate.kind == 'export':
        export_weights(config, state, workdir)


def merge(state: TrainState, frozen: nnx.State) -> nnx.State:
    """The parameters to sample from: averaged ones, where an average is kept."""
    return nnx.merge_state(state.trainable if state.ema is None else state.ema, frozen)


def draw_samples(pipe: Pipeline, workdir: pathlib.Path, step: int) -> None:
    """samples/step_N: of each task a sheet of what is shown, drawn and wanted, and canvas maps.

    A sheet of clips has some frames of each; in an mp4 beside it they move.
    """
    config, folder = pipe.config, workdir / 'samples' / f'step_{step}'
    asked = to_draw(config)
    for task, told in asked.items():
        name = '' if len(asked) == 1 else f'{task}_'
        records = [unanswered(record) for record in told]
        batch = config.evaluate.get('batch_size', len(records))  # then scores cost no new programs
        drawn = in_batches(drawing(pipe, task), records, batch)
        found = {'grid.png': png(sheet(told, drawn))}
        if drawn.shape[1] > 1:
            found['grid.mp4'] = mp4(moving_sheet(told, drawn), config.data.fps)
        if pipe.has_canvas:
            maps = in_batches(mapping(pipe, task), records, batch)
            bare = [Record(record.text) for record in told]
            found['canvas.png'] = png(sheet(bare, maps))
        if jax.process_index() == 0:
            for file, save in found.items():
                write(folder / f'{name}{file}', save)


def drawing(pipe: Pipeline, task: str | None) -> Draw:
    return lambda records, indices: pipe.decode(
        pipe.sample(records, indices=indices, seed=pipe.config.seed, task=task)
    )


def mapping(pipe: Pipeline, task: str | None) -> Draw:
    """Maps of the canvas in each latent frame."""

    def draw(records: list[Record], indices: range) -> np.ndarray:
        features_BThwD = pipe.canvas_features(
            records, indices=indices, seed=pipe.config.seed, task=task
        )
        maps = np.stack([[pca_map(frame) for frame in clip] for clip in features_BThwD])
        return (maps * 255).round().astype(np.uint8)

    return draw


def to_draw(config: ConfigDict) -> dict[str | None, list[Record]]:
    """{task: records}; without prompts of its own, what the shapes world asks, half held out."""
    if config.sample.prompts:
        return {None: [Record(text) for text in config.sample.prompts]}
    each = -(-config.sample.count // 12)
    return {
        task: [
            exam.record(one, config.data)
            for split in SPLITS
            for one in exam.requests(split, each, config.seed)
        ][: config.sample.count]
        for task, exam in EXAMS.get(config.evaluate.kind, EXAMS['shapes']).items()
    }


def png(image: Image.Image) -> Callable[[BinaryIO], None]:
    return lambda file: image.save(file, 'PNG')


def mp4(frames_FHWC: np.ndarray, fps: float) -> Callable[[BinaryIO], None]:
    return lambda file: encode_video(file, frames_FHWC, fps=fps, comment='')


def score(pipe: Pipeline) -> dict:
    """Of each task where there are several."""
    config = pipe.config
    settings = dict(
        per_category=config.evaluate.per_category,
        batch=config.evaluate.batch_size,
        seed=config.seed,
    )
    scores = {
        task: examine(exam, drawing(pipe, task), config.data, **settings)
        for task, exam in EXAMS[config.evaluate.kind].items()
    }
    return scores if len(scores) > 1 else scores.popitem()[1]


def overall(scores: dict) -> dict:
    """Of score.json the one figure of each split."""
    of_tasks = {name: found for name, found in scores.items() if isinstance(found, dict)}
    return {
        name: found['overall'] if 'overall' in found else overall(found)
        for name, found in of_tasks.items()
    }


def export_weights(config: ConfigDict, state, workdir: pathlib.Path) -> None:
    """WORKDIR/weights: what learned, in bf16, as `config.weights` takes it.

    Of a language model that is its folder; of a system, a folder for each of its parts.
    """
    parts = COMPONENTS[config.objective]
    flat = {
        '/'.join(map(str, path)): value
        for path, value in nnx.to_flat_state(merge(state, nnx.State({})))
    }
    if other := [path for path in flat if not path.startswith(tuple(parts.values()))]:
        raise InputError(
            f'config.evaluate.kind is export, which writes {", ".join(parts)}; {other[0]} learned '
            'too and is of none of these: go on from the run itself, with config.init_from'
        )
    for name, prefix in parts.items():
        arrays = {
            path.removeprefix(prefix): np.asarray(value[...].astype(jnp.bfloat16))
            for path, value in flat.items()
            if path.startswith(prefix)
        }
        if arrays and jax.process_index() == 0:
            sizes = part_sizes(config, name).to_json() if name in PARTS else {}
            folder = workdir / 'weights' / (name if len(parts) > 1 else '')
            save_weights(folder, arrays, sizes)


def _silent(*_) -> None:
    """What the other processes say."""


if __name__ == '__main__':
    run(main)
