"""Every arithmetic instruction that the machine knows, against an oracle of exact arithmetic; what it does not know it refuses."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from fused_ops.testing.ptx.approximate import BOUNDS, errors
from fused_ops.testing.ptx.arithmetic import (
    COMPARISONS,
    CONVERSIONS,
    INSTRUCTIONS,
    PAIRS,
    TYPES,
    arithmetic,
    comparison,
    convert,
    convert_pair,
    fma,
)
from tests.ptx import oracle

F32 = (  # zeros, subnormals, the smallest normal, 1 and its neighbours, integers and halves, the largest, infinity, NaN
    0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x00800001, 0x3EFFFFFF, 0x3F000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001,
    0x3FC00000, 0x40200000, 0x42FE8000, 0x437FC000, 0x43800000, 0x4F000000, 0x5F000000, 0x7E800001, 0x7F000000, 0x7F7FFFFF,
    0x7F800000, 0x7FC00000,
)  # fmt: skip
INTEGERS = (0, 1, 2, 3, 7, 31, 32, 33, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """The machine runs without numpy's warnings of invalid values too."""
    with np.errstate(all="ignore"):
        yield


@functools.cache
def samples(kind: str, count: int) -> list[int]:
    """The bits of numbers of a type: those at which definitions part, then drawn ones."""
    source = random.Random(f"{kind}{count}")
    size = oracle.width(kind)
    if kind == "f32":
        edges = [sign | bits for bits in F32 for sign in (0, 1 << 31)]
    elif kind in oracle.FORMATS:
        top = (1 << oracle.FORMATS[kind][0]) - 1 << oracle.FORMATS[kind][1]
        edges = [sign | bits for bits in (0, 1, top >> 1, top - 1, top, top | 1) for sign in (0, 1 << size - 1)]
    else:
        edges = sorted({value & (1 << size) - 1 for value in INTEGERS})
    near = (
        [oracle.rounded(Fraction(source.randrange(-4000, 4000), 16), kind) for _ in range(count)]
        if kind in oracle.FORMATS
        else []
    )
    drawn = [source.getrandbits(size) for _ in range(count)]
    return edges + near + drawn


def operand_kinds(mnemonic: str, kind: str) -> list[str]:
    """The types of an instruction's operands."""
    name = mnemonic.split(".")[0]
    if name in ("shl", "shr"):
        return [kind, "u32"]
    if name == "bfe":
        return [kind, "u32", "u32"]
    if name == "mad" and "wide" in mnemonic:
        return [kind, kind, f"u{2 * oracle.width(kind)}"]
    of_one = ("neg", "abs", "not", "popc", "rcp", "sqrt", "rsqrt", "lg2", "ex2", "tanh")
    return [kind] * (1 if name in of_one else 3 if name in ("mad", "fma", "prmt") else 2)


def operands(kinds: list[str]) -> list[tuple[int, ...]]:
    """Operands: every pair of edges of the first two types, and drawn ones."""
    if len(kinds) == 1:
        return [(bits,) for bits in samples(kinds[0], 60)]
    source = random.Random(len(kinds))
    lists = [samples(kind, 20) for kind in kinds]
    pairs = list(itertools.product(*(each[:-20] for each in lists[:2])))
    chosen = source.sample(pairs, min(len(pairs), 250)) + [tuple(map(source.choice, lists[:2])) for _ in range(50)]
    return [(*pair, *(source.choice(each) for each in lists[2:])) for pair in chosen]


def column(bits: list[int], kind: str) -> np.ndarray:
    """An array of the type of these bits."""
    if kind == "pred":
        return np.array(bits, np.bool_)
    return np.array(bits, f"u{oracle.width(kind) // 8}").view(TYPES[kind])


def as_bits(result: np.ndarray, kind: str) -> list[int | str]:
    """The bits of an array of a type, NAN for any NaN."""
    array = np.asarray(result)
    if kind == "pred":
        return [int(x) for x in array]
    bits = array.view(f"u{array.dtype.itemsize}").tolist()
    nan = np.isnan(array.view(TYPES[kind]).astype(np.float64)) if kind in oracle.FORMATS else np.zeros(array.shape, bool)
    return [oracle.NAN if is_nan else x for x, is_nan in zip(bits, nan.tolist())]


def differences(got: list, want: list, rows: list) -> list[tuple]:
    """(operands, got, expected) of the first rows that differ."""
    assert len(got) == len(want) == len(rows) > 0
    return [(row, g, w) for row, g, w in zip(rows, got, want) if g != w][:3]


