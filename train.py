"""Trains one config, resumes by itself, and scores what it made.

python train.py --config configs/FILE.py[:variant] --workdir DIR [--config.key=value ...]
"""

import functools
import json
import pathlib
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from metacanvas_jax.build import check_size, choose, part_sizes, picture_size, size_multiple
from metacanvas_jax.caching import cached_readers, fill, from_cache, open_caches
from metacanvas_jax.canvas.pca import pca_map
from metacanvas_jax.checkpoint import RunCheckpoints, save_weights
from metacanvas_jax.command import compilation_cache, config_from_flags, define_config, run
from metacanvas_jax.data.captioned import Captioned
from metacanvas_jax.data.feature_cache import FeatureCache
from metacanvas_jax.data.kontext_sizes import context_size
from metacanvas_jax.data.loader import Loader, process_rows
from metacanvas_jax.data.records import Record
from metacanvas_jax.data.shapes import SPLITS
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.data.tasks import BATCHES, TASKS
from metacanvas_jax.evaluate.shapes_score import EXAMS, examine, unanswered
from metacanvas_jax.evaluate.sheet import contact_sheet, sheet
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
from metacanvas_jax.train.workdir import open_workdir, write_text
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
    batches = make_loader(config, caches).iterate(first, config.steps)
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
        for step, batch in enumerate(batches, start=first + 1):
            state, metrics = step_fn(state, frozen, put_batch(batch, mesh), key)
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

    Without prompts of its own, what the shapes world asks, half of it held out.
    """
    config, folder = pipe.config, workdir / 'samples' / f'step_{step}'
    exams = EXAMS.get(config.evaluate.kind, EXAMS['shapes'])
    for task, exam in exams.items():
        told = [Record(text) for text in config.sample.prompts] or [
            exam.record(one, config.data)
            for split in SPLITS
            for one in exam.requests(split, -(-config.sample.count // 12), config.seed)
        ]
        told = told[: config.sample.count]
        records = [unanswered(record) for record in told]
        indices = range(len(told))
        drawn = pipe.decode(pipe.sample(records, indices=indices, seed=config.seed))
        name = '' if len(exams) == 1 else f'{task}_'
        save(sheet(told, drawn), folder / f'{name}grid.png')
        if pipe.has_canvas:
            features = pipe.canvas_features(records, indices=indices, seed=config.seed)[:, 0]
            maps = np.stack([pca_map(feature) for feature in features])
            maps, texts = (maps * 255).round().astype(np.uint8), [record.text for record in told]
            save(contact_sheet(maps, texts), folder / f'{name}canvas.png')


def save(image: Image.Image, path: pathlib.Path) -> None:
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f'.{path.name}')
        image.save(temporary, 'PNG')
        temporary.replace(path)


def score(pipe: Pipeline) -> dict:
    """Of each task where there are several."""
    config = pipe.config

    def draw(records: list[Record], indices: range) -> np.ndarray:
        return pipe.decode(pipe.sample(records, indices=indices, seed=config.seed))

    settings = dict(
        per_category=config.evaluate.per_category,
        batch=config.evaluate.batch_size,
        seed=config.seed,
    )
    scores = {
        task: examine(exam, draw, config.data, **settings)
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
    """WORKDIR/weights: the MLLM in bf16, as `config.weights.mllm` takes it."""
    arrays = {
        '/'.join(map(str, path)): np.asarray(value[...].astype(jnp.bfloat16))
        for path, value in nnx.to_flat_state(merge(state, nnx.State({})))
    }
    if jax.process_index() == 0:
        save_weights(workdir / 'weights', arrays, part_sizes(config, 'mllm').to_json())


def _silent(*_) -> None:
    """What the other processes say."""


if __name__ == '__main__':
    run(main)
