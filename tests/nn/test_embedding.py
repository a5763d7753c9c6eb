"""Tables: the rows asked for, NaN for what is none, and the gradient's sums."""

import jax
import numpy as np
import pytest
from oracles.compiling import quick_jit

from ctx_jax.nn.embedding import Embedding
from ctx_jax.nn.parameters import Bound

BOUND = Bound(lambda rngs: Embedding(5, 3, stddev=1.0, rngs=rngs))
TABLE = np.arange(15, dtype=np.float32).reshape(5, 3)


def plain(table, ids):
    return BOUND({"table": table})(ids)


look_up = quick_jit(plain)


def test_rows():
    ids = np.array([[0, 4], [2, 2]], np.int32)
    np.testing.assert_array_equal(look_up(TABLE, ids), TABLE[ids])


@pytest.mark.parametrize("wrong", [5, 6, 2**31 - 1, -1, -5, -6])
def test_an_id_outside_the_table_cannot_pass_unseen(wrong):
    vectors = np.asarray(look_up(TABLE, np.array([1, wrong, 3], np.int32)))
    np.testing.assert_array_equal(vectors[[0, 2]], TABLE[[1, 3]])
    assert np.isnan(vectors[1]).all()


def test_gradients_of_repeated_ids_add_up():
    ids = np.array([[1, 1, 4], [1, 0, 4]], np.int32)
    gradient = quick_jit(jax.grad(lambda table: plain(table, ids).sum()))(TABLE)
    np.testing.assert_array_equal(gradient, np.repeat([[1], [3], [0], [0], [2]], 3, axis=1))
