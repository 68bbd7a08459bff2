"""Small versions of common architectures, each with example batches and the expected folds and reasons.

``python tests/support/zoo.py`` prints for each what is folded, left alone, quantized and skipped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from klquant.backends.torch import quantize
from klquant.backends.torch.folding.api import examine
from klquant.backends.torch.folding.apply import apply_folds
from klquant.backends.torch.model.dataflow import tensors_in
from klquant.backends.torch.model.forward import call_model
from support.networks import Net, batch, outputs, ready


class Entry(NamedTuple):
    build: Callable
    """Returns the model and its batches in float64."""
    folded: dict
    """The kinds of modules that are folded into a layer, by its name."""
    left: dict
    """Words of the reason why a BatchNorm is not folded, by its name."""
    skipped: dict
    """Words of the reason why a module stays in floating point, by its name."""
    uncalled: set
    """Layers that the batches never call."""
    products: dict
    """How many calls of functions are observed in a module, by its name."""


ZOO: dict[str, Entry] = {}
BOTH = "batch_norm relu"


def entry(*, left=(), skipped=(), uncalled=(), products=(), **folded):
    """Register a function that returns a model and batches. Keywords name the folds, with `__` for dots."""

    def register(build):
        names = {name.replace("__", "."): kinds for name, kinds in folded.items()}
        ZOO[build.__name__] = Entry(build, names, dict(left), dict(skipped), set(uncalled), dict(products))
        return build

    return register


def load(name, dtype=torch.float64):
    """Return a model of the zoo with random weights, and its batches."""
    model, batches = ZOO[name].build()
    cast = tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, batches)
    return ready(model, dtype=dtype), cast


def layers(model):
    """Return the names of the layers that can be quantized, found without the code under test."""
    plain = {f"{kind}{rank}d" for kind in ("Conv", "ConvTranspose") for rank in (1, 2, 3)}
    plain |= {"Linear", "NonDynamicallyQuantizableLinear"}
    found = {name for name, module in model.named_modules() if type(module).__name__ in plain}
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return found | {f"{name}.{part}_proj" for name in attentions for part in "qkv"}


def folding_error(model, folded, batches):
    """Return the largest change of the output by folding, relative to the largest output."""
    errors = [0.0]
    for given in batches:
        pairs = zip(*(tensors_in(outputs_of(net, given)) for net in (model, folded)), strict=True)
        errors += [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
    return float(torch.tensor(errors).max())  # NaN if one is


def outputs_of(model, given):
    return outputs(lambda: call_model(model, given))


def images(channels=3, size=8, count=3):
    """Return batches of images. The last one is smaller."""
    return [batch(4 if k < count - 1 else 3, channels, size, size, seed=k) for k in range(count)]


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **{"bias": False, **options})


def chain(*parts):
    return nn.Sequential(*parts)


# --- convolutional families ---


class Residual(nn.Module):
    """A ResNet's basic block: one ReLU module, called twice."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.down = chain(conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs)) if stride > 1 else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.down is None else self.down(x)))


@entry(**{"0": BOTH, "3.conv1": BOTH, "3.conv2": "batch_norm"},
       **{"4.conv1": BOTH, "4.conv2": "batch_norm", "4.down.0": "batch_norm"})  # fmt: skip
def resnet():
    blocks = Residual(4, 4), Residual(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return chain(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), *blocks), images()


@entry(left={"norm1": "no convolution", "norm2": "used elsewhere", "norm3": "no convolution"}, conv2=BOTH)
def preactivation():
    """A ResNet with its norms before the convolutions. One norm also feeds a shortcut."""

    def run(net, x):
        x = net.conv1(F.relu(net.norm1(x)))
        y = net.conv2(F.relu(net.norm2(x)))
        return net.conv3(F.relu(net.norm3(F.relu(net.inner(y)) + x)))

    norms = {f"norm{k}": nn.BatchNorm2d(3 if k == 1 else 4) for k in (1, 2, 3)}
    convs = {"conv1": conv(3, 4), "conv2": conv(4, 4), "inner": nn.BatchNorm2d(4), "conv3": conv(4, 4)}
    return Net(run, **norms, **convs), images()


