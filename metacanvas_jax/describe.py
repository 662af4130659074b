"""The MLLM as it was published: it answers questions about pictures and videos.

The canvas and its LoRA have no part in it: generation runs on base weights alone.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metacanvas_jax.data.media import Media
from metacanvas_jax.data.tasks import Encoder
from metacanvas_jax.mllm.generate import generate, greedy, nucleus
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class Answer:
    """`ids` hold the end of sequence where the answer has one; `text` does not."""

    text: str
    ids: list[int]


@functools.lru_cache
def _program(mesh: Mesh):
    static = ('choose', 'max_new_tokens', 'stop', 'pad')
    return jax.jit(generate, static_argnames=static, out_shardings=NamedSharding(mesh, P()))


_nucleus = functools.lru_cache(nucleus)  # the same function again, or the program compiles again


@dataclasses.dataclass(frozen=True)
class Describer:
    """Questions to answers; one compiled program per bucket of prompts and pictures."""

    encoder: Encoder
    mllm: Qwen
    mesh: Mesh

    def __call__(
        self,
        prompts: Sequence[str],
        media: Sequence[Sequence[Media]] | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> list[Answer]:
        """One answer a prompt; `media` are what each shows, from `encoder.see` and `watch`.

        Greedy at temperature 0. Answer j draws with fold_in(key(seed), indices[j]), by default j.
        """
        draw = functools.partial(jax.random.fold_in, jax.random.key(seed))
        indices = range(len(prompts)) if indices is None else indices
        keys_B = jax.vmap(draw)(jnp.asarray(indices, jnp.uint32))
        tokenizer = self.encoder.tokenizer
        ids_BN, length_B = _program(self.mesh)(
            self.mllm,
            self.prompt(prompts, media),
            keys_B,
            choose=_nucleus(temperature, top_p) if temperature else greedy,
            max_new_tokens=max_new_tokens,
            stop=(tokenizer.end, tokenizer.pad),
            pad=tokenizer.pad,
        )
        rows = zip(np.asarray(ids_BN).tolist(), np.asarray(length_B), strict=True)
        answers = [ids[:length] for ids, length in rows]
        return [Answer(text=tokenizer.decode(ids), ids=ids) for ids in answers]

    def prompt(
        self, prompts: Sequence[str], media: Sequence[Sequence[Media]] | None = None
    ) -> Prompt:
        """Chats up to the assistant's first word."""
        shown = media or [()] * len(prompts)
        chats = [
            self.encoder.tokenizer.chat(prompt, media=pictures)[0][:-1]
            for prompt, pictures in zip(prompts, shown, strict=True)
        ]
        return self.encoder.prompts(chats, media)
