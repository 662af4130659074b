"""Batches are functions of (seed, step), and prompts are what Qwen was trained on."""

import functools

import jax
import numpy as np
import pytest
import transformers

from metacanvas_jax.build import ASSETS
from metacanvas_jax.data import loader as loader_module
from metacanvas_jax.data.loader import Loader
from metacanvas_jax.data.prompts import ChatTokenizer
from metacanvas_jax.data.records import Record, TextRecord
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.data.tasks import (
    TASKS,
    Encoder,
    Readers,
    diffusion_batch,
    text_batch,
)
from metacanvas_jax.data.visuals import SANA, Bucket, Visuals
from metacanvas_jax.mllm.config import PRESETS
from metacanvas_jax.mllm.windows import VisionBuckets
from metacanvas_jax.types import InputError

FOLDER = ASSETS / 'tiny_qwen'
SIZE, SEED, BATCH = 8, 3, 16
MIXED = dict(layout=0.4, dialogue=0.3, picture=0.3)


class Data:
    seed, size, frames, fps = SEED, SIZE, 5, 4.0


def encoder(buckets=(64, 160), pictures=(1,)) -> Encoder:
    tokenizer = ChatTokenizer(FOLDER)
    return Encoder(
        tokenizer,
        PRESETS['tiny'],
        buckets=buckets,
        vision_buckets=VisionBuckets(pictures=pictures, windows=(4,)),
        min_pixels=64 * 64,
        max_pixels=64 * 64,
    )


def readers(text_dropout: float = 0.0, buckets=(64, 160)) -> Readers:
    bucket = Bucket(SIZE, SIZE, frames=1, latent_frames=1, references=0, short_clips='refuse')
    visuals = Visuals(bucket, SANA)
    return Readers(encoder(buckets), None, visuals, text_dropout=text_dropout)


def pictures(threads: int = 1, seed: int = SEED) -> Loader:
    encode = functools.partial(diffusion_batch, readers(0.3, (64,)))
    sources = SOURCES['shapes'](Data)
    options = dict(batch=dict(t2i=BATCH), accumulate=1, prefetch=3)
    return Loader(sources, dict(t2i=1.0), encode, seed=seed, threads=threads, **options)


def texts() -> Loader:
    encode = functools.partial(text_batch, encoder(buckets=(160,)))
    batch = dict.fromkeys(MIXED, BATCH)
    options = dict(batch=batch, accumulate=1, prefetch=3, threads=1)
    return Loader(SOURCES['shapes_text'](Data), MIXED, encode, seed=SEED, **options)


def arrays(batch) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]


def same(left, right) -> bool:
    pairs = zip(arrays(left), arrays(right), strict=True)
    return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize('make', [pictures, texts])
def test_a_batch_is_a_function_of_its_step(make):
    whole = list(make().iterate(0, 8))
    assert all(same(batch, make().batch(step)) for step, batch in enumerate(whole))
    tail = list(make().iterate(5, 8))
    assert len(tail) == 3
    assert all(map(same, tail, whole[5:]))
    assert not any(same(whole[i], whole[j]) for i in range(8) for j in range(i))


def test_threads_and_seeds():
    one, two = list(pictures().iterate(0, 8)), list(pictures(threads=2).iterate(0, 8))
    assert all(map(same, one, two))
    other = pictures(seed=SEED + 1).batch(0)
    assert not np.array_equal(other.texts.mllm.ids_BL, one[0].texts.mllm.ids_BL)  # other lots


def test_no_record_twice():
    pixels = np.concatenate([pictures().batch(step).pixels_BFHWC for step in range(8)])
    seen = [picture.tobytes() for picture in pixels]
    assert len(set(seen)) > 0.95 * len(seen)  # two records may show the same small scene


@pytest.mark.parametrize('make', [pictures, texts])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_processes_tile_the_batch(make, processes, monkeypatch):
    whole = make().batch(6)
    parts = []
    monkeypatch.setattr(jax, 'process_count', lambda: processes)
    monkeypatch.setattr(jax, 'device_count', lambda: 2 * processes)
    for process in range(processes):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        parts.append(make().batch(6))
    assert all(len(leaf) == BATCH // processes for part in parts for leaf in jax.tree.leaves(part))
    assert same(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), whole)


def test_every_process_chooses_the_same_bucket(monkeypatch):
    """A global array has one length: the bucket may not depend on the rows of a process."""
    encode = functools.partial(diffusion_batch, readers(buckets=tuple(range(30, 65))))
    sizes = []
    monkeypatch.setattr(jax, 'process_count', lambda: BATCH)
    monkeypatch.setattr(jax, 'device_count', lambda: BATCH)
    for process in range(BATCH):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        options = dict(batch=dict(t2i=BATCH), accumulate=1, prefetch=1, threads=1, seed=SEED)
        loader = Loader(SOURCES['shapes'](Data), dict(t2i=1.0), encode, **options)
        sizes.append(loader.batch(0).texts.mllm.ids_BL.shape[1])
    assert len(set(sizes)) == 1


def test_batches_that_devices_do_not_divide(monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 8)
    with pytest.raises(InputError, match='8 devices x 2 accumulated parts; nearest: 16'):
        loader_module.process_rows(20, 2)


