"""What becomes of a result: copied, saved, moved, compiled, differentiated, fine-tuned."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from klquant.backends.torch import export_onnx, fake_quantize, freeze_weights, quantize, requantize, unfreeze_weights
from klquant.demo.digits import load_images
from klquant.errors import CalibrationWarning, InvalidInputError
from support import digits_networks
from support.networks import Net, batch, is_same, mlp, outputs, ready

pytestmark = pytest.mark.filterwarnings("ignore::klquant.errors.CalibrationWarning")
IMAGES = batch(8, 3, 8, 8, dtype=torch.float32)


def network():
    """Return a network with ReLU in place, behind which a folded ReLU stays."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5)
    return ready(nn.Sequential(*layers), dtype=torch.float32)


def result(**options):
    return quantize(network(), [IMAGES], num_bins=401, **options)


def loaded(content, **options):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, **options)


def by_state(model):
    """Return the simulation of a calibration alone, with the state of another one."""
    other = requantize(network(), result(criterion="max").calibration).model
    assert not is_same(outputs(other, IMAGES), outputs(model, IMAGES))
    other.load_state_dict(loaded(model.state_dict(), weights_only=True))
    return other


SURVIVES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301
    "torch.save": lambda model: loaded(model, weights_only=False),
    "state_dict": by_state,
    "to": lambda model: copy.deepcopy(model).to("cpu", torch.float64).to(torch.float32),
    "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "export": lambda model: torch.export.export(model, (IMAGES,)).module(),
}


@pytest.mark.parametrize("how", SURVIVES)
def test_a_result_survives(how):
    model = result().model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export
        again = SURVIVES[how](model)
    assert is_same(outputs(again, IMAGES), outputs(model, IMAGES))


def test_a_copied_or_saved_result_does_not_contain_the_data():
    found = quantize(network(), [IMAGES], num_bins=401, forward=lambda model, batch: model(batch))
    assert found.source.batches == [IMAGES]
    assert copy.deepcopy(found).source is found.source
    kept = found._replace(histograms={}, thresholds={})
    assert pickle.loads(pickle.dumps(kept)).source.batches is None  # noqa: S301


def test_a_layer_with_its_own_copy_is_copied_with_its_wrapper():
    class Layer(nn.Linear):
        def __deepcopy__(self, memo):
            again = type(self)(4, 4)
            again.load_state_dict(self.state_dict())
            return again.eval()

    model = ready(nn.Sequential(Layer(4, 4), nn.Linear(4, 4)), dtype=torch.float32)
    model[0].__class__ = nn.Linear
    model = quantize(model, [IMAGES.reshape(-1, 4)], num_bins=401).model
    model[0].layer.__class__ = Layer
    assert type(copy.deepcopy(model)[0]) is type(model[0])


# Gradients


