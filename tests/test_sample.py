"""Pictures from a trained run: neither batches nor devices nor restarts change them."""

import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import metacanvas_jax as mc
from metacanvas_jax.data.tasks import TASKS, Asked
from metacanvas_jax.types import InputError
from tests.test_bad_input import script
from tests.test_resume import STEPS, finished, once, uninterrupted

PROMPT = 'a red circle left of a blue square'
SEED, STEPS_OF_SOLVER, N = 3, 3, 4
SHAPE = (8, 8, 48)  # of the latents


def noise(n: int) -> np.ndarray:
    """Picture i has the noise fold_in(key(seed), i)."""
    keys = [jax.random.fold_in(jax.random.key(SEED), i) for i in range(n)]
    return np.stack([jax.random.normal(key, SHAPE) for key in keys])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return uninterrupted(tmp_path_factory)


def draw(trained: pathlib.Path, folder: pathlib.Path, *args: object, devices: int = 1):
    ask = [f'--checkpoint={trained}', f'--output={folder}/out.png', f'--seed={SEED}']
    told = [f'--prompt={PROMPT}', f'--latents={folder}/latents.npy']
    return finished('sample.py', *ask, *told, *args, devices=devices)


@pytest.fixture(scope='module')
def drawn(trained, tmp_path_factory):
    """N pictures at once on one device."""

    def make(folder):
        options = [f'--num_images={N}', '--batch_size=4', f'--canvas_map={folder}/map.png']
        draw(trained, folder, *options)

    return once(tmp_path_factory, 'drawn', make)


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_pictures_and_what_they_say(drawn, trained):
    files = ['latents.npy', 'map.png', *(f'out_{i}.png' for i in range(N))]
    assert sorted(path.name for path in drawn.iterdir() if path.name != 'made') == files
    pictures = [Image.open(drawn / f'out_{i}.png') for i in range(N)]
    for i, picture in enumerate(pictures):
        assert (picture.size, picture.mode) == ((32, 32), 'RGB')
        told = dict(prompt=PROMPT, seed=str(SEED), index=str(i), checkpoint=str(trained))
        assert told.items() <= picture.info.items()
        assert {'steps', 'guidance', 'negative_prompt', 'size'} <= picture.info.keys()
    assert len({picture.tobytes() for picture in pictures}) == N
    assert Image.open(drawn / 'map.png').size == (32, 32)
    assert np.load(drawn / 'latents.npy').shape == (N, *SHAPE)


def test_batches_and_devices_change_nothing(drawn, trained, tmp_path):
    draw(trained, tmp_path, f'--num_images={N}', '--batch_size=1', devices=8)
    close(np.load(tmp_path / 'latents.npy'), np.load(drawn / 'latents.npy'))
    for i in range(N):
        ours, theirs = (np.asarray(Image.open(f / f'out_{i}.png'), int) for f in (tmp_path, drawn))
        assert np.abs(ours - theirs).max() <= 1  # a value on the edge may be rounded otherwise


def test_given_noise(drawn, trained, tmp_path):
    """The noise of a seed, given as a file, makes the pictures of that seed."""
    np.save(tmp_path / 'noise.npy', noise(N))
    draw(trained, tmp_path, f'--noise={tmp_path}/noise.npy', '--batch_size=4')
    close(np.load(tmp_path / 'latents.npy'), np.load(drawn / 'latents.npy'))


def test_a_file_of_prompts(trained, tmp_path):
    lines = [
        '{"prompt": "a red circle"}',
        '',
        '{"prompt": "a blue square", "id": "mine"}',
        '{"prompt": "a red circle", "seed": 5}',
        '{"prompt": "a red circle"}',
    ]
    (tmp_path / 'prompts.jsonl').write_text('\n'.join(lines))
    ask = [f'--checkpoint={trained}', f'--prompts={tmp_path}/prompts.jsonl', '--batch_size=4']
    folder = tmp_path / 'out'
    done = finished('sample.py', *ask, f'--output={folder}')
    assert done.stdout == '4 prompts, 0 already there\n'
    names = ['0.png', '2.png', '3.png', 'mine.png']
    assert sorted(path.name for path in folder.iterdir()) == names
    before = {name: (folder / name).read_bytes() for name in names}
    seeds = {name: Image.open(folder / name).info['seed'] for name in names}
    assert seeds == {'0.png': '0', '2.png': '5', '3.png': '0', 'mine.png': '0'}
    assert len({Image.open(folder / name).tobytes() for name in names}) == 4
    times = {name: (folder / name).stat().st_mtime_ns for name in names}
    (folder / '3.png').unlink()
    done = finished('sample.py', *ask, f'--output={folder}')
    assert done.stdout == '4 prompts, 3 already there\n'
    kept = {name for name in names if (folder / name).stat().st_mtime_ns == times[name]}
    assert kept == {'0.png', '2.png', 'mine.png'}
    # Alone in its batch it has other roundings, but its own noise.
    after = np.asarray(Image.open(folder / '3.png'), int)
    (folder / '3.png').write_bytes(before['3.png'])
    assert np.abs(after - np.asarray(Image.open(folder / '3.png'), int)).max() <= 1


