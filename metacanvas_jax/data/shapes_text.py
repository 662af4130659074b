"""The language of the shapes world: texts about scenes, and a small tokenizer in Qwen2's style.

`python -m metacanvas_jax.data.shapes_text DIRECTORY` writes the tokenizer's files.
"""

import bisect
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE

from metacanvas_jax.data.shapes import (
    ALL_PAIRS,
    CATEGORIES,
    EDITS,
    LENGTH,
    NUMBERS,
    PLACES,
    RELATIONS,
    SHAPES,
    TOLD,
    Object,
    Scene,
    draw_edit,
    draw_picture,
    generator,
    phrase,
    pick,
)

GENERATE = 'Please generate image based on the following caption: {}'
SYSTEM = 'You are a helpful assistant.'
SPECIAL_TOKENS = tuple(  # in the order of their ids in Qwen2.5
    f'<|{name}|>'
    for name in (
        *('endoftext', 'im_start', 'im_end', 'object_ref_start', 'object_ref_end'),
        *('box_start', 'box_end', 'quad_start', 'quad_end'),
        *('vision_start', 'vision_end', 'vision_pad', 'image_pad', 'video_pad'),
    )
)
BASE_VOCABULARY = 493  # every word of this world is a token
QUESTIONS = 3  # at most, in one text


# Qwen2's pattern, from its tokenizer.json.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# Qwen2.5-VL's template without its options for numbering pictures.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    f'<|im_start|>system\n{SYSTEM}<|im_end|>\n'
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    '<|vision_start|><|image_pad|><|vision_end|>'
    "{% elif content['type'] == 'video' or 'video' in content %}"
    '<|vision_start|><|video_pad|><|vision_end|>'
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    '{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
_TEXTS = 4000  # records the tokenizer is trained on


@dataclass(frozen=True)
class Text:
    """One turn of a conversation: what is asked, and the one right kind of answer.

    With a scene, its picture stands in front of the user's words.
    """

    user: str
    assistant: str
    scene: Scene | None = None


@dataclass(frozen=True)
class ShapeTexts:
    """Texts about scenes, addressed at random; `kinds` are keys of TEXTS."""

    seed: int
    kinds: tuple[str, ...]
    split: str = 'train'

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Text:
        rng = generator(self.seed, 'texts', self.split, index)
        edges = list(itertools.accumulate(TEXTS[kind][0] for kind in self.kinds))
        kind = self.kinds[bisect.bisect(edges, rng.random() * edges[-1], hi=len(edges) - 1)]
        return TEXTS[kind][1](rng, self.split)


def _told(rng, split: str) -> str:
    """A split to read of: words have no held-out pairs, as a large MLLM has read of everything.

    All pairs are told of alike: were the held-out ones told of otherwise, their states would be of
    a kind that nothing which is trained on pictures has met.
    """
    return TOLD if rng.random() < 0.6 else split


def _caption(rng, split: str) -> Text:
    picture = draw_picture(rng, pick(rng, CATEGORIES), _told(rng, split))
    return Text(GENERATE.format(picture.request.caption), layout(picture.scene))


def _question(rng, split: str) -> Text:
    return _in_words(rng, _picture_question(rng, _told(rng, split)))


def _edit(rng, split: str) -> Text:
    return _in_words(rng, _picture_edit(rng, _told(rng, split)))


def _picture_layout(rng, split: str) -> Text:
    scene = _draw_scene(rng, split)
    return Text('Describe the picture.', layout(scene), scene)


def _picture_question(rng, split: str) -> Text:
    return _asked(rng, _draw_scene(rng, split), _QUESTIONS)


def _picture_relation(rng, split: str) -> Text:
    """Of several objects, what only colour and shape together tell apart."""
    return _asked(rng, draw_edit(rng, pick(rng, EDITS), split).source, _RELATIONS)


def _asked(rng, scene: Scene, kinds) -> Text:
    """One question or more; each is said again before its answer, after a look at the picture.

    The look says what is where, then where what is: a small model finds what stands behind a word.
    """
    wanted, asked = 1 + int(rng.random() * QUESTIONS), {}
    while len(asked) < wanted:
        if found := pick(rng, kinds)(rng, scene):
            asked.update([found])
    said = [f'{question} {found}' for question, found in asked.items()]
    told = _objects(sorted(scene.objects, key=lambda o: tuple(PLACES).index(place(o))))
    return Text(' '.join(asked), '. '.join([layout(scene), told, *said]), scene)


def _picture_edit(rng, split: str) -> Text:
    edit = draw_edit(rng, pick(rng, EDITS), split)
    return Text(edit.instruction, layout(edit.target), edit.source)


def _in_words(rng, text: Text) -> Text:
    """The same without its picture, of which the user tells in any order."""
    assert text.scene is not None
    objects = [text.scene.objects[i] for i in rng.random(len(text.scene.objects)).argsort()]
    told = f'{_objects(objects)}, on {text.scene.background}'
    return Text(f'Picture: {told}. {text.user}', text.assistant)


# kind -> (its share among the kinds of a source, how one is drawn)
TEXTS = {
    'caption': (0.5, _caption),
    'question': (0.7, _question),
    'edit': (0.3, _edit),
    'picture_layout': (0.4, _picture_layout),
    'picture_question': (0.4, _picture_question),
    'picture_edit': (0.2, _picture_edit),
    'picture_relation': (1.0, _picture_relation),
}
READ = ('caption', 'question', 'edit')
SEE = ('picture_layout', 'picture_question', 'picture_edit')


