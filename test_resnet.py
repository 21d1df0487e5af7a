# SPDX-License-Identifier: MIT
"""Tests of resnet.py: `python -m pytest`. They need no GPU and no download.

What is tested is compared with something that does not come from resnet.py: the paper's numbers, arithmetic written
out by hand, torchvision, or a loop over single images and pixels.
"""
import ast
import contextlib
import copy
import csv
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

import resnet

PROGRAM = Path(resnet.__file__)


def run(capsys, *argv):
    """Run the program in this process: (exit status, stdout, stderr)."""
    status = 0
    try:
        resnet.main([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):  # as the interpreter does with sys.exit("text")
            print(status, file=sys.stderr)
            status = 1
    out, err = capsys.readouterr()
    return status, out, err


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def net_of(depth, option):
    """The net of an option "A", "B" or "C", or the "plain" one."""
    return resnet.ResNet(depth, plain=True) if option == "plain" else resnet.ResNet(depth, shortcut=option)


def noisy(net):
    """net with BN parameters and statistics that are not the initial zeros and ones, which would hide mistakes."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def write_folder(root, classes=("cat", "dog"), train=6, test=4):
    """A tiny data set for --dataset folder: one grey level a class, so that it is easy to learn."""
    for part, count in (("train", train), ("test", test)):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (100 * k + i, 50, 200 - 100 * k)).save(root / part / name / f"{i}.png")
    return root


# ----- Sections 3.1 to 3.4: shortcuts and block ---------------------------------------------------------------------


def by_hand(block, x):
    """The training-mode block from its state_dict, with convolutions as matrix products and BN as formulas."""
    w = dict(block.named_parameters())

    def convolution(x, weight, stride):
        size, (batch, _, height, width) = weight.shape[-1], x.shape
        columns = F.unfold(x, size, padding=size // 2, stride=stride)
        y = weight.flatten(1) @ columns
        return y.view(batch, -1, -(-height // stride), -(-width // stride))

    def batch_norm(x, name):
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        scale, shift = w[f"{name}.weight"][:, None, None], w[f"{name}.bias"][:, None, None]
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    stride = block.conv1.stride[0]
    y = batch_norm(convolution(x, w["conv1.weight"], stride), "bn1").clamp(min=0)
    y = batch_norm(convolution(y, w["conv2.weight"], 1), "bn2")
    if block.shortcut is None:
        return y.clamp(min=0)
    if "shortcut.conv.weight" in w:
        return (y + batch_norm(convolution(x, w["shortcut.conv.weight"], stride), "shortcut.bn")).clamp(min=0)
    shortcut = torch.zeros_like(y)
    first = (y.shape[1] - x.shape[1]) // 2
    shortcut[:, first:first + x.shape[1]] = x[:, :, ::stride, ::stride]
    return (y + shortcut).clamp(min=0)


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 16, 2), (8, 16, 1), (8, 8, 2), (3, 8, 2)], ids=str)
@pytest.mark.parametrize("shortcut", ["A", "B", "C", None])
def test_block_equals_the_block_written_out(shortcut, shape):
    torch.manual_seed(0)
    block = noisy(resnet.ResidualBlock(*shape, shortcut)).double()
    x = torch.randn(4, shape[0], 9, 7, dtype=torch.double, requires_grad=True)
    y, expected = block(x), by_hand(block, x)
    weight = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    inputs = [x, *block.parameters()]
    for ours, theirs in zip(torch.autograd.grad((y * weight).sum(), inputs),
                            torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("shortcut", "shape", "kind"), [
    ("A", (8, 8, 1), resnet.IdentityShortcut), ("A", (8, 16, 2), resnet.IdentityShortcut),
    ("B", (8, 8, 1), resnet.IdentityShortcut), ("B", (8, 16, 2), resnet.ProjectionShortcut),
    ("B", (8, 16, 1), resnet.ProjectionShortcut), ("B", (8, 8, 2), resnet.ProjectionShortcut),
    ("C", (8, 8, 1), resnet.ProjectionShortcut), ("C", (8, 16, 2), resnet.ProjectionShortcut),
    (None, (8, 16, 2), type(None))], ids=str)
def test_option_decides_the_kind_of_shortcut(shortcut, shape, kind):
    assert type(resnet.ResidualBlock(*shape, shortcut).shortcut) is kind


def test_identity_shortcut_pixel_by_pixel():
    x = torch.randn(2, 3, 5, 4)
    y = resnet.IdentityShortcut(3, 8, stride=2)(x)
    assert y.shape == (2, 8, 3, 2)
    for image in range(2):
        for channel in range(8):
            for row in range(3):
                for column in range(2):
                    source = channel - 2  # five new channels: two before, three after
                    value = x[image, source, 2 * row, 2 * column] if 0 <= source < 3 else 0
                    assert y[image, channel, row, column] == value


def test_identity_shortcut_keeps_zeros_zero_beside_nan():
    y = resnet.IdentityShortcut(2, 4, stride=2)(torch.full((1, 2, 4, 4), float("nan")))
    assert torch.equal(y[:, [0, 3]], torch.zeros(1, 2, 2, 2))


def test_block_is_relu_of_the_identity_if_the_residual_is_zero():
    block = noisy(resnet.ResidualBlock(8, 8))
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x.clamp(min=0))
    plain = copy.deepcopy(block)
    plain.shortcut = None
    assert torch.equal(plain(x), torch.zeros_like(x))


@pytest.mark.parametrize("training", [True, False])
def test_option_b_equals_torchvision(training):
    torch.manual_seed(0)
    ours = noisy(resnet.ResidualBlock(16, 32, 2, "B")).train(training)
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    theirs = torchvision.models.resnet.BasicBlock(16, 32, 2, projection).train(training)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(4, 16, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.bn2.running_var, theirs.bn2.running_var)


def test_bad_blocks_are_refused():
    with pytest.raises(ValueError, match="ProjectionShortcut"):
        resnet.IdentityShortcut(32, 16)
    with pytest.raises(ValueError, match="'D'"):
        resnet.ResidualBlock(16, 16, shortcut="D")


def test_the_block_can_be_copied_out_with_torch_alone():
    names = ("IdentityShortcut", "ProjectionShortcut", "ResidualBlock")
    text = PROGRAM.read_text(encoding="utf-8")
    parts = [ast.get_source_segment(text, node) for node in ast.parse(text).body
             if isinstance(node, ast.ClassDef) and node.name in names]
    assert len(parts) == 3
    space = {}
    exec("import torch\nfrom torch import nn\n" + "\n".join(parts), space)
    assert space["ResidualBlock"](16, 32, stride=2, shortcut="B")(torch.zeros(1, 16, 8, 8)).shape == (1, 32, 4, 4)


# ----- Section 4.2: the nets ----------------------------------------------------------------------------------------

DEPTHS = [20, 32, 44, 56, 110, 1202]
PARAMETERS = {  # counted by hand from the widths; the paper's table rounds the first row
    "A": [269_722, 464_154, 658_586, 853_018, 1_727_962, 19_421_274],
    "B": [272_474, 466_906, 661_338, 855_770, 1_730_714, 19_424_026],
    "C": [283_962, 489_594, 695_226, 900_858, 1_826_202, 20_538_714],
}


@pytest.mark.parametrize("option", ["plain", "A", "B", "C"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters_and_layers(depth, option):
    with torch.device("meta"):  # shapes without memory
        net = net_of(depth, option)
    expected = PARAMETERS[option.replace("plain", "A")][DEPTHS.index(depth)]
    assert sum(p.numel() for p in net.parameters()) == expected
    layers = [name for name, module in net.named_modules()
              if isinstance(module, (nn.Conv2d, nn.Linear)) and "shortcut" not in name]
    assert len(layers) == depth
    assert all(module.bias is None for module in net.modules() if isinstance(module, nn.Conv2d))


def test_plain_and_residual_differ_by_the_shortcuts_alone():
    plain, residual = resnet.ResNet(20, plain=True), resnet.ResNet(20)
    shapes = [{name: t.shape for name, t in net.state_dict().items()} for net in (plain, residual)]
    assert shapes[0] == shapes[1]
    assert not list(resnet.IdentityShortcut(16, 32, 2).parameters())
    plain.load_state_dict(residual.state_dict())
    plain.eval(), residual.eval()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(plain(x), residual(x))
    for block in [m for m in residual.modules() if isinstance(m, resnet.ResidualBlock)]:
        block.shortcut = None
    assert torch.equal(plain(x), residual(x))


def test_stage_shapes_and_global_average():
    net, shapes = resnet.ResNet(20, num_classes=7), {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, i, o, name=name: shapes.update({name: (i[0], tuple(o.shape[1:]))}))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert {name: shape for name, (_, shape) in shapes.items()} == {
        "conv1": (16, 32, 32), "bn1": (16, 32, 32), "stage1": (16, 32, 32),
        "stage2": (32, 16, 16), "stage3": (64, 8, 8), "fc": (7,)}
    assert [len(stage) for stage in (net.stage1, net.stage2, net.stage3)] == [3, 3, 3]
    net.stage3.register_forward_hook(lambda _, i, o: shapes.update(last=o))
    net(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(shapes["fc"][0], shapes["last"].flatten(2).sum(dim=2) / 64)


@pytest.mark.parametrize("plain", [False, True])
def test_net_equals_the_net_written_out(plain):
    """ResNet-20 in evaluation mode as a flat list of convolutions, from its weights in their order."""
    torch.manual_seed(0)
    net = noisy(resnet.ResNet(20, plain=plain)).double().eval()
    tensors = iter([t for name, t in net.state_dict().items() if "num_batches" not in name])

    def conv_bn(x, stride=1):
        weight, scale, shift, mean, variance = (next(tensors) for _ in range(5))
        x = F.conv2d(x, weight, stride=stride, padding=1)
        return (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt() * scale[:, None, None] \
            + shift[:, None, None]

    images = torch.randn(3, 3, 32, 32, dtype=torch.double)
    x = conv_bn(images).relu()
    for block in range(9):
        stride = 2 if block in (3, 6) else 1
        y = conv_bn(conv_bn(x, stride).relu())
        if not plain:
            new = (y.shape[1] - x.shape[1]) // 2
            zeros = torch.zeros(3, new, *y.shape[2:], dtype=torch.double)
            y = y + torch.cat([zeros, x[:, :, ::stride, ::stride], zeros], dim=1)
        x = y.relu()
    torch.testing.assert_close(net(images), F.linear(x.mean(dim=(2, 3)), next(tensors), next(tensors)))
    assert next(tensors, None) is None


def test_batch_norm_averages_as_the_readme_says():
    for module in resnet.ResNet(8, shortcut="C").modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.momentum, module.eps, module.affine) == (0.1, 1e-5, True)


def test_he_initialisation():
    torch.manual_seed(0)
    net = resnet.ResNet(56, shortcut="B")
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach()
            deviation = (2 / weight[0].numel()) ** 0.5
            spread = 5 / weight.numel() ** 0.5  # five standard errors, and more
            assert abs(weight.std() / deviation - 1) < spread, name
            assert abs(weight.mean() / deviation) < spread, name
    assert torch.equal(net.fc.bias, torch.zeros(10))


@pytest.mark.parametrize(("depth", "nearest"), [
    (57, "56 and 62"), (61, "56 and 62"), (21, "20 and 26"), (0, "8 and 14"), (2, "8 and 14"), (-4, "8 and 14")])
def test_depth_that_is_not_6n_plus_2(depth, nearest):
    with pytest.raises(ValueError, match=f"{nearest}$"):
        resnet.ResNet(depth)


@pytest.mark.parametrize("option", ["plain", "A", "B", "C"])
def test_net_pickles_copies_exports_and_loads(option, tmp_path):
    torch.manual_seed(0)
    net = noisy(net_of(8, option)).eval()
    x = torch.randn(2, 3, 32, 32)
    y = net(x)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
    assert torch.equal(copy.deepcopy(net)(x), y)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), y)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = net_of(8, option).eval()
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(other(x), y)
    assert {key.split(".")[0] for key in net.state_dict()} == {"conv1", "bn1", "stage1", "stage2", "stage3", "fc"}


# ----- Section 4.2: the data ----------------------------------------------------------------------------------------


def test_augment_equals_a_loop_over_all_crops_and_flips():
    """All 9 x 9 x 2 cases against torchvision's pad, crop and flip, image by image."""
    cases = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    images = torch.rand(len(cases), 3, 32, 32) + 1  # no pixel looks like the padding
    ours = resnet.augment(images, *cases.T)
    assert ours.shape == images.shape
    for image, (dy, dx, flip), result in zip(images, cases.tolist(), ours, strict=True):
        expected = torchvision.transforms.functional.pad(image, [4])[:, dy:dy + 32, dx:dx + 32]
        expected = torchvision.transforms.functional.hflip(expected) if flip else expected
        assert torch.equal(result, expected)
    assert torch.equal(resnet.augment(images[:1], *torch.tensor([[4], [4], [0]])), images[:1])


def test_draws_reach_every_crop_and_flip_evenly():
    index, dy, dx, flip = resnet.draw_epoch(81 * 2 * 100, seed=3, epoch=5)
    counts = torch.bincount((dy * 9 + dx) * 2 + flip, minlength=162)
    assert len(counts) == 162
    assert counts.sum() == 16_200
    assert counts.min() > 50 and counts.max() < 150  # 100 +- 5 standard deviations
    assert torch.equal(index.sort().values, torch.arange(16_200))


def test_draws_depend_on_seed_and_epoch_alone():
    torch.manual_seed(0)
    one = resnet.draw_epoch(50, 1, 2)
    torch.manual_seed(1)
    assert torch.equal(one, resnet.draw_epoch(50, 1, 2))
    keys = [(seed, epoch) for seed in (0, 1, 2, 256, 2**16, 2**32 - 1) for epoch in (0, 1, 2, 256, 2**16, 2**24)]
    draws = [resnet.draw_epoch(50, *key) for key in keys]
    for row in range(4):  # no sum or product of seed and epoch, and no part of their bits, decides
        assert len({tuple(draw[row].tolist()) for draw in draws}) == len(keys)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 5), (3, 8), (7, 7), (50, 1)])
