"""Draws pictures and videos with a trained model, or asks its MLLM about one.

python sample.py --checkpoint DIR --prompt TEXT --output FILE.png [--num_images N]
python sample.py --checkpoint DIR --prompts FILE.jsonl --output FOLDER
python sample.py --checkpoint DIR --prompts geneval --output FOLDER [--processes N --process I]
python sample.py --check --prompts geneval --output FOLDER
python sample.py --checkpoint DIR --task describe --image FILE --prompt TEXT [--output FILE]

A published system instead of a checkpoint: --config configs/base.py:qwen --config.weights.mllm=DIR
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
from absl import flags
from PIL import Image, PngImagePlugin

from metacanvas_jax.canvas.pca import pca_map
from metacanvas_jax.command import compilation_cache, config_from_flags, define_config, run
from metacanvas_jax.data.media import Media, encode_video, read_clip, read_image, read_video
from metacanvas_jax.data.tasks import TASKS
from metacanvas_jax.describe import Describer
from metacanvas_jax.evaluate.benchmarks import BENCHMARKS, open_benchmark
from metacanvas_jax.evaluate.layouts import VIDEO, Layout, Picture
from metacanvas_jax.evaluate.prompts_file import read_prompts
from metacanvas_jax.pipeline import Pipeline, load
from metacanvas_jax.train.workdir import write
from metacanvas_jax.types import InputError

FLAGS = flags.FLAGS
flags.DEFINE_string('checkpoint', None, 'A train workdir, or one of its steps.')
flags.DEFINE_string('output', None, 'The file to write; with --prompts a folder.')
flags.DEFINE_string('prompt', None, 'What to draw, or to answer.')
flags.DEFINE_string(
    'prompts',
    None,
    'A .jsonl of prompt, id, seed, image, video, references; or a benchmark, NAME or NAME=FILE of '
    f'your own data: {", ".join(BENCHMARKS)}.',
)
flags.DEFINE_bool('check', default=False, help='Only says what the folder of a benchmark lacks.')
flags.DEFINE_integer('processes', 1, 'Of so many, each draws its share of a benchmark.')
flags.DEFINE_integer('process', 0, 'Which one this is, from 0.')
flags.DEFINE_string('negative_prompt', None, 'What guidance steers away from.')
flags.DEFINE_string('task', None, 'Inferred from the inputs where it is not given.')
flags.DEFINE_integer('seed', 0, 'Picture i of a run has the noise fold_in(key(seed), i).')
flags.DEFINE_integer('num_images', None, 'How many pictures of the prompt: 1; of a benchmark, 4.')
flags.DEFINE_integer('batch_size', 16, 'How many pictures at once; it never changes a picture.')
flags.DEFINE_integer('steps', None, 'Solver steps.')
flags.DEFINE_float('guidance', None, 'Scale of classifier-free guidance; 1 is none.')
flags.DEFINE_integer('height', None, 'In pixels.')
flags.DEFINE_integer('width', None, 'In pixels.')
flags.DEFINE_string('noise', None, 'Initial latents, .npy fp32 (H, W, C), or (B, H, W, C).')
flags.DEFINE_string('latents', None, 'Where to write the final latents, in the same layout.')
flags.DEFINE_string('canvas_map', None, 'Where to write a map of the canvas features (App. I).')
flags.DEFINE_multi_string('image', [], 'A picture that the prompt is about; several are allowed.')
flags.DEFINE_multi_string('reference', [], 'A picture of what shall be in the video to draw.')
flags.DEFINE_string('video', None, 'A video that the prompt is about, or edits.')
flags.DEFINE_integer('frames', None, 'Of a video to draw; how many of --video the MLLM sees (8).')
flags.DEFINE_float('fps', None, 'Of a video to draw: frames a second.')
flags.DEFINE_integer('max_new_tokens', 128, 'The longest answer of --task describe.')
flags.DEFINE_float('temperature', 0.0, 'Of --task describe; 0 takes the likeliest token.')
flags.DEFINE_float('top_p', 1.0, 'Of --task describe: draws from so much of the probability.')
define_config()

DESCRIBE = 'describe'  # the one task without a picture to draw
EDIT = 'edit'  # the one that cannot do without a picture to look at


def main() -> None:
    check_flags()
    compilation_cache()
    if FLAGS.task == DESCRIBE:
        media = read_media()
        answer(open_system(), *media)
    elif FLAGS.prompts is None:
        noise = None if FLAGS.noise is None else read_noise(pathlib.Path(FLAGS.noise))
        sample_prompt(noise)
    elif (layout := benchmark()) is not None:
        sample_benchmark(layout)
    else:
        sample_prompts(pathlib.Path(FLAGS.prompts))


def benchmark() -> Layout | None:
    if FLAGS.prompts is None:
        return None
    return open_benchmark(
        FLAGS.prompts, samples=FLAGS.num_images, frames=FLAGS.frames, fps=FLAGS.fps
    )


def check_flags() -> None:
    if FLAGS.check and benchmark() is None:
        raise InputError(f'--check wants --prompts of a benchmark: {", ".join(BENCHMARKS)}')
    if not FLAGS.check and (FLAGS.checkpoint is None) == (FLAGS.config is None):
        raise InputError('give either --checkpoint or --config')
    if (FLAGS.prompt is None) == (FLAGS.prompts is None):
        raise InputError('give either --prompt or --prompts')
    tasks = tuple(dict.fromkeys((*TASKS, EDIT, DESCRIBE)))
    if FLAGS.task not in (None, *tasks):
        known = ', '.join(tasks)
        raise InputError(f'--task {FLAGS.task!r} is unknown; there are: {known}')
    if FLAGS.task == DESCRIBE and FLAGS.prompts:
        raise InputError('--task describe takes one --prompt')
    if FLAGS.task == EDIT and FLAGS.prompt and not FLAGS.image:
        raise InputError('--task edit wants --image, the picture that --prompt is to change')
    if FLAGS.prompts and (FLAGS.image or FLAGS.reference or FLAGS.video):
        raise InputError(
            '--image, --reference and --video go with --prompt; a file of --prompts names its own'
        )
    if FLAGS.task != DESCRIBE and FLAGS.output is None:
        raise InputError('--output is missing')
    for name in ('num_images', 'batch_size', 'steps', 'frames', 'max_new_tokens'):
        value = FLAGS[name].value
        if value is not None and value < 1:
            raise InputError(f'--{name} must be at least 1, got {value}')
    if not 0 <= FLAGS.process < FLAGS.processes:
        raise InputError(f'--process {FLAGS.process} is not one of {FLAGS.processes}, from 0')
    if FLAGS.processes > 1 and benchmark() is None:
        raise InputError('--processes goes with --prompts of a benchmark')
    if FLAGS.temperature < 0 or not 0 < FLAGS.top_p <= 1:
        raise InputError(
            f'--temperature must be at least 0 and --top_p in (0, 1], got {FLAGS.temperature} '
            f'and {FLAGS.top_p}'
        )
    if FLAGS.prompts and (FLAGS.noise or FLAGS.latents or FLAGS.canvas_map):
        raise InputError('--noise, --latents and --canvas_map go with --prompt, not with --prompts')


def open_system() -> Pipeline | Describer:
    return load(FLAGS.checkpoint or config_from_flags())


def open_pipeline() -> Pipeline:
    system = open_system()
    if isinstance(system, Describer):
        raise InputError('this is an MLLM alone: it makes no pictures; use --task describe')
    return system


def frames_to_draw(pipe: Pipeline) -> int:
    return pipe.frames(FLAGS.frames, FLAGS.task)


def settings() -> dict[str, Any]:
    return {
        'negative_prompt': FLAGS.negative_prompt,
        'frames': FLAGS.frames,
        'steps': FLAGS.steps,
        'guidance': FLAGS.guidance,
        'size': (FLAGS.height, FLAGS.width),
    }


# ---------------------------------------------------------------- a question


def read_media() -> tuple[list[np.ndarray], tuple[np.ndarray, float] | None]:
    """Before anything is compiled: the file may be at fault."""
    pictures = [read_image(path) for path in FLAGS.image]
    return pictures, None if FLAGS.video is None else read_video(FLAGS.video, FLAGS.frames or 8)


def answer(
    system: Pipeline | Describer,
    pictures: list[np.ndarray],
    video: tuple[np.ndarray, float] | None,
) -> None:
    describer = system if isinstance(system, Describer) else system.describer
    media: list[Media] = describer.encoder.see(pictures)
    if video is not None:
        media.append(describer.encoder.watch(*video))
    (found,) = describer(
        [FLAGS.prompt],
        [media] if media else None,
        max_new_tokens=FLAGS.max_new_tokens,
        temperature=FLAGS.temperature,
        top_p=FLAGS.top_p,
        seed=FLAGS.seed,
    )
    print(found.text)
    if FLAGS.output is not None:
        path = pathlib.Path(FLAGS.output)
        text = found.text
        if path.suffix == '.json':
            text = json.dumps({'text': found.text, 'ids': found.ids}, ensure_ascii=False)
        write(path, lambda file: file.write(f'{text}\n'.encode()))


# ---------------------------------------------------------------- one prompt


def sample_prompt(noise: np.ndarray | None) -> None:
    shown = [[read_image(path) for path in paths] for paths in (FLAGS.image, FLAGS.reference)]
    pipe = open_pipeline()
    if FLAGS.canvas_map and not pipe.has_canvas:
        raise InputError('--canvas_map: this model has no canvas (config.canvas.fuse is none)')
    output = pathlib.Path(FLAGS.output)
    record = pipe.record(FLAGS.prompt, shown[0], shown[1], read_source(pipe, FLAGS.video))
    if noise is not None:
        noise = pipe.given_noise(noise, record, (FLAGS.height, FLAGS.width), frames_to_draw(pipe))
    n = (FLAGS.num_images or 1) if noise is None else len(noise)
    latents = [
        pipe.sample(
            [record] * len(part),
            indices=part,
            seed=FLAGS.seed,
            noise=None if noise is None else noise[part.start : part.stop],
            task=FLAGS.task,
            **settings(),
        )
        for part in parts(n)
    ]
    pictures = np.concatenate([pipe.decode(part) for part in latents])
    for i, frames in enumerate(pictures):
        path = output if n == 1 else output.with_stem(f'{output.stem}_{i}')
        facts = {'prompt': FLAGS.prompt, 'seed': FLAGS.seed, 'index': i}
        if len(frames) == 1:
            write_picture(frames[0], path, facts)
        else:
            write_video(frames, path, facts, FLAGS.fps or pipe.config.data.fps)
        print(path)
    if FLAGS.latents:
        final = np.concatenate(latents)
        final = final[:, 0] if final.shape[1] == 1 else final
        write(pathlib.Path(FLAGS.latents), lambda file: np.save(file, squeeze(final)))
    if FLAGS.canvas_map:
        how = {'task': FLAGS.task, 'frames': FLAGS.frames}
        feature = pipe.canvas_features([record], indices=[0], seed=FLAGS.seed, **how)[0, 0]
        side = pictures.shape[2]
        colours = Image.fromarray((pca_map(feature) * 255).round().astype(np.uint8))
        colours = colours.resize((pictures.shape[3], side), Image.Resampling.NEAREST)
        write(pathlib.Path(FLAGS.canvas_map), lambda file: colours.save(file, 'PNG'))


def read_noise(path: pathlib.Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(f'--noise {path} does not exist')
    try:
        noise = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f'--noise {path} is not a .npy array: {error}') from error
    if noise.ndim not in (3, 4, 5):
        raise InputError(
            f'--noise {path} has shape {noise.shape}, want (H, W, C) of a picture or (T, H, W, C) '
            'of a video, or several'
        )
    return noise


def squeeze(latents: np.ndarray) -> np.ndarray:
    return latents[0] if len(latents) == 1 else latents


# ---------------------------------------------------------------- a file of prompts


def sample_prompts(file: pathlib.Path) -> None:
    """One result a line, named by its id; existing ones are kept, so a killed run resumes."""
    pictures = read_prompts(file, FLAGS.seed)
    pipe = open_pipeline()
    suffix = VIDEO if frames_to_draw(pipe) > 1 else '.png'
    pictures = [dataclasses.replace(p, path=f'{p.path}{suffix}') for p in pictures]
    todo = [p for p in pictures if not pathlib.Path(FLAGS.output, p.path).exists()]
    print(f'{len(pictures)} prompts, {len(pictures) - len(todo)} already there')
    draw(pipe, todo)


def draw(pipe: Pipeline, pictures: list[Picture]) -> None:
    """Those that are about no file in batches; the others one by one, each of its own size."""
    alone = [p for p in pictures if p.images or p.references or p.video]
    groups = [[picture] for picture in alone]
    for seed in dict.fromkeys(picture.seed for picture in pictures):
        same = [p for p in pictures if p.seed == seed and p not in alone]
        groups += [same[part.start : part.stop] for part in parts(len(same))]
    for group in groups:
        records = [
            pipe.record(
                picture.prompt,
                [read_image(path) for path in picture.images],
                [read_image(path) for path in picture.references],
                read_source(pipe, picture.video),
            )
            for picture in group
        ]
        indices, seed = [picture.index for picture in group], group[0].seed
        latents = pipe.sample(records, indices=indices, seed=seed, task=FLAGS.task, **settings())
        for picture, frames in zip(group, pipe.decode(latents), strict=True):
            save(pipe, picture, frames)


def read_source(pipe: Pipeline, video: str | pathlib.Path | None):
    """Of a video to edit as many frames as are drawn, at their rate."""
    if video is None:
        return None
    fps = FLAGS.fps or pipe.config.data.get('fps', 1.0)
    return read_clip(video, frames_to_draw(pipe), fps), fps


def save(pipe: Pipeline, picture: Picture, frames: np.ndarray) -> None:
    facts = {'prompt': picture.prompt, 'seed': picture.seed, 'index': picture.index}
    path = pathlib.Path(FLAGS.output, picture.path)
    if (last := max(picture.stills.values(), default=0)) >= len(frames):
        raise InputError(f'{path} wants frame {last}, and {len(frames)} are drawn; give --frames')
    for still, at in picture.stills.items():
        write_picture(frames[at], pathlib.Path(FLAGS.output, still), facts)
    if path.suffix == VIDEO:
        write_video(frames, path, facts, FLAGS.fps or pipe.config.data.fps)
    else:
        write_picture(frames[0], path, facts)


# ---------------------------------------------------------------- a benchmark


def sample_benchmark(layout: Layout) -> None:
    """Whole files are kept, so a killed run resumes; each process has its own share of them."""
    folder, mine = pathlib.Path(FLAGS.output), slice(FLAGS.process, None, FLAGS.processes)
    faults = layout.faults(folder)
    if FLAGS.check:
        print(*faults, f'{folder}: {layout.summary(faults)}', sep='\n')
        sys.exit(1 if faults else 0)
    faulty = {fault.path for fault in faults}
    pictures = layout.pictures(FLAGS.seed)[mine]
    todo = [picture for picture in pictures if not faulty.isdisjoint(picture.paths)]
    print(f'{len(pictures)} pictures, {len(pictures) - len(todo)} already there')
    if todo:
        draw(open_pipeline(), todo)
    for path, line in list(layout.lines().items())[mine]:
        if path in faulty:
            write(folder / path, lambda file, line=line: file.write(f'{line}\n'.encode()))
    for path, source in list(layout.sources().items())[mine]:
        if path in faulty:
            write(folder / path, source.save)


# ---------------------------------------------------------------- files


def parts(n: int) -> list[range]:
    size = FLAGS.batch_size
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def write_picture(picture: np.ndarray, path: pathlib.Path, facts: dict[str, Any]) -> None:
    """PNG with its prompt, seed and settings as text."""
    info = PngImagePlugin.PngInfo()
    for key, value in {**facts, **settings(), 'checkpoint': FLAGS.checkpoint}.items():
        info.add_text(key, str(value))
    write(path, lambda file: Image.fromarray(picture).save(file, 'PNG', pnginfo=info))


def write_video(frames: np.ndarray, path: pathlib.Path, facts: dict[str, Any], fps: float) -> None:
    """An mp4 with the same, as its comment."""
    told = json.dumps({**facts, **settings(), 'checkpoint': FLAGS.checkpoint})
    write(path, lambda file: encode_video(file, frames, fps=fps, comment=told))


if __name__ == '__main__':
    run(main)