def place(o: Object) -> str:
    """The name of the object's place, one of PLACES."""
    return next(name for name, at in PLACES.items() if at == (o.x, o.y))


def layout(scene: Scene) -> str:
    """What is where, place after place, in one sentence."""
    parts = [f'{name} {_at(scene, name, lambda o: o.name)}' for name in PLACES]
    return ', '.join([*parts, f'on {scene.background}'])


def _objects(objects) -> str:
    return ', '.join(f'{o.name} {place(o)}' for o in objects)


def answers(text: str) -> list[str]:
    """What an assistant says to each question."""
    return re.findall(r'\? ([^?.]+)', text)


def build_tokenizer(directory: str | Path) -> Tokenizer:
    """Trains the tokenizer and writes `tokenizer.json` and `tokenizer_config.json`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / 'tokenizer.json'))
    config = {
        'add_prefix_space': False,
        'bos_token': None,
        'chat_template': _CHAT_TEMPLATE,
        'clean_up_tokenization_spaces': False,
        'eos_token': '<|im_end|>',
        'errors': 'replace',
        'model_max_length': 32768,
        'pad_token': '<|endoftext|>',
        'split_special_tokens': False,
        'tokenizer_class': 'Qwen2Tokenizer',
        'unk_token': None,
    }
    (directory / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
    return tokenizer


def _corpus():
    texts = ShapeTexts(0, (*READ, *SEE))
    for i in range(_TEXTS):
        text = texts[i]
        yield f'system\n{SYSTEM}\n'
        yield f'user\n{text.user}\n'
        look, *said = re.split(r'\. [^?]+\? ', text.assistant)  # questions were the user's
        yield f'assistant\n{look}{": " if said else ""}{", ".join(said)}\n'


def _draw_scene(rng, split: str) -> Scene:
    """Half from captions (few objects, alike), half from edits (up to four, all different)."""
    if rng.random() < 0.5:
        return draw_picture(rng, pick(rng, CATEGORIES), split).scene
    return draw_edit(rng, pick(rng, EDITS), split).source


# Questions: (rng, scene) -> (question, answer), or None where the answer would be ambiguous.


def _how_many(rng, scene):
    shape = pick(rng, scene.objects).shape if rng.random() < 0.75 else pick(rng, SHAPES)
    noun = phrase(None, shape, 2).removeprefix('two ')
    count = sum(o.shape == shape for o in scene.objects)
    return f'How many {noun} are there?', NUMBERS[count]


def _what_colour(rng, scene):
    o = pick(rng, scene.objects)
    alone = sum(other.shape == o.shape for other in scene.objects) == 1
    return (f'What colour is the {o.shape}?', o.colour) if alone else None


def _what_is_beside(rng, scene):
    o = pick(rng, scene.objects)
    relation = pick(rng, tuple(RELATIONS))
    axis, sign = RELATIONS[relation]
    beside, across = None, False
    for other in scene.objects:
        steps = (other.x - o.x, other.y - o.y)
        if steps[axis] * sign > 0:
            beside, across = (beside, True) if steps[1 - axis] else (other, across)
    if beside is None and across:  # in the opposite corner: neither beside it nor not
        return None
    if _twins(scene, o):
        return None
    if beside is None and rng.random() < 0.7:  # else most answers would be 'nothing'
        return None
    question = f'What is {relation} the {o.name}?'
    return question, phrase(beside.colour, beside.shape) if beside else 'nothing'


def _is_there(rng, scene):
    here = {(o.colour, o.shape) for o in scene.objects}
    if rng.random() < 0.5:
        return f'Is there {phrase(*pick(rng, sorted(here)))}?', 'yes'
    return f'Is there {phrase(*pick(rng, [p for p in ALL_PAIRS if p not in here]))}?', 'no'


def _what_is_at(rng, scene):
    what, say = pick(rng, _LOOKUPS)
    name = pick(rng, tuple(PLACES))
    return f'{what} is {name}?', _at(scene, name, say)


def _where(rng, scene):
    o = pick(rng, scene.objects)
    return None if _twins(scene, o) else (f'Where is the {o.name}?', place(o))


def _what_background(rng, scene):
    return 'What is the background?', scene.background


def _at(scene: Scene, name: str, say) -> str:
    """What `say` says of the object at a place."""
    return next((say(o) for o in scene.objects if place(o) == name), 'nothing')


def _twins(scene: Scene, o: Object) -> bool:
    return sum(other.name == o.name for other in scene.objects) > 1


_QUESTIONS = (
    _how_many,
    _what_colour,
    _what_is_beside,
    _is_there,
    _what_is_at,
    _what_is_at,
    _where,
    _what_background,
)
_RELATIONS = (_where, _where, _what_colour, _what_is_beside, _is_there)
_LOOKUPS = (  # what is asked of a place, and what is said of the object there
    ('What', lambda o: o.name),
    ('What colour', lambda o: o.colour),
    ('What shape', lambda o: o.shape),
)


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: python -m metacanvas_jax.data.shapes_text DIRECTORY')
    build_tokenizer(sys.argv[1])