def test_no_image_is_dropped_or_repeated_within_an_epoch(count, batch_size):
    source, taken = resnet.batches(count, batch_size, 7, "cpu"), []
    while len(taken) < 5 * count:
        batch = next(source)
        assert batch.shape == (4, batch_size)
        taken += batch[0].tolist()
    for epoch in range(5):
        order = taken[epoch * count:(epoch + 1) * count]
        assert sorted(order) == list(range(count))
        assert order == resnet.draw_epoch(count, 7, epoch)[0].tolist()


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 10), (3, 8), (12, 4)])
def test_batches_can_begin_anywhere(count, batch_size):
    from_the_first = resnet.batches(count, batch_size, 5, "cpu")
    for start, draws in zip(range(9), from_the_first, strict=False):
        assert torch.equal(next(resnet.batches(count, batch_size, 5, "cpu", start)), draws), start


def test_mean_is_per_pixel_and_of_the_training_images(tmp_path):
    write_folder(tmp_path)
    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "train" / "cat" / "0.png")
    data = resnet.load_data("folder", tmp_path, False, "cpu")
    assert data.images.dtype == torch.uint8 and data.images.shape == (12, 3, 32, 32)
    by_loop = sum(image.double() / 255 for image in data.images) / 12
    torch.testing.assert_close(data.mean.double(), by_loop, rtol=1e-6, atol=0)
    assert data.mean.shape == (3, 32, 32)
    normalised = resnet.normalise(data.images, data.mean)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised.mean(dim=0), torch.zeros(3, 32, 32), rtol=0, atol=1e-6)
    torch.testing.assert_close(normalised[3], data.images[3] / 255 - by_loop.float())


def test_folder_holds_what_was_written(tmp_path):
    write_folder(tmp_path, classes=("owl", "ape", "bee"))
    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "test" / "bee" / "0.png")
    images, labels, test_images, test_labels, classes = resnet.read_folder(tmp_path)
    assert classes == ["ape", "bee", "owl"]
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert test_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(test_images[4].permute(1, 2, 0), pixels)
    assert images[-1, :, 0, 0].tolist() == [5, 50, 200]  # "owl" was written first, its last image is the sixth


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files_are_read_plane_by_plane(name, tmp_path, monkeypatch):
    """A small data set in CIFAR's own file format: 3072 bytes an image, all red ones first, row by row."""
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    key, names = {"cifar10": ("labels", "label_names"), "cifar100": ("fine_labels", "fine_label_names")}[name]
    folder = tmp_path / source.base_folder
    folder.mkdir()
    bytes_, labels = torch.randint(256, (2, 5, 3072), dtype=torch.uint8), torch.randint(10, (2, 5))
    for part in range(2):
        entry = {"data": bytes_[part].numpy(), key: labels[part].tolist()}
        (folder / f"part{part}").write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({names: list("abcdefghij")}))
    monkeypatch.setattr(source, "train_list", [["part0", None]])
    monkeypatch.setattr(source, "test_list", [["part1", None]])
    monkeypatch.setattr(source, "meta", {"filename": "meta", "key": names, "md5": None})
    images, train_labels, test_images, test_labels, classes = resnet.read_cifar(name, tmp_path)
    assert classes == list("abcdefghij")
    assert torch.equal(images, bytes_[0].view(5, 3, 32, 32))
    assert torch.equal(test_images, bytes_[1].view(5, 3, 32, 32))
    assert torch.equal(torch.stack([train_labels, test_labels]), labels)


def test_val_holds_out_5000_training_images():
    whole, split = (resnet.load_data("synthetic", None, val, "cpu") for val in (False, True))
    assert (len(split.images), len(split.test_images)) == (5_000, 5_000)
    assert (len(split.labels), len(split.test_labels)) == (5_000, 5_000)

    def multiset(images, labels):
        return sorted(hash(image.numpy().tobytes() + bytes([label]))
                      for image, label in zip(images, labels.tolist(), strict=True))

    torch.manual_seed(1)  # another seed of the run does not move the split
    assert torch.equal(split.test_images, resnet.load_data("synthetic", None, True, "cpu").test_images)
    first = set(multiset(whole.images[:5000], whole.labels[:5000]))
    held_from_first = len(first & set(multiset(split.test_images, split.test_labels)))
    assert 2_300 < held_from_first < 2_700  # it is a sample of the whole, not a range
    both = multiset(torch.cat([split.images, split.test_images]), torch.cat([split.labels, split.test_labels]))
    assert both == multiset(whole.images, whole.labels)
    torch.testing.assert_close(split.mean, (split.images.double() / 255).mean(dim=0).float())


def test_synthetic_data_is_fixed_and_balanced():
    images, labels, test_images, test_labels, classes = resnet.make_synthetic()
    assert images.dtype == torch.uint8 and len(classes) == 10
    assert torch.bincount(labels).tolist() == [1000] * 10 and torch.bincount(test_labels).tolist() == [200] * 10
    torch.manual_seed(5)
    assert torch.equal(images, resnet.make_synthetic()[0])
    train = {image.numpy().tobytes() for image in images}
    assert not any(image.numpy().tobytes() in train for image in test_images)


def test_synthetic_classes_look_the_same_in_a_mirror():
    """No direction is favoured: gradients along one diagonal are as strong as along the other, in each class."""
    images, labels, *_ = resnet.make_synthetic()
    grey = images.float().mean(dim=1)
    across, down = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    lean = (across * down).mean(dim=(1, 2)) / (across**2 + down**2).mean(dim=(1, 2))  # in [-1/2, 1/2]
    for k in range(10):
        chosen = lean[labels == k]
        assert abs(chosen.mean()) < 5 * chosen.std() / len(chosen) ** 0.5
    left, right = (part.var(dim=2).mean().item() for part in (grey[:, :, :16], grey[:, :, 16:].flip(2)))
    assert left == pytest.approx(right, rel=0.02)


# ----- Section 4.2: the recipe --------------------------------------------------------------------------------------


