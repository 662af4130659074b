"""A checkpoint family as a table of rules, read in both directions.

    published tensors  -- forward -->  our parameters       import
    published tensors  <- backward --  our parameters       export

A table is total: every published tensor is used once and every parameter is filled, or `match`
says all that is wrong at once. Rules hold names and layouts only, never values, so a table can be
checked against a list of names and shapes.
"""

import abc
import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from einops import pack, rearrange, unpack

Shapes = Mapping[str, jax.ShapeDtypeStruct]


class Op(abc.ABC):
    """Arrays as published <-> arrays as ours; each way undoes the other, bit for bit.

    Runs on numpy arrays, and on tracers to learn shapes.
    """

    @abc.abstractmethod
    def forward(self, *published: Any) -> tuple[Any, ...]: ...

    @abc.abstractmethod
    def backward(self, *ours: Any) -> tuple[Any, ...]: ...


class Rearrange(Op):
    """One einops pattern, 'published -> ours'; `sizes` are those of the axes inside brackets."""

    def __init__(self, pattern: str, **sizes: int):
        self.pattern, self.sizes = pattern, sizes

    def forward(self, *published):
        return tuple(rearrange(a, self.pattern, **self.sizes) for a in published)

    def backward(self, *ours):
        theirs, mine = self.pattern.split('->')
        return tuple(rearrange(a, f'{mine}->{theirs}', **self.sizes) for a in ours)


class Join(Op):
    """Several published tensors, of these lengths along their first axis, as one of ours."""

    def __init__(self, *lengths: int):
        self.lengths = lengths

    def forward(self, *published):
        return (pack(published, _first(published[0]))[0],)

    def backward(self, *ours):
        (whole,) = ours
        assert sum(self.lengths) == whole.shape[0], (self.lengths, whole.shape)
        return tuple(unpack(whole, [(n,) for n in self.lengths], _first(whole)))


class SwapHalves(Op):
    """The two halves of the first axis trade places: (shift, scale) <-> (scale, shift)."""

    def forward(self, *published):
        halves = (rearrange(a, '(two half) ... -> two half ...', two=2) for a in published)
        return tuple(rearrange(h[::-1], 'two half ... -> (two half) ...') for h in halves)

    backward = forward


class Inverse(Op):
    """`op` with the two sides exchanged: Inverse(Join(...)) cuts a published tensor in pieces."""

    def __init__(self, op: Op):
        self.op = op

    def forward(self, *published):
        return self.op.backward(*published)

    def backward(self, *ours):
        return self.op.forward(*ours)


class Chain(Op):
    """One op after the other, from published to ours."""

    def __init__(self, *ops: Op):
        self.ops = ops

    def forward(self, *published):
        return functools.reduce(lambda arrays, op: op.forward(*arrays), self.ops, published)

    def backward(self, *ours):
        return functools.reduce(lambda arrays, op: op.backward(*arrays), self.ops[::-1], ours)


def _first(array) -> str:
    """The pattern of `pack` along the first axis."""
    return ' '.join(['*', *'abcdefg'[: len(array.shape) - 1]])


SAME = Rearrange('... -> ...')
TRANSPOSED = Rearrange('o i -> i o')  # torch's Linear keeps (out, in)


@dataclasses.dataclass(frozen=True)
class Rule:
    """The parameters at the paths `ours` are the tensors `published`, after `op`.

    A name with {i} stands for the tensors of all layers: layer i is slice i of our stacked
    parameter, and `op` acts on one layer. {i+1} is for layers that are counted from one.
    """

    ours: str | tuple[str, ...]
    published: str | tuple[str, ...]
    op: Op = SAME

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def names(self) -> tuple[str, ...]:
        return (self.published,) if isinstance(self.published, str) else self.published


