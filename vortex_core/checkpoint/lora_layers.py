"""What a LoRA file says of one module, from its header: the method, the rank, and whether sizes fit each other.

Methods are LyCORIS' and PEFT's. Legend: N rows and K columns of what a layer changes, r a rank. A 1x1 convolution's
`[N, K, 1, 1]` counts as `[N, K]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from .lora_places import Place

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # by role, without trailing ones
LOW, DENSE, INPUT, TURN, NORM, BIAS, NONE = "low rank", "dense", "input", "rotation", "norm", "bias", "nothing"
MOST_RANK = 1024  # in a file; trainers offer up to 512
MOST_PRODUCT = 1024  # of what LoHa and LoKr multiply to
MOST_STAGES = 16


class Misfit(ValueError):
    """Sizes that cannot be; the message is the end of a sentence about the module."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A module of a file. `keys` by role; `form`: what it becomes.

    `size`: `(N, K)` as its factors say; K is 0 for OFT, which takes any. `rank`: in the file; `product`: of the update,
    0 where it has none. `copied`: the matrix needs a copy in 16 bits.
    """

    stem: str
    place: Place
    keys: Mapping[str, str]
    method: str
    form: str
    rank: int | None
    size: tuple[int, int]
    product: int = 0
    copied: bool = False

    @property
    def label(self) -> str:
        """The method in words, with DoRA where magnitudes are learned."""
        return f"{self.method} with DoRA" if "dora" in self.keys else self.method


@dataclass(frozen=True, slots=True)
class Outline:
    """What a method's factors say: the size of their product, the rank that counts in the file, the form."""

    size: tuple[int, int]
    rank: int | None
    form: str


def layer(stem: str, place: Place, keys: Mapping[str, str], shapes: Shapes) -> Layer:
    """The layer of these `keys`, whose `shapes` are by role. Raises `Misfit`; does not compare with `place`."""
    shapes = {role: trimmed(shape) for role, shape in shapes.items()}
    found = [name for name, method in METHODS.items() if method.roles & shapes.keys()]
    if len(found) > 1:
        raise Misfit(f"is {' and '.join(found)} at once")
    if "alpha" in shapes and prod(shapes["alpha"]) != 1:
        raise Misfit(f"has an alpha of {prod(shapes['alpha'])} values")
    if place.is_norm:
        return _norm(stem, place, keys, shapes, found)
    if not found:
        return _beside(stem, place, keys, shapes)
    name = found[0]
    outline = METHODS[name].outline(shapes)
    if outline.rank is not None and not 1 <= outline.rank <= MOST_RANK:
        raise Misfit(f"has rank {outline.rank}; 1 to {MOST_RANK} is read")
    for role in ("diff_b", "up_bias"):
        if role in shapes and prod(shapes[role]) != outline.size[0]:
            raise Misfit(f"has a bias of {prod(shapes[role])} values for {outline.size[0]} rows")
    form, product = outline.form, _product(name, shapes, outline.rank)
    if form == LOW and name != "LoRA" and not is_useful(product, outline.size):
        form, product = DENSE, 0
    columns = "dora" in shapes and axis(shapes["dora"], (place.count, place.shape[1])) == "input"
    copied = form in (DENSE, TURN) or columns
    return Layer(stem, place, keys, name, form, outline.rank, outline.size, product, copied)


def trimmed(shape: Shape) -> Shape:
    """Without ones at the end, down to two sizes."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def is_useful(rank: int, size: tuple[int, int]) -> bool:
    """Whether factors of this rank are worth it: they take no more memory than the whole matrix."""
    n, k = size
    return rank <= MOST_PRODUCT and rank * (n + k) <= n * k


def axis(dora: Shape, size: tuple[int, int]) -> str:
    """The axis of DoRA's magnitudes: `output`, one a row, or `input`, one a column. Raises `Misfit` for neither."""
    n, k = size
    if prod(dora) == n and dora[:1] == (n,):
        return "output"
    if prod(dora) == k and dora[-1:] == (k,):
        return "input"
    raise Misfit(f"has DoRA magnitudes of {dora}; expected {n} x 1 or 1 x {k}")