def test_learning_rate_at_its_edges():
    rates = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    for iteration, rate in rates.items():
        assert resnet.learning_rate(iteration, 64_000) == pytest.approx(rate, rel=1e-12)
    assert [resnet.learning_rate(i, 8, base=1) for i in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [resnet.learning_rate(i, 8, base=1, warm=True) for i in range(8)] == [0.1] * 6 + [0.01] * 2
    assert [resnet.learning_rate(i, 1) for i in range(1)] == [0.1]
    assert [resnet.learning_rate(i, 3, base=1) for i in range(3)] == [1, 1, 0.1]


def recipe(**changes):
    values = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 8, "seed": 0, "warmup": False,
              "iterations": 4}
    return Namespace(**{**values, **changes})


def steps_of(net, data, args, progress=None, model=None, step=resnet.step):
    """What train() yields for this net, or model around it, from the beginning or from progress on."""
    progress = progress or resnet.Progress(warm=args.warmup)
    return resnet.train(model or net, resnet.make_optimizer(net, args), data, args, progress, step)


def small_data(count=40, classes=10):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=g)
    return resnet.Data(images, labels, images, labels, images.double().mean(dim=0).float() / 255, list(range(classes)))


def black_data(labels):
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    return resnet.Data(images, labels, images, labels, torch.zeros(3, 32, 32), ["a", "b"])


class Constant(nn.Module):
    """Answers class 0 whatever it is shown."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return torch.tensor([1.0, 0.0]).expand(len(x), 2) + 0 * self.bias


@pytest.mark.parametrize(("right", "ends"), [(0, None), (10, None), (11, 100), (50, 100)])
def test_warmup_ends_when_the_training_error_is_below_80_percent(right, ends):
    labels = (torch.arange(50) >= right).long()  # class 0 is the right answer for so many of 50
    args = recipe(warmup=True, batch_size=50, iterations=400)
    rates = [rate for rate, _, _ in steps_of(Constant(), black_data(labels), args)]
    expected = [0.01] * 400 if ends is None else [0.01] * ends + [0.1] * (200 - ends) + [0.01] * 200
    assert rates[:300] == pytest.approx(expected[:300])
    assert rates[300:] == pytest.approx([0.001] * 100)


def test_warmup_looks_at_each_100_iterations_by_themselves():
    """All wrong but for iteration 100; then 78 % wrong, which is below 80 although the whole is not."""
    class Scripted(Constant):
        calls = 0

        def forward(self, x):
            self.calls += 1
            right = 50 if self.calls == 100 else 11 if self.calls > 100 else 0
            answers = (torch.arange(len(x)) < right).long()
            return F.one_hot(answers, 2).float() + 0 * self.bias

    args = recipe(warmup=True, batch_size=50, iterations=500)
    data = black_data(torch.ones(50, dtype=torch.long))
    rates = [rate for rate, _, _ in steps_of(Scripted(), data, args)]
    assert rates[:250] == pytest.approx([0.01] * 200 + [0.1] * 50)


def test_train_is_the_recipe_written_out():
    """Four steps of SGD with momentum and weight decay on padded, cropped and flipped images, all by hand."""
    torch.manual_seed(0)
    data = small_data(count=10)  # batches of 8 of 10: they cross epochs
    args = recipe(weight_decay=0.01, momentum=0.8, seed=3)
    net = resnet.ResNet(8).double()
    other = copy.deepcopy(net)
    data = data._replace(mean=data.mean.double())
    progress = resnet.Progress()
    steps = [(progress.iteration, *step) for step in steps_of(net, data, args, progress)]

    velocity = [torch.zeros_like(p) for p in other.parameters()]
    draws = torch.cat([resnet.draw_epoch(10, 3, epoch) for epoch in range(4)], dim=1)
    for step in range(4):
        batch, labels = [], []
        for index, dy, dx, flip in draws[:, 8 * step:8 * step + 8].T.tolist():
            image = F.pad(data.images[index] / 255 - data.mean, (4, 4, 4, 4))[:, dy:dy + 32, dx:dx + 32]
            batch.append(image.flip(2) if flip else image)
            labels.append(data.labels[index])
        logits = other(torch.stack(batch))
        chosen = logits.log_softmax(dim=1)[range(8), torch.stack(labels)]
        loss = -chosen.mean()
        wrong = sum(int(row.argmax()) != label for row, label in zip(logits, labels, strict=True))
        rate = [0.1, 0.1, 0.01, 0.001][step]
        for p, v, g in zip(other.parameters(), velocity, torch.autograd.grad(loss, list(other.parameters())),
                           strict=True):
            v.mul_(0.8).add_(g + 0.01 * p.detach())
            p.data.sub_(rate * v)
        iteration, their_rate, their_loss, their_wrong = steps[step]
        assert (iteration, their_wrong.item()) == (step + 1, wrong)
        assert their_rate == pytest.approx(rate)
        torch.testing.assert_close(their_loss, loss.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_evaluate_equals_a_loop_over_single_images():
    torch.manual_seed(0)
    data = small_data(count=503)  # one batch of 500, and three more
    net = noisy(resnet.ResNet(8)).train()
    before = copy.deepcopy(net.state_dict())
    needs_grad = []
    hook = net.fc.register_forward_hook(lambda _, i, o: needs_grad.append(o.requires_grad))
    error = resnet.evaluate(net, data.test_images, data.test_labels, data.mean)
    hook.remove()
    assert net.training and not any(needs_grad)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    net.eval()
    with torch.no_grad():
        wrong = sum(int(net(image[None] / 255 - data.mean).argmax()) != int(label)
                    for image, label in zip(data.test_images, data.test_labels, strict=True))
    assert error == pytest.approx(100 * wrong / 503)


def test_evaluate_subtracts_the_mean_and_counts():
    torch.manual_seed(0)
    data = small_data(count=503)
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Linear(3072, 10)).eval()
    with torch.no_grad():
        answers = torch.cat([net(image[None] / 255 - data.mean).argmax(dim=1) for image in data.images])
    assert len(answers.unique()) == 10  # or a mistake could hide
    labels = torch.where(torch.arange(503) < 200, answers, (answers + 1) % 10)
    assert resnet.evaluate(net, data.images, labels, data.mean) == pytest.approx(100 * 303 / 503)


@pytest.mark.parametrize("plain", [False, True])
def test_one_batch_can_be_learnt_by_heart(plain):
    torch.manual_seed(0)
    data = small_data(count=32)
    net = resnet.ResNet(8, plain=plain)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    images = resnet.normalise(data.images, data.mean)
    for _ in range(60):
        loss = F.cross_entropy(net(images), data.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert (net(images).argmax(dim=1) == data.labels).all()


def test_synthetic_data_can_be_learnt(tmp_path, capsys):
    status, _, _ = run(capsys, "--dataset", "synthetic", "--depth", 8, "--iterations", 150, "--batch-size", 64,
                       "--eval-every", 150, "--output-dir", tmp_path / "run")
    assert status == 0
    rows = rows_of(tmp_path / "run")
    assert float(rows[-1]["test_error"]) < 50  # by chance it would be 90


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(data):
    return data._replace(**{k: v.cuda() for k, v in data._asdict().items() if k != "classes"})


@needs_cuda
def test_cuda_equals_cpu():
    torch.manual_seed(0)
    net, data, args = resnet.ResNet(20).double(), small_data(), recipe()
    data = data._replace(mean=data.mean.double())
    there = steps_of(copy.deepcopy(net).cuda(), on_cuda(data), args)
    for (_, loss, wrong), (_, loss_there, wrong_there) in zip(steps_of(net, data, args), there, strict=True):
        torch.testing.assert_close(loss_there.cpu(), loss, rtol=1e-5, atol=1e-6)
        assert wrong_there.item() == wrong.item()


# ----- Speed ----------------------------------------------------------------------------------------------------


def fast(*argv):
    """The arguments as run() has them when it calls speed_up()."""
    args = resnet.make_parser().parse_args([str(word) for word in argv])
    args.processes, args.warmup, args.iterations = 1, False, args.iterations or 64_000
    return args


def assert_alike(ours, theirs, tolerance):
    """The state_dicts are equal to rounding, relative to each tensor's largest element."""
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        difference = (tensor.double() - theirs[key].double()).abs().max()
        assert difference <= tolerance * theirs[key].double().abs().max(), key


@pytest.mark.parametrize("option", ["plain", "A", "C"])
def test_autocast_computes_in_bf16_and_keeps_float32(option):
    torch.manual_seed(0)
    net, seen = net_of(8, option), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    model = resnet.Autocast(net)
    images = torch.randn(8, 3, 32, 32)
    logits = model(images)
    assert logits.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    logits.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())
    torch.testing.assert_close(logits, net(images), atol=0.1, rtol=0.1)
    assert not torch.equal(logits, net(images))


def test_bf16_is_of_the_training_alone(tmp_path, capsys):
    net, seen = resnet.ResNet(8), {True: set(), False: set()}
    net.conv1.register_forward_hook(lambda m, i, o: seen[net.training].add(o.dtype))
    args = fast("--iterations", 2, "--batch-size", 4, "--eval-every", 1)
    resnet.fit(net, resnet.make_optimizer(net, args), small_data(), args, resnet.Run(), tmp_path, [], "",
               resnet.Autocast(net))
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert checkpoint(tmp_path)["model"].keys() == net.state_dict().keys()


@pytest.mark.parametrize(("device", "native"), [("cuda", True), ("cuda", False), ("cpu", True), ("cpu", False),
                                                ("mps", False)])
def test_bf16_is_the_default_where_it_is_native(device, native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native, "avx2": True})
    assert resnet.native_bf16(torch.device(device)) is native


def test_precision_is_kept_by_resume(tmp_path, capsys):
    argv = ["--dataset", "synthetic", "--depth", 8, "--batch-size", 4, "--eval-every", 1, "--output-dir", tmp_path]
    for precision, other in (("float32", "bf16"), ("bf16", "float32")):
        words = [*argv[:-1], tmp_path / precision]
        assert run(capsys, *words, "--iterations", 1, "--precision", precision)[0] == 0
        status, _, err = run(capsys, *words, "--iterations", 2, "--precision", other, "--resume")
        assert status == 2 and f"precision {precision}, not {other}" in err
        status, out, _ = run(capsys, *words, "--iterations", 2, "--resume")
        assert status == 0 and f"speed   {precision}" in out
        assert json.loads((tmp_path / precision / "run.json").read_text())["arguments"]["precision"] == precision
    status, out, _ = run(capsys, *argv[:-1], tmp_path / "bf16", "--test-only", "--precision", "float32")
    assert status == 0  # evaluation is in float32 in any case


