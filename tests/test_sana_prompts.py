"""SANA's prompts equal those of diffusers' SanaPipeline: ids, masks and Gemma-2's states."""

import concurrent.futures
import inspect
import json

import jax
import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

import convert
from metacanvas_jax.data.sana_prompts import INSTRUCTION, SIZE, SanaTokenizer
from metacanvas_jax.types import InputError
from tests import tiny

PUBLISHED = inspect.signature(SanaPipeline.__call__).parameters
THEIR_INSTRUCTION = PUBLISHED['complex_human_instruction'].default
LONG = 'a very long story of a cat and a city ' * 40
TEXTS = [
    'a red circle',
    '',
    '  A Cat, SLEEPING\n',
    'Ein größeres Bild: 三个圆 🙂 É',
    'two  spaces,\na new line\tand a tab',
    'typed <eos> and <pad> and <0x41>',
    LONG,
    'a',
]


def gemma_tokenizer() -> Tokenizer:
    """In Gemma's manner: spaces as the first letter of words, bytes for the unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(' ', '▁')
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>']
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=special + [f'<0x{i:02X}>' for i in range(256)],
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
    tokenizer.train_from_iterator([INSTRUCTION, *TEXTS[:3]], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<bos> $A', pair='<bos> $A <bos> $B', special_tokens=[('<bos>', 2)]
    )
    return tokenizer


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gemma')
    gemma_tokenizer().save(str(folder / 'tokenizer.json'))
    settings = dict(tokenizer_class='GemmaTokenizer', add_bos_token=True)
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder


class Recorded(Gemma2Model):
    """Notes the ids that it reads."""

    def forward(self, input_ids, **rest):
        self.read = input_ids
        return super().forward(input_ids, **rest)


@pytest.fixture(scope='module')
def pipeline(folder):
    config = Gemma2Config(
        vocab_size=700,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        sliding_window=100,
        attn_implementation='eager',
    )
    encoder = Recorded(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    encoder.save_pretrained(folder)
    tokenizer = GemmaTokenizer.from_pretrained(folder)
    return SanaPipeline(tokenizer, encoder, vae=None, transformer=None, scheduler=None)


@pytest.fixture(scope='module')
def encoder(folder, pipeline):
    del pipeline  # saves it
    module = convert.load('gemma2', str(folder))
    context = jax.jit(lambda module, prompt: module.context(prompt))
    return lambda prompt: context(module, prompt)


def _theirs(pipeline, texts, **options):
    """Ids as padded, states and mask as the DiT gets them, for prompts; then for negatives."""
    read = []
    hook = pipeline.text_encoder.register_forward_hook(
        lambda module, args, out: read.append(module.read.numpy())
    )
    with torch.no_grad():
        x, mask, negative, negative_mask = pipeline.encode_prompt(
            list(texts), negative_prompt=list(texts), device=torch.device('cpu'), **options
        )
    hook.remove()
    return [
        (ids, states.numpy(), mask.numpy())
        for ids, states, mask in zip(read, (x, negative), (mask, negative_mask), strict=True)
    ]


def _compare(prompt, encoder, ids, states, mask):
    width = ids.shape[1]
    np.testing.assert_array_equal(prompt.ids_BU[:, :width], ids)
    assert (prompt.ids_BU[:, width:] == 0).all()
    assert (prompt.length_B <= width).all()
    states_of = encoder(prompt)
    context, length_B = states_of.states_BLD, states_of.length_B
    np.testing.assert_array_equal(np.arange(mask.shape[1]) < length_B[:, None], mask)
    assert tiny.error(context[mask > 0], states[mask > 0]) <= 1e-5


@pytest.mark.parametrize('size', [SIZE, 20])
@pytest.mark.parametrize('instruction', [THEIR_INSTRUCTION, ['Draw this:', 'Prompt: '], []])
def test_ids_masks_and_states(folder, pipeline, encoder, size, instruction):
    prompts, negatives = _theirs(
        pipeline, TEXTS, max_sequence_length=size, complex_human_instruction=instruction
    )
    ours = SanaTokenizer(folder, size=size, instruction='\n'.join(instruction))
    _compare(ours.batch([ours.prompt(text) for text in TEXTS]), encoder, *prompts)
    _compare(ours.batch([ours.negative(text) for text in TEXTS]), encoder, *negatives)


def test_the_defaults(folder, pipeline):
    assert '\n'.join(THEIR_INSTRUCTION) == INSTRUCTION
    assert PUBLISHED['max_sequence_length'].default == SIZE
    assert PUBLISHED['negative_prompt'].default == ''
    assert PUBLISHED['clean_caption'].default is False
    ours = SanaTokenizer(folder)
    assert ours.negative().ids == [2]
    empty = ours.batch([ours.negative(), ours.prompt('')])
    assert empty.context_length_B.tolist() == [1, 2]  # <bos>; <bos> and the instruction's last


def test_prompts_and_negatives_in_one_batch(folder, encoder):
    ours = SanaTokenizer(folder)
    rows = [ours.prompt(TEXTS[0]), ours.negative(), ours.prompt(TEXTS[3]), ours.negative('bad')]
    together = encoder(ours.batch(rows))
    for i, row in enumerate(rows):
        alone, length = encoder(ours.batch([row])), together.length_B[i]
        assert length == alone.length_B[0]
        ours_LD, theirs_LD = together.states_BLD[i, :length], alone.states_BLD[0, :length]
        assert tiny.error(ours_LD, theirs_LD) <= 1e-6


def test_what_is_too_long_is_counted_and_said_once(folder, capsys):
    ours = SanaTokenizer(folder)
    row = ours.prompt(LONG)
    over = len(gemma_tokenizer().encode(INSTRUCTION + LONG.strip()).ids) - row.room
    assert len(row.ids) == row.room
    assert ours.batch([row]).context_length_B.tolist() == [SIZE]
    told = capsys.readouterr().err
    assert told.count('\n') == 1
    assert f'cut {over} off the end of' in told
    assert 'a very long story' in told
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(ours.negative, [LONG, 'a cat'] * 50))
    assert ours.truncated == 51
    assert not capsys.readouterr().err
    assert len(ours.negative(LONG).ids) == SIZE


def test_settings_in_the_file_are_not_used(folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(10)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    texts = [TEXTS[0], LONG]
    want, got = (SanaTokenizer(where) for where in (folder, tmp_path))
    assert [got.prompt(text) for text in texts] == [want.prompt(text) for text in texts]


def test_a_tokenizer_that_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r'no tokenizer\.json in'):
        SanaTokenizer(tmp_path)
    path = tmp_path / 'tokenizer.json'
    values = json.loads((folder / 'tokenizer.json').read_text())
    path.write_text(json.dumps(values | {'post_processor': None}))
    with pytest.raises(InputError, match=r'makes \[\] of an empty text, not <bos> alone \(\[2\]\)'):
        SanaTokenizer(tmp_path)
    vocabulary = {k.replace('<pad>', '<none>'): v for k, v in values['model']['vocab'].items()}
    added = [token for token in values['added_tokens'] if token['content'] != '<pad>']
    values |= {'added_tokens': added, 'model': values['model'] | {'vocab': vocabulary}}
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="lacks Gemma's <pad> or <bos>"):
        SanaTokenizer(tmp_path)
