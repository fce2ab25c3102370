"""QJL and the asymmetric estimator. Risks: a factor that leaves a bias, a variance that is a bound only, signs of the wrong vector."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_gguf import codec
from turbo_gguf.codec import asymmetric, qjl

SEEDS = 3000
CASES = [(16, 16, False), (16, 16, True), (16, 8, True), (16, 48, True), (24, 72, False), (64, 64, False), (64, 64, True)]
each_case = pytest.mark.parametrize(
    ("n", "rows", "orthogonal"), CASES, ids=[f"{n}x{m}-{'orthogonal' if o else 'gaussian'}" for n, m, o in CASES]
)


def vectors(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A query and a key that have something in common, so that a bias would show."""
    rng = np.random.default_rng(n)
    q = rng.standard_normal(n)
    return q, rng.standard_normal(n) + 0.7 * q


def estimates(n: int, rows: int, orthogonal: bool) -> np.ndarray:
    q, x = vectors(n)
    found = []
    for seed in range(SEEDS):
        p = qjl.projection(n, rows, orthogonal=orthogonal, seed=seed)
        found.append(qjl.estimate(p, q[None], qjl.encode(p, x[None]))[0, 0])
    return np.array(found, np.float64)


@each_case
def test_estimates_have_no_bias_and_the_variance_of_the_formula(n: int, rows: int, orthogonal: bool) -> None:
    """Both from both sides, within four standard errors; that of the variance is from the fourth moment of what was drawn."""
    q, x = vectors(n)
    found = estimates(n, rows, orthogonal)
    expected = float(qjl.variance(qjl.projection(n, rows, orthogonal=orthogonal), q, x))
    assert abs(found.mean() - q @ x) < 4 * np.sqrt(expected / SEEDS) + 2**-11 * abs(q @ x)  # and the norm is fp16
    squares = np.square(found - q @ x)
    assert abs(squares.mean() - expected) < 4 * squares.std() / np.sqrt(SEEDS)


@each_case
def test_a_wrong_factor_is_noticed(n: int, rows: int, orthogonal: bool) -> None:
    """Negative control: the factor of least error, which shrinks, is far outside of the bounds of the test above."""
    q, x = vectors(n)
    p = qjl.projection(n, rows, orthogonal=orthogonal)
    shrunk = estimates(n, rows, orthogonal) / p.factor**2
    assert abs(shrunk.mean() - q @ x) > 8 * np.sqrt(float(qjl.variance(p, q, x)) / SEEDS)


def test_orthogonal_rows_vary_less() -> None:
    q, x = vectors(64)
    gaussian, orthogonal = (float(qjl.variance(qjl.projection(64, orthogonal=o), q, x)) for o in (False, True))
    assert orthogonal < 0.75 * gaussian


@pytest.mark.parametrize("orthogonal", [False, True])
def test_error_of_decoded_vectors(orthogonal: bool) -> None:
    """What decides against QJL: Gaussian rows leave (pi n / 2 - 1) / m of |x|^2, orthogonal ones pi / 2 - 1 and a little more."""
    n = 64
    x = np.random.default_rng(3).standard_normal((200, n))
    errors = []
    for seed in range(40):
        p = qjl.projection(n, orthogonal=orthogonal, seed=seed)
        errors.append(codec.compare(x, qjl.decode(p, qjl.encode(p, x))).error)
    expected = p.factor**2 - 1 if orthogonal else (np.pi / 2 * n - 1) / n
    assert np.mean(errors) == pytest.approx(expected, rel=0.01)