@pytest.mark.parametrize("name", sorted({mnemonic.split(".")[0] for mnemonic in INSTRUCTIONS}))
def test_every_instruction(name: str) -> None:
    for mnemonic, (function, kind, result) in INSTRUCTIONS.items():
        if mnemonic.split(".")[0] != name:
            continue
        kinds = operand_kinds(mnemonic, kind)
        rows = operands(kinds)
        got = function(*(column(list(bits), k) for bits, k in zip(zip(*rows), kinds)))
        assert np.asarray(got).dtype.itemsize * 8 == max(oracle.width(result), 8), mnemonic
        want = [oracle.computed(mnemonic, list(row), kinds) for row in rows]
        assert differences(as_bits(got, result), want, rows) == [], mnemonic


@pytest.mark.parametrize("kind", sorted({mnemonic.split(".")[-1] for mnemonic in COMPARISONS}))
def test_every_comparison(kind: str) -> None:
    single = kind.removesuffix("x2")
    rows = operands([single, single])
    for mnemonic, (function, of) in COMPARISONS.items():
        if of == kind:
            assert mnemonic.endswith(kind)
            got = function(*(column(list(bits), single) for bits in zip(*rows)))
            want = [oracle.compared(mnemonic.removesuffix("x2"), list(row)) for row in rows]
            assert differences(np.asarray(got).tolist(), want, rows) == [], mnemonic


@pytest.mark.parametrize("target", sorted({mnemonic.split(".")[-2] for mnemonic in CONVERSIONS}))
def test_every_conversion(target: str) -> None:
    for mnemonic, (function, source, result) in CONVERSIONS.items():
        if mnemonic.split(".")[-2] != target:
            continue
        rows = samples(source, 60)
        got = function(column(rows, source))
        kind = target if target in oracle.FORMATS else result
        want = [oracle.converted(mnemonic, bits) for bits in rows]
        assert differences(as_bits(got, kind), want, rows) == [], mnemonic


def test_every_conversion_of_pairs() -> None:
    rows = operands(["f32", "f32"])
    columns = [column(list(bits), "f32") for bits in zip(*rows)]
    for mnemonic, (function, _, _) in PAIRS.items():
        if mnemonic == "cvt.rn.f16x2.e4m3x2":
            pairs = list(range(0, 1 << 16, 67))
            halves = zip(
                *(
                    as_bits((function(column(pairs, "b16")) >> np.uint32(s)).astype(np.uint16).view(np.float16), "f16")
                    for s in (16, 0)
                )
            )
            want = [tuple(oracle.of(float(oracle.number(p >> s & 255, "e4m3")), "f16") for s in (8, 0)) for p in pairs]
            assert differences(list(halves), want, pairs) == []
            continue
        kind = mnemonic.split(".")[-2].removesuffix("x2")
        nan = {"f16": 0x7FFF, "bf16": 0x7FFF, "e4m3": 0x7F}[kind]
        one = oracle.e4m3 if kind == "e4m3" else functools.partial(oracle.converted, f"cvt.rn.{kind}.f32")
        halves = [[nan if (bits := one(x)) == oracle.NAN else int(bits) for x in row] for row in rows]
        got = function(*columns).tolist()
        assert differences(got, [high << oracle.width(kind) | low for high, low in halves], rows) == [], mnemonic


