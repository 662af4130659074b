"""The shipped MLLM writes plans and answers, and says so where it cannot."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import metacanvas_jax as mc
from configs import base, quickstart_mllm
from metacanvas_jax.build import ASSETS
from metacanvas_jax.data.shapes import RELATIONS, SPLITS, render, requests
from metacanvas_jax.data.shapes_text import GENERATE, ShapeTexts, answers
from metacanvas_jax.describe import Describer
from metacanvas_jax.types import InputError
from tests.test_bad_input import assert_one_line, process
from tests.test_resume import finished
from tests.test_shapes import places

QUESTIONS = [ShapeTexts(1, ('question',), 'held_out')[i] for i in range(6)]
QWEN = ('--config', 'configs/base.py:qwen', '--config.weights.mllm', 'tiny_qwen')


@pytest.fixture(scope='module', autouse=True)
def optimized():
    """It generates thousands of tokens."""
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='module')
def describer() -> Describer:
    system = mc.load(quickstart_mllm.get_config(), weights={'mllm': 'tiny_qwen'})
    assert isinstance(system, Describer)
    return system


@pytest.mark.parametrize('split', SPLITS)
def test_plans_fulfil_their_prompts(describer, split):
    """Held-out pairs too: it has read of them."""
    asked = requests(split, 25, 1)
    plans = describer(
        [GENERATE.format(request.caption) for request in asked], max_new_tokens=40, temperature=1.0
    )
    pairs = zip(plans, asked, strict=True)
    assert np.mean([fulfils(plan.text, request) for plan, request in pairs]) >= 0.9


def fulfils(plan: str, request) -> bool:
    told = places(plan)
    if len({t[2:] for t in told}) < len(told) or len(told) != sum(a.count for a in request.asked):
        return False
    for a in request.asked:
        if a.count != sum(s == a.shape and a.colour in (None, c) for c, s, *_ in told):
            return False
    if request.relation is None:
        return True
    axis, sign = RELATIONS[request.relation]
    first, second = (next(t for t in told if t[1] == a.shape) for a in request.asked)
    return (first[3 - axis] - second[3 - axis]) * sign > 0


def test_questions_about_pictures(describer):
    """200 and more, of pictures with pairs of colour and shape that it has never seen."""
    texts = [ShapeTexts(1, ('picture_question',), 'held_out')[i] for i in range(120)]
    media = [describer.encoder.see([render(text.scene, 32)]) for text in texts]
    said = describer([text.user for text in texts], media, max_new_tokens=64)
    right = []
    for found, text in zip(said, texts, strict=True):
        wanted, given = answers(text.assistant), answers(found.text)
        given += [''] * (len(wanted) - len(given))
        right += [a == b for a, b in zip(given, wanted, strict=False)]
    assert len(right) >= 200
    assert np.mean(right) >= 0.9


def test_an_instruction_is_read_with_its_picture(describer):
    """The states of the same words differ when the picture does."""
    texts = [ShapeTexts(1, ('picture_edit',), 'held_out')[i] for i in range(8)]
    tokenizer, words = describer.encoder.tokenizer, texts[0].user
    states = []
    for text in texts:
        media = describer.encoder.see([render(text.scene, 32)])
        chat, _ = tokenizer.chat(words, '', media=media)
        prompt = describer.encoder.prompts([chat], [media])
        states_BLD, _ = describer.mllm.prefix(prompt)
        states.append(np.asarray(states_BLD[0, len(chat) - 1]))
    apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(states, 2)]
    assert min(apart) > 0.01 * np.linalg.norm(states[0])


def test_batch_and_seed(describer):
    """What else is asked changes no answer; draws depend on the seed alone."""
    together = describer([text.user for text in QUESTIONS], max_new_tokens=64)
    alone = describer([QUESTIONS[3].user], max_new_tokens=64)
    assert alone[0] == together[3]
    assert together[3].ids[-1] == describer.encoder.tokenizer.end
    hot = dict(max_new_tokens=24, temperature=3.0)
    drawn = [describer(['Describe: nothing'], **hot, seed=seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_command(describer, tmp_path):
    """`sample.py --task describe` with the MLLM alone."""
    text = QUESTIONS[0]
    out = tmp_path / 'answer.json'
    options = ('--config.dtype', 'float32', '--config.prompt.buckets', '(128,)')
    ask = ('--task', 'describe', '--prompt', text.user, '--output', out)
    done = finished('sample.py', *QWEN, *options, *ask)
    (answer,) = describer([text.user], max_new_tokens=64)
    assert done.stdout == f'{answer.text}\n'
    assert json.loads(out.read_text()) == {'text': answer.text, 'ids': answer.ids}


def test_weights_for_text_refuse_pictures(tmp_path):
    """Those of the shipped model without its eyes."""
    folder = tmp_path / 'text'
    shutil.copytree(ASSETS / 'tiny_qwen', folder)
    config = json.loads((folder / 'config.json').read_text())
    kept = ('spatial_merge_size', 'tokens_per_second')
    config['vision_config'] = {name: config['vision_config'][name] for name in kept}
    (folder / 'config.json').write_text(json.dumps(config))
    arrays = load_file(folder / 'model.safetensors')
    words = {name: array for name, array in arrays.items() if not name.startswith('vision/')}
    assert 0 < len(words) < len(arrays)
    save_file(words, folder / 'model.safetensors')

    Image.new('RGB', (64, 64)).save(tmp_path / 'picture.png')
    ask = ('--task=describe', '--prompt=What is this?', f'--image={tmp_path}/picture.png')
    config = ('--config=configs/base.py:qwen', f'--config.weights.mllm={folder}')
    code, stderr = process('sample', *config, *ask)
    assert_one_line(code, stderr, 'for text alone: it sees no pictures')


def test_loading_leaves_the_config_alone():
    config = quickstart_mllm.get_config()
    mc.load(config, weights={'mllm': 'tiny_qwen'})
    assert config.weights.mllm is None
    with pytest.raises(InputError, match=r"config\.weights 'mlm' is unknown"):
        mc.load(config, weights={'mlm': 'tiny_qwen'})


def test_size_comes_from_the_weights():
    with pytest.raises(InputError, match=r'weights\.mllm is missing'):
        mc.load(base.get_config('qwen'))
