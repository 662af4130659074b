"""Ops are undone exactly; a table is total; names tell families apart."""

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import registry
from convert.rules import (
    SAME,
    TRANSPOSED,
    Chain,
    Inverse,
    Join,
    Rearrange,
    Rule,
    SwapHalves,
    linear,
    match,
    published_shapes,
    shapes_after,
)
from metacanvas_jax.types import InputError


def bits(*shape: int) -> np.ndarray:
    """Every pattern of bits counts, those of nan too."""
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape).view(ml_dtypes.bfloat16)


OPS = {
    'same': (SAME, [(3, 4)], [(3, 4)]),
    'scalar': (SAME, [()], [()]),
    'linear': (TRANSPOSED, [(6, 4)], [(4, 6)]),
    'patches': (Rearrange('o c t h w -> (c t h w) o', t=2, h=3, w=3), [(5, 4, 2, 3, 3)], [(72, 5)]),
    'convolution': (Rearrange('o i h w -> h w i o'), [(5, 4, 3, 2)], [(3, 2, 4, 5)]),
    '1x1': (Rearrange('o i 1 1 -> i o'), [(5, 4, 1, 1)], [(4, 5)]),
    'q, k, v': (Chain(Join(6, 2, 2), TRANSPOSED), [(6, 4), (2, 4), (2, 4)], [(4, 10)]),
    'biases': (Join(6, 2, 2), [(6,), (2,), (2,)], [(10,)]),
    'cut': (Chain(Inverse(Join(6, 4)), TRANSPOSED), [(10, 3)], [(3, 6), (3, 4)]),
    'shift, scale': (Chain(SwapHalves(), TRANSPOSED), [(6, 4)], [(4, 6)]),
    'bias of it': (SwapHalves(), [(6,)], [(6,)]),
}


@pytest.mark.parametrize('name', OPS)
def test_each_way_undoes_the_other(name):
    op, published, ours = OPS[name]
    arrays = [bits(*shape) for shape in published]
    made = op.forward(*arrays)
    assert [a.shape for a in made] == ours
    assert list(shapes_after(op.forward, *arrays)) == ours
    assert list(shapes_after(op.backward, *made)) == published
    for back, array in zip(op.backward(*made), arrays, strict=True):
        assert back.dtype == array.dtype
        assert np.ascontiguousarray(back).tobytes() == array.tobytes()


def test_what_ops_do():
    q, k, v = bits(6, 4), bits(2, 4), bits(2, 4) * 2
    (joined,) = Chain(Join(6, 2, 2), TRANSPOSED).forward(q, k, v)
    np.testing.assert_array_equal(joined, np.concatenate([q, k, v]).T)
    first, second = Inverse(Join(6, 4)).forward(np.arange(10))
    assert (list(first), list(second)) == ([*range(6)], [*range(6, 10)])
    assert list(SwapHalves().forward(np.arange(6))[0]) == [3, 4, 5, 0, 1, 2]


# ------------------------------------------------------------ tables


def structs(**shapes):
    return {
        name.replace('__', '/').replace('_', '.'): jax.ShapeDtypeStruct(shape, 'float32')
        for name, shape in shapes.items()
    }


RULES = [
    *linear('blocks/up', 'h.{i}.up', bias=True),
    Rule(('q', 'k'), 'qk', Inverse(Join(2, 3))),
    Rule('v', ('v1', 'v2'), Join(1, 1)),
    Rule('head', 'head'),
]
OURS = structs(blocks__up__kernel=(2, 3, 4), blocks__up__bias=(2, 4), q=(2,), k=(3,), v=(2,))
THEIRS = {
    **{f'h.{i}.up.weight': jax.ShapeDtypeStruct((4, 3), 'float32') for i in range(2)},
    **{f'h.{i}.up.bias': jax.ShapeDtypeStruct((4,), 'float32') for i in range(2)},
    **structs(qk=(5,), v1=(1,), v2=(1,)),
}


