"""The record of a threshold, or of a batch of them."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

import klquant
from support.cases import even_edges
from support.namespaces import JAX, NUMPY, enable_x64, needs_jax

HISTS, EDGES = np.random.default_rng(0).integers(1, 99, (2, 3, 13)), even_edges(13)


def search(library, hists):
    return klquant.optimal_threshold(library.asarray(hists), library.asarray(EDGES), num_quantized_bins=5)


def test_a_batch_is_indexed_like_its_arrays(eager):
    batch = search(eager, HISTS)
    assert len(batch) == 2
    assert batch[1] == search(eager, HISTS[1])
    assert batch[1, 2] == batch[1][2] == search(eager, HISTS[1, 2])
    assert batch[0, :2] == search(eager, HISTS[0, :2])
    assert batch[..., -1] == search(eager, HISTS[:, -1])
    assert eager.owns(*vars(batch[1]).values())


def test_a_batch_iterates_over_its_histograms(eager):
    batch = search(eager, HISTS[0])
    assert list(batch) == [search(eager, hist) for hist in HISTS[0]]
    assert [float(threshold) for threshold in batch] == np.asarray(batch.value).tolist()
    first, *others = batch
    assert (first, len(others)) == (batch[0], 2)


def test_a_single_threshold_is_no_batch(eager):
    alone = search(eager, HISTS[0, 0])
    assert alone
    for use in (len, list, lambda threshold: threshold[0]):
        with pytest.raises(TypeError, match="this Threshold belongs to one histogram"):
            use(alone)


def test_records_are_equal_if_all_fields_are():
    batch = search(NUMPY, HISTS)
    assert batch == search(NUMPY, HISTS)
    assert batch != search(NUMPY, HISTS[:, ::-1])
    assert batch != batch[0]
    assert batch != "T"
    widest = klquant.max_threshold(HISTS[0, 0], EDGES, num_quantized_bins=5)
    assert widest == klquant.max_threshold(HISTS[0, 0], EDGES, num_quantized_bins=5)  # divergence is NaN
    for copied in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):  # noqa: S301
        assert copied == batch
    with pytest.raises(AttributeError):
        batch.value = 1


def test_the_repr_is_short(eager):
    found = [np.float32(3.5), np.int32(2), 0.00468312, 0.000131, 34.81234]
    one = klquant.Threshold(*map(eager.asarray, found))
    assert repr(one) == "Threshold(value=3.5, index=2, divergence=0.004683, clipped=0.0131%, sqnr_db=34.8)"
    none = klquant.Threshold(*map(eager.asarray, [3.5, -1, np.nan, 0.0, np.inf]))
    assert repr(none) == "Threshold(value=3.5, clipped=0.0000%, sqnr_db=inf)"
    many = klquant.Threshold(*(eager.asarray([value, 2 * value]) for value in found))
    assert repr(many) == "Threshold(batch of shape (2,), value=3.5 .. 7)"


@needs_jax
def test_jax_knows_the_record():
    import jax

    batch = search(JAX, HISTS)
    with enable_x64():
        doubled = jax.tree.map(lambda field: field + field, batch)
        assert isinstance(doubled, klquant.Threshold)
        assert (doubled.value == 2 * batch.value).all()
        values = jax.jit(lambda found: [one[1].value for one in found])(batch)
        assert [float(value) for value in values] == batch.value[:, 1].tolist()
        shapes = jax.eval_shape(lambda found: found, batch)
    assert repr(shapes).startswith("Threshold(value=ShapeDtypeStruct")
    assert jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(batch)[1][0]) == ".index"


@needs_jax
def test_jax_may_be_imported_later():
    code = """
import numpy as np, klquant
found = klquant.max_threshold(np.ones(3, int), np.array([-3.0, -1, 1, 3]))
import jax
klquant.max_threshold(np.ones(3, int), np.array([-3.0, -1, 1, 3]))
assert len(jax.tree.leaves(found)) == len(vars(found))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
