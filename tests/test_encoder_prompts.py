"""FLUX's and Wan's prompts equal those of diffusers' pipelines: ids, states, lengths."""

import concurrent.futures
import inspect
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, WanPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import UnigramTrainer
from transformers import CLIPTokenizer, T5Tokenizer

import convert
from metacanvas_jax.data.flux_prompts import (
    CLIP_SIZE,
    T5_SIZE,
    FluxClipTokenizer,
    FluxT5Tokenizer,
)
from metacanvas_jax.data.wan_prompts import SIZE, WanTokenizer, clean
from metacanvas_jax.types import InputError, Texts
from tests import published_encoders, tiny

LONG = 'a very long story of a cat and a city ' * 20
TEXTS = [
    'a red circle',
    '',
    '  A Cat, SLEEPING\n',
    'Ein größeres Bild: 三个圆 🙂 É',
    'two  spaces,\na new line\tand a tab',
    'typed </s> and <pad> and <|endoftext|>',
    'Tom &amp;amp; Jerry &lt;3\u00a0end',
    LONG,
]
CLIP_ROOM, T5_ROOM = 11, 20


def t5_folder(folder: pathlib.Path) -> pathlib.Path:
    """As T5's: unigrams of words that begin with a mark for the space before them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme='always')]
    )
    special = ['<pad>', '</s>', '<unk>']
    trainer = UnigramTrainer(
        vocab_size=60, special_tokens=special, unk_token='<unk>', show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single='$A </s>', special_tokens=[('</s>', 1)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / 'tokenizer.json'))
    settings = dict(tokenizer_class='T5Tokenizer', extra_ids=0, model_max_length=512)
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder


def clip_folder(folder: pathlib.Path) -> pathlib.Path:
    """Letters, letters that end a word, three merges; the end of a text has the largest id."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f'{letter}</w>' for letter in letters), 'ca', 'cat</w>', 're']
    vocabulary = {word: i for i, word in enumerate([*words, '<|startoftext|>', '<|endoftext|>'])}
    folder.mkdir()
    (folder / 'vocab.json').write_text(json.dumps(vocabulary))
    (folder / 'merges.txt').write_text('#version: 0.2\nc a\nca t</w>\nr e\n')
    settings = dict(
        tokenizer_class='CLIPTokenizer', model_max_length=CLIP_ROOM, pad_token='<|endoftext|>'
    )
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    room = tmp_path_factory.mktemp('tokenizers')
    return {'clip': clip_folder(room / 'clip'), 't5': t5_folder(room / 't5')}


def _module(component: str, model, folder):
    model.save_pretrained(folder)
    return convert.load(component, str(folder))


def test_flux(folders, tmp_path):
    """CLIP's pooled state, and T5's states, of a batch with a long and an empty text."""
    clip = published_encoders.clip(vocab_size=517, max_position_embeddings=CLIP_ROOM)
    t5 = published_encoders.t5('t5')
    pipeline = FluxKontextPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=CLIPTokenizer.from_pretrained(folders['clip']),
        tokenizer_2=T5Tokenizer.from_pretrained(folders['t5']),
    )
    with torch.no_grad():
        states, pooled, _ = pipeline.encode_prompt(
            TEXTS, device=torch.device('cpu'), max_sequence_length=T5_ROOM
        )
    clip_prompt = FluxClipTokenizer(folders['clip'], size=CLIP_ROOM).batch(TEXTS)
    t5_prompt = FluxT5Tokenizer(folders['t5'], size=T5_ROOM).batch(TEXTS)
    for prompt, tokenizer, size in (
        (clip_prompt, pipeline.tokenizer, CLIP_ROOM),
        (t5_prompt, pipeline.tokenizer_2, T5_ROOM),
    ):
        options = dict(padding='max_length', max_length=size, truncation=True)
        np.testing.assert_array_equal(prompt.ids_BU, tokenizer(TEXTS, **options).input_ids)
    assert clip_prompt.length_B[:2].tolist() == [11, 2]
    assert clip_prompt.length_B[-1] == CLIP_ROOM
    assert t5_prompt.length_B.tolist() == t5_prompt.context_length_B.tolist() == [T5_ROOM] * 8
    module = _module('clip', clip, tmp_path / 'clip')
    found = jax.jit(lambda model, texts: model.pool(texts))(module, Texts(None, pooled=clip_prompt))
    assert tiny.error(found, pooled) <= 1e-4
    module = _module('t5', t5, tmp_path / 't5')
    found = jax.jit(lambda model, prompt: model.context(prompt))(module, t5_prompt)
    assert tiny.error(found.states_BLD, states) <= 1e-4