@entry(expand="batch_norm relu6", depthwise="batch_norm relu6", project="batch_norm")
def mobilenet_v2():
    def run(net, x):
        y = net.act(net.norm1(net.expand(x)))
        y = net.act(net.norm2(net.depthwise(y)))
        return net.head((net.norm3(net.project(y)) + x).mean((2, 3)))

    convs = {"expand": conv(4, 8, 1), "depthwise": conv(8, 8, groups=8), "project": conv(8, 4, 1)}
    norms = {"norm1": nn.BatchNorm2d(8), "norm2": nn.BatchNorm2d(8), "norm3": nn.BatchNorm2d(4)}
    return Net(run, **convs, **norms, act=nn.ReLU6(inplace=True), head=nn.Linear(4, 5)), images(4)


@entry(expand="batch_norm", squeeze="relu", project="batch_norm")
def mobilenet_v3():
    """Squeeze and excite, with hardswish and hardsigmoid."""

    def run(net, x):
        y = net.swish(net.norm1(net.expand(x)))
        y = y * net.gate(net.excite(net.relu(net.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return net.norm2(net.project(y)) + x

    convs = {"expand": conv(4, 8, 1), "squeeze": nn.Conv2d(8, 4, 1), "excite": nn.Conv2d(4, 8, 1)}
    parts = {"project": conv(8, 4, 1), "norm1": nn.BatchNorm2d(8), "norm2": nn.BatchNorm2d(4)}
    return Net(run, **convs, **parts, swish=nn.Hardswish(), gate=nn.Hardsigmoid(), relu=nn.ReLU()), images(4)


@entry(left={"norm1": "no convolution", "norm3": "no convolution"}, bottleneck1=BOTH, bottleneck2=BOTH)
def densenet():
    def run(net, x):
        for k in (1, 3):
            y = F.relu(net.get_submodule(f"norm{k}")(x))
            y = F.relu(net.get_submodule(f"norm{k + 1}")(net.get_submodule(f"bottleneck{k // 2 + 1}")(y)))
            x = torch.cat([x, net.get_submodule(f"grow{k // 2 + 1}")(y)], 1)
        return x

    norms = {f"norm{k}": nn.BatchNorm2d(channels) for k, channels in enumerate((4, 8, 6, 8), 1)}
    convs = {"bottleneck1": conv(4, 8, 1), "grow1": conv(8, 2), "bottleneck2": conv(6, 8, 1), "grow2": conv(8, 2)}
    return Net(run, **norms, **convs), images(4)


@entry(point__0=BOTH, wide__0=BOTH, wide__3=BOTH, pooled__1=BOTH)
def inception():
    def run(net, x):
        return torch.cat([net.point(x), net.wide(x), net.pooled(x)], 1)

    def basic(inputs, outputs, kernel):
        return conv(inputs, outputs, kernel), nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU(inplace=True)

    wide = chain(*basic(4, 4, 1), *basic(4, 6, 3))
    pooled = chain(nn.AvgPool2d(3, 1, 1), *basic(4, 4, 1))
    return Net(run, point=chain(*basic(4, 4, 1)), wide=wide, pooled=pooled), images(4)


@entry(branch__0=BOTH, branch__3="batch_norm", branch__5=BOTH)
def shufflenet():
    def run(net, x):
        kept, changed = x.chunk(2, 1)
        y = torch.cat([kept, net.branch(changed)], 1)
        return y.view(len(y), 2, 4, 8, 8).transpose(1, 2).reshape(len(y), 8, 8, 8)

    pointwise = [(conv(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)) for _ in range(2)]
    depthwise = conv(4, 4, groups=4), nn.BatchNorm2d(4)
    return Net(run, branch=chain(*pointwise[0], *depthwise, *pointwise[1])), images(8)


@entry(down="batch_norm relu", up="batch_norm relu", last="relu")
def unet():
    def run(net, x):
        low = F.relu(net.norm1(net.down(x)))
        high = F.relu(net.norm2(net.up(low)))
        return net.out(F.relu(net.last(torch.cat([x, high], 1))))

    convs = {"down": nn.Conv2d(4, 8, 2, 2), "up": nn.ConvTranspose2d(8, 4, 2, 2), "last": conv(8, 4, bias=True)}
    return Net(run, **convs, norm1=nn.BatchNorm2d(8), norm2=nn.BatchNorm2d(4), out=conv(4, 2, 1)), images(4)


# --- attention ---


@entry()
def convnext():
    """LayerNorm and linear layers with the channels last."""

    def run(net, x):
        y = net.norm(net.depthwise(x).permute(0, 2, 3, 1))
        return x + (net.project(F.gelu(net.expand(y))) * net.scale).permute(0, 3, 1, 2)

    parts = {"depthwise": conv(4, 4, 7, groups=4), "norm": nn.LayerNorm(4, eps=1e-6)}
    model = Net(run, **parts, expand=nn.Linear(4, 16), project=nn.Linear(16, 4))
    model.scale = nn.Parameter(torch.ones(4))
    return model, images(4)


def attend(net, x):
    """Attention with one linear layer for q, k and v."""
    q, k, v = net.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@entry(products={"attend": 1})
def vit():
    def run(net, x):
        x = torch.cat([net.token.expand(len(x), 1, 8), net.patches(x).flatten(2).mT], 1) + net.position
        x = x + net.attend(net.norm1(x))
        return net.head((x + net.mlp(net.norm2(x)))[:, 0])

    attention = Net(attend, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))
    mlp = chain(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    parts = {"patches": nn.Conv2d(3, 8, 4, 4), "attend": attention, "mlp": mlp, "head": nn.Linear(8, 5)}
    model = Net(run, norm1=nn.LayerNorm(8), norm2=nn.LayerNorm(8), **parts)
    model.token, model.position = (nn.Parameter(torch.zeros(1, k, 8)) for k in (1, 5))
    return model, images()


@entry(products={"attend": 1})
def multihead_attention():
    def run(net, x):
        y = net.norm(x)
        return net.head(x + net.attend(y, y, y, need_weights=False)[0])

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Net(run, norm=nn.LayerNorm(8), attend=attention, head=nn.Linear(8, 5)), [batch(3, 5, 8), batch(2, 7, 8)]


@entry(products={"layers.0.self_attn": 1, "layers.1.self_attn": 1},
       layers__0__linear1="relu", layers__1__linear1="relu")  # fmt: skip
def transformer_encoder():
    """PyTorch's own encoder, which runs a layer as one kernel in eval mode."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2), [batch(3, 5, 8), batch(2, 7, 8)]


@entry(products={"attend": 2})
def swin():
    """Shifted windows, with a bias for relative positions."""

    def windows(net, x):
        q, k, v = net.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 2 + net.bias).softmax(-1)
        return net.out((weights @ v).transpose(1, 2).flatten(2))

    def run(net, x):
        y = torch.roll(net.norm(net.patches(x).permute(0, 2, 3, 1)), (-1, -1), (1, 2))
        count, size, _, channels = y.shape
        y = y.view(count, 2, size // 2, 2, size // 2, channels).transpose(2, 3).reshape(-1, size, channels)
        y = net.attend(y).view(count, 2, 2, size // 2, size // 2, channels).transpose(2, 3)
        return net.reduce(torch.roll(y.reshape(count, size, size, channels), (1, 1), (1, 2)).flatten(1))

    attention = Net(windows, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))
    attention.bias = nn.Parameter(torch.zeros(2, 4, 4))
    parts = {"patches": nn.Conv2d(3, 8, 2, 2), "norm": nn.LayerNorm(8), "attend": attention}
    return Net(run, **parts, reduce=nn.Linear(128, 5)), images()


EMBEDDINGS = {f"embeddings.{kind}_embeddings": "embedding" for kind in ("word", "position", "token_type")}


@entry(skipped=EMBEDDINGS, products={f"encoder.layer.{k}.attention.self": 1 for k in range(2)})
def bert():
    """From `transformers`, with random weights and a mask."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                        max_position_embeddings=12)  # fmt: skip
    tokens = torch.arange(21).view(3, 7) * 11 % 30
    masks = [torch.ones(3, 7, dtype=torch.long), (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()]
    return BertModel(config), [{"input_ids": tokens, "attention_mask": mask} for mask in masks]


@entry(skipped={"words": "embedding", "memory": "recurrent"}, hidden="relu")
def text():
    def run(net, words):
        return net.out(F.relu(net.hidden(net.memory(net.words(words))[0][:, -1])))

    parts = {"words": nn.Embedding(9, 4), "memory": nn.LSTM(4, 6, batch_first=True)}
    model = Net(run, **parts, hidden=nn.Linear(6, 8), out=nn.Linear(8, 2))
    return model, [torch.arange(12).view(3, 4) % 9, torch.arange(10).view(2, 5) % 9]


# --- ways of writing a model ---


@entry(left={"norm2": "never called"}, uncalled={"second"}, first=BOTH)
def control_flow():
    """A branch and a number of iterations that depend on the data. All batches here take the same branch."""

    def run(net, x):
        x = F.relu(net.norm1(net.first(x))) if x.square().mean() > 0 else net.norm2(net.second(x))
        for _ in range(2 + int(x.numel() < 0)):
            x = net.turn(x)
        return x

    convs = {"first": conv(3, 4), "second": conv(3, 4), "turn": conv(4, 4)}
    return Net(run, **convs, norm1=nn.BatchNorm2d(4), norm2=nn.BatchNorm2d(4)), images()


@entry(a="relu", b="relu", c="relu", d="relu", e="relu", f="relu6", g="relu6", h="relu6")
def functional_relus():
    forms = {
        "a": F.relu,
        "b": torch.relu,
        "c": lambda y: y.relu(),
        "d": lambda y: y.relu_(),
        "e": lambda y: F.relu(y, inplace=True),
        "f": F.relu6,
        "g": lambda y: F.hardtanh(y, 0, 6),
        "h": lambda y: F.relu6(y, inplace=True),
        "i": lambda y: y.clamp(min=0),
        "j": lambda y: F.leaky_relu(y, 0.1),
    }

    def run(net, x):
        for name, relu in forms.items():
            x = relu(net.get_submodule(name)(x))
        return net.last(x)

    return Net(run, **{name: conv(4, 4, bias=True) for name in forms}, last=conv(4, 4)), images(4)


@entry(left={"norm": "more than once", "own": "more than once"}, twice="relu")
def called_twice():
    def run(net, x):
        x = net.norm(net.a(x)) + net.norm(net.b(x))
        x = net.own(net.again(net.own(net.again(x))))
        return F.relu(net.twice(F.relu(net.twice(x))))

    convs = {name: conv(4, 4) for name in ("a", "b", "again", "twice")}
    return Net(run, **convs, norm=nn.BatchNorm2d(4), own=nn.BatchNorm2d(4)), images(4)


@entry(left={"norm1": "shared", "norm2": "shared"})
def shared_weights():
    def run(net, x):
        return net.norm2(net.second(F.gelu(net.norm1(net.first(x)))))

    model = Net(run, first=conv(4, 4), second=conv(4, 4), norm1=nn.BatchNorm2d(4), norm2=nn.BatchNorm2d(4))
    model.second.weight = model.first.weight
    return model, images(4)


@entry(b="batch_norm relu", a="batch_norm relu")
def declared_out_of_order():
    def run(net, x):
        return net.act(net.norm_a(net.b(net.act(net.norm_b(net.a(x))))))

    norms = {"norm_a": nn.BatchNorm2d(4), "act": nn.ReLU(), "norm_b": nn.BatchNorm2d(4)}
    return Net(run, **norms, b=conv(4, 4), a=conv(4, 4)), images(4)


@entry(left={"0": "no convolution"})
def norm_before():
    return chain(nn.BatchNorm2d(3), conv(3, 4)), images()


@entry(left={"4": "running statistics"}, **{"0": "batch_norm"})
def norm_options():
    """Without an affine map; without running statistics."""
    bare, online = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)
    return chain(conv(3, 4), bare, nn.SiLU(), conv(4, 4), online), images()


@entry(left={"tokens_norm": "dimension 1"}, hidden=BOTH)
def norm_after_linear():
    """BatchNorm on (batch, features), and on (batch, tokens, features), where the channels are the tokens."""

    def run(net, x):
        return net.tokens_norm(net.tokens(net.act(net.norm(net.hidden(x))).unflatten(1, (4, 2))))

    norms = {"norm": nn.BatchNorm1d(8), "tokens_norm": nn.BatchNorm1d(4)}
    model = Net(run, hidden=nn.Linear(6, 8), act=nn.ReLU(), tokens=nn.Linear(2, 3), **norms)
    return model, [batch(5, 6), batch(3, 6, seed=1)]


@entry(left={"2.1": "grouped transposed"}, **{"0.0": BOTH, "1.0": BOTH})
def transposed():
    plain = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)
    dilated = nn.ConvTranspose2d(6, 4, 3, dilation=2, bias=False)
    grouped = nn.ConvTranspose2d(4, 4, 3, groups=2)
    blocks = [chain(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()) for layer in (plain, dilated, grouped)]
    return chain(*blocks), images(4)


@entry(**{f"{k}.0": BOTH for k in range(5)})
def padding_modes():
    modes = [{"padding": 1, "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")]
    options = [*modes, {"padding": "same", "dilation": 2}]
    return chain(*(chain(nn.Conv2d(4, 4, 3, **o), nn.BatchNorm2d(4), nn.ReLU()) for o in options)), images(4)


@entry(one=BOTH, two="relu")
def inputs_by_name():
    """Takes a mapping, calls its layers by keyword, and returns a mapping."""

    def run(net, image, *, scale, other):
        y = F.relu(net.norm(input=net.one(input=image * scale)))
        return {"sum": [net.out(input=y + F.relu(input=net.two(other)))], "y": (y,)}

    convs = {"one": conv(3, 4), "two": conv(3, 4), "out": conv(4, 2)}
    scale = torch.tensor(2.0)
    given = [{"image": x, "scale": scale, "other": x.flip(0)} for x in images()]
    return Net(run, **convs, norm=nn.BatchNorm2d(4)), given


@entry(fc=BOTH)
def inputs_by_position():
    """Takes two tensors and returns a tuple."""

    def run(net, x, shift):
        y = net.relu(net.norm(net.fc(x)))
        return net.out(y + shift), y

    model = Net(run, fc=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), relu=nn.ReLU(), out=nn.Linear(4, 2))
    return model, [(batch(5, 3), batch(4)), [batch(2, 3), batch(4, seed=1)]]


def table():
    """Yield a line of the table for each model."""
    yield "| model | folded | left alone, and why | quantized | in floating point, and why | max relative error |"
    yield "|---|---|---|---|---|---|"
    for name in ZOO:
        model, batches = load(name)
        found = examine(model, batches[0])
        error = folding_error(model, apply_folds(model, found.folds), batches)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = quantize(*load(name, torch.float32), num_bins=255).thresholds
        folded = ", ".join(f"{fold.into} + {fold.kind}" for fold in found.folds if not fold.reason)
        left = "; ".join(f"{fold.module}: {fold.reason}" for fold in found.folds if fold.reason)
        skipped = "; ".join(f"{name}: {reason}" for name, reason in found.skipped.items())
        yield f"| {name} | {folded} | {left} | {len(done)} of {len(layers(model))} | {skipped} | {error:.1e} |"


if __name__ == "__main__":
    for line in table():
        print(line)  # noqa: T201