@pytest.mark.parametrize("switch", [True, False])
def test_channels_last_is_a_switch(switch, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(resnet, "benchmark", lambda model, *_: seen.append(model))
    words = ["--benchmark", "--precision", "float32", *([] if switch else ["--no-channels-last"])]
    assert run(capsys, *words)[0] == 0
    weight = seen[0].stage2[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is switch


needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


@needs_compiler
def test_compiled_blocks_equal_eager_ones_and_share_their_code():
    """Of 26 layers, all blocks of a shape run the code that 14 layers have compiled: 5 pieces, as many as shapes."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data = small_data()
    data = data._replace(mean=data.mean.double())
    args = fast("--depth", 26, "--compile", "--batch-size", 8, "--precision", "float32", "--iterations", 4)
    net = resnet.ResNet(26).double().to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    torch.set_default_dtype(torch.float64)  # what is compiled holds for one default
    try:
        model, step, words = resnet.speed_up(net, args, torch.device("cpu"))
        pieces = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        ours, theirs = list(steps_of(net, data, args, model=model, step=step)), list(steps_of(other, data, args))
    finally:
        torch.set_default_dtype(torch.float32)
    assert "blocks compiled in" in words
    assert len(ours) == 4
    torch.testing.assert_close(ours, theirs)
    assert_alike(net.state_dict(), other.state_dict(), 1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == pieces == 5
    assert copy.deepcopy(net).state_dict().keys() == other.state_dict().keys()


def test_without_a_compiler_it_trains_all_the_same(tmp_path):
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = ["--dataset", "synthetic", "--depth", "8", "--iterations", "2", "--batch-size", "4", "--compile"]
    done = subprocess.run([sys.executable, PROGRAM, *words, "--output-dir", tmp_path / "run"], env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("speed") and "not compiled (" in line]
    assert "test error" in done.stdout.splitlines()[-1]


def test_graphed_step_does_each_iteration_once(monkeypatch):
    """With the CUDA calls replaced: a recording runs nothing, a replay runs the recorded step on what draws holds."""
    class Recording:
        def replay(self):
            draws, rate = self.recorded
            done.append((draws.tolist(), rate, "replayed"))

    class Stream:
        def wait_stream(self, other):
            pass

    class Recorder:
        def __init__(self, recording):
            self.recording = recording

        def __enter__(self):
            nonlocal recording
            recording = self.recording

        def __exit__(self, *_):
            nonlocal recording
            recording = None

    def step(net, optimizer, data, draws):
        rate = optimizer.param_groups[0]["lr"]
        if recording:
            recording.recorded = draws, rate
            recorded.append(rate)
        else:
            done.append((draws.tolist(), rate, "run"))
        return static

    recording, recorded, done, static = None, [], [], (torch.zeros(1), torch.ones(1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", Recorder)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(resnet, "step", step)
    args, data = recipe(iterations=20), small_data()
    net = nn.Linear(1, 1)
    results = list(steps_of(net, data, args, step=resnet.GraphedStep()))
    expected = list(itertools.islice(resnet.batches(40, 8, 0, "cpu"), 20))
    rates = [0.1] * 10 + [0.01] * 5 + [0.001] * 5
    assert [draws for draws, _, _ in done] == [draws.tolist() for draws in expected]
    assert [rate for _, rate, _ in done] == pytest.approx(rates)
    assert [how for _, _, how in done] == ["run"] * 3 + ["replayed"] * 17
    assert recorded == pytest.approx([0.1, 0.01, 0.001])
    assert not any(result is one for _, *results_of in results[3:] for result in results_of for one in static)


@needs_cuda
@pytest.mark.parametrize("argv", [["--no-compile"], ["--compile"], ["--compile", "--shortcut", "C"]], ids=" ".join)
def test_graphed_and_compiled_equal_eager(argv, monkeypatch):
    """40 iterations, in float32 with TF32 off, across both changes of the rate; without a wait from the fourth on."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    args = fast(*argv, "--depth", 14, "--batch-size", 32, "--precision", "float32", "--iterations", 40, "--lr", 0.01)
    data = on_cuda(small_data(count=1000))
    net = resnet.ResNet(14, shortcut=args.shortcut).cuda().to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    model, step, words = resnet.speed_up(net, args, torch.device("cuda"))
    assert words.endswith("CUDA graph") and "not compiled (" not in words
    optimizer, optimizer2 = resnet.make_optimizer(net, args), resnet.make_optimizer(other, args)
    ours = resnet.train(model, optimizer, data, args, resnet.Progress(), step)
    theirs = resnet.train(other, optimizer2, data, args, resnet.Progress())
    for k in range(40):
        quiet = 5 < k < 20 and k % 31  # between recordings; the draws of an epoch are copied once in 31 iterations
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        (_, loss, wrong) = next(ours)
        torch.cuda.set_sync_debug_mode("default")
        (_, loss2, wrong2) = next(theirs)
        torch.testing.assert_close(loss, loss2, rtol=1e-3, atol=1e-4)
        assert abs(wrong.item() - wrong2.item()) <= 1
    assert_alike(net.state_dict(), other.state_dict(), 1e-3)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        momentum, momentum2 = optimizer.state[p]["momentum_buffer"], optimizer2.state[q]["momentum_buffer"]
        assert (momentum - momentum2).abs().max() <= 0.02 * momentum2.abs().max()


def test_benchmark_needs_no_data_and_counts_its_arithmetic(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "--benchmark", "--depth", 8, "--batch-size", 32)
    assert status == 0 and not list(tmp_path.iterdir())
    ms, images, tflops = (float(word.replace(",", "")) for word in
                          re.search(r"([\d.]+) ms .*: ([\d,]+) images/s, ([\d.]+) TFLOP/s", out).groups())
    assert images == pytest.approx(32_000 / ms, rel=0.01)
    # Multiplications of an image forward: 3x3 convolutions in 32x32, 16x16 and 8x8 pixels, the linear layer.
    first = 9 * 3 * 16 * 32**2
    others = 2 * 9 * 16 * 16 * 32**2 + 9 * (16 * 32 + 32 * 32) * 16**2 + 9 * (32 * 64 + 64 * 64) * 8**2 + 64 * 10
    flop = 2 * (2 * first + 3 * others) * 32  # backward: again for the weights, and for the inputs but the first
    assert tflops == pytest.approx(flop / ms / 1e9, abs=0.001)
    assert "peak memory" in out


# ----- The program --------------------------------------------------------------------------------------------------


def script(monkeypatch, steps, errors=None):
    """Have train() yield steps, of (iteration, rate, loss, wrong answers), and evaluate() return errors, or 50."""
    def train(net, optimizer, data, args, progress, step):
        for iteration, rate, loss, wrong in steps:
            progress.iteration = iteration
            yield rate, torch.tensor(loss), torch.tensor(wrong)

    monkeypatch.setattr(resnet, "train", train)
    monkeypatch.setattr(resnet, "evaluate", lambda *_: next(errors) if errors else 50.0)


def fit(folder, *argv, net=None, data=None, caught=()):
    """fit() as run() calls it."""
    args = resnet.make_parser().parse_args([str(word) for word in argv])
    net = net or resnet.ResNet(8)
    return resnet.fit(net, resnet.make_optimizer(net, args), data or small_data(), args, resnet.Run(), folder,
                      caught, "python resnet.py --resume")


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_program_on_a_folder_then_test_only(tmp_path):
    """As a user runs it: training, its files, and the saved net evaluated again."""
    write_folder(tmp_path / "data")
    command = [sys.executable, PROGRAM, "--dataset", "folder", "--data-dir", tmp_path / "data", "--depth", "8",
               "--plain", "--batch-size", "5", "--device", "cpu"]
    done = subprocess.run([*command, "--iterations", "7", "--eval-every", "3"], cwd=tmp_path, check=False,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "runs" / "plain-8-folder"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "log.csv", "run.json"]
    for words in ("cpu", torch.__version__, "plain-8", "74,770 parameters", "12 training and 8 test", "2 classes"):
        assert words in done.stdout, words
    assert "\r" not in done.stdout and "the paper" not in done.stdout

    rows = rows_of(folder)
    assert [row["iteration"] for row in rows] == ["3", "6", "7"]
    assert [float(row["rate"]) for row in rows] == [0.1, 0.01, 0.001]
    last = f"{float(rows[-1]['test_error']):.2f} %"
    assert done.stdout.splitlines()[-1].startswith(f"plain-8: test error {last} after the last iteration")
    repeat = json.loads((folder / "run.json").read_text())
    assert repeat["arguments"]["depth"] == 8 and repeat["arguments"]["seed"] == 0
    assert f"torch {torch.__version__}" in repeat["versions"]

    again = subprocess.run([*command, "--test-only"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.splitlines()[-1] == f"plain-8, after 7 iterations: test error {last}"


def test_rows_hold_what_was_trained_and_evaluated(tmp_path, capsys, monkeypatch):
    """fit() fed with known losses, answers, errors and times: 5 iterations of 8 images, a row every 2."""
    steps = [(1, 0.1, 4.0, 8), (2, 0.1, 2.0, 4), (3, 0.01, 1.0, 3), (4, 0.01, 0.5, 1), (5, 0.001, 0.25, 2)]
    errors, seen, now, data = iter([30.0, 10.0, 20.0]), [], [0.0], small_data()

    def clock(steps):
        for step in steps:
            now[0] += 2.0
            yield step

    def evaluate(net, *inputs):
        now[0] += 100.0
        seen.append(inputs)
        return next(errors)

    script(monkeypatch, clock(steps))
    monkeypatch.setattr(resnet, "evaluate", evaluate)
    monkeypatch.setattr(resnet.time, "perf_counter", lambda: now[0])
    argv = ["--iterations", 5, "--batch-size", 8, "--eval-every", 2, "--val"]
    assert fit(tmp_path, *argv, data=data) == 20.0  # the last, not the best
    assert [[float(value) for value in row.values()] for row in rows_of(tmp_path)] == [
        [2, 0.1, 3.0, 75.0, 30.0, 4, 104], [4, 0.01, 0.75, 25.0, 10.0, 4, 208], [5, 0.001, 0.25, 25.0, 20.0, 4, 310]]
    assert list(rows_of(tmp_path)[0]) == ["iteration", "rate", "train_loss", "train_error", "val_error", "images_per_s",
                                          "seconds"]
    for inputs in seen:
        assert [id(t) for t in inputs] == [id(t) for t in (data.test_images, data.test_labels, data.mean)]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[-1] == ["5", "0.001", "0.2500", "25.00", "%", "20.00", "%", "4", "0:05:10"]
    saved = checkpoint(tmp_path)
    assert saved["progress"]["iteration"] == 5 and torch.equal(saved["mean"], data.mean)


@pytest.mark.parametrize("live", [False, True])
def test_lines_between_rows_tell_the_time_left(live, tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: live)

    def steps():
        for iteration in range(1, 101):
            now[0] += 12.0
            yield iteration, 0.1, 1.0, 4

    script(monkeypatch, steps())
    monkeypatch.setattr(resnet.time, "perf_counter", lambda: now[0])
    fit(tmp_path, "--iterations", 100, "--batch-size", 24, "--eval-every", 100)
    out = capsys.readouterr().out
    if live:  # each second, so at each iteration: over the line before, until the row stays
        lines = out.split("\r\033[K")
        assert len(lines) == 1 + 1 + 99 + 1 and out.count("\n") == 2 and out.endswith("0:20:00\n")
    else:
        lines = ["", *out.splitlines()]
        assert len(lines) == 1 + 1 + 33 + 1  # each 30 seconds, so at each third iteration
    third = lines[4] if live else lines[2]
    assert third.split() == ["3", "0.1", "1.0000", "16.67", "%", "2", "0:19:24", "left"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_before_the_net_is_saved(loss, tmp_path, capsys, monkeypatch):
    script(monkeypatch, [(i, 0.1, loss if i == 2 else 1.0, 1) for i in (1, 2, 3, 4)])
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, "--iterations", 4, "--eval-every", 1)
    assert end.value.code == 1
    assert f"not finite, at iteration 2 (loss {loss})" in capsys.readouterr().err
    assert checkpoint(tmp_path)["progress"]["iteration"] == 1
    assert [row["iteration"] for row in rows_of(tmp_path)] == ["1"]


def test_test_only_subtracts_the_mean_of_the_training(tmp_path, capsys, monkeypatch):
    argv = ["--dataset", "folder", "--depth", 8, "--output-dir", tmp_path / "run", "--data-dir"]
    run(capsys, *argv, write_folder(tmp_path / "data"), "--iterations", 2)
    mean = resnet.load_data("folder", tmp_path / "data", False, "cpu").mean
    seen, saved = [], checkpoint(tmp_path / "run")["model"]
    monkeypatch.setattr(resnet, "evaluate", lambda *inputs: seen.append(inputs) or 0.0)
    status, _, _ = run(capsys, *argv, write_folder(tmp_path / "more", train=9), "--test-only")
    assert status == 0 and torch.equal(seen[0][3], mean)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in seen[0][0].state_dict().items())
    assert not torch.equal(mean, resnet.load_data("folder", tmp_path / "more", False, "cpu").mean)


def test_interrupt_ends_quietly(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resnet, "load_data", interrupted)
    status, _, err = run(capsys, "--dataset", "synthetic")
    assert (status, err) == (130, "")


def test_saved_net_loads_into_a_bare_one(tmp_path, capsys):
    write_folder(tmp_path / "data", classes=("a", "b", "c"))
    run(capsys, "--dataset", "folder", "--data-dir", tmp_path / "data", "--depth", 8, "--shortcut", "B",
        "--iterations", 2, "--output-dir", tmp_path / "run")
    saved = checkpoint(tmp_path / "run")
    net = resnet.ResNet(8, shortcut="B", num_classes=3)
    net.load_state_dict(saved["model"])
    assert saved["mean"].shape == (3, 32, 32) and saved["classes"] == ["a", "b", "c"]


def test_same_seed_same_bits(tmp_path, capsys):
    write_folder(tmp_path / "data")
    results = []
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        run(capsys, "--dataset", "folder", "--data-dir", tmp_path / "data", "--depth", 8, "--iterations", 6,
            "--batch-size", 8, "--device", "cpu", "--output-dir", tmp_path / name, "--seed", seed)
        rows = [list(row.values())[:5] for row in rows_of(tmp_path / name)]
        results.append((rows, checkpoint(tmp_path / name)["model"]))
    (rows, one), (same_rows, two), (other_rows, _) = results
    assert rows == same_rows != other_rows
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_seed_decides_the_initial_weights(tmp_path, capsys):
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--depth", 8, "--iterations", 1,
            "--lr", 0]
    for seed in (5, 6):
        run(capsys, *argv, "--output-dir", tmp_path / f"{seed}", "--seed", seed)
    five, six = (checkpoint(tmp_path / f"{seed}")["model"] for seed in (5, 6))
    for name in five:
        if "conv" in name or name == "fc.weight":
            assert not torch.equal(five[name], six[name]), name


@pytest.mark.parametrize(("argv", "words"), [
    (["--depth", "57"], "56 and 62"),
    (["--depth", "0"], "8 and 14"),
    (["--depth", "-4"], "8 and 14"),
    (["--depth", "deep"], "--depth"),
    (["--depth", "60000002"], "--depth"),
    (["--iterations", "1" + "0" * 400], "--iterations"),
    (["--batch-size", "1000000"], "--batch-size"),
    (["--lr", "1e39"], "--lr"),
    (["--weight-decay", "1e39"], "--weight-decay"),
    (["--shortcut", "D"], "--shortcut"),
    (["--plain", "--shortcut", "B"], "--plain"),
    (["--dataset", "mnist"], "--dataset"),
    (["--iterations", "0"], "--iterations"),
    (["--batch-size", "0"], "--batch-size"),
    (["--batch-size", "2.5"], "--batch-size"),
    (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "inf"], "--lr"),
    (["--momentum", "1"], "--momentum"),
    (["--weight-decay", "-1e-4"], "--weight-decay"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "4294967296"], "--seed"),
    (["--eval-every", "0"], "--eval-every"),
    (["--dep", "20"], "--dep"),
    (["--device", "tpu"], "cuda, cuda:N, mps or cpu"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
    (["--test-only", "--output-dir", "nowhere"], "nowhere"),
])
def test_bad_arguments_are_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def break_missing_class(root):
    shutil.rmtree(root / "test" / "dog")


def break_empty_class(root):
    for path in (root / "train" / "dog").iterdir():
        path.unlink()


def spoil(image):
    return lambda root: image.save(root / "train" / "dog" / "3.png")


@pytest.mark.parametrize(("spoiler", "words"), [
    (break_missing_class, ["same classes", "dog"]),
    (break_empty_class, ["train", "dog"]),
    (lambda root: (root / "train" / "dog" / "3.png").write_text("woof"), ["dog/3.png", "image"]),
    (lambda root: (root / "train" / "dog" / "3.png").write_bytes(b""), ["dog/3.png", "image"]),
    (spoil(Image.new("RGB", (33, 32))), ["dog/3.png", "33x32", "32x32 RGB"]),
    (spoil(Image.new("L", (32, 32))), ["dog/3.png", "32x32 L", "32x32 RGB"]),
    (spoil(Image.new("RGBA", (32, 32))), ["dog/3.png", "RGBA", "32x32 RGB"]),
    (spoil(Image.new("I;16", (32, 32))), ["dog/3.png", "I;16", "32x32 RGB"]),
], ids=["missing class", "empty class", "text", "empty file", "size", "grey", "alpha", "16 bits"])
def test_bad_folders_are_one_line(spoiler, words, tmp_path, capsys):
    spoiler(write_folder(tmp_path / "data"))
    status, _, err = run(capsys, "--dataset", "folder", "--data-dir", tmp_path / "data",
                         "--output-dir", tmp_path / "run")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert all(word in err.replace("\\", "/") for word in words), err
    assert not (tmp_path / "run").exists()


def test_failed_download_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    status, _, err = run(capsys, "--depth", 56, "--plain", "--data-dir", tmp_path / "data",
                         "--output-dir", tmp_path / "run")
    assert status == 2
    assert len(err.splitlines()) == 1
    for word in ("urlopen error", "http://127.0.0.1:9/cifar-10-python.tar.gz", str(tmp_path / "data"),
                 "--dataset synthetic"):
        assert word in err
    assert not (tmp_path / "run").exists()


def test_val_needs_more_than_5000_images(tmp_path, capsys):
    status, _, err = run(capsys, "--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--val",
                         "--output-dir", tmp_path / "run")
    assert status == 2 and "5,000" in err and len(err.splitlines()) == 1


def test_a_run_is_not_overwritten_and_a_bad_folder_is_one_line(tmp_path, capsys):
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--depth", 8, "--iterations", 2]
    assert run(capsys, *argv, "--output-dir", tmp_path / "run")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    status, _, err = run(capsys, *argv, "--output-dir", tmp_path / "run")
    assert status == 2 and "already holds a run" in err and len(err.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    status, _, err = run(capsys, *argv, "--output-dir", tmp_path / "data" / "train" / "cat" / "0.png")
    assert status == 2 and "--output-dir" in err and len(err.splitlines()) == 1


def test_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--depth", 8, "--iterations", 9,
            "--output-dir", tmp_path / "run"]
    status, out, err = run(capsys, *argv, "--lr", "1e8", "--weight-decay", "1e8")
    assert status == 1
    assert len(err.splitlines()) == 1 and "loss" in err and "--lr" in err
    assert "after the last iteration" not in out
    before = (tmp_path / "run" / "run.json").read_bytes()
    status, _, err = run(capsys, *argv)  # a run that stopped is not overwritten either
    assert status == 2 and "already holds a run" in err
    assert before == (tmp_path / "run" / "run.json").read_bytes()


def test_weights_that_are_not_finite_stop_before_the_net_is_saved(tmp_path, capsys, monkeypatch):
    """A loss is of the weights before the step: it can be finite although the step broke the net."""
    net = resnet.ResNet(8)

    def steps():
        yield 1, 0.1, 1.0, 1
        net.fc.bias.data[3] = float("inf")
        yield 2, 0.1, 1.0, 1

    script(monkeypatch, steps())
    with pytest.raises(SystemExit):
        fit(tmp_path, "--iterations", 2, "--eval-every", 1, net=net)
    assert "weight that is not finite, at iteration 2" in capsys.readouterr().err
    assert checkpoint(tmp_path)["progress"]["iteration"] == 1


@pytest.mark.parametrize("content", [
    b"", b"no net", pickle.dumps({"model": 1}), [], torch.zeros(3), torchvision.models.resnet18().state_dict(),
    {"arguments": {"depth": 8, "plain": False, "shortcut": "A"}, "classes": ["cat", "dog"], "mean": 0, "model": {},
     "optimizer": {}, "progress": {}}, {"arguments": 8, "progress": []}], ids=lambda content: type(content).__name__)
def test_file_that_is_no_saved_net(content, tmp_path, capsys):
    if isinstance(content, bytes):
        (tmp_path / "checkpoint.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "checkpoint.pt")
    with warnings.catch_warnings(record=True) as caught:  # a warning would be a second line
        status, _, err = run(capsys, "--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--depth", 8,
                             "--test-only", "--output-dir", tmp_path)
    assert status == 2 and "checkpoint.pt is not a checkpoint" in err and len(err.splitlines()) == 1 and not caught


@pytest.fixture
def tf32():
    """TF32's switches, which are no ordinary attributes, are put back after the test."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize(("cuda", "mps", "best"), [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_best_device(cuda, mps, best, monkeypatch, tf32):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: Namespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert resnet.pick_device(None) == torch.device(best)


def test_a_cuda_device_is_the_current_one_and_without_tf32(monkeypatch, tf32):
    current = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: Namespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    resnet.pick_device("cpu")
    assert current == [] and torch.backends.cudnn.allow_tf32
    assert resnet.pick_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_code_in_a_saved_net_is_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "checkpoint.pt")
    status, _, err = run(capsys, "--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--depth", 8,
                         "--test-only", "--output-dir", tmp_path)
    assert status == 2 and "checkpoint.pt is not a checkpoint" in err and not Path("exploded").exists()


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB.\nmore", "can't allocate memory"])
def test_out_of_memory_is_one_line(message, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(message)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resnet, "load_data", full)
    status, _, err = run(capsys, "--dataset", "synthetic")
    assert status == 2 and "--batch-size" in err and len(err.splitlines()) == 1


def test_saved_net_is_not_taken_for_another(tmp_path, capsys):
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--output-dir", tmp_path / "run"]
    assert run(capsys, *argv, "--depth", 8, "--iterations", 2)[0] == 0
    for other in (["--depth", 14], ["--depth", 8, "--plain"], ["--depth", 8, "--shortcut", "C"],
                  ["--depth", 8, "--data-dir", write_folder(tmp_path / "other", classes=("cat", "fox"))],
                  ["--depth", 8, "--val", "--data-dir", write_folder(tmp_path / "many", train=2501)]):
        status, _, err = run(capsys, *argv, "--test-only", *other)
        assert status == 2 and "checkpoint.pt is of a" in err and len(err.splitlines()) == 1, other


@pytest.mark.parametrize(("argv", "shown"), [
    ([], "8.75 %"), (["--depth", 32], "7.51 %"), (["--depth", 44], "7.17 %"), (["--depth", 56], "6.97 %"),
    (["--depth", 110], "6.61 +/- 0.16 %"), (["--depth", 1202], "7.93 %"), (["--seed", 3], "8.75 %"),
    (["--plain"], None), (["--depth", 26], None), (["--val"], None), (["--shortcut", "B"], None),
    (["--dataset", "cifar100"], None), (["--iterations", 100], None), (["--batch-size", 64], None),
    (["--lr", 0.2], None), (["--momentum", 0.8], None), (["--weight-decay", 0], None), (["--warmup"], None),
    (["--depth", 110, "--no-warmup"], None)])
def test_paper_stands_only_beside_its_own_recipe(argv, shown, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resnet, "load_data", lambda *_: small_data())
    monkeypatch.setattr(resnet, "fit", lambda *_: 12.34)  # the training itself is not what is looked at here
    status, out, _ = run(capsys, *argv, "--output-dir", tmp_path)
    assert status == 0 and "12.34 %" in out
    assert ("the paper" in out) == (shown is not None) and (shown or "") in out
    assert ("validation error 12.34 %" in out) == ("--val" in argv)


def test_defaults_are_the_papers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resnet, "load_data", lambda *_: small_data())
    monkeypatch.setattr(resnet, "fit", lambda *inputs: seen.append(inputs[3]) or 50.0)
    seen = []
    run(capsys, "--output-dir", tmp_path)
    args = seen[0]
    assert (args.iterations, args.batch_size) == (64_000, 128)
    assert (args.lr, args.momentum, args.weight_decay) == (0.1, 0.9, 0.0001)
    assert (args.dataset, args.val, args.plain, args.shortcut) == ("cifar10", False, False, "A")


@pytest.mark.parametrize(("depth", "argv", "warmup"), [
    (104, [], False), (110, [], True), (1202, [], True), (20, ["--warmup"], True), (110, ["--no-warmup"], False)])
def test_warmup_is_for_110_layers_and_more_or_on_request(depth, argv, warmup, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(resnet, "load_data", lambda *_: small_data())
    monkeypatch.setattr(resnet, "fit", lambda *inputs: seen.append(inputs[3]) or 12.34)
    run(capsys, "--depth", depth, *argv, "--iterations", 45, "--output-dir", tmp_path)
    assert seen[0].warmup is warmup and seen[0].eval_every == 5
    assert json.loads((tmp_path / "run.json").read_text())["arguments"] == vars(seen[0])


@pytest.mark.parametrize(("argv", "folder"), [
    ([], "resnet-20"), (["--depth", 56, "--plain"], "plain-56"), (["--shortcut", "C"], "resnet-C-20"),
    (["--dataset", "synthetic", "--seed", 2], "resnet-20-synthetic-seed2"), (["--val"], "resnet-20-val")])
def test_default_folder_names_the_run(argv, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resnet, "load_data", lambda *_: small_data())
    monkeypatch.setattr(resnet, "fit", lambda *_: 12.34)
    run(capsys, *argv)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder]


# ----- Long runs: interruption and faults ---------------------------------------------------------------------------


def in_child(argv, output, limit):
    with open(output, "a") as sys.stdout:
        sys.stderr = sys.stdout
        torch.set_num_threads(1)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        resnet.main([str(word) for word in argv])


@pytest.fixture
def spawn(tmp_path):
    """Start the program in a process of its own, forked from one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def start(*argv, limit=None):
        child = context.Process(target=in_child, args=(argv, tmp_path / "output", limit))
        child.start()
        return child

    return start


def facts(folder):
    """All that must be the same in two runs: not the seconds and images/s, and where and how they were started."""
    saved = checkpoint(folder)
    rows = [list(row.values())[:5] for row in rows_of(folder)]
    assert rows == [[str(value) for value in row[:5]] for row in saved["progress"]["rows"]]
    del saved["progress"]["seconds"], saved["progress"]["rows"], saved["arguments"]["output_dir"]
    del saved["arguments"]["resume"]
    return rows, saved


def assert_same(one, other, where=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where} {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for k, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where} {k}")
    else:
        assert one == other, where


@pytest.fixture
def long_run(tmp_path):
    """Arguments of a run of about 4 seconds that warms up for a part of them."""
    names = [f"class{k:02d}" for k in range(12)]
    for part, k in itertools.product(("train", "test"), range(12)):
        (tmp_path / "data" / part / names[k]).mkdir(parents=True)
        for i in range(3):
            image = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(100 * k + i))
            Image.fromarray(image.byte().numpy()).save(tmp_path / "data" / part / names[k] / f"{i}.png")
    return ["--dataset", "folder", "--data-dir", tmp_path / "data", "--depth", 8, "--iterations", 700, "--batch-size",
            4, "--eval-every", 30, "--warmup", "--device", "cpu"]


def test_20_kills_change_nothing(long_run, spawn, tmp_path):
    """SIGKILL or SIGTERM at random moments; after each, the run goes on, and ends like one left alone."""
    child = spawn(*long_run, "--output-dir", tmp_path / "alone")
    child.join()
    assert child.exitcode == 0
    rows, expected = facts(tmp_path / "alone")
    assert [row[0] for row in rows] == [str(i) for i in [*range(30, 700, 30), 700]]
    assert [float(row[1]) for row in rows[:3]] == pytest.approx([0.01] * 3) and "0.1" in [row[1] for row in rows]
    chance, kills, finished, reached, midway = random.Random(0), 0, 0, 0, 0
    while kills < 20 or not finished:
        folder = tmp_path / f"killed{finished}"
        child = spawn(*long_run, "--output-dir", folder, "--resume")
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        child.join(chance.uniform(0.05, 0.9) if kills < 20 else None)
        if child.exitcode is None:
            os.kill(child.pid, number)
            child.join()
            kills += 1
            assert child.exitcode in (-number, 128 + number, 0)  # 0: at its last breath
        else:
            assert child.exitcode == 0
        if (folder / "checkpoint.pt").exists():
            iteration = checkpoint(folder)["progress"]["iteration"]
            assert iteration >= reached
            midway += 0 < iteration < 700
            reached = 0 if iteration == 700 else iteration
            if iteration == 700:
                child = spawn(*long_run, "--output-dir", folder, "--resume")
                child.join()
                assert child.exitcode == 0
                assert_same(facts(folder), (rows, expected))
                assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "log.csv", "run.json"]
                finished += 1
    assert midway >= 10  # or it was killed before it had begun


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_tell_how_to_go_on(number, status, tmp_path, capsys, monkeypatch):
    def steps():
        yield 1, 0.1, 3.0, 1
        os.kill(os.getpid(), number)
        yield 2, 0.1, 2.0, 1
        raise AssertionError("went on")

    script(monkeypatch, steps())
    monkeypatch.setattr(resnet, "load_data", lambda *_: small_data())
    monkeypatch.setattr(sys, "argv", ["resnet.py"])
    ended, _, err = run(capsys, "--depth", 8, "--eval-every", 5, "--output-dir", tmp_path / "a run")
    assert ended == status
    assert err == (f"resnet.py: stopped by {number.name}; iteration 2 of 64,000 is saved. To go on: python resnet.py "
                   f"--depth 8 --eval-every 5 --output-dir '{tmp_path}/a run' --resume\n")
    progress = checkpoint(tmp_path / "a run")["progress"]
    assert (progress["iteration"], progress["loss"], progress["wrong"], progress["rows"]) == (2, 5.0, 2, [])
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize("last", [False, True])
def test_signal_while_evaluating(last, tmp_path, capsys, monkeypatch):
    """The evaluation comes to its end, and its row is saved; after the last one the run is complete."""
    script(monkeypatch, [(1, 0.1, 1.0, 1), (2, 0.1, 1.0, 1)][:1 if last else 2])
    monkeypatch.setattr(resnet, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 50.0)
    monkeypatch.setattr(resnet, "load_data", lambda *_: small_data())
    argv = ["--depth", 8, "--iterations", 1 if last else 2, "--eval-every", 1, "--output-dir", tmp_path]
    status, out, err = run(capsys, *argv)
    assert status == 143 and [row["iteration"] for row in rows_of(tmp_path)] == ["1"]
    assert ("after the last iteration" in out, "--resume" in err) == (last, not last)