def linear(ours: str, published: str, *, bias: bool = True) -> list[Rule]:
    """A torch Linear as our Linear."""
    kernel = Rule(f'{ours}/kernel', f'{published}.weight', TRANSPOSED)
    return [kernel, Rule(f'{ours}/bias', f'{published}.bias')] if bias else [kernel]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rule at one layer: the smallest part that can be converted by itself."""

    rule: Rule
    names: tuple[str, ...]
    index: int | None  # of the layer; None where nothing is stacked

    @property
    def paths(self) -> tuple[str, ...]:
        return self.rule.paths


def pieces(rules: Sequence[Rule], ours: Shapes) -> list[Piece]:
    """Every rule whose parameters the model has, at every layer that it has."""
    result = []
    for rule in rules:
        if any(path not in ours for path in rule.paths):
            continue
        if '{i' not in rule.names[0]:
            result.append(Piece(rule, rule.names, None))
            continue
        for i in range(ours[rule.paths[0]].shape[0]):
            names = (name.replace('{i}', str(i)) for name in rule.names)
            names = tuple(name.replace('{i+1}', str(i + 1)) for name in names)
            result.append(Piece(rule, names, i))
    twice = collections.Counter(name for piece in result for name in piece.names).most_common(1)
    assert not twice or twice[0][1] == 1, f'two rules use {twice[0][0]}'
    return result


@dataclasses.dataclass(frozen=True)
class Match:
    """What of a checkpoint fits a model, and all that does not, a line each."""

    pieces: list[Piece]
    unused: list[str]
    unfilled: list[str]
    misshapen: list[str]

    @property
    def fits(self) -> bool:
        return not (self.unused or self.unfilled or self.misshapen)

    def problems(self) -> dict[str, list[str]]:
        lists = {'unused': self.unused, 'unfilled': self.unfilled, 'misshapen': self.misshapen}
        return {title: lines for title, lines in lists.items() if lines}


def match(rules: Sequence[Rule], published: Shapes, ours: Shapes) -> Match:
    """Holds the names and shapes of a checkpoint against those of a model."""
    found = pieces(rules, ours)
    used, filled = set(), set()
    lacking: dict[str, list[str]] = collections.defaultdict(list)
    misshapen = []
    for piece in found:
        filled.update(piece.paths)
        used.update(piece.names)
        if missing := [name for name in piece.names if name not in published]:
            for path in piece.paths:
                lacking[path] += missing
            continue
        try:
            got = shapes_after(piece.rule.op.forward, *(published[name] for name in piece.names))
        except Exception:  # einops names its own class only inside the message
            got = ('another number of axes',) * len(piece.paths)
        for path, shape in zip(piece.paths, got, strict=True):
            want = ours[path].shape[0 if piece.index is None else 1 :]
            if shape != want:
                shapes = ' and '.join(f'{name} {published[name].shape}' for name in piece.names)
                misshapen.append(f'{shapes} makes {shape}, {path} wants {want}')
    unfilled = [f'{path}: no rule fills it' for path in ours if path not in filled]
    unfilled += [f'{path} lacks {_some(names)}' for path, names in lacking.items()]
    unused = [name for name in published if name not in used]
    return Match(found, unused, unfilled, misshapen)


def published_shapes(found: Sequence[Piece], ours: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """What the parameters of a model are called, and look like, as a published checkpoint."""
    result = {}
    for piece in found:
        parts = [ours[path] for path in piece.paths]
        if piece.index is not None:
            parts = [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in parts]
        shapes = shapes_after(piece.rule.op.backward, *parts)
        for name, shape in zip(piece.names, shapes, strict=True):
            result[name] = jax.ShapeDtypeStruct(shape, parts[0].dtype)
    return result


def shapes_after(function: Any, *arrays: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of what `function`, a method of an Op, makes of arrays of these shapes."""
    return _shapes_after(function, *(tuple(a.shape) for a in arrays))


@functools.lru_cache(maxsize=4096)  # a model has some thousand tensors, but few shapes
def _shapes_after(function, *shapes):
    made = jax.eval_shape(function, *(jax.ShapeDtypeStruct(s, 'float32') for s in shapes))
    return tuple(tuple(a.shape) for a in made)


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