def test_a_table_that_fits():
    found = match(RULES, THEIRS, OURS)
    assert found.fits, found.problems()
    assert len(found.pieces) == 6  # the head is not in this model
    assert published_shapes(found.pieces, OURS) == THEIRS


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (lambda t: t.pop('h.1.up.bias'), {'unfilled': ['blocks/up/bias lacks h.1.up.bias']}),
        (lambda t: t.pop('qk'), {'unfilled': ['q lacks qk', 'k lacks qk']}),
        (lambda t: t.update(structs(head=(1,))), {'unused': ['head']}),
        (
            lambda t: t.update({'h.2.up.bias': t['h.0.up.bias']}),
            {'unused': ['h.2.up.bias']},
        ),
        (
            lambda t: t.update({'h.0.up.weight': jax.ShapeDtypeStruct((3, 4), 'float32')}),
            {
                'misshapen': [
                    'h.0.up.weight (3, 4) makes (4, 3), blocks/up/kernel wants (3, 4)',
                ]
            },
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, problem):
    theirs = dict(THEIRS)
    change(theirs)
    assert match(RULES, theirs, OURS).problems() == problem


def test_all_problems_are_in_one_report():
    theirs = {**THEIRS, **structs(head=(1,), qk=(5, 1), v1=(2,))}
    del theirs['h.0.up.bias'], theirs['h.1.up.bias']
    problems = match(RULES, theirs, {**OURS, **structs(extra=(1,))}).problems()
    assert problems['unused'] == ['head']
    assert problems['unfilled'] == [
        'extra: no rule fills it',
        'blocks/up/bias lacks h.0.up.bias, h.1.up.bias',
    ]
    assert [line.split(' makes ')[0] for line in problems['misshapen']] == [
        'qk (5, 1)',
        'qk (5, 1)',
        'v1 (2,) and v2 (1,)',
    ]


def test_a_tensor_is_used_once():
    with pytest.raises(AssertionError, match='two rules use qk'):
        match([*RULES, Rule('head', 'qk')], THEIRS, {**OURS, **structs(head=(5,))})


# ------------------------------------------------------------ families

# One tensor of each published checkpoint, and of which family it is.
LOOKS = {
    'single_transformer_blocks.0.norm.linear.weight': 'flux (diffusers)',
    'single_blocks.0.modulation.lin.weight': 'flux (bfl)',
    'double_blocks.0.img_attn.qkv.weight': 'flux2 or chroma (native)',
    'transformer_blocks.0.ff.conv_inverted.weight': 'sana (diffusers)',
    'blocks.0.mlp.inverted_conv.conv.weight': 'sana (native)',
    'transformer_blocks.0.ff.conv_temp.weight': 'sana_video',
    'blocks.0.cross_attn.norm_k.weight': 'wan (native)',
    'encoder.down_blocks.0.resnets.0.norm1.weight': 'flux_ae (diffusers)',
    'encoder.down_blocks.0.resnets.0.norm1.gamma': 'wan_vae (diffusers)',
    'encoder.downsamples.0.residual.0.gamma': 'VAE of Wan2.1',
    'encoder.block.0.layer.0.SelfAttention.q.weight': 't5',
    'model.layers.0.self_attn.q_proj.weight': 'language model',
}


@pytest.mark.parametrize('name', LOOKS)
def test_another_family_is_named(name):
    with pytest.raises(InputError, match='its names are those of') as caught:
        registry.find_layout('qwen2_5_vl', {name, 'patch_embed.proj.weight'}, 'here')
    assert LOOKS[name] in str(caught.value)


def test_nothing_known():
    with pytest.raises(InputError, match='nothing else known: it lacks model'):
        registry.find_layout('qwen2_5_vl', ['a.weight'], 'here')
    with pytest.raises(InputError, match="component 'qwen' is unknown; there are: qwen2_5_vl"):
        registry.find('qwen')
