"""Loaders as people have them: labels beside the inputs, dicts, BatchEncoding, augmentation, arrays, channels last."""

import functools
import io
import itertools
import logging
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from klquant.backends import batches
from klquant.backends.torch import Quantizer, quantize
from klquant.backends.torch.model.arguments import arguments_of, describe
from klquant.errors import CalibrationWarning, InvalidInputError, ModelError
from support.networks import batch, ready

pytestmark = pytest.mark.filterwarnings("ignore:layers? `:klquant.errors.CalibrationWarning")
IMAGES = batch(12, 3, 8, 8, dtype=torch.float32)
LABELS, MASKS = torch.arange(12), torch.zeros(12, 8, 8).long()
Sample = namedtuple("Sample", "image label")
OPTIONS = {"num_bins": 401}


def network():
    return ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), dtype=torch.float32)


class WithMask(nn.Module):
    """Takes an optional mask, as vision transformers do."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x, attn_mask=None):
        return self.inner(x if attn_mask is None else x * attn_mask)


class WithFlag(WithMask):
    """Takes an optional flag."""

    def forward(self, x, return_features=False):
        return self.inner(x) if not return_features else x


class WithNumber(WithMask):
    """Takes an optional number."""

    def forward(self, x, scale=1.0):
        return self.inner(x * scale)


def thresholds(model, data, **options):
    return {name: one.threshold for name, one in quantize(model, data, **OPTIONS, **options).thresholds.items()}


class Dicts(Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, k):
        return {"label": int(LABELS[k]), "path": f"{k}.png", "image": IMAGES[k]}


WITH_LABELS = {
    "a tensor": [IMAGES],
    "pairs of a loader": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5),
    "pairs": [(IMAGES, LABELS)],
    "one-hot labels": [(IMAGES, torch.eye(12))],
    "masks": [(IMAGES, MASKS)],
    "a named tuple": [Sample(IMAGES, LABELS)],
    "three items": [(IMAGES, LABELS, ["a.png"] * 12)],
    "a dict of one": [{"image": IMAGES}],
    "dicts of a loader": DataLoader(Dicts(), batch_size=7),
}


OPTIONAL_ARGUMENTS = (WithMask(), WithFlag(), WithNumber())
OPTIONAL = ["pairs", "pairs of a loader", "dicts of a loader"]
CASES = [(nn.Sequential(network()), case) for case in WITH_LABELS]


@pytest.mark.parametrize(("model", "case"), CASES + [(m, case) for m in OPTIONAL_ARGUMENTS for case in OPTIONAL])
def test_labels_beside_the_inputs_are_left_out(model, case):
    alone = thresholds(model.eval(), [IMAGES], forward=lambda model, batch: model(batch))
    assert thresholds(model, WITH_LABELS[case]) == alone


@pytest.mark.parametrize("case", ["masks", "one-hot labels"])
def test_what_may_be_an_optional_input_is_passed_and_the_error_has_the_line_to_write(case):
    with pytest.raises(ModelError, match=r"; pass forward=lambda model, batch: model\(batch\[0\]\)$"):
        thresholds(WithMask().eval(), WITH_LABELS[case])


def test_what_is_left_out_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="klquant"):
        thresholds(network(), [(IMAGES, LABELS)] * 3)
    (message,) = [record.message for record in caplog.records if "left out" in record.message]
    assert message == "(Tensor[12,3,8,8], Tensor[12]): the model does not take item 1, which is left out"


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()


def tokens(*lengths):
    return [torch.randint(0, 50, (3, n), generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.mark.parametrize("kind", ["dict", "BatchEncoding", "(inputs, labels)"])
def test_what_tokenizers_return_is_passed_by_name(kind):
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens(4, 7)]
    kinds = {"dict": dict, "BatchEncoding": pytest.importorskip("transformers").BatchEncoding}
    given = [kinds[kind](one) if kind in kinds else (one, LABELS[:3]) for one in data]
    model = bert()
    alone = thresholds(model, data, forward=lambda model, batch: model(**batch))
    assert thresholds(model, given) == alone


def test_entries_that_the_model_does_not_name_are_left_out():
    def run(input_ids, attention_mask=None, *, scale=1):
        pass

    ids = tokens(4)[0]
    found = arguments_of(run, {"input_ids": ids, "labels": LABELS, "scale": 2, "text": "a"})
    assert found == ((), {"input_ids": ids, "scale": 2}, ("`labels`", "`text`"))
    without_ids = {"attention_mask": ids, "labels": LABELS}
    assert arguments_of(run, without_ids) == ((), without_ids, ())
    assert arguments_of(lambda **entries: None, without_ids).kwargs == without_ids


def test_several_inputs_may_have_a_label_behind_them():
    def run(left, right):
        pass

    assert arguments_of(run, (IMAGES, IMAGES, LABELS)).args == (IMAGES, IMAGES)
    assert len(arguments_of(run, (IMAGES, LABELS, LABELS)).args) == 3  # it is not clear what is the label
    assert len(arguments_of(lambda x: None, (LABELS, IMAGES)).args) == 2
    assert len(arguments_of(lambda *items: None, (IMAGES, LABELS)).args) == 2


def test_a_mask_that_is_one_is_passed():
    def run(x, attn_mask=None):
        pass

    assert arguments_of(run, (IMAGES, MASKS)).args == (IMAGES, MASKS)


@dataclass
class Record:
    label: torch.Tensor
    image: torch.Tensor


TOLD = {
    "two images": ((IMAGES, IMAGES), r"batches are \(Tensor\[12,3,8,8\], Tensor\[12,3,8,8\]\); ", "model(batch[0])"),
    "the label first": ((LABELS, IMAGES), r"batches are \(Tensor\[12\], Tensor", "model(batch[1])"),
    "a mask beside the image": (
        {"label": LABELS, "image": IMAGES, "mask": IMAGES[:, :1]},
        "batches are {'label'",
        "model(batch['image'])",
    ),
    "a dataclass": (Record(LABELS, IMAGES), "batches are Record", "model(batch.image)"),
    "one sample": ((IMAGES[0], 1), "no batch dimension", "model(batch[0][None])"),
    "a dict of two": ({"a": IMAGES, "b": IMAGES}, r"batches are {'a': Tensor", "model(batch['a'])"),
    "bytes": ((IMAGES * 50).byte(), r"\(uint8\); ", "model(batch.float() / 255)"),
    "bytes with labels": (((IMAGES * 50).byte(), LABELS), r"\(uint8\); ", "model(batch[0].float() / 255)"),
    "channels last": (IMAGES.permute(0, 2, 3, 1), "NHWC", "model(batch.permute(0, 3, 1, 2))"),
    "NumPy": (IMAGES.numpy(), "NumPy arrays", "model(torch.from_numpy(batch))"),
    "float64": (
        IMAGES.double(),
        "torch.float64, where the weights are torch.float32",
        "model(batch.to(torch.float32))",
    ),
    "all of them": (
        {"image": (IMAGES * 50).byte().permute(0, 2, 3, 1).numpy(), "label": LABELS},
        r"NumPy arrays, channels last, NHWC, uint8",
        "model(torch.from_numpy(batch['image']).permute(0, 3, 1, 2).float() / 255)",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_the_error_has_the_line_to_write(case):
    data, what, line = TOLD[case]
    with pytest.raises(ModelError, match=what) as caught:
        thresholds(network(), [data])
    message = str(caught.value)
    assert message.endswith(f"; pass forward=lambda model, batch: {line}")
    forward = eval(f"lambda model, batch: {line}", {"torch": torch})  # noqa: S307
    assert thresholds(network(), [data], forward=forward)


class Takes(nn.Module):
    """Takes its arguments in a form of its own."""

    def __init__(self, run):
        super().__init__()
        self.inner, self.run = network(), run
        self.forward = functools.partial(run, self.inner)


def two(net, a, b, bias=None):
    return net(a + b) if bias is None else net(a + b) + bias


CALLS = {
    "a dict": (lambda net, batch: net(batch["image"]), {"image": IMAGES, "label": LABELS}, "model(batch)"),
    "a list": (lambda net, images: [net(x[None]) for x in images], list(IMAGES[:3]), "model(batch)"),
    "a list of a pair": (lambda net, images: [net(x[None]) for x in images], (list(IMAGES), [{}]), "model(batch[0])"),
    "an optional argument": (two, (IMAGES, IMAGES, LABELS), "model(batch[0], batch[1])"),
    "a pair of a pair": (two, ((IMAGES, IMAGES), LABELS), "model(batch[0][0], batch[0][1])"),
    "a dict of a pair": (two, ({"a": IMAGES, "b": IMAGES, "c": 1}, LABELS), "model(a=batch[0]['a'], b=batch[0]['b'])"),
}


@pytest.mark.parametrize("case", CALLS)
def test_the_line_to_write_is_a_call_that_uses_as_much_as_the_model_takes(case):
    run, data, line = CALLS[case]
    with pytest.raises(ModelError) as caught:
        thresholds(Takes(run).eval(), [data])
    assert str(caught.value).endswith(f"; pass forward=lambda model, batch: {line}")


def test_a_batch_that_is_none_is_refused():
    with pytest.raises(InvalidInputError, match=r"batch 0: expected what the model takes, .*, got None"):
        thresholds(network(), [None])


def test_no_line_is_told_that_does_not_work():
    with pytest.raises(ModelError, match=r"batches are \[str, str\]; pass forward=lambda model, batch: \.\.\.$"):
        thresholds(network(), [["a", "b"]])


def test_where_the_model_is_matters():
    from klquant.backends.torch.model.advice import advice

    elsewhere = network().to("meta")
    expected = " (on cpu, where the model is on meta); pass forward=lambda model, batch: model(batch.to('meta'))"
    assert advice(elsewhere, IMAGES, is_call=False).endswith(expected)
    assert advice(network(), IMAGES, is_call=False) == ""


def test_batches_are_described_in_short():
    assert describe({"a": [1, "b"], "c": np.zeros((2, 3))}) == "{'a': [int, str], 'c': ndarray[2,3]}"
    assert describe(("x",) * 9) == f"({'str, ' * 8}...)"


# Data that differ between the passes


class Drifting:
    """Scales the images by another factor each time, as an augmentation may: for the first look and both passes."""

    def __init__(self, *factors):
        self._factors = iter(factors)

    def __iter__(self):
        return iter([next(self._factors) * IMAGES])


CAUSES = r"the data differ between the passes \(random augmentation.*seed.*passes=1"


def test_larger_values_in_the_second_pass_are_refused_with_the_cause():
    with pytest.raises(InvalidInputError, match=rf"got a value of .*; {CAUSES}"):
        thresholds(network(), Drifting(1, 1, 1.2), keep_bytes=0)


def test_smaller_values_in_the_second_pass_are_warned_of_with_the_cause():
    with pytest.warns(CalibrationWarning, match=rf"tensor `0` had amax = .*, got .* in pass 2.*; {CAUSES}"):
        thresholds(network(), Drifting(1, 1, 0.8), keep_bytes=0)


def test_the_rounding_of_kernels_is_no_difference():
    below, above = (thresholds(network(), Drifting(1, 1, factor), keep_bytes=0) for factor in (0.9999, 1.0001))
    assert below.keys() == above.keys()


# Some of the data


def test_only_the_first_batches_are_used():
    data = list(IMAGES.split(2))
    expected = quantize(network(), data[:3], **OPTIONS)
    for given in (data, DataLoader(IMAGES, batch_size=2)):
        result = quantize(network(), given, num_batches=3, criterion="auto", **OPTIONS)
        assert result.calibration.num_batches == 3
        assert result.calibration.amax == expected.calibration.amax
    streamed = iter(data)
    assert quantize(network(), streamed, num_batches=3, passes=1, **OPTIONS).calibration.num_batches == 3
    assert len(list(streamed)) == 3
    with pytest.raises(InvalidInputError, match="`num_batches` must be 1 or more, got 0"):
        quantize(network(), data, num_batches=0)


def test_islice_is_refused_with_the_option_in_its_place():
    with pytest.raises(InvalidInputError, match="one-shot islice; pass the data themselves and num_batches="):
        quantize(network(), itertools.islice(DataLoader(IMAGES), 3))


def test_bars_are_on_by_default_also_for_the_choice_of_criteria_and_the_diagnosis(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(batches, "Console", lambda **_: Console(file=file, force_terminal=True, force_jupyter=False))
    quantizer = Quantizer(network(), **OPTIONS)
    quantizer.fold(IMAGES)
    quantizer.quantize_weights()
    quantizer.collect_amax([IMAGES])
    quantizer.collect_histograms([IMAGES])
    quantizer.search_thresholds(criterion="auto", batches=[IMAGES])
    quantizer.diagnose([IMAGES])
    written = file.getvalue()
    assert all(name in written for name in ("pass 1", "pass 2", "choice of criteria", "diagnosis"))
    before = len(written)
    quantize(network(), [IMAGES], progress=False, **OPTIONS)
    assert len(file.getvalue()) == before