def turns_halves(blocks: Shape) -> bool:
    """Whether OFT's blocks turn each half of the rows by itself."""
    return len(blocks) == 3 and blocks[0] % 2 == 0


def _norm(stem: str, place: Place, keys: Mapping[str, str], shapes: Shapes, found: list[str]) -> Layer:
    roles = [role for role in ("diff", "set", "weight") if role in shapes]
    if [name for name in found if name != "a whole update"] or len(roles) > 1 or "dora" in shapes:
        raise Misfit("is a norm, which has no matrix")
    sizes = {prod(shapes[role]) for role in (*roles, "diff_b") if role in shapes}
    if len(sizes) != 1:
        raise Misfit("is a norm with nothing to add" if not sizes else f"has parts of {sorted(sizes)} values")
    return Layer(stem, place, keys, "a norm", NORM if roles else BIAS, None, (sizes.pop(), 1))


def _beside(stem: str, place: Place, keys: Mapping[str, str], shapes: Shapes) -> Layer:
    if not {"dora", "up_bias"}.isdisjoint(shapes):
        raise Misfit("has no factors beside its DoRA magnitudes or bias")
    if "diff_b" in shapes:
        return Layer(stem, place, keys, "a bias", BIAS, None, (prod(shapes["diff_b"]), place.shape[1]))
    return Layer(stem, place, keys, "nothing", NONE, None, (place.count, place.shape[1]))


# ---------------------------------------------------------------- methods


def _matrix(shapes: Shapes, role: str, word: str) -> tuple[int, int]:
    if role not in shapes:
        raise Misfit(f"lacks {word}: half of it is missing")
    if len(shapes[role]) != 2 or 0 in shapes[role]:
        raise Misfit(f"has {word} of {shapes[role]}, which is no matrix")
    n, k = shapes[role]
    return n, k


def _pair(shapes: Shapes, roles: tuple[str, str], words: tuple[str, str], core: str = "") -> tuple[int, int, int]:
    """N, K and r of a product `[N, r] [r, K]`; with a core `[r, N]^T [r, r] [r, K]`, as Tucker factors are stored."""
    first, second = (_matrix(shapes, role, word) for role, word in zip(roles, words, strict=True))
    if core in shapes:
        r = first[0]
        if shapes[core] != (r, r) or second[0] != r:
            raise Misfit(f"has {words[0]} of {first}, {words[1]} of {second} and a core of {shapes[core]}")
        return first[1], second[1], r
    if first[1] != second[0]:
        raise Misfit(f"has {words[0]} of {first} and {words[1]} of {second}, whose ranks differ")
    return first[0], second[1], first[1]


def _lora(shapes: Shapes) -> Outline:
    n, k, r = _pair(shapes, ("up", "down"), ("lora_up (lora_B)", "lora_down (lora_A)"))
    if "mid" in shapes and shapes["mid"] != (r, r):
        raise Misfit(f"has lora_mid of {shapes['mid']}; a linear layer of rank {r} has {r} x {r}")
    return Outline((n, k), r, LOW)


def _loha(shapes: Shapes) -> Outline:
    if ("t1" in shapes) != ("t2" in shapes):
        raise Misfit("lacks hada_t1 or hada_t2: half of it is missing")
    first = _pair(shapes, ("w1_a", "w1_b"), ("hada_w1_a", "hada_w1_b"), "t1")
    second = _pair(shapes, ("w2_a", "w2_b"), ("hada_w2_a", "hada_w2_b"), "t2")
    if first[:2] != second[:2]:
        raise Misfit(f"has factors of {first[:2]} and {second[:2]}, which differ")
    return Outline(first[:2], max(first[2], second[2]), LOW)


def _lokr(shapes: Shapes) -> Outline:
    left, right = kron_sides(shapes)
    ranks = [side[2] for side in (left, right) if side[2] is not None]
    return Outline((left[0] * right[0], left[1] * right[1]), max(ranks, default=None), LOW)