def test_wan(folders, tmp_path):
    """Its cleaning, and zeros behind every text."""
    umt5 = published_encoders.t5('umt5')
    pipeline = WanPipeline(
        tokenizer=T5Tokenizer.from_pretrained(folders['t5']),
        text_encoder=umt5,
        vae=None,
        scheduler=None,
        transformer=None,
    )
    with torch.no_grad():
        states, _ = pipeline.encode_prompt(
            TEXTS,
            do_classifier_free_guidance=False,
            device=torch.device('cpu'),
            max_sequence_length=T5_ROOM,
        )
    prompt = WanTokenizer(folders['t5'], size=T5_ROOM).batch(TEXTS)
    module = _module('umt5', umt5, tmp_path / 'umt5')
    found = jax.jit(lambda model, prompt: model.context(prompt))(module, prompt)
    context, length_B = found.states_BLD, found.length_B
    assert tiny.error(context, states) <= 1e-4
    np.testing.assert_array_equal(np.any(context, -1), np.any(states.numpy(), -1))
    assert length_B.tolist() == [T5_ROOM] * 8
    assert prompt.length_B[1] == 1
    assert prompt.length_B[-1] == T5_ROOM


def test_what_wan_cleans():
    assert clean(' a&amp;amp;b\n\t c\u3000d ') == 'a&b c d'
    assert clean('\u201cIt\u2019s\u201d') == '"It\'s"'
    assert clean('caf\u00e9\uff0c\ufb01') == 'caf\u00e9\uff0c\ufb01'  # a wide comma, a ligature


def test_the_defaults():
    flux = inspect.signature(FluxKontextPipeline.__call__).parameters
    wan = inspect.signature(WanPipeline.__call__).parameters
    assert flux['max_sequence_length'].default == T5_SIZE
    assert wan['max_sequence_length'].default == SIZE
    assert CLIP_SIZE == 77  # model_max_length of the published tokenizer


def test_what_is_too_long_is_counted_and_said_once(folders, capsys):
    clip = FluxClipTokenizer(folders['clip'], size=CLIP_ROOM)
    t5 = FluxT5Tokenizer(folders['t5'], size=T5_ROOM)
    for tokenizer in (clip, t5):
        tokenizer.batch([LONG])
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith(f'FLUX by its CLIP reads {CLIP_ROOM} tokens of a prompt; cut ')
    assert told[1].startswith(f'FLUX by its T5 reads {T5_ROOM} tokens of a prompt; cut ')
    assert "off the end of 'a very long story" in told[0]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(t5.t5.row, [LONG, 'a cat'] * 50))
    assert (t5.t5.truncated, clip.clip.truncated) == (51, 1)
    assert not capsys.readouterr().err
    assert t5.t5.row(LONG)[-1] == 1  # </s>


def test_a_tokenizer_that_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match=r'no tokenizer\.json and no vocab\.json with merges\.txt'):
        FluxClipTokenizer(tmp_path)
    with pytest.raises(InputError, match=r'no tokenizer\.json in .*; Wan by its UMT5 wants that'):
        WanTokenizer(tmp_path)
    values = json.loads((folders['t5'] / 'tokenizer.json').read_text())
    (tmp_path / 'tokenizer.json').write_text(json.dumps(values | {'post_processor': None}))
    with pytest.raises(InputError, match=r'of Wan by its UMT5 ends an empty text as \[\], not </s'):
        WanTokenizer(tmp_path)
    text = json.dumps(values).replace('<pad>', '<none>')
    (tmp_path / 'tokenizer.json').write_text(text)
    with pytest.raises(InputError, match='lacks <pad> or </s>'):
        WanTokenizer(tmp_path)
