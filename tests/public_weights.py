"""Weights in the public layouts, made up, and the forward passes that these layouts stand for."""

import itertools

import numpy as np
import safetensors.numpy


def vit_shapes(width, depth, heads, patch, channels, positions, classes):
    """Names and shapes of the public .npz files."""
    head = width // heads
    shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (patch, patch, channels, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, 1 + positions, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/{x}": (width,) for x in ("scale", "bias")}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            shapes[f"{attention}/{name}/kernel"] = (width, heads, head)
            shapes[f"{attention}/{name}/bias"] = (heads, head)
        shapes[f"{attention}/out/kernel"] = (heads, head, width)
        shapes[f"{attention}/out/bias"] = (width,)
        for name, (a, b) in {"Dense_0": (width, 4 * width), "Dense_1": (4 * width, width)}.items():
            shapes[f"{block}/MlpBlock_3/{name}/kernel"] = (a, b)
            shapes[f"{block}/MlpBlock_3/{name}/bias"] = (b,)
    return shapes


def resnet_shapes(bottleneck, depths, width, classes):
    """Names and shapes of torchvision's state, without the counts of batches."""
    shapes = {}

    def layer(conv, norm, out, into, size):
        shapes[f"{conv}.weight"] = (out, into, size, size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{name}"] = (out,)

    layer("conv1", "bn1", width, 3, 7)
    into = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        out = 4 * inner if bottleneck else inner
        for i in range(depth):
            block = f"layer{stage + 1}.{i}"
            sizes = [(inner, into, 1), (inner, inner, 3), (out, inner, 1)]
            if not bottleneck:
                sizes = [(inner, into, 3), (inner, inner, 3)]
            for j, size in enumerate(sizes, 1):
                layer(f"{block}.conv{j}", f"{block}.bn{j}", *size)
            if i == 0 and (stage > 0 or into != out):
                layer(f"{block}.downsample.0", f"{block}.downsample.1", out, into, 1)
            into = out
    return shapes | {"fc.weight": (classes, into), "fc.bias": (classes,)}


def random_arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:] if name.endswith("weight") else shape[:-1], initial=1.0)
        arrays[name] = rng.normal(0, fan_in**-0.5 if len(shape) > 1 else 0.3, shape)
        if name.endswith(("scale", "var")) or (len(shape) == 1 and name.endswith("weight")):
            arrays[name] = 0.5 + np.abs(arrays[name])
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def write(file, arrays):
    if file.suffix == ".npz":
        np.savez(file, **arrays)
    else:
        safetensors.numpy.save_file(arrays, file)
    return file


# What the layouts mean, in float64.


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def vit_forward(arrays, images):
    w = {name: x.astype(np.float64) for name, x in arrays.items()}
    n, height, width, _ = images.shape
    patch = len(w["embedding/kernel"])
    rows, columns = range(0, height, patch), range(0, width, patch)
    cells = [images[:, i : i + patch, j : j + patch] for i in rows for j in columns]
    x = np.stack([np.einsum("nhwc,hwcd->nd", x, w["embedding/kernel"]) for x in cells], axis=1)
    x = x + w["embedding/bias"]
    x = np.concatenate([np.repeat(w["cls"], n, axis=0), x], axis=1)
    x = x + w["Transformer/posembed_input/pos_embedding"]
    for i in itertools.count():
        b = {
            name.partition(f"encoderblock_{i}/")[2]: v
            for name, v in w.items()
            if f"encoderblock_{i}/" in name
        }
        if not b:
            break
        y = layer_norm(x, b["LayerNorm_0/scale"], b["LayerNorm_0/bias"])
        attention = "MultiHeadDotProductAttention_1"
        q, k, v = (
            np.einsum("ntd,dhk->nhtk", y, b[f"{attention}/{name}/kernel"])
            + b[f"{attention}/{name}/bias"][:, None]
            for name in ("query", "key", "value")
        )
        y = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v
        x = x + np.einsum("nhtk,hkd->ntd", y, b[f"{attention}/out/kernel"])
        x = x + b[f"{attention}/out/bias"]
        y = layer_norm(x, b["LayerNorm_2/scale"], b["LayerNorm_2/bias"])
        y = y @ b["MlpBlock_3/Dense_0/kernel"] + b["MlpBlock_3/Dense_0/bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + y @ b["MlpBlock_3/Dense_1/kernel"] + b["MlpBlock_3/Dense_1/bias"]
    x = layer_norm(x, w["Transformer/encoder_norm/scale"], w["Transformer/encoder_norm/bias"])
    return x[:, 0] @ w["head/kernel"] + w["head/bias"]


def windows(x, size, stride, value):
    """Of images (batch, channels, height, width), padded as a convolution of odd size is."""
    margin = size // 2
    x = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)), constant_values=value)
    view = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
    return view[:, :, ::stride, ::stride]


def conv(x, kernel, stride):
    return np.einsum("nchwij,ocij->nohw", windows(x, kernel.shape[-1], stride, 0.0), kernel)


def batch_norm(x, w, name):
    mean, var, scale, bias = (
        w[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def resnet_forward(arrays, images, bottleneck, depths):
    w = {name: x.astype(np.float64) for name, x in arrays.items()}

    def relu(x):
        return np.maximum(x, 0)

    x = np.moveaxis(images, -1, 1)
    x = relu(batch_norm(conv(x, w["conv1.weight"], 2), w, "bn1"))
    x = windows(x, 3, 2, -np.inf).max(axis=(-1, -2))
    for stage, depth in enumerate(depths, 1):
        for i in range(depth):
            block, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            y = x
            for j, s in enumerate(strides, 1):
                y = batch_norm(conv(y, w[f"{block}.conv{j}.weight"], s), w, f"{block}.bn{j}")
                y = relu(y) if j < len(strides) else y
            if f"{block}.downsample.0.weight" in w:
                x = conv(x, w[f"{block}.downsample.0.weight"], stride)
                x = batch_norm(x, w, f"{block}.downsample.1")
            x = relu(x + y)
    return x.mean(axis=(2, 3)) @ w["fc.weight"].T + w["fc.bias"]