def test_full_disk_keeps_the_last_checkpoint(long_run, spawn, tmp_path):
    argv = [*long_run, "--iterations", 90]
    for name, limit in (("alone", None), ("full", 450_000)):  # enough for the first checkpoint, without momentum
        child = spawn(*argv, "--output-dir", tmp_path / name, limit=limit)
        child.join()
        assert child.exitcode == (1 if limit else 0)
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert "checkpoint.pt cannot be written: File too large; the last checkpoint is kept" in last and "--resume" in last
    assert checkpoint(tmp_path / "full")["progress"]["iteration"] == 0
    assert not list((tmp_path / "full").glob("*.new"))
    child = spawn(*argv, "--output-dir", tmp_path / "full", "--resume")
    child.join()
    assert_same(facts(tmp_path / "full"), facts(tmp_path / "alone"))


@pytest.fixture
def short_run(tmp_path, capsys):
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--depth", 8, "--output-dir",
            tmp_path / "run", "--iterations", 4, "--eval-every", 2, "--batch-size", 6]
    assert run(capsys, *argv)[0] == 0
    return argv


@pytest.mark.parametrize(("change", "words"), [
    (["--depth", 14], "depth 8, not 14"), (["--plain"], "plain False, not True"),
    (["--shortcut", "B"], "shortcut A, not B"), (["--dataset", "synthetic"], "dataset folder, not synthetic"),
    (["--batch-size", 12], "batch_size 6, not 12"), (["--seed", 1], "seed 0, not 1"), (["--lr", 1], "lr 0.1, not 1.0"),
    (["--momentum", 0], "momentum 0.9, not 0.0"), (["--weight-decay", 0], "weight_decay 0.0001, not 0.0"),
    (["--warmup"], "warmup False, not True"), (["--val"], "val False, not True"),
    (["--depth", 14, "--seed", 1], "depth 8, not 14; seed 0, not 1"), (["--iterations", 3], "has 4 iterations")])
