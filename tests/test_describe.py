"""The shipped MLLM sees: it answers questions about pictures, and prompts change with them."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import metacanvas_jax as mc
from configs import base, quickstart_mllm
from metacanvas_jax.data.shapes import Scene, render
from metacanvas_jax.data.shapes_text import ShapeTexts, layout
from metacanvas_jax.describe import Describer
from metacanvas_jax.types import InputError
from tests.test_resume import ROOT

QUESTIONS = [ShapeTexts(0, ('picture_question',), 'held_out')[i] for i in range(200)]


@pytest.fixture(scope='module')
def describer() -> Describer:
    system = mc.load(quickstart_mllm.get_config(), weights={'mllm': 'tiny_qwen'})
    assert isinstance(system, Describer)
    return system


def scene(text) -> Scene:
    assert text.scene is not None
    return text.scene


def pictures(describer, texts, size=32):
    return [describer.encoder.see([render(scene(text), size)]) for text in texts]


@pytest.mark.parametrize('size', [32, 64, 200])
def test_held_out_questions_are_answered(describer, size):
    """200 questions about scenes with a colour and shape never seen together; 90 % right."""
    texts = QUESTIONS if size == 32 else QUESTIONS[:64]
    right = []
    for start in range(0, len(texts), 50):
        part = texts[start : start + 50]
        answers = describer(
            [t.user for t in part], pictures(describer, part, size), max_new_tokens=8
        )
        right += [a.text == t.assistant for a, t in zip(answers, part, strict=True)]
    assert np.mean(right) >= 0.9


def test_the_picture_matters(describer):
    """The same questions about other pictures get other answers."""
    other = pictures(describer, QUESTIONS[1:51] + QUESTIONS[:1])[:50]
    answers = describer([t.user for t in QUESTIONS[:50]], other, max_new_tokens=8)
    wrong = [a.text != t.assistant for a, t in zip(answers, QUESTIONS[:50], strict=True)]
    assert np.mean(wrong) > 0.3


def test_prefix_of_an_edit_differs_with_the_picture(describer):
    edits = [ShapeTexts(0, ('picture_edit',), 'held_out')[i] for i in range(8)]
    shown = pictures(describer, edits)
    prompt = describer.prompt([edits[0].user] * 8, shown)
    states = np.asarray(jax.jit(lambda m, p: m.prefix(p)[0])(describer.mllm, prompt))
    after = states[:, int(prompt.length_B[0]) - 5]  # text behind the picture
    for i in range(1, 8):
        assert np.abs(after[i] - after[0]).max() > 0.1


def test_batch_and_seed(describer):
    """What else is asked changes no answer; draws depend on the seed alone."""
    texts = QUESTIONS[:6]
    together = describer([t.user for t in texts], pictures(describer, texts), max_new_tokens=8)
    alone = describer([texts[3].user], pictures(describer, texts[3:4]), max_new_tokens=8)
    assert alone[0] == together[3]
    assert together[3].ids[-1] == describer.encoder.tokenizer.end
    hot = dict(max_new_tokens=24, temperature=3.0)
    drawn = [describer(['Describe the picture.'], **hot, seed=seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_command(tmp_path):
    """`sample.py --task describe` on a file, with the MLLM alone."""
    text = QUESTIONS[0]
    Image.fromarray(render(scene(text), 64)).save(tmp_path / 'picture.png')
    out = tmp_path / 'answer.json'
    command = [
        *(sys.executable, 'sample.py', '--config', 'configs/base.py:qwen'),
        *('--config.weights.mllm', 'tiny_qwen', '--task', 'describe'),
        *('--config.prompt.windows', '(4,)', '--config.prompt.buckets', '(96,)'),
        *('--config.prompt.min_pixels', '4096', '--config.prompt.max_pixels', '4096'),
        *('--image', str(tmp_path / 'picture.png'), '--prompt', 'Describe the picture.'),
        *('--output', str(out), '--config.dtype', 'float32'),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == layout(scene(text))
    assert json.loads(out.read_text())['text'] == layout(scene(text))


def test_size_comes_from_the_weights():
    with pytest.raises(InputError, match=r'weights\.mllm is missing'):
        mc.load(base.get_config('qwen'))