def test_a_share_of_a_benchmark(trained, tmp_path):
    """Four of GenEval's pictures and one of its lines, of so many processes."""
    options = ['--processes=553', '--process=7', '--batch_size=4', f'--output={tmp_path}/out']
    done = finished('sample.py', f'--checkpoint={trained}', '--prompts=geneval', *options)
    assert done.stdout == '4 pictures, 0 already there\n'
    files = {str(path.relative_to(tmp_path / 'out')) for path in tmp_path.rglob('*.*')}
    pictures = {f'{i // 4:05}/samples/{i % 4:05}.png': i for i in (7, 560, 1113, 1666)}
    assert files == {*pictures, '00007/metadata.jsonl'}
    shown = {name: Image.open(tmp_path / 'out' / name) for name in pictures}
    assert {name: int(picture.info['index']) for name, picture in shown.items()} == pictures
    assert len({picture.tobytes() for picture in shown.values()}) == 4


def test_files_appear_whole_or_not_at_all(tmp_path):
    with script('sample') as sample:
        path = tmp_path / 'deep/out.png'

        def torn(file):
            file.write(b'half')
            assert not path.exists()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sample.write(path, torn)
        assert not path.exists()
        sample.write(path, lambda file: file.write(b'whole'))
        assert path.read_bytes() == b'whole'
        with pytest.raises(ZeroDivisionError):
            sample.write(path, lambda file: file.write(b'other') / 0)
        assert path.read_bytes() == b'whole'


@pytest.fixture(scope='module')
def pipe(trained):
    return mc.load(trained)


def test_the_python_interface(pipe, drawn):
    """On all the devices, with programs of its own: the pictures of the command."""
    seen = []
    options = dict(seed=SEED, num_images=2)
    out = pipe(PROMPT, output='latent', callback=lambda t, z: seen.append((float(t), z)), **options)
    close(out.images, np.load(drawn / 'latents.npy')[:2])
    assert len(seen) == STEPS_OF_SOLVER
    times = [t for t, _ in seen]
    assert times[0] == 1
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0
    # The first thing it sees is the noise, bit by bit.
    assert np.asarray(seen[0][1])[:, 0].tobytes() == noise(2).tobytes()
    # Nothing but the kind of output changes.
    pixels = pipe.decode(out.images[:, None])[:, 0]
    assert (pixels.dtype, pixels.shape) == (np.uint8, (2, 32, 32, 3))
    picture = np.asarray(Image.open(drawn / 'out_1.png'), int)
    assert np.abs(pixels[1].astype(int) - picture).max() <= 1


def test_kinds_of_output_without_guidance(pipe):
    """A scale of 1 is the conditional branch alone; a negative prompt then says nothing."""
    options = dict(seed=SEED, guidance=1, steps=2)
    plain = pipe([PROMPT, 'a green star'], **options)
    assert [image.size for image in plain.images] == [(32, 32)] * 2
    array = pipe([PROMPT, 'a green star'], negative_prompt='a star', output='np', **options).images
    assert (array.dtype, array.shape) == (np.uint8, (2, 32, 32, 3))
    assert all(np.array_equal(image, row) for image, row in zip(plain.images, array, strict=True))
    prompts = [PROMPT, 'a green star']
    seeded = pipe(prompts, output='latent', **options).images
    given = pipe(prompts, noise=noise(2), output='latent', **options).images
    assert given.tobytes() == seeded.tobytes()
    other = pipe(prompts, noise=noise(2)[::-1], output='latent', **options).images
    assert np.abs(other - seeded).max() > 0.1
    with pytest.raises(InputError, match='width 31 is not a multiple of 4'):
        pipe(PROMPT, width=31)


def test_the_steps_of_a_run(trained, tmp_path):
    """A step of a workdir is a checkpoint too, and one that is not there is refused."""
    step = trained / f'checkpoints/{STEPS}'
    assert step.is_dir()
    ours, theirs = (mc.load(path)._state for path in (step, trained))
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    older = mc.load(trained / f'checkpoints/{STEPS - 3}')._state
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(older), strict=True)
    assert not all(np.array_equal(a, b) for a, b in pairs)


def test_plans_come_before_pictures(pipe):
    """What the MLLM writes about image i stands in its prompt; nothing is written about nothing."""
    texts, indices = [PROMPT, '', 'a cross'], [4, 5, 6]
    tokenizer = pipe._readers.mllm.tokenizer
    prompt = pipe._texts('t2i', [Asked(text) for text in texts], indices, SEED).mllm
    asked = [TASKS['t2i'].prompt(text) for text in texts]
    written = [
        pipe.describer(
            [asked[row]],
            max_new_tokens=8,
            temperature=pipe.config.sample.temperature,
            seed=SEED,
            indices=[indices[row]],
        )[0].text
        for row in (0, 2)
    ]
    plans = [written[0], '', written[1]]
    assert len({*plans}) == 3
    for row, (user, plan) in enumerate(zip(asked, plans, strict=True)):
        ids = prompt.ids_BL[row, : prompt.length_B[row]]
        assert ids.tolist() == tokenizer.chat(user, plan)[0]


def test_a_long_prompt_is_steered_away_from_a_short_one(pipe):
    """Both branches of guidance run in the bucket of the longer prompt."""
    long = ' and '.join(['a red circle'] * 8)
    pictures = pipe([long, PROMPT], seed=SEED, output='latent').images
    assert np.isfinite(pictures).all()
    # Their maps want no other program for the way to them.
    programs = pipe._solve._cache_size()
    records = [pipe.record(prompt) for prompt in (long, PROMPT)]
    features = pipe.canvas_features(records, indices=range(2), seed=SEED)
    assert features.shape[:4] == (2, 1, *SHAPE[:2])
    assert pipe._solve._cache_size() == programs