def test_text_dropout():
    """Independent of the text, at the asked rate, and the prompt is then that of no text."""
    n, rate = 4096, 0.1
    record = Record(text='a red circle', pixels=np.zeros((1, SIZE, SIZE, 3), np.uint8))
    kept, gone = (diffusion_batch(readers(rate), 't2i', [record], [lot]) for lot in (0.5, 0.01))
    empty = diffusion_batch(readers(rate), 't2i', [Record('', record.pixels)], [0.5])
    assert same(gone, empty)
    assert not same(gone, kept)
    assert same(diffusion_batch(readers(), 't2i', [record], [0.0]), kept)

    sources = {'t2i': [record] * BATCH}
    options = dict(batch=dict(t2i=BATCH), accumulate=1, seed=SEED, threads=1, prefetch=1)
    drawn = Loader(sources, dict(t2i=1.0), lambda task, records, lots: lots, **options)
    lots = np.concatenate([drawn.batch(step) for step in range(n // BATCH)])
    sigma = (rate * (1 - rate) / n) ** 0.5
    assert abs(np.mean(lots < rate) - rate) < 3 * sigma
    assert len(set(lots)) == n
    many = diffusion_batch(readers(rate), 't2i', [record] * 64, lots[:64]).texts.mllm
    assert many
    assert gone.texts.mllm
    assert np.array_equal(many.length_B == gone.texts.mllm.length_B[0], lots[:64] < rate)


# ---------------------------------------------------------------- prompts

USERS = [
    '',
    'a red circle',
    'two  spaces,\na new line\tand a tab ',
    'ein größeres Bild: 三个圆 🙂 e\u0301',
    *(SOURCES['shapes_text'](Data)['dialogue'][i].user for i in range(8)),
]


@pytest.fixture(scope='module')
def published():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.mark.parametrize('user', USERS)
@pytest.mark.parametrize('response', ['', 'a blue square at 3, 4.'])
def test_ids_are_those_of_transformers(published, user, response):
    turns = [dict(role='user', content=user), dict(role='assistant', content=response)]
    text = published.apply_chat_template(turns, tokenize=False)
    assert text.endswith('<|im_end|>\n')
    want = published(text.removesuffix('\n'), add_special_tokens=False).input_ids
    ids, answer = ChatTokenizer(FOLDER).chat(user, response)
    assert ids == want
    assert ids[-1] == published.convert_tokens_to_ids('<|im_end|>')
    assert published.decode(ids[-answer:]) == f'{response}<|im_end|>'


@pytest.mark.parametrize('word', ['<|im_end|>', '<|image_pad|>', '<|im_start|>', '<|endoftext|>'])
def test_typed_special_tokens_stay_text(published, word):
    tokenizer = ChatTokenizer(FOLDER)
    special = set(published.all_special_ids) | set(published.added_tokens_decoder)
    plain, _ = tokenizer.chat('a circle', 'yes')
    typed, answer = tokenizer.chat(f'a {word} circle {word}', f'yes {word}')
    assert [i for i in typed if i in special] == [i for i in plain if i in special]
    assert typed[-1] == tokenizer.end
    assert word in published.decode(typed[-answer:-1])
    ids = encoder().prompts([typed]).ids_BL
    assert not np.isin(ids, [PRESETS['tiny'].image_token_id]).any()


def test_prompts_end_with_the_end_and_pad_on_the_right():
    tools = encoder(buckets=(128, 40))
    captions = ['', 'a red circle', 'a red circle left of a blue square']
    chats = [tools.tokenizer.chat(TASKS['t2i'].prompt(text))[0] for text in captions]
    prompt = tools.prompts(chats)
    longest = max(map(len, chats))
    assert prompt.ids_BL.shape == (3, 40 if longest <= 40 else 128)
    for row, chat in enumerate(chats):
        n = prompt.length_B[row]
        assert prompt.ids_BL[row, n - 1] == tools.tokenizer.end
        assert prompt.ids_BL[row, :n].tolist() == chat
        assert set(prompt.ids_BL[row, n:]) <= {tools.tokenizer.pad}
        assert prompt.start_B[row] == n
    with pytest.raises(InputError, match='the largest bucket holds 9;'):
        encoder(buckets=(7, 9)).prompts(chats)


@pytest.mark.parametrize('task', ['dialogue', 'picture', 't2v', 'v2v'])
def test_weights_cover_the_response_and_its_end(published, task):
    """Which is the plan of what could be drawn."""
    records = [SOURCES['shapes_text'](Data)[task][i] for i in range(6)]
    draws = task in TASKS
    if not draws:
        records.append(TextRecord('a question', '', records[0].pictures))
    batch = text_batch(encoder(pictures=(1, 3)), task, records, np.zeros(len(records)))
    assert (batch.prompt.vision is None) == (task in ('dialogue', 't2v'))
    assert set(np.unique(batch.weight_BL)) == {0, 1}
    for record, ids, weight in zip(records, batch.prompt.ids_BL, batch.weight_BL, strict=True):
        learned = published.decode(ids[weight == 1])
        wanted, user = (record.plan, record.text) if draws else (record.assistant, record.user)
        assert learned == f'{wanted}<|im_end|>'
        first = int(np.argmax(weight))
        assert published.decode(ids[:first]).endswith(f'{user}<|im_end|>\n<|im_start|>assistant\n')
