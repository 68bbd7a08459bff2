"""Numbers and thresholds as text, and values as JSON can hold them."""

import json
import math

import numpy as np

from klquant.backends.text import THRESHOLD_COLUMNS, number, percent, ratio, threshold_cells, without_nan
from klquant.backends.thresholds import LayerThreshold

DASH = "\N{EN DASH}"
ZERO = LayerThreshold(0.0, 127.0, math.nan, math.nan, math.inf, "none")


def test_numbers_for_people():
    numbers = (1.23456, math.nan, math.inf, -math.inf, np.float32(2), None)
    assert [number(value) for value in numbers] == ["1.235", DASH, "∞", "-∞", "2", DASH]
    assert [number(value, ".1f", "") for value in (2.25, math.nan, None)] == ["2.2", "", ""]


def test_shares_in_percent():
    shares = (0.0, 1.0, 1.2345e-7, math.nan, None)
    assert [percent(share) for share in shares] == ["0%", "100%", "1.23e-05%", DASH, DASH]
    assert percent(math.nan, "") == ""


def test_a_threshold_has_a_cell_for_every_column():
    cells = threshold_cells(LayerThreshold(4.0, 3.0, 0.01234, 0.00012345, 38.06))
    assert list(cells) == list(THRESHOLD_COLUMNS)
    assert list(cells.values()) == ["entropy", "4", "3", "0.750", "0.0123%", "0.0123", "38.1"]
    assert list(threshold_cells(ZERO).values()) == ["none", "0", "127", DASH, DASH, DASH, "∞"]
    assert list(threshold_cells(ZERO, missing="").values()) == ["none", "0", "127", "", "", "", "∞"]


def test_a_tensor_of_zeros_has_no_ratio():
    assert ratio(LayerThreshold(4.0, 3.0, 0.0, 0.0)) == 0.75
    assert math.isnan(ratio(ZERO))


def test_json_has_null_for_nan_and_infinity():
    value = {"a": [1, math.nan, (math.inf, "nan", None, True)], 3: ZERO}
    plain = without_nan(value)
    fields = {**ZERO._asdict(), "divergence": None, "clipped": None, "sqnr_db": None}
    assert plain == {"a": [1, None, [None, "nan", None, True]], "3": fields}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
