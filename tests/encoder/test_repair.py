"""Repairs do what they say to the vectors that they were fitted on, in jit and out, and come back from their file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctx_jax import InputError
from ctx_jax.encoder import vectors as vectors_module
from ctx_jax.encoder.repair import FITS, all_but_the_top, apply, centre, whiten, zca
from ctx_jax.encoder.vectors import moments
from ctx_jax.interop.files.npz_file import write_npz
from ctx_jax.interop.pretrained import KINDS, REPAIRS, Repair, load_repairs, save_repairs


def skewed(count=400, width=12, seed=0):
    rng = np.random.default_rng(seed)
    scales = np.geomspace(8, 0.5, width)
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
    return ((rng.standard_normal((count, width)) * scales) @ turn + rng.uniform(-20, 20, width)).astype(np.float32)


def repaired(repair, x):
    return np.asarray(apply(repair, jnp.asarray(x)), np.float64)


def test_moments_are_numpys_block_by_block(monkeypatch):
    x = skewed() + np.float32(1000)
    monkeypatch.setattr(vectors_module, "_BLOCK", 12 * 7)
    found = moments(x)
    np.testing.assert_allclose(found.mean, x.mean(0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64), rowvar=False, bias=True), rtol=1e-10)
    np.testing.assert_allclose(found.spectrum(), np.linalg.eigvalsh(found.covariance)[::-1], rtol=1e-12)


def test_centre():
    x = skewed()
    np.testing.assert_allclose(repaired(centre(x), x), x - x.mean(0, dtype=np.float64), atol=1e-5)


@pytest.mark.parametrize("d", [1, 3])
def test_all_but_the_top_is_an_explicit_projection(d):
    x = skewed().astype(np.float64)
    centred = x - x.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:d]
    expected = centred - sum(np.outer(centred @ axis, axis) for axis in axes)
    np.testing.assert_allclose(repaired(all_but_the_top(x, d), x.astype(np.float32)), expected, atol=2e-5)


def test_all_but_the_top_takes_a_direction_for_each_hundred_dimensions():
    rng = np.random.default_rng(1)
    for width, expected in [(20, 1), (160, 2)]:
        repair = all_but_the_top(rng.standard_normal((200, width)))
        assert np.linalg.matrix_rank(np.asarray(repair.matrix), tol=1e-3) == width - expected


@pytest.mark.parametrize("k", [None, 12, 5])
def test_whitened_vectors_have_the_identity_as_covariance(k):
    x = skewed()
    found = repaired(whiten(x, k), x)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(found, rowvar=False, bias=True), np.eye(k or 12), atol=1e-4)


def test_whitening_is_scikit_learns_but_for_signs():
    pca = pytest.importorskip("sklearn.decomposition").PCA
    x = skewed()
    theirs = pca(n_components=4, whiten=True, svd_solver="full").fit_transform(x.astype(np.float64))
    # Theirs divides by N - 1.
    theirs *= np.sqrt(len(x) / (len(x) - 1))
    np.testing.assert_allclose(np.abs(repaired(whiten(x, 4), x)), np.abs(theirs), atol=1e-4)


def test_zca_whitens_and_turns_nothing():
    x = skewed()
    repair = zca(x, eps=1e-9)
    np.testing.assert_allclose(np.cov(repaired(repair, x), rowvar=False, bias=True), np.eye(12), atol=1e-4)
    np.testing.assert_allclose(repair.matrix, np.asarray(repair.matrix).T, atol=1e-7)
    values, axes = np.linalg.eigh(np.cov(x.astype(np.float64), rowvar=False, bias=True))
    expected = axes / np.sqrt(values + 0.5 * values[-1]) @ axes.T
    np.testing.assert_allclose(zca(x, eps=0.5).matrix, expected, atol=1e-6)


def test_vectors_of_a_plane_are_whitened_in_the_plane():
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((50, 2)) @ rng.standard_normal((2, 9)) + 5).astype(np.float32)
    assert whiten(x).matrix.shape == (9, 2)
    with pytest.raises(InputError, match="k: found 3, expected 1 or more and at most the 2"):
        whiten(x, 3)
    with pytest.raises(InputError, match="d: found 2, expected 1 or more and fewer than the 2"):
        all_but_the_top(x, 2)


def test_a_point_cannot_be_whitened():
    x = np.full((10, 4), 0.1, np.float32)
    np.testing.assert_array_equal(repaired(centre(x), x), 0)
    for fit in (whiten, zca, all_but_the_top):
        for vectors in (x, x[:1]):
            with pytest.raises(InputError):
                fit(vectors)


@pytest.mark.parametrize("fit", [centre, whiten, zca, all_but_the_top])
def test_vectors_that_are_none(fit):
    with pytest.raises(InputError, match=r"found shape \[0, 4\]"):
        fit(np.zeros((0, 4)))
    with pytest.raises(InputError, match="NaN or infinity"):
        fit(np.array([[1, np.nan], [0, 1]]))


def test_eps_is_above_zero():
    with pytest.raises(InputError, match="eps: found 0"):
        zca(skewed(), eps=0)


@pytest.mark.parametrize("fit", [centre, whiten, zca, all_but_the_top])
def test_inside_jit_as_an_argument_over_any_batch(fit):
    x, repair = skewed(), fit(skewed())
    batch = jnp.asarray(x.reshape(4, 100, 12))
    found = jax.jit(apply)(repair, batch)
    np.testing.assert_allclose(np.asarray(found).reshape(400, -1), repaired(repair, x), rtol=1e-5, atol=1e-5)
    assert apply(repair, batch.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_they_come_back_from_their_file(tmp_path):
    x = skewed()
    repairs = {12: {"zca": zca(x), "whiten": whiten(x, 5)}, 0: {kind: fit(x) for kind, fit in FITS.items()}}
    save_repairs(tmp_path / REPAIRS, repairs)
    found = load_repairs(tmp_path / REPAIRS, 12, 12)
    assert list(found) == [0, 12]
    for layer, kinds in repairs.items():
        assert found[layer].keys() == kinds.keys()
        for kind, repair in kinds.items():
            assert found[layer][kind].kind == kind
            np.testing.assert_array_equal(repaired(found[layer][kind], x), repaired(repair, x))
    assert found[0].keys() == set(KINDS)


ONE = np.ones(3, np.float32)
TWO = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"last/zca/mean": ONE}, "array 'last/zca/mean': expected a name like"),
        ({"1/zca/bias": ONE}, "array '1/zca/bias': expected a name like"),
        ({"1/zka/mean": ONE}, r"found kind 'zka'.*did you mean 'zca'"),
        ({"1/zca/mean": TWO}, r"found shape \[3, 2\], expected \[3\]"),
        ({"1/zca/mean": np.ones(4, np.float32)}, r"found shape \[4\], expected \[3\]"),
        ({"1/zca/mean": ONE, "1/zca/matrix": TWO.T}, r"found shape \[2, 3\], expected \[3, K\]"),
        ({"1/zca/mean": ONE.astype(np.float64)}, "found float64, expected float32"),
        ({"1/zca/mean": ONE * np.nan}, "array '1/zca/mean': found NaN"),
        ({"1/zca/mean": ONE}, "layer 1: zca: found mean, expected matrix, mean"),
        ({"1/centre/mean": ONE, "1/centre/matrix": TWO}, "layer 1: centre: found matrix, mean, expected mean"),
        ({"1/centre/mean": ONE, "1/zca/matrix": TWO}, "layer 1: zca: found matrix, expected matrix, mean"),
        ({"1/centre/mean": ONE, "01/centre/mean": ONE}, "found layer 1 under two numbers"),
        ({"3/centre/mean": ONE}, "found layer 3, expected 0 to 2"),
        ({"9" * 5000 + "/centre/mean": ONE}, "found layer 999999999, expected 0 to 2"),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, message):
    write_npz(tmp_path / REPAIRS, arrays)
    with pytest.raises(InputError, match=message) as caught:
        load_repairs(tmp_path / REPAIRS, 3, 2)
    assert REPAIRS in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=REPAIRS):
        load_repairs(tmp_path / REPAIRS, 3, 2)


def test_a_repair_is_a_tree_of_arrays():
    repair = Repair("centre", np.zeros(2, np.float32), None)
    assert len(jax.tree.leaves(repair)) == 1