def test_resuming_another_run_is_refused(change, words, short_run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    status, out, err = run(capsys, *short_run, *change, "--resume")
    assert (status, out) == (2, "") and words in err and len(err.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_resuming_with_other_images_is_refused(short_run, tmp_path, capsys):
    for change in ({"train": 7}, {"classes": ("cat", "fox")}):
        root = write_folder(tmp_path / str(change), **change)
        status, _, err = run(capsys, *short_run, "--data-dir", root, "--resume", "--iterations", 8)
        assert status == 2 and len(err.splitlines()) == 1
        assert "other images" in err if "train" in change else "the classes cat, dog, not cat, fox" in err


def test_finished_run_says_so_and_mends_its_log(short_run, tmp_path, capsys):
    before = checkpoint(tmp_path / "run")
    log = (tmp_path / "run" / "log.csv").read_text()
    (tmp_path / "run" / "log.csv").write_text(log[:-9] + "\nrubbish")
    shutil.rmtree(tmp_path / "data")  # not needed any more
    at = short_run.index("--iterations")
    status, out, _ = run(capsys, *short_run[:at], *short_run[at + 2:], "--resume")
    assert status == 0 and "has finished" in out and "after the last of 4 iterations" in out
    assert (tmp_path / "run" / "log.csv").read_text() == log
    assert_same(checkpoint(tmp_path / "run"), before)


def test_more_iterations_go_on_by_their_own_schedule(short_run, tmp_path, capsys):
    status, out, _ = run(capsys, *short_run, "--iterations", 12, "--resume")
    assert status == 0 and "on from iteration 4" in out
    rows = rows_of(tmp_path / "run")
    assert [int(row["iteration"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    # 4 iterations: drops at 2 and 3. From there on 12 iterations: drops at 6 and 9.
    assert [float(row["rate"]) for row in rows] == pytest.approx([0.1, 0.001, 0.1, 0.01, 0.001, 0.001])
    assert checkpoint(tmp_path / "run")["progress"]["planned"] == [4, 12]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["iterations"] == 12


def test_extended_run_is_not_the_papers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resnet, "load_data", lambda *_: small_data())
    script(monkeypatch, [(500, 0.1, 1.0, 1)])
    run(capsys, "--iterations", 1000, "--output-dir", tmp_path)
    script(monkeypatch, [(64_000, 0.1, 1.0, 1)])
    status, out, _ = run(capsys, "--iterations", 64_000, "--output-dir", tmp_path, "--resume")
    assert status == 0 and "the paper" not in out


def test_resume_with_nothing_there_begins(tmp_path, capsys):
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--depth", 8, "--iterations", 2,
            "--output-dir", tmp_path / "run", "--resume"]
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "on from" not in out and len(rows_of(tmp_path / "run")) == 2
    (tmp_path / "run" / "checkpoint.pt").unlink()
    status, _, err = run(capsys, *argv)
    assert status == 2 and "no checkpoint.pt" in err and len(rows_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("spoil", ["truncated", "empty", "bomb", "fifo", "folder"])
def test_bad_checkpoint_is_one_line_and_stays(spoil, short_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    path.unlink()
    if spoil == "bomb":
        torch.save({"arguments": Bomb(), "progress": Bomb()}, path)
    elif spoil == "fifo":
        os.mkfifo(path)
    elif spoil == "folder":
        path.mkdir()
    else:
        path.write_bytes(content[:len(content) // 2] if spoil == "truncated" else b"")
    status, _, err = run(capsys, *short_run, "--resume")
    assert status == 2 and str(path) in err and len(err.splitlines()) == 1 and not Path("exploded").exists()
    assert len(rows_of(tmp_path / "run")) == 2


def test_closed_output_ends_with_one_line(short_run, tmp_path):
    """As with `| head`: nobody reads on."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, PROGRAM, *short_run[:-6], "--output-dir", tmp_path / "other"]
    done = subprocess.run([str(word) for word in command], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1 and "--resume" in done.stderr and len(done.stderr.splitlines()) == 1


# ----- Several processes --------------------------------------------------------------------------------------------


def torchrun(folder, program, *argv):
    """Two processes on this machine's CPU: (exit status, standard output, lines of resnet.py on standard error)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", program, *argv]
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(PROGRAM.parent), "OMP_NUM_THREADS": "1"}, timeout=120)
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.startswith("resnet.py:")]


WORKER = """
import sys, torch, resnet, test_resnet
resnet.join()
net, losses, error = test_resnet.frozen_steps()
if torch.distributed.get_rank() == 0:
    torch.save((net.state_dict(), losses, error), sys.argv[1])
torch.distributed.destroy_process_group()
"""


def frozen_steps():
    """Five steps of a net whose BN is in evaluation mode, and an evaluation."""
    torch.manual_seed(0)
    net = noisy(resnet.ResNet(8)).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().train = lambda mode: None
    data = small_data(count=503)
    data = data._replace(mean=data.mean.double())
    args = recipe(iterations=5, lr=1e-3)
    model = nn.parallel.DistributedDataParallel(net) if torch.distributed.is_initialized() else net
    progress = resnet.Progress()
    steps = [(loss, wrong) for _, loss, wrong in resnet.train(model, resnet.make_optimizer(net, args), data, args,
                                                              progress)]
    return net, steps, resnet.evaluate(net, data.test_images, data.test_labels, data.mean)


def test_two_processes_equal_one(tmp_path):
    """With BN's statistics fixed, the gradients of two halves of a batch are those of the whole."""
    (tmp_path / "worker.py").write_text(WORKER)
    status, _, _ = torchrun(tmp_path, "worker.py", "out.pt")
    assert status == 0
    state, steps, error = torch.load(tmp_path / "out.pt", weights_only=True)
    net, expected, expected_error = frozen_steps()
    assert error == expected_error
    for (loss, wrong), (expected_loss, expected_wrong) in zip(steps, expected, strict=True):
        torch.testing.assert_close(loss, expected_loss)
        assert wrong == expected_wrong
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-10, atol=1e-12)


KILLER = """
import os, signal, sys, torch, resnet
victim, real, calls = int(sys.argv.pop(1)), resnet.evaluate, []
def evaluate(*inputs):
    calls.append(1)
    if len(calls) == 3 and torch.distributed.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*inputs)
resnet.evaluate = evaluate
resnet.main()
"""


def test_two_processes_survive_the_loss_of_one(tmp_path):
    """A killed process ends the other, with one line; the run resumes, and ends like one left alone."""
    (tmp_path / "killer.py").write_text(KILLER)
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data", train=9, test=5), "--depth", 8,
            "--iterations", 12, "--eval-every", 2, "--batch-size", 6, "--device", "cpu", "--output-dir"]
    status, out, err = torchrun(tmp_path, PROGRAM, *argv, "alone")
    assert (status, err) == (0, []) and "2 processes" in out and out.count("after the last iteration") == 1
    for victim in (0, 1):
        status, out, err = torchrun(tmp_path, "killer.py", victim, *argv, f"{victim}", "--resume")
        assert status != 0 and len(err) == 1 and "another process has ended" in err[0] and "--resume" in err[0]
        assert len(rows_of(tmp_path / f"{victim}")) == 2
    status, out, err = torchrun(tmp_path, PROGRAM, *argv, "1", "--resume")
    assert (status, err) == (0, []) and "on from iteration 4" in out
    assert_same(facts(tmp_path / "1"), facts(tmp_path / "alone"))


def test_errors_of_several_processes_are_one_line(tmp_path):
    for argv, words in ((["--batch-size", 7], "split evenly among 2"), (["--data-dir", "no"], "train/<class>")):
        status, _, err = torchrun(tmp_path, PROGRAM, "--dataset", "folder", "--device", "cpu", *argv)
        assert status != 0 and len(err) == 1 and words in err[0]


# ----- The files ----------------------------------------------------------------------------------------------------


def write_run(folder, errors, asked=None, parameters=269_722, hardware="2 threads", **changes):
    """A run's folder, made without the program: errors are (iteration, training error, test error)."""
    folder.mkdir(parents=True)
    asked = asked or errors[-1][0]
    arguments = {"depth": 20, "plain": False, "shortcut": "A", "dataset": "cifar10", "val": False, "batch_size": 128,
                 "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "warmup": False, "seed": 0, "precision": "bf16",
                 "processes": 1, "iterations": asked, **changes}
    facts = {"arguments": arguments, "planned": [asked], "hardware": hardware, "parameters": parameters}
    (folder / "run.json").write_text(json.dumps(facts))
    lines = ["iteration,rate,train_loss,train_error,test_error,images_per_s,seconds"]
    lines += [f"{i},0.1,1.5,{train},{test},100,{i // 100}" for i, train, test in errors]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


def test_report_is_a_line_for_the_seeds_of_a_net(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed, (train, test) in enumerate([(1.0, 8.0), (2.0, 9.0), (3.0, 8.5)]):
        write_run(tmp_path / f"a{seed}", [(32_000, 20.0, 22.0), (64_000, train, test)], seed=seed)
    write_run(tmp_path / "b", [(64_000, 3.0, 9.75)], plain=True)
    write_run(tmp_path / "c", [(500, 50.0, 55.5)], asked=64_000, depth=56)
    write_run(tmp_path / "d", [(2000, 40.0, 42.25)], dataset="folder", data_dir="some", seed=7)
    write_run(tmp_path / "g", [(2000, 40.0, 12.25)], dataset="folder", data_dir="others", seed=8)
    write_run(tmp_path / "h", [(64_000, 4.0, 6.25)], processes=2, seed=9)
    write_run(tmp_path / "deep" / "e", [(64_000, 4.0, 6.5)], depth=110, warmup=True, precision="float32")
    write_run(tmp_path / "f", [(64_000, 4.0, 6.6)], depth=110, lr=0.05, val=True)
    write_run(tmp_path / "same", [(64_000, 4.0, 1.0)], seed=0)  # of the seed of a0: no evidence of its own
    status, out, err = run(capsys, "--report", tmp_path)
    assert (status, err) == (0, "")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    two = [row for row in table if row[-1] == "2 x 2 threads"]  # BN of half a batch each is another experiment
    assert [row[5] for row in two] == ["6.25 %"]
    table = {(row[0], row[2]): row[1:] for row in table[2:] if row not in two}
    assert len(table) == 7
    row = table["ResNet-20, option A", "as in the paper"]
    # Mean 8.5 and, by hand, the root of (0.25 + 0.25 + 0) / 2.
    assert row[2:7] == ["bf16", "2.00 ± 1.00 % (n = 3)", "8.50 ± 0.50 % (n = 3)", "8.75 %", "0:10:40"]
    assert table["plain-20", "as in the paper"][4:6] == ["9.75 %", ""]
    assert table["ResNet-56, option A", "unfinished, 500 of 64,000"][4:6] == ["55.50 %", ""]
    assert table["ResNet-20, option A", "images of some, 2,000 iterations"][4:6] == ["42.25 %", ""]
    assert table["ResNet-20, option A", "images of others, 2,000 iterations"][4:6] == ["12.25 %", ""]
    assert table["ResNet-110, option A", "as in the paper"][5].startswith("6.43 %")
    assert table["ResNet-110, option A", "tested on --val images, lr 0.05, without warm-up"][5] == ""
    assert f"left out: {tmp_path / 'same'}: the same seed as {tmp_path / 'a0'}" in out
    with Image.open(tmp_path / "fig6.png") as image:
        assert image.size == (1200, 500)


def test_report_draws_figure_6(tmp_path, capsys, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    write_run(tmp_path / "a", [(32_000, 30.0, 22.0), (64_000, 1.0, 8.0)])
    write_run(tmp_path / "b", [(500, 50.0, 55.5)], asked=64_000, plain=True)
    write_run(tmp_path / "c", [(64_000, 2.0, 7.0)], depth=56)
    assert run(capsys, "--report", tmp_path)[0] == 0
    plain, residual = pyplot.gcf().axes
    assert [plain.get_title(), residual.get_title()] == ["plain", "residual"]
    assert plain.get_ylim() == residual.get_ylim()
    training, test = residual.lines[:2]
    assert (training.get_linestyle(), list(training.get_ydata())) == ("--", [30.0, 1.0])
    assert (test.get_linestyle(), list(test.get_ydata()), list(test.get_xdata())) == ("-", [22.0, 8.0], [32e3, 64e3])
    assert test.get_linewidth() > training.get_linewidth()
    assert test.get_color() == training.get_color() == plain.lines[0].get_color() != residual.lines[2].get_color()
    assert [text.get_text() for text in plain.get_legend().texts] == ["plain-20, unfinished, 500 of 64,000, bf16"]
    pyplot.close("all")


def test_figure_6_tells_apart_the_nets_of_a_depth(tmp_path, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    write_run(tmp_path / "a", [(64_000, 1.0, 8.0)])
    write_run(tmp_path / "b", [(64_000, 1.0, 8.0)], precision="float32")
    write_run(tmp_path / "c", [(64_000, 1.0, 8.0)], shortcut="B")
    write_run(tmp_path / "d", [(64_000, 1.0, 8.0)], depth=56)
    write_run(tmp_path / "e", [(64_000, 1.0, 8.0)], depth=56, hardware="another")
    assert run(capsys, "--report", tmp_path)[0] == 0
    residual = pyplot.gcf().axes[1]
    assert len({line.get_color() for line in residual.lines}) == 5
    labels = [text.get_text() for text in residual.get_legend().texts]
    assert len(set(labels)) == 5 and "ResNet-20, option A, float32, 2 threads" in labels
    pyplot.close("all")


def test_a_figure_that_cannot_be_written_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "a", [(64_000, 4.0, 8.0)])
    (tmp_path / "fig6.png").mkdir()
    status, out, err = run(capsys, "--report", tmp_path)
    assert status == 2 and "fig6.png cannot be written" in err and err.count("\n") == 1
    assert "| 8.00 % |" in out


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "log.csv").unlink(), lambda folder: (folder / "log.csv").write_text(""),
    lambda folder: (folder / "log.csv").write_text("iteration,rate\n"),
    lambda folder: (folder / "log.csv").write_bytes(b"a,b,c,d,e,f,g\n1,2,3,\xff\x00"),
    lambda folder: (folder / "log.csv").write_text("a,b,c,d,e,f,g\n1,0.1,nan,nan,1,1,1\n"),
    lambda folder: (folder / "log.csv").write_text("a,b,c,d,e,f,g\n1,0.1,1,2\n"),
    lambda folder: (folder / "run.json").write_text(""), lambda folder: (folder / "run.json").write_text("[]"),
    lambda folder: (folder / "run.json").write_text('{"arguments": {}, "planned": []}'),
    lambda folder: ((folder / "run.json").unlink(), (folder / "run.json").mkdir())],
    ids=["no log", "empty log", "no rows", "bytes", "nan", "torn", "empty", "list", "little", "folder"])
def test_report_leaves_out_what_it_cannot_read(spoil, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "bad", [(64_000, 3.0, 9.0)])
    write_run(tmp_path / "good", [(64_000, 4.0, 8.0)])
    spoil(tmp_path / "bad")
    status, out, err = run(capsys, "--report", tmp_path)
    assert (status, err) == (0, "")
    assert len([line for line in out.splitlines() if line.startswith("| ResNet-20, option A |")]) == 1
    assert [line for line in out.splitlines() if line.startswith(f"left out: {tmp_path / 'bad'}: ")]


def test_report_without_runs_or_matplotlib_is_one_line(tmp_path, capsys, monkeypatch):
    for folder, words in ((tmp_path, "no run to show"), (tmp_path / "none", "is not a folder")):
        status, _, err = run(capsys, "--report", folder)
        assert status == 2 and words in err and err.count("\n") == 1
    write_run(tmp_path / "a", [(64_000, 4.0, 8.0)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    status, out, err = run(capsys, "--report", tmp_path)
    assert status == 2 and "pip install matplotlib" in err and err.count("\n") == 1
    assert "| 8.00 % |" in out


def test_report_reads_what_a_run_writes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        run(capsys, "--dataset", "synthetic", "--depth", 8, "--iterations", 4, "--batch-size", 8, "--seed", seed,
            "--output-dir", tmp_path / f"{seed}")
    rows = [rows_of(tmp_path / f"{seed}")[-1] for seed in (0, 1)]
    mean = sum(float(row["test_error"]) for row in rows) / 2
    _, out, _ = run(capsys, "--report", tmp_path)
    assert f"{mean:.2f} ± " in out and "| synthetic data, 4 iterations, batch size 8 |" in out


def test_imports_at_the_top_are_torch_torchvision_and_the_standard_library():
    for node in ast.parse(PROGRAM.read_text(encoding="utf-8")).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            assert top in {"torch", "torchvision"} or top in sys.stdlib_module_names, name


def test_commands_of_the_readme_are_ones_that_the_program_takes():
    text = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")
    commands = [line.split("#")[0].split("resnet.py")[1].split() for line in text.splitlines()
                if "python resnet.py" in line and line.startswith("python")]
    assert len(commands) >= 6
    for command in commands:
        resnet.blocks_per_stage(resnet.make_parser().parse_args(command).depth)