@given(
    shape=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    keys=st.integers(1, 5),
    n=st.sampled_from([2, 7, 32]),
    rows=st.sampled_from([1, 5, 32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_an_estimate_is_the_product_with_what_is_decoded(shape: tuple[int, ...], keys: int, n: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, x = rng.standard_normal((*shape, 3, n)), rng.standard_normal((*shape, keys, n))
    p = qjl.projection(n, rows, seed=seed)
    signs = qjl.encode(p, x)
    assert signs.bits.shape == (*shape, keys, -(-rows // 8)) and signs.norm.shape == (*shape, keys)
    found = qjl.estimate(p, q, signs)
    assert found.shape == (*shape, 3, keys)
    np.testing.assert_allclose(found, q @ np.swapaxes(qjl.decode(p, signs), -1, -2), rtol=1e-4, atol=1e-4)
    assert p.bits_per_value == (rows + 16) / n
    assert qjl.variance(p, q[..., :1, :], x).shape == (*shape, keys)


def test_rows_are_orthogonal() -> None:
    for rows in (5, 16, 32):
        p = qjl.projection(16, rows, orthogonal=True)
        for i, j in product(range(0, rows, 16), repeat=2):
            if i == j:
                group = p.matrix[i : i + 16]
                np.testing.assert_allclose(group @ group.T, 16 * np.eye(len(group)), atol=1e-4)


def test_zeros_stay_zeros() -> None:
    p = qjl.projection(32)
    assert not qjl.decode(p, qjl.encode(p, np.zeros((3, 32)))).any()
    keys = asymmetric.encode(np.zeros((3, 32)), 3, p)
    assert not asymmetric.decode(keys, 3, p).any()


def test_refusals() -> None:
    for n, rows in ((1, None), (8, 0), (0, 4)):
        with pytest.raises(ValueError, match="no projection"):
            qjl.projection(n, rows)
    with pytest.raises(ValueError, match="neither at most 8 nor a multiple"):
        qjl.projection(8, 12, orthogonal=True)
    p = qjl.projection(8)
    for x in (np.zeros((2, 9)), np.float32(1)):
        with pytest.raises(ValueError, match="do not have the 8 values"):
            qjl.encode(p, x)
        with pytest.raises(ValueError, match="do not have the 8 values"):
            qjl.estimate(p, x, qjl.encode(p, np.zeros((1, 8))))


# --- with a codebook ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scores_have_no_bias_and_those_of_the_codebook_do(bits: int) -> None:
    """Over projections, with the variance of the formula for what the codebook leaves."""
    q, x = vectors(32)
    found = []
    for seed in range(SEEDS):
        p = qjl.projection(32, seed=seed)
        found.append(asymmetric.scores(q[None], asymmetric.encode(x[None], bits, p), bits, p)[0, 0])
    rest = x - asymmetric.decode_unit(asymmetric.encode_unit(x, bits - 1), bits - 1)
    variance = float(qjl.variance(p, q, rest))
    assert abs(np.mean(found) - q @ x) < 4 * np.sqrt(variance / SEEDS) + 1e-3
    assert np.var(found) == pytest.approx(variance, rel=4 * np.sqrt(2 / SEEDS))
    many = np.random.default_rng(4).standard_normal((2000, 32))
    book = asymmetric.decode_unit(asymmetric.encode_unit(many, bits), bits)
    assert codec.compare(many, book).slope == pytest.approx(1 - codec.lloyd_max(bits, 32).error, abs=3e-3), "a codebook shrinks"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_codebook_alone_has_the_error_of_the_integral(bits: int) -> None:
    x = 7 * np.random.default_rng(5).standard_normal((3, 1000, 64))
    code = asymmetric.encode_unit(x, bits)
    assert code.indices.shape == x.shape and code.indices.max() == 2**bits - 1 and code.norm.shape == (3, 1000)
    assert codec.compare(x, asymmetric.decode_unit(code, bits)).error == pytest.approx(codec.lloyd_max(bits, 64).error, rel=0.02)


def test_scores_are_products_with_decoded_keys() -> None:
    rng = np.random.default_rng(6)
    p = qjl.projection(64, orthogonal=True)
    keys = asymmetric.encode(rng.standard_normal((2, 5, 64)), 3, p)
    q = rng.standard_normal((2, 4, 64))
    expected = q @ np.swapaxes(asymmetric.decode(keys, 3, p), -1, -2)
    np.testing.assert_allclose(asymmetric.scores(q, keys, 3, p), expected, rtol=1e-4, atol=1e-3)


def test_bits_of_keys() -> None:
    p = qjl.projection(64)
    assert asymmetric.bits_of_unit(3, 64) == 3.25 and asymmetric.bits_of_keys(3, p) == 3.5
    with pytest.raises(ValueError, match="1 to 8 bits"):
        asymmetric.encode(np.zeros(64), 1, p)
    with pytest.raises(ValueError, match="no vector"):
        asymmetric.encode_unit(np.float32(1), 2)


# --- what has no bias without signs ---------------------------------------------------------------------------------------


def test_a_scale_that_keeps_inner_products_has_no_bias_over_rotations_and_varies_less() -> None:
    """What is read back is x and a part across it, in a direction that random rotations make uniform: docs/lab/0020-qjl.md."""
    q, x = vectors(64)
    rotations = [qjl.projection(64, orthogonal=True, seed=seed).matrix / 8 for seed in range(SEEDS)]
    turned = np.stack([r @ x for r in rotations])
    found = {}
    for scale in codec.Scale:
        read = codec.round_trip("turbo3", turned, scale=scale)
        found[scale] = np.einsum("ni,nij,j->n", read, np.stack(rotations), q)
    errors = found[codec.Scale.INNER_PRODUCT] - q @ x
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(SEEDS) + 2**-11 * abs(q @ x)
    shrunk = found[codec.Scale.LEAST_SQUARES] - q @ x
    assert shrunk.mean() < -8 * shrunk.std() / np.sqrt(SEEDS), "the smallest error has a bias"
    rest = x - asymmetric.decode_unit(asymmetric.encode_unit(x, 2), 2)
    for orthogonal, times in ((False, 4), (True, 1.5)):  # at the same bits
        assert errors.var() < float(qjl.variance(qjl.projection(64, orthogonal=orthogonal), q, rest)) / times


def test_orthogonal_signs_are_a_codebook_of_one_bit() -> None:
    """Of rotated vectors, with the factor that keeps inner products on average."""
    p = qjl.projection(64, orthogonal=True)
    x = np.random.default_rng(7).standard_normal((50, 64))
    book = asymmetric.decode_unit(asymmetric.encode_unit(x @ p.matrix.T / 8, 1), 1) @ p.matrix / 8
    kept = 1 - codec.lloyd_max(1, 64).error
    np.testing.assert_allclose(qjl.decode(p, qjl.encode(p, x)), book / kept, rtol=1e-3, atol=1e-3)
    assert p.factor**2 - 1 == pytest.approx(codec.rescaled(1 - kept, codec.Scale.INNER_PRODUCT))