def test_fma_is_rounded_once() -> None:
    """Sums that fall on or next to halfway points of fp32, of normal and of subnormal results, and where fp64 has rounded first."""
    source = random.Random(1)
    rows: list[tuple[int, int, int]] = []
    for _ in range(1000):  # cancellation, and c far above or below the product
        a, b = (source.getrandbits(23) | source.randrange(80, 170) << 23 | source.getrandbits(1) << 31 for _ in range(2))
        product = Fraction(oracle.number(a, "f32")) * Fraction(oracle.number(b, "f32"))
        power = Fraction(2) ** source.choice((0, 1, 24, 25, 30, 53, 60, 80, -24, -30, -54))
        rows.append((a, b, oracle.rounded(-product * source.choice((1, -1, 3)) * power, "f32")))
    for _ in range(500):  # subnormal results
        a, b = (source.getrandbits(23) | source.randrange(1, 64) << 23 for _ in range(2))
        rows.append((a, b, source.getrandbits(source.choice((1, 5, 23, 25))) | source.getrandbits(1) << 31))
    halves = [(2**23 - 1, 2**23 + 1), (2**23 - 2**12 + 1, 2**23 + 2**12 + 1)]  # products 2^46 - 1 and 2^46 + 1
    while len(halves) < 40:
        p = source.randrange(2**23, 2**24)
        if 0 < abs(p * round(2**46 / p) - 2**46) < 2**16:
            halves.append((p, round(2**46 / p)))
    for p, q in halves * 20:  # the product is half of c's last bit, give or take what fp64 cannot hold beside c
        exponent = source.choice((0, 1, source.randrange(2, 230)))
        last = Fraction(2) ** (max(exponent, 1) - 150)
        scale = Fraction(2) ** (max(exponent, 1) // 2 - 100)
        signs = [source.choice((1, -1)) for _ in range(2)]
        a, b = oracle.rounded(signs[0] * p * scale, "f32"), oracle.rounded(signs[1] * q * last / 2 / 2**46 / scale, "f32")
        rows.append((a, b, source.getrandbits(23) | exponent << 23 | source.getrandbits(1) << 31))
    a, b, c = (column(list(bits), "f32") for bits in zip(*rows))
    got = as_bits(fma(a, b, c), "f32")
    twice = as_bits((a.astype(np.float64) * b + c).astype(np.float32), "f32")
    want = [oracle.computed("fma.rn.f32", list(row), ["f32"] * 3) for row in rows]
    assert differences(got, want, rows) == []
    assert sum(x != y for x, y in zip(twice, want)) > 100  # these operands tell it from two roundings


@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("name", BOUNDS)
def test_approximate_instructions_err_as_documented(name: str, sign: int) -> None:
    """Each result is within the bound, no fp32 further on its side is, and both sides come up where a hash chooses."""
    function, bound, root = INSTRUCTIONS[f"{name}.f32"][0], BOUNDS[name], name.split(".")[0]
    rows = [
        row
        for row in operands(["f32"] * (2 if root == "div" else 1))
        if root != "div" or 2.0**-126 <= abs(oracle.number(row[1], "f32")) <= 2.0**126
    ]
    with errors(None, sign):
        got = as_bits(function(*(column(list(bits), "f32") for bits in zip(*rows))), "f32")
    sides = set()
    for row, bits in zip(rows, got):
        values = [float(oracle.number(x, "f32")) for x in row]
        right = oracle.floating(name.split("."), "f32", values)
        if root == "div":
            finite = right != oracle.NAN and abs(oracle.number(right, "f32")) < np.inf and values[0] != 0
            exact: Fraction | float = Fraction(values[0]) / Fraction(values[1]) if finite else np.inf
        else:
            exact = oracle.exact_function(root, values[0])
        if not isinstance(exact, Fraction) or abs(oracle.number(int(right), "f32")) == np.inf:
            special = exact in (1.0, -1.0)  # tanh of infinities is given too
            assert bits == right or special, (name, row)
            continue
        assert bits != oracle.NAN
        if bound.ulps:
            moved = (int(bits) & 0x7FFFFFFF) - (int(right) & 0x7FFFFFFF)
            wanted = {bound.ulps, -bound.ulps} if sign == 0 else {bound.ulps * sign}
            stopped = int(bits) & 0x7FFFFFFF in (0, 0x7F800000)
            assert moved in wanted or (stopped and abs(moved) < bound.ulps), (name, row)
            sides.add(moved > 0)
            continue
        inside = bound.interval is not None and bound.interval[0] < values[0] < bound.interval[1]
        reach = Fraction(bound.absolute) if inside else abs(exact) * Fraction(bound.relative)
        value = Fraction(oracle.number(int(bits), "f32"))
        assert abs(value - exact) <= max(reach, abs(Fraction(oracle.number(int(right), "f32")) - exact)) * (
            1 + Fraction(1, 2**40)
        ), (name, row)
        side = value > exact if exact >= 0 else value < exact
        if sign:
            assert value == exact or side == (sign > 0) or bits == right, (name, row)
            above = np.float32(np.inf if (sign > 0) == (exact >= 0) else -np.inf)
            further = float(np.nextafter(np.float32(float(value)), above))
            assert np.isinf(further) or abs(Fraction(further) - exact) > reach * (1 - Fraction(1, 2**40)), (name, row)
        sides.add(side)
    assert len(sides) == 2 or sign


def test_what_nothing_rounds_stays() -> None:
    """Instructions that PTX rounds do not err, nor those on integers; after the errors all is as before."""
    a, b = (column(samples("f32", 60), "f32") for _ in range(2))
    exact = {m: f for m, (f, kind, _) in INSTRUCTIONS.items() if kind == "f32" and not any(m.startswith(n) for n in BOUNDS)}
    assert {"div.rn.f32", "sqrt.rn.ftz.f32", "rcp.rn.f32", "fma.rn.f32", "add.f32"} <= set(exact)
    for mnemonic, function in exact.items():
        given = (a, b[::-1], a)[: len(operand_kinds(mnemonic, "f32"))]
        before = as_bits(function(*given), "f32")
        for ulps, sign in ((None, 1), (2, -1), (2, 0)):
            with errors(ulps, sign):
                assert as_bits(function(*given), "f32") == before, mnemonic
    for name in BOUNDS:
        function = INSTRUCTIONS[f"{name}.f32"][0]
        given = (a, b[::-1])[: len(operand_kinds(f"{name}.f32", "f32"))]
        before = as_bits(function(*given), "f32")
        with errors(2, 1):
            assert as_bits(function(*given), "f32") != before, name
        assert as_bits(function(*given), "f32") == before, name


def test_results_at_the_ends_of_fp32() -> None:
    """exp2(0) errs; a result next to infinity or zero goes no further, and zeros and infinities that are certain stay."""
    exp2, flushing = (INSTRUCTIONS[f"ex2.approx{ftz}.f32"][0] for ftz in ("", ".ftz"))
    divide, logarithm = INSTRUCTIONS["div.full.f32"][0], INSTRUCTIONS["lg2.approx.f32"][0]
    x = np.array([0, 127.99999, -149, -151, -126, -np.inf, np.inf, 200], np.float32)
    largest = np.array([3.4028234e38], np.float32)
    with errors(None, 1):
        assert exp2(x).view(np.uint32).tolist() == [0x3F800002, exp_bits(x[1], 2), 3, 2, 0x00800002, 0, 0x7F800000, 0x7F800000]
        assert flushing(x).view(np.uint32).tolist()[2:5] == [0, 0, 0x00800002]
        assert np.isinf(divide(largest, np.float32(1))).all()
        assert (logarithm(np.ones(1, np.float32)) == 2.0**-22).all()
        assert (divide(largest, largest).view(np.uint32) == 0x3F800002).all()
    with errors(None, -1):
        assert exp2(x).view(np.uint32).tolist()[:5] == [0x3F7FFFFE, exp_bits(x[1], -2), 0, 0, 0x007FFFFE]
        assert flushing(x).view(np.uint32).tolist()[2:5] == [0, 0, 0]
        zero = np.zeros(2, np.float32)
        assert (divide(zero, np.array([1, -3], np.float32)) == 0).all()
        assert np.isinf(divide(zero + 1, zero)).all()
        assert np.isnan(divide(zero, zero)).all()


def exp_bits(x: np.float32, moved: int) -> int:
    """The bits of exp2(x), moved, no further than infinity."""
    return min(int(oracle.of(oracle.exact_function("ex2", float(x)), "f32")) + moved, 0x7F800000)


@pytest.mark.parametrize(
    "mnemonic",
    [
        "ex2.approx.ftz.bf16", "ex2.approx.ftz.bf16x2", "ex2.approx.f16", "tanh.approx.bf16", "tanh.approx.f16x2", "sin.approx.f32",
        "cos.approx.ftz.f32", "ex2.f32", "tanh.approx.ftz.f32", "div.f32", "div.rz.f32", "sqrt.rm.f32", "add.sat.f32", "add.rz.f32",
        "fma.rn.f16", "fma.rn.bf16x2", "fma.rn.relu.f16", "mad.f32", "mad.hi.s32", "mul.hi.u64", "mul.s32", "add.bf16", "mul.f16x2",
        "add.cc.u32", "max.xorsign.abs.f32", "prmt.f4e.b32", "shl.s32", "shf.l.wrap.b32", "bfe.u64", "lop3.b32", "neg.bf16x2", "abs.bf16",
    ],
)  # fmt: skip
def test_other_instructions_are_refused(mnemonic: str) -> None:
    assert arithmetic(tuple(mnemonic.split("."))) is None


@pytest.mark.parametrize(
    "mnemonic",
    [
        "cvt.rna.tf32.f32", "cvt.rz.bf16.f32", "cvt.rz.f16x2.f32", "cvt.rn.relu.bf16x2.f32", "cvt.rn.satfinite.f16x2.f32",
        "cvt.rn.e4m3x2.f32", "cvt.rn.satfinite.e5m2x2.f32", "cvt.sat.u8.s32", "cvt.rn.bf16.s32", "cvt.rzi.s32.f16", "cvt.f16x2.f32",
    ],
)  # fmt: skip
def test_other_conversions_are_refused(mnemonic: str) -> None:
    op = tuple(mnemonic.split("."))
    assert convert(op) is None
    assert convert_pair(op) is None


@pytest.mark.parametrize("mnemonic", ["setp.lt.and.f32", "setp.lt.b32", "setp.lo.s32", "setp.lt.ftz.f16", "setp.ltu.s32"])
def test_other_comparisons_are_refused(mnemonic: str) -> None:
    with pytest.raises(NotImplementedError, match=mnemonic):
        comparison(tuple(mnemonic.split(".")))