def test_nothing_in_a_result_requires_a_gradient():
    model = result().model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(IMAGES).grad_fn is None
    with torch.inference_mode():
        found = result().model
    assert is_same(found(IMAGES), model(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_of_rounding_is_that_of_an_identity_where_nothing_is_clipped(dtype):
    x = torch.tensor([-9.0, -1.27, -0.3, 0.0, 0.004, 0.7, 1.27, 5, torch.inf]).to(dtype).requires_grad_()
    rounded = fake_quantize(x, torch.tensor(0.01))
    assert is_same(rounded.detach().float(), fake_quantize(x.detach(), torch.tensor(0.01)).float())
    rounded.sum().backward()
    inside = (x.detach().abs() <= 1.27).to(dtype)
    assert x.grad[1:-3].tolist() == inside[1:-3].tolist()
    assert x.grad[[0, -2, -1]].tolist() == [0, 0, 0]


def test_gradients_reach_the_input_and_all_layers():
    given = IMAGES.clone().requires_grad_()
    model = unfreeze_weights(result().model)
    model(given).square().sum().backward()
    assert given.grad.count_nonzero() > 0.5 * given.numel()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


# Fine-tuning


def test_an_unfrozen_model_computes_the_same_and_a_frozen_one_too():
    model = result().model
    student = unfreeze_weights(model)
    assert is_same(outputs(student, IMAGES), outputs(model, IMAGES))
    assert is_same(outputs(freeze_weights(student), IMAGES), outputs(model, IMAGES))
    assert {*freeze_weights(student).state_dict()} == {*model.state_dict()}
    assert [type(one) for one in freeze_weights(student).modules()] == [type(one) for one in model.modules()]


def test_a_fine_tuned_model_is_frozen_and_exported():
    student = unfreeze_weights(result().model)
    train(student, IMAGES, torch.arange(8) % 5, epochs=3)
    tuned = freeze_weights(student)
    assert is_same(outputs(tuned, IMAGES), outputs(student, IMAGES))
    assert not is_same(outputs(tuned, IMAGES), outputs(result().model, IMAGES))
    codes = tuned[4].layer.weight / tuned[4].layer.weight.abs().amax(1, keepdim=True) * 127
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert not export_onnx(tuned, IMAGES).skipped
    student.load_state_dict(loaded(student.state_dict(), weights_only=True))


def train(model, images, labels, *, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize(("bits", "criterion", "before", "gain"), [(4, "max", 0.97, 0.005), (3, "mse", 0.6, 0.25)])
def test_fine_tuning_on_the_digits_raises_the_accuracy(bits, criterion, before, gain):
    digits = load_images()
    data = digits.train_images[:512].split(64)
    found = quantize(digits_networks.load("MobileNetV2"), data, num_bits=bits, criterion=criterion)
    student = unfreeze_weights(found.model)
    train(student, digits.train_images, digits.train_labels, epochs=1)
    first, second = (
        float((outputs(model, digits.test_images).argmax(1) == digits.test_labels).double().mean())
        for model in (found.model, freeze_weights(student))
    )
    assert first < before
    assert second >= first + gain


def test_what_cannot_be_unfrozen_is_named():
    with pytest.raises(InvalidInputError, match="without quantized layers"):
        unfreeze_weights(mlp())
    student = unfreeze_weights(result().model)
    with pytest.raises(InvalidInputError, match="layer `0`, which can be trained already"):
        unfreeze_weights(student)


# The result itself is exported


def residual():
    def run(net, x):
        return net.last(torch.relu(net.first(x) + x))

    return ready(Net(run, first=nn.Conv2d(3, 3, 3, padding=1), last=nn.Conv2d(3, 3, 1)), dtype=torch.float32)


def rounded_inputs(exported, kind):
    """Return how many inputs of the nodes of a kind are dequantized."""
    nodes = exported.model.graph.node
    made = {node.output[0]: node.op_type for node in nodes}
    found = ([made.get(name) for name in node.input] for node in nodes if node.op_type == kind)
    return [kinds.count("DequantizeLinear") for kinds in found]


def test_residual_sums_are_quantized_from_the_data_of_the_calibration():
    found = quantize(residual(), [IMAGES, 2 * IMAGES], num_bins=401)
    assert rounded_inputs(export_onnx(found.model, IMAGES), "Add") == [0]
    by_default = export_onnx(found, IMAGES)
    given = export_onnx(found.model, IMAGES, batches=[IMAGES, 2 * IMAGES])
    assert rounded_inputs(by_default, "Add") == rounded_inputs(given, "Add") == [1]  # the other one stays joined
    assert by_default.thresholds == given.thresholds
    again = requantize(residual(), found.calibration)
    assert rounded_inputs(export_onnx(again, IMAGES), "Add") == [0]


def test_the_forward_of_the_calibration_is_used_for_export():
    data = [{"picture": (IMAGES * 50).byte(), "label": torch.zeros(8)}]

    def forward(model, batch):
        return model(batch["picture"].float() / 255).argmax(1)

    found = quantize(residual(), data, num_bins=401, forward=forward)
    exported = export_onnx(found, data[0])
    assert [value.name for value in exported.model.graph.input] == ["input"]
    assert rounded_inputs(exported, "Add") == [1]
    alone = export_onnx(found.model, data[0], forward=forward, batches=data)
    assert alone.thresholds == exported.thresholds
    again = requantize(residual(), found.calibration, forward=forward)
    assert export_onnx(again, data[0]).thresholds.items() <= exported.thresholds.items()
    with pytest.raises(InvalidInputError, match="`forward` must call the model itself"):
        export_onnx(found, data[0], forward=lambda model, batch: batch)


def test_kept_batches_of_another_size_than_a_fixed_one_are_left_out():
    net = Net(lambda net, x: net.last(torch.relu(net.first(x) + x).reshape(8, -1, 8, 8)), **residual()._modules).eval()
    found = quantize(net, [IMAGES, IMAGES[:5].repeat(1, 1, 1, 1)][:1], num_bins=401)
    found = found._replace(source=type(found.source)(found.source.forward, [IMAGES[:5], IMAGES]))
    with pytest.warns(CalibrationWarning, match="the batch size is fixed"):
        exported = export_onnx(found, IMAGES)
    assert rounded_inputs(exported, "Add") == [1]


class Pretrained(nn.Sequential):
    """A model with the methods of transformers."""

    def save_pretrained(self, folder):
        return folder


@pytest.mark.parametrize("inside", [False, True])
def test_a_simulation_is_not_saved_as_a_pretrained_model_but_its_float_model_is(inside):
    pretrained = Pretrained(*network()).eval()
    model = nn.Sequential(pretrained).eval() if inside else pretrained
    simulated = quantize(model, [IMAGES], num_bins=401).model
    with pytest.raises(InvalidInputError, match=r"requantize the float model"):
        copy.deepcopy(simulated[0] if inside else simulated).save_pretrained("folder")
    assert pretrained.save_pretrained("folder") == "folder"
