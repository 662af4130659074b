"""CLIP's vector of the empty prompt as weights of their own: all of CLIP that a system may need.

What `kind = 'stored'` reads (configs/flux_edit.py): a few kilobytes instead of an encoder that
would read the same nothing at each step.
"""

import pathlib

import jax
import numpy as np

from convert.importing import load, tokenizer_files
from convert.source import open_source
from metacanvas_jax.checkpoint import save_weights
from metacanvas_jax.data.flux_prompts import FluxClipTokenizer
from metacanvas_jax.text_encoders.base import VectorConfig
from metacanvas_jax.text_encoders.clip import Clip
from metacanvas_jax.types import InputError, Texts

EMPTY = ''


def pool_empty(source: str, target: str, *, tokenizer: str | None = None) -> str:
    """A published CLIP text model -> the folder `target`; returns a sentence about it."""
    files = tokenizer_files(open_source(source).folder, tokenizer)
    if not files:
        raise InputError(f'{source} has no tokenizer in it or beside it; give --tokenizer=DIR')
    clip = load('clip', source, dtype='float32')
    assert isinstance(clip, Clip)
    size = clip.config.max_position_embeddings
    texts = Texts(mllm=None, pooled=FluxClipTokenizer(files[0].parent, size=size).batch([EMPTY]))
    vector_BD = jax.jit(lambda clip, texts: clip.pool(texts))(clip, texts)
    (vector,) = np.asarray(vector_BD)
    folder = pathlib.Path(target).absolute()
    if folder.exists():
        raise InputError(f'{target} exists already; remove it, or give another folder')
    save_weights(folder, {'vector': vector}, VectorConfig(len(vector)).to_json())
    return f'{target}: the vector of the empty prompt, {len(vector)} values'