def kron_sides(shapes: Shapes) -> tuple[tuple[int, int, int | None], tuple[int, int, int | None]]:
    """Rows, columns and rank (None where it is whole) of LoKr's two sides."""
    sides: list[tuple[int, int, int | None]] = []
    for whole, core in (("k1", ""), ("k2", "kt")):
        if whole in shapes:
            if {f"{whole}_a", f"{whole}_b", core} & shapes.keys():
                raise Misfit(f"has lokr_w{whole[1]} both whole and in factors")
            sides.append((*_matrix(shapes, whole, f"lokr_w{whole[1]}"), None))
        else:
            words = (f"lokr_w{whole[1]}_a", f"lokr_w{whole[1]}_b")
            sides.append(_pair(shapes, (f"{whole}_a", f"{whole}_b"), words, core))
    return sides[0], sides[1]


def _glora(shapes: Shapes) -> Outline:
    a1, a2, b1, b2 = (_matrix(shapes, role, f"{role}.weight") for role in ("a1", "a2", "b1", "b2"))
    if "bm" in shapes:
        raise Misfit("has a core (bm), which only convolutions have")
    if is_old_glora(shapes):
        a1, a2, b1, b2 = a2, a1, b2, b1
    k, r = a1
    if a2 != (r, k) or b1[1] != r or b2 != (r, k):
        raise Misfit(f"has a1 {shapes['a1']}, a2 {shapes['a2']}, b1 {shapes['b1']}, b2 {shapes['b2']}: they do not fit")
    return Outline((b1[0], k), r, INPUT)


def is_old_glora(shapes: Shapes) -> bool:
    """Whether GLoRA's factors are in LyCORIS' older order, in which a1 and b1 come second."""
    return shapes["a1"][0] < shapes["a1"][1]


def _oft(shapes: Shapes) -> Outline:
    blocks = shapes.get("blocks", ())
    if len(blocks) not in (3, 4) or 0 in blocks or blocks[-1] != blocks[-2]:
        raise Misfit(f"has oft_blocks of {blocks}; expected blocks x size x size")
    rows = blocks[-3] * blocks[-1]
    if blocks[-1] > MOST_RANK:
        raise Misfit(f"has blocks of {blocks[-1]}; up to {MOST_RANK} is read")
    if len(blocks) == 4 and (blocks[0] > MOST_STAGES or blocks[-1] % 2 or rows % (2 ** (blocks[0] - 1) * blocks[-1])):
        raise Misfit(f"has oft_blocks of {blocks}, which are no butterflies")
    if "rescale" in shapes and prod(shapes["rescale"]) != rows:
        raise Misfit(f"has a rescale of {prod(shapes['rescale'])} values for {rows} rows")
    return Outline((rows, 0), None, TURN)


def _diff(shapes: Shapes) -> Outline:
    return Outline(_matrix(shapes, "diff", "diff"), None, DENSE)


@dataclass(frozen=True, slots=True)
class Method:
    """A method: the roles that give it away, and how its shapes are read."""

    roles: frozenset[str]
    outline: Callable[[Shapes], Outline]


METHODS = {
    "LoRA": Method(frozenset(("up", "down", "mid")), _lora),
    "LoHa": Method(frozenset(("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")), _loha),
    "LoKr": Method(frozenset(("k1", "k1_a", "k1_b", "k2", "k2_a", "k2_b", "kt")), _lokr),
    "GLoRA": Method(frozenset(("a1", "a2", "b1", "b2", "bm")), _glora),
    "OFT": Method(frozenset(("blocks", "rescale")), _oft),
    "a whole update": Method(frozenset(("diff",)), _diff),
}


def _product(name: str, shapes: Shapes, rank: int | None) -> int:
    """The rank of a method's update as one pair of factors."""
    if name == "LoHa":
        return prod(shapes[role][0] for role in ("w1_b", "w2_b"))
    if name == "LoKr":
        return prod(min(n, k) if r is None else min(n, k, r) for n, k, r in kron_sides(shapes))
    return (rank or 0) * (2 if name == "GLoRA" else 1)
