# SPDX-License-Identifier: MIT
"""Tests of resnet.py: `python -m pytest`. They need no GPU and no download.

Results are compared with something that does not come from resnet.py: the paper's numbers,
arithmetic written out by hand, torchvision, or a loop over single images and pixels.
"""

import copy
import errno
import functools
import hashlib
import io
import itertools
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import symtable
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import resnet

PROGRAM = Path(resnet.__file__)
SOURCE = PROGRAM.read_text(encoding="utf-8")
README = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")


def split(argv):
    """Return the words of a command line, given as strings of several words and as paths."""
    parts = [part.split() if isinstance(part, str) else [str(part)] for part in argv]
    return list(itertools.chain(*parts))


def run(capsys, *argv):
    """Run the program in this process: (exit status, stdout, stderr)."""
    status = None
    try:
        resnet.main(split(argv))
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    if isinstance(status, str):  # Python would print it and exit with 1
        return 1, out, err + status
    return status or 0, out, err


def refusal(capsys, *argv):
    """Run the program, which must stop with status 2 and one line on stderr. Return this line."""
    status, _, err = run(capsys, *argv)
    assert status == 2 and len(err.splitlines()) == 1, err
    return err


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def conditions_of(option):
    """The two arguments of ResNet() for "plain", "A", "B" or "C"."""
    return {"plain": option == "plain", "shortcut": option.replace("plain", "A")}


def net_of(depth, option):
    return resnet.ResNet(depth, **conditions_of(option))


def noisy(net):
    """net with BN's tensors drawn at random: zeros and ones would hide mistakes."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return net


def is_layer(module):
    return isinstance(module, nn.Conv2d | nn.Linear)


def layers_and_parameters(net):
    """How many there are. The paper does not count projections as layers."""
    layers = [name for name, m in net.named_modules() if is_layer(m) and "shortcut" not in name]
    return len(layers), sum(p.numel() for p in net.parameters())


def small_data(count=40, dtype=torch.float32):
    """A resnet.Data of noise: so many images to train on, and as many to test on."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, count, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(10, (2, count), generator=g)
    mean = (images[0].double().mean(dim=0) / 255).to(dtype)
    return resnet.Data(images[0], labels[0], images[1], labels[1], mean, list("abcdefghij"))


def write_folder(root, classes=("cat", "dog"), train=6, test=4):
    """A tiny data set for --dataset folder, easy to learn: one colour a class."""
    for part, count in (("train", train), ("test", test)):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (32, 32), (100 * k + i, 50, 200 - 100 * k))
                image.save(root / part / name / f"{i}.png")
    return root


def watch(net, data, recipe, propagate=resnet.forward_backward, ends=(), warming_up=False):
    """Train net up to each of ends: what train() returns, and each step's (rate, loss, wrong)."""
    optimizer = resnet.make_optimizer(net, recipe)
    results, steps = [], []

    def note(net, images, labels):
        loss, wrong = propagate(net, images, labels)
        steps.append((optimizer.param_groups[0]["lr"], loss, wrong))
        return loss, wrong

    start = 0
    for stop in ends or [None]:
        results.append(resnet.train(net, optimizer, data, recipe, start, stop, warming_up, note))
        warming_up = results[-1][-1]
        start = stop
    return results, steps


# ----- The nets (sections 3 and 4.2) --------------------------------------------------------------


def convolution_bn(x, convolution, bn, stride=1):
    """Both from their weights: BN by formulas, in training mode from the batch's statistics."""
    y = F.conv2d(x, convolution.weight, stride=stride, padding=convolution.weight.shape[-1] // 2)
    mean, variance = bn.running_mean, bn.running_var
    if bn.training:
        mean, variance = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), correction=0)
    scale, shift, mean, variance = (t[:, None, None] for t in (bn.weight, bn.bias, mean, variance))
    return (y - mean) / (variance + 1e-5).sqrt() * scale + shift


def by_hand(block, x, stride, option):
    y = convolution_bn(x, block.conv1, block.bn1, stride)
    y = convolution_bn(y.relu(), block.conv2, block.bn2)
    if isinstance(block, resnet.BottleneckBlock):
        y = convolution_bn(y.relu(), block.conv3, block.bn3)
    if option == "C" or (option == "B" and x.shape != y.shape):
        y = y + convolution_bn(x, block.shortcut.conv, block.shortcut.bn, stride)
    elif option is not None:
        shortcut = torch.zeros_like(y)
        first = (y.shape[1] - x.shape[1]) // 2
        shortcut[:, first : first + x.shape[1]] = x[:, :, ::stride, ::stride]
        y = y + shortcut
    return y.relu()


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 16, 2), (8, 16, 1), (8, 8, 2), (3, 8, 2)])
@pytest.mark.parametrize("option", ["A", "B", "C", None])
@pytest.mark.parametrize("kind", [resnet.ResidualBlock, resnet.BottleneckBlock])
def test_block_equals_the_block_written_out(kind, option, shape):
    torch.manual_seed(0)
    block = noisy(kind(*shape, option)).double()
    x = torch.randn(4, shape[0], 9, 7, dtype=torch.double, requires_grad=True)
    y, expected = block(x), by_hand(block, x, shape[2], option)
    assert_close(y, expected)
    weight = torch.randn_like(y)
    inputs = [x, *block.parameters()]
    ours, theirs = (torch.autograd.grad((z * weight).sum(), inputs) for z in (y, expected))
    assert_close(ours, theirs)


@pytest.mark.parametrize("plain", [False, True])
def test_net_equals_the_net_written_out(plain):
    torch.manual_seed(0)
    net = noisy(resnet.ResNet(20, plain=plain)).double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.double)
    x = convolution_bn(images, net.conv1, net.bn1).relu()
    for k, block in enumerate([*net.stage1, *net.stage2, *net.stage3]):
        x = by_hand(block, x, 2 if k in (3, 6) else 1, None if plain else "A")
    assert_close(net(images), F.linear(x.mean(dim=(2, 3)), net.fc.weight, net.fc.bias))


@pytest.mark.parametrize(("first", "last"), [("# ----- 1.", "# ----- 2."), ("", "# ----- 5.")])
def test_part_1_and_parts_1_to_4_define_every_name_they_use(first, last):
    text = SOURCE[SOURCE.index(first) : SOURCE.index(last)]
    space = {"__name__": "part", "torch": torch, "nn": nn}
    exec(text, space)
    tables = [symtable.symtable(text, "part", "exec")]
    for table in tables:  # this list grows
        tables.extend(table.get_children())
    symbols = [symbol for table in tables for symbol in table.get_symbols()]
    names = {s.get_name() for s in symbols if s.is_global() and not s.is_assigned()}
    assert "make_shortcut" in names and not names - {*space, *space["__builtins__"]}


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
    assert layers_and_parameters(net) == (depth, expected)


@pytest.mark.parametrize("make", [lambda: net_of(56, "B"), lambda: resnet.ImageNetResNet(50)])
def test_he_initialisation(make):
    torch.manual_seed(0)
    net = make()
    for module in filter(is_layer, net.modules()):
        z = module.weight.detach() / (2 / module.weight[0].numel()) ** 0.5
        five_errors = 5 / z.numel() ** 0.5
        assert abs(z.std() - 1) < five_errors and abs(z.mean()) < five_errors, module
    assert not net.fc.bias.any()


def test_bad_depths_and_shortcuts_are_refused():
    for depth, nearest in {57: "56 and 62", 21: "20 and 26", -4: "8 and 14"}.items():
        with pytest.raises(ValueError, match=f"{nearest}$"):
            resnet.ResNet(depth)
    for depth, plain in ((57, False), (-4, False), (50, True)):
        words = f"18, 34, 50, 101 or 152, and 18 or 34 if plain, not {depth}"
        with pytest.raises(ValueError, match=words):
            resnet.ImageNetResNet(depth, plain)
    with pytest.raises(ValueError, match="ProjectionShortcut"):
        resnet.IdentityShortcut(32, 16)
    with pytest.raises(ValueError, match="'D'"):
        resnet.ResidualBlock(16, 16, shortcut="D")


@pytest.mark.parametrize("kind", [resnet.ResNet, resnet.ImageNetResNet])
@pytest.mark.parametrize("option", ["plain", "A", "C"])
def test_nets_pickle_copy_export_and_load(option, kind):
    torch.manual_seed(0)
    depth = 8 if kind is resnet.ResNet else 34 if option == "plain" else 50
    net, other = (noisy(kind(depth, **conditions_of(option))).eval() for _ in range(2))
    x = torch.randn(2, 3, 32, 32)
    y = net(x)
    other.load_state_dict(net.state_dict())
    for twin in (other, pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert torch.equal(twin(x), y)
    assert_close(torch.export.export(net, (x,)).module()(x), y)
    names = {key.split(".")[0] for key in net.state_dict()}
    assert names - {"stage4"} == {"conv1", "bn1", "stage1", "stage2", "stage3", "fc"}


# Depths, parameters, and Table 1's billions of multiply-adds.
IMAGENET = {18: (11_689_512, 1.8), 34: (21_797_672, 3.6), 50: (25_557_032, 3.8)}
IMAGENET |= {101: (44_549_160, 7.6), 152: (60_192_808, 11.3)}


@pytest.mark.parametrize("depth", IMAGENET)
def test_imagenet_nets_are_those_of_table_1_and_of_torchvision(depth):
    parameters, multiply_adds = IMAGENET[depth]
    torch.manual_seed(0)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = resnet.ImageNetResNet(depth)
        net(torch.empty(1, 3, 224, 224))
    assert layers_and_parameters(net) == (depth, parameters)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.02)
    theirs = noisy(getattr(torchvision.models, f"resnet{depth}")(num_classes=7)).double().eval()
    ours = resnet.ImageNetResNet(depth, num_classes=7).double().eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    for module in theirs.modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck):  # it strides in the 3x3
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    images = torch.randn(2, 3, 75, 64, dtype=torch.double)
    assert_close(ours(images), theirs(images))


# ----- Section 4.2: the data and the recipe, and their speed --------------------------------------


def test_augment_equals_a_loop_over_all_crops_and_flips():
    cases = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    images = torch.rand(len(cases), 3, 32, 32) + 1  # no pixel looks like the padding
    ours = resnet.augment(images, *cases.T)
    for image, (dy, dx, flip), result in zip(images, cases.tolist(), ours, strict=True):
        padded = torchvision.transforms.functional.pad(image, [4])
        expected = padded[:, dy : dy + 32, dx : dx + 32]
        if flip:
            expected = torchvision.transforms.functional.hflip(expected)
        assert torch.equal(result, expected)


def test_draws_reach_every_crop_and_flip_evenly_and_depend_on_seed_and_epoch():
    index, dy, dx, flip = resnet.draw_epoch(81 * 2 * 100, 3, 5, "cpu")
    counts = torch.bincount((dy * 9 + dx) * 2 + flip, minlength=162)
    assert len(counts) == 162 and counts.min() > 50 and counts.max() < 150  # 5 deviations from 100
    assert torch.equal(index, resnet.draw_epoch.__wrapped__(16_200, 3, 5, "cpu")[0])  # not cached
    keys = itertools.product((0, 1, 2, 256, 2**16, 2**32 - 1), (0, 1, 2, 256, 2**16, 2**24))
    draws = torch.stack([resnet.draw_epoch(50, *key, "cpu") for key in keys])
    assert all(len(draws[:, row].unique(dim=0)) == 36 for row in range(4))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 5), (3, 8), (7, 7), (50, 1)])
def test_no_image_is_dropped_or_repeated_within_an_epoch(count, batch_size):
    epochs = torch.cat([resnet.draw_epoch(count, 7, epoch, "cpu") for epoch in range(5)], dim=1)
    batches = 5 * count // batch_size
    for iteration in random.Random(0).sample(range(batches), batches):
        draws = resnet.draw_batch(count, batch_size, 7, iteration, "cpu")
        first = iteration * batch_size
        assert torch.equal(draws, epochs[:, first : first + batch_size])
    assert epochs[0].view(5, count).sort().values.tolist() == [list(range(count))] * 5


def write_cifar(root, name, monkeypatch):
    """A small data set in CIFAR's own format: 3072 bytes an image, all red ones first, by rows."""
    source = getattr(torchvision.datasets, name.upper())
    names = source.meta["key"]  # "label_names" or "fine_label_names"
    pixels = torch.randint(256, (2, 5, 3072), dtype=torch.uint8)
    labels = torch.randint(10, (2, 5))
    key = names.replace("label_names", "labels")
    files = {f"part{k}": {"data": pixels[k].numpy(), key: labels[k].tolist()} for k in range(2)}
    files["meta"] = {names: list("abcdefghij")}
    files = {file: pickle.dumps(content) for file, content in files.items()}
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    (root / source.base_folder).mkdir()
    for file, content in files.items():
        (root / source.base_folder / file).write_bytes(content)
    monkeypatch.setattr(source, "url", f"http://127.0.0.1:9/{source.filename}")
    monkeypatch.setattr(source, "train_list", [["part0", md5["part0"]]])
    monkeypatch.setattr(source, "test_list", [["part1", md5["part1"]]])
    monkeypatch.setattr(source, "meta", {"filename": "meta", "key": names, "md5": md5["meta"]})
    return pixels.view(2, 5, 3, 32, 32), labels


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files_are_read_plane_by_plane(name, tmp_path, monkeypatch):
    (images, test_images), labels = write_cifar(tmp_path, name, monkeypatch)
    data = resnet.load_data(name, tmp_path)
    assert all(map(torch.equal, data[:4], (images, labels[0], test_images, labels[1])))
    assert_close(data.mean.double(), images.double().mean(dim=0) / 255, rtol=1e-6, atol=0)
    assert data.classes == list("abcdefghij")


def test_images_that_are_not_uint8_are_refused():
    """Images that are scaled already would be scaled twice, and the error would be 90 %."""
    data = small_data()
    wrong = data._replace(images=data.images / 255, test_images=data.images / 255)
    net = resnet.ResNet(8)
    refused = [lambda: resnet.normalise(wrong.images, data.mean)]
    refused += [lambda: resnet.evaluate(net, wrong), lambda: resnet.mean_image(wrong.images)]
    refused.append(lambda: resnet.train(net, resnet.make_optimizer(net), wrong))
    for call in refused:
        with pytest.raises(ValueError, match="uint8"):
            call()


def test_val_holds_out_5000_training_images():
    whole, part = (resnet.load_data("synthetic", None, val) for val in (False, True))
    torch.manual_seed(1)  # another seed of the run does not move the split
    assert torch.equal(part.test_images, resnet.load_data("synthetic", None, True).test_images)

    def pairs(images, labels):
        return [(image.numpy().tobytes(), int(k)) for image, k in zip(images, labels, strict=True)]

    everything, rest, held_out = pairs(*whole[:2]), pairs(*part[:2]), pairs(*part[2:4])
    assert [len(everything), len(rest), len(held_out)] == [10_000, 5_000, 5_000]
    assert sorted(everything) == sorted(rest + held_out)
    assert 2_300 < len({*everything[:5_000]} & {*held_out}) < 2_700  # a sample, not a range
    assert_close(part.mean.double(), part.images.double().mean(dim=0) / 255, rtol=1e-6, atol=0)


def test_learning_rate_at_its_edges_and_the_other_defaults():
    rates = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    for iteration, rate in rates.items():
        assert resnet.learning_rate(iteration) == pytest.approx(rate, rel=1e-12)
    assert resnet.PAPER[:5] == (64_000, 128, 0.1, 0.9, 1e-4) and resnet.WARM_UP_DEPTH == 110
    net = resnet.ResNet(8)
    optimizer = resnet.make_optimizer(net)
    assert resnet.train(net, optimizer, small_data(), stop=1)[2] is False  # it does not warm up
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 1e-4]

    def rates_of(iterations, warming_up=False):
        recipe = resnet.Recipe(iterations=iterations, lr=1)
        return [resnet.learning_rate(i, recipe, warming_up) for i in range(iterations)]

    assert rates_of(8) == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rates_of(8, warming_up=True) == [0.1] * 6 + [0.01] * 2
    assert rates_of(1) == [1] and rates_of(3) == [1, 1, 0.1]


@pytest.mark.parametrize("right", [(0,), (10,), (11,), (0, 10, 11, 0)])
def test_warmup_ends_when_the_training_error_is_below_80_percent(right):
    """So many answers of 50 are right, in turns of 100 iterations."""
    end = {(11,): 100, (0, 10, 11, 0): 300}.get(right, 1000)
    recipe = resnet.Recipe(iterations=800, batch_size=50)
    wrongs = itertools.cycle([torch.tensor(50 - k) for k in right for _ in range(100)])
    job = nn.Linear(1, 1), small_data(), recipe, lambda *_: (torch.zeros(()), next(wrongs))
    ends = (100, 400, 800)
    results, steps = watch(*job, ends, warming_up=True)
    expected = [0.01 if i < end or i >= 400 else 0.1 for i in range(600)] + [0.001] * 200
    assert [rate for rate, *_ in steps] == pytest.approx(expected)
    assert [warming_up for *_, warming_up in results] == [stop < end for stop in ends]
    with pytest.raises(ValueError, match="multiple of 100, not 50"):
        watch(*job, ends=(50, 60), warming_up=True)


def test_train_is_the_recipe_written_out():
    torch.manual_seed(0)
    data = small_data(count=10, dtype=torch.double)  # batches of 8 of 10: they cross epochs
    net = resnet.ResNet(8).double()
    other = copy.deepcopy(net)
    recipe = resnet.Recipe(4, batch_size=8, momentum=0.8, weight_decay=0.01, seed=3)
    results, steps = watch(net, data, recipe, ends=(1, 4))
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    draws = torch.cat([resnet.draw_epoch(10, 3, epoch, "cpu") for epoch in range(4)], dim=1)
    losses, wrongs = [], []
    for step, rate in enumerate([0.1, 0.1, 0.01, 0.001]):
        index, dy, dx, flip = draws[:, 8 * step : 8 * step + 8]
        logits = other(resnet.augment(data.images[index] / 255 - data.mean, dy, dx, flip))
        loss = -logits.log_softmax(dim=1)[range(8), data.labels[index]].mean()
        losses.append(loss.item())
        wrongs.append((logits.argmax(dim=1) != data.labels[index]).sum().item())
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        for p, v, g in zip(other.parameters(), velocity, gradients, strict=True):
            v.mul_(0.8).add_(g + 0.01 * p.detach())
            p.data.sub_(rate * v)
        step = [float(number) for number in steps[step]]
        assert step == pytest.approx([rate, losses[-1], wrongs[-1]], rel=1e-5)
    first = (losses[0], 100 * wrongs[0] / 8, False)
    others = (sum(losses[1:]) / 3, 100 * sum(wrongs[1:]) / 24, False)
    assert_close(results, [first, others], rtol=1e-5, atol=1e-6)
    assert_close(net.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)


def test_evaluate_equals_a_loop_over_single_images():
    torch.manual_seed(0)
    data = small_data(count=503)
    net = noisy(resnet.ResNet(8)).eval()
    images = data.test_images / 255 - data.mean
    with torch.no_grad():
        answers = torch.cat([net(image[None]).argmax(dim=1) for image in images])
    answers[:303] = (answers[:303] + 1) % 10
    before = copy.deepcopy(net.train().state_dict())
    error = resnet.evaluate(net, data._replace(test_labels=answers))
    assert error == pytest.approx(30300 / 503) and net.training
    assert all(map(torch.equal, before.values(), net.state_dict().values()))


@pytest.mark.parametrize("option", ["plain", "A", "C"])
def test_bf16_is_of_convolutions_and_products_alone(option):
    torch.manual_seed(0)
    net = net_of(8, option)
    other = copy.deepcopy(net)
    batch = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    seen = set()
    for module in filter(is_layer, net.modules()):
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    loss, _ = resnet.forward_backward(net, *batch, torch.bfloat16)
    expected, _ = resnet.forward_backward(other, *batch)
    assert seen == {torch.bfloat16} and loss.dtype == torch.float32
    assert abs(loss / expected - 1) < 0.05
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.9


@pytest.fixture
def default_dtype():
    """torch.set_default_dtype() for one test: what is compiled holds for one default."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
def test_compiled_blocks_equal_eager_ones(default_dtype):
    """PyTorch compiles at most eight versions of a function: the second net needs a reset."""
    default_dtype(torch.float64)
    torch.manual_seed(0)
    data = small_data(dtype=torch.float64)
    recipe = resnet.Recipe(iterations=4, batch_size=8)
    for option in ("A", "C"):
        net = net_of(20, option).to(memory_format=torch.channels_last)
        other = copy.deepcopy(net)
        torch._dynamo.utils.counters.clear()
        propagate = resnet.speed_up(net, resnet.forward_backward)
        assert all(block._compiled_call_impl for block in (*net.stage1, *net.stage2, *net.stage3))
        assert_close(watch(net, data, recipe, propagate), watch(other, data, recipe))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 6  # blocks of five shapes, and a trial
        assert_close(copy.deepcopy(net).state_dict(), other.state_dict(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_iteration_mixes_no_devices_and_reads_no_value(device, monkeypatch):
    """Without a GPU: tensors that have a device, but no content. bool() and int() of them raise."""
    reads = []
    item = torch.Tensor.item

    def read(tensor):
        if not isinstance(tensor, FakeTensor):
            return item(tensor)
        reads.append(tensor.device.type)
        return 0

    monkeypatch.setattr(torch.Tensor, "item", read)
    monkeypatch.setattr(resnet, "draw_epoch", resnet.draw_epoch.__wrapped__)  # without a cache
    if device == "cuda":
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # it needs a driver
    recipe = resnet.Recipe(iterations=6, batch_size=8)
    propagate = functools.partial(resnet.forward_backward, precision=torch.bfloat16)
    with FakeTensorMode():
        with torch.device(device):
            net = resnet.ResNet(14, shortcut="B")
            images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
            labels = torch.zeros(20, dtype=torch.int64)
        data = resnet.Data(images, labels, images, labels, resnet.mean_image(images), [])
        optimizer = resnet.make_optimizer(net, recipe)
        resnet.train(net, optimizer, data, recipe, warming_up=True, propagate=propagate)
        resnet.evaluate(net, data)
    assert reads == [device] * 3  # the loss and the two errors, at the end


def test_without_a_compiler_the_net_stays_as_it_was(tmp_path, monkeypatch):
    script = """import torch, resnet
net = resnet.ResNet(8)
propagate = resnet.speed_up(net, resnet.forward_backward)
loss, _ = propagate(net, torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
print(loss.isfinite().item(), [module for module in net.modules() if module._compiled_call_impl])"""
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, "-c", script]
    first, last = subprocess.check_output(command, text=True, cwd=PROGRAM.parent).splitlines()
    assert first.startswith("not compiled (") and "--eager" in first and last == "True []"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["plain", "A", "C", "fails"])
def test_graphed_and_compiled_equal_eager(option, precision, default_dtype, capsys):
    """In float64 across both drops of the rate. "fails" is a net that cannot be recorded."""
    double = precision == torch.float64
    stop, rtol = (40, 1e-7) if double else (5, 1e-3 if precision == torch.float32 else 5e-2)
    default_dtype(torch.float64 if double else torch.float32)
    torch.manual_seed(0)
    data = small_data(count=2000, dtype=torch.get_default_dtype())
    data = resnet.Data(*[tensor.cuda() for tensor in data[:5]], data.classes)
    recipe = resnet.Recipe(iterations=40, batch_size=32, lr=0.01)
    fails = option == "fails"
    option = option.replace("fails", "A")
    net = net_of(14, option).cuda().to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    if fails:
        net.register_forward_hook(lambda module, inputs, logits: logits.sum().item() and None)
    autocast = {} if double else {"precision": precision}
    eager = functools.partial(resnet.forward_backward, **autocast)
    calls = itertools.count(1)

    def strict(*batch):
        """From the seventh call on, waiting is an error, but train() ends by reading its sums."""
        error = 6 < next(calls) < stop and not fails
        torch.cuda.set_sync_debug_mode("error" if error else "default")
        return fast(*batch)

    flags = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with flags, torch.cuda.stream(torch.cuda.Stream()):
        fast = resnet.speed_up(net, eager)
        _, ours = watch(net, data, recipe, strict, ends=[stop])
        _, theirs = watch(other, data, recipe, eager, ends=[stop])
    assert type(fast) is resnet.CUDAGraph and (fast.graph is None) == fails
    printed = capsys.readouterr().out
    assert printed.count("recording it failed") == printed.count("--eager") == fails
    assert "not compiled" not in printed
    for (rate, loss, wrong), (rate2, expected, wrong2) in zip(ours, theirs, strict=True):
        assert rate == rate2 and (not double or wrong == wrong2)
        assert_close(loss, expected, rtol=rtol, atol=0)
    if double:
        assert_close(net.state_dict(), other.state_dict(), rtol=rtol, atol=1e-9)


# ----- A run, of one process or two ---------------------------------------------------------------


def run_in_child(folder):
    """A run of some seconds that warms up for a part of them."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    torch.set_num_threads(1)
    words = "--dataset synthetic --depth 8 --iterations 400 --batch-size 4 --eval-every 100"
    resnet.main(split([words, "--warmup --device cpu --output-dir", folder]))


def facts(folder):
    """All that must be the same in two runs, without tensors: not images/s and seconds."""
    saved = checkpoint(folder)
    titles, *logged = (folder / "log.csv").read_text().splitlines()
    assert titles == "iteration,rate,train_loss,train_error,test_error,images_per_s,seconds"
    assert [",".join(map(str, row)) for row in saved["rows"]] == logged
    for key in ("model", "momentum"):
        saved[key] = {name: tensor.tolist() for name, tensor in saved[key].items()}
    return {**saved, "rows": [row[:5] for row in saved["rows"]], "mean": saved["mean"].tolist()}


@pytest.mark.skipif(sys.platform == "win32", reason="needs forks and signals")
def test_12_kills_change_nothing(tmp_path):
    """SIGKILL at random moments, the same command each time: the run ends like one left alone."""

    def spawn(folder):
        child = context.Process(target=run_in_child, args=(folder,))
        child.start()
        return child

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # each child begins with torch imported
    spawn(tmp_path / "alone").join()
    expected = facts(tmp_path / "alone")
    assert [row[0] for row in expected["rows"]] == [100, 200, 300, 400]
    assert {0.01, 0.1} <= {round(row[1], 9) for row in expected["rows"]}  # a part is warm-up
    whole = 1 + checkpoint(tmp_path / "alone")["rows"][-1][6]  # seconds
    chance = random.Random(0)
    kills = finished = midway = 0
    while kills < 12 or not finished:
        folder = tmp_path / f"killed{finished}"
        child = spawn(folder)
        child.join(whole * chance.uniform(0.25, 0.6) if kills < 12 else None)
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += 1
            midway += (folder / "checkpoint.pt").exists()
        else:
            assert child.exitcode == 0 and facts(folder) == expected
            finished += 1
    assert midway >= 4  # or it was killed before it had begun


def tiny_run(root, **data):
    """Arguments of a run that takes a moment, on the images of write_folder()."""
    folders = "--data-dir", write_folder(root / "data", **data), "--output-dir", root / "run"
    return ["--dataset folder --depth 8 --iterations 4 --eval-every 2 --batch-size 6", *folders]


@pytest.fixture
def short_run(tmp_path, capsys):
    argv = [*tiny_run(tmp_path), "--precision bf16"]
    assert run(capsys, *argv)[0] == 0
    return argv


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_the_same_command_continues(precision, tmp_path, capsys, monkeypatch):
    """Where --precision is left out, the run keeps its own, whatever the default here is."""
    argv = tiny_run(tmp_path)
    assert run(capsys, *argv, "--precision", precision)[0] == 0
    folder = tmp_path / "other"
    argv += ["--output-dir", folder]
    real = resnet.train
    monkeypatch.setattr(resnet, "train", lambda *a: real(*a) if a[4] < 2 else sys.exit(9))  # start
    assert run(capsys, *argv, "--precision", precision)[0] == 9
    monkeypatch.undo()
    saved = facts(folder)
    assert [row[0] for row in saved["rows"]] == [2] and saved["responses"] == []
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "resuming at iteration 2;" in out and f"delete {folder}" in out
    assert facts(folder) == facts(tmp_path / "run")


def test_a_finished_run_of_a_folder_says_so_and_has_saved_all(short_run, tmp_path, capsys):
    folder = tmp_path / "run"
    before = contents(folder)
    status, out, err = run(capsys, *short_run)
    assert (status, len(out.splitlines()), err) == (0, 1, "") and contents(folder) == before
    saved = checkpoint(folder)
    assert f"{saved['rows'][-1][4]:.2f} % after iteration 4" in out
    assert str(folder / "checkpoint.pt") in out and f"delete {folder}" in out
    data = resnet.load_data("folder", tmp_path / "data")
    assert data.labels.tolist() == [0] * 6 + [1] * 6 and data.classes == ["cat", "dog"]
    assert data.test_labels.tolist() == [0] * 4 + [1] * 4
    assert data.test_images[7, :, 0, 0].tolist() == [103, 50, 100]  # the last dog
    assert torch.equal(saved["mean"], data.mean)
    net = resnet.ResNet(8, num_classes=2)
    net.load_state_dict(saved["model"])
    responses = resnet.measure_responses(net, data)
    assert saved["responses"] == pytest.approx(responses, rel=1e-4)
    assert f"{torch.__version__}, torchvision {torchvision.__version__}" in saved["versions"]
    torch.save({**saved, "code": "of an earlier version"}, folder / "checkpoint.pt")
    assert "has finished" in run(capsys, *short_run)[1]


OTHERS = {"--plain": "plain False, not True", "--lr 1": "lr 0.1, not 1.0"}
OTHERS |= {"--warmup": "warmup False, not True", "--iterations 8": "iterations 4, not 8"}
OTHERS |= {"--precision float32": "precision bf16, not float32"}
OTHERS |= {"--depth 14 --seed 1": "depth 8, not 14; seed 0, not 1"}


@pytest.mark.parametrize(("depth", "warms_up"), [(104, False), (110, True)])
def test_seed_and_default_warm_up_reach_training(depth, warms_up, tmp_path, capsys, monkeypatch):
    def train(net, optimizer, data, recipe, start, stop, warming_up, propagate):
        sys.exit(10 + warming_up if recipe.seed == 7 else 0)

    monkeypatch.setattr(resnet, "train", train)
    assert run(capsys, *tiny_run(tmp_path), f"--seed 7 --depth {depth}")[0] == 10 + warms_up


def test_a_log_that_cannot_be_written_is_a_warning(short_run, tmp_path, capsys):
    folder = tmp_path / "other"
    argv = [*short_run, "--output-dir", folder]
    log = folder / "log.csv"
    log.mkdir(parents=True)  # stands in for a file that another program has locked
    status, _, err = run(capsys, *argv)
    assert status == 0 and err.count("warning") == err.count("\n") == 2 and str(log) in err
    assert [row[0] for row in checkpoint(folder)["rows"]] == [2, 4]
    assert run(capsys, *argv)[0] == 0
    log.rmdir()
    assert run(capsys, *argv)[::2] == (0, "") and facts(folder) == facts(tmp_path / "run")
    log.write_text("out of date")
    assert run(capsys, *argv)[::2] == (0, "") and facts(folder) == facts(tmp_path / "run")


def test_a_terminal_without_the_letters_of_a_folder(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    resnet.main(split([*tiny_run(tmp_path), "--output-dir", tmp_path / "\u5b9f"]))
    terminal.flush()
    assert rb"\u5b9f" in terminal.buffer.getvalue()


@pytest.mark.parametrize(("trouble", "expected"), [("stopped", 130), ("File too large", 1)])
def test_a_failed_save_keeps_the_checkpoint(trouble, expected, tmp_path, capsys, monkeypatch):
    """In the second of two rows. A limit on the size of files stands for a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run"
    files = [folder / "checkpoint.pt", folder / "log.csv"]
    sizes = []

    def fsync(file):
        sizes.append(os.fstat(file).st_size)
        if trouble == "File too large":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        elif len(sizes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        status, _, err = run(capsys, *tiny_run(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == expected and trouble in err
    assert trouble == "stopped" or f"{files[0]} cannot be written (" in err
    assert len(err.splitlines()) == 1 and "same command" in err
    assert [row[0] for row in facts(folder)["rows"]] == [2]
    assert sorted(folder.iterdir()) == files and sizes[0] == files[0].stat().st_size


def test_the_handler_of_ctrl_c_is_left_as_it_was_after_run_in_a_notebook(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["resnet.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert signal.getsignal(signal.SIGINT) is before


def test_messages_of_libraries_are_whole_and_without_escape_codes():
    message = f"\x1b[1m{'long ' * 100}\x1b[0mend\nand more"
    assert resnet.brief(ValueError(message)) == f"ValueError: {'long ' * 100}end"


def test_another_recipe_is_refused_and_other_images(short_run, tmp_path, capsys):
    before = contents(tmp_path / "run")
    cases = [([change], words) for change, words in OTHERS.items()]
    for images in ({"train": 7}, {"test": 5}, {"classes": ("cat", "fox")}):
        others = write_folder(tmp_path / f"others{len(cases)}", **images)
        cases.append((["--data-dir", others], r"images \w+, not \w+"))
    for change, words in cases:
        err = refusal(capsys, *short_run, *change)
        assert re.search(f"a run with {words}: use the same arguments, or name another ", err)
        assert before == contents(tmp_path / "run")


def test_what_is_no_checkpoint_is_left_as_it_is(short_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    saved = checkpoint(tmp_path / "run")
    bad = [b"", b"no net", whole[: len(whole) // 2], torchvision.models.resnet18().state_dict()]
    bomb = type("Bomb", (), {"__reduce__": lambda self: (open, ("exploded", "w"))})
    bad.append({**saved, "rows": bomb()})
    for key in ("recipe", "rows", "model", "momentum", "warming_up"):
        bad.append({name: value for name, value in saved.items() if name != key})
    for key in ("recipe", "rows", "model", "momentum"):
        for value in (None, "text", [], [[1, 2]], [[None] * 7], torch.zeros(3)):
            bad.append({**saved, key: value})
        if key != "momentum":  # a finished run has none
            bad.append({**saved, key: {}})
    for content in bad:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        assert str(path) in refusal(capsys, *short_run)
        assert path.read_bytes() == before and not Path("exploded").exists()
    path.unlink()
    path.mkdir()  # it cannot be read, as if permission were lacking
    assert f"{path} cannot be read (Is a directory)" in refusal(capsys, *short_run)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("seconds", [0.2, 0.5, 1, 2, 4])
def test_ctrl_c_is_one_line_also_while_importing(seconds, tmp_path):
    command = [sys.executable, PROGRAM, "--dataset", "synthetic", "--output-dir", tmp_path]
    child = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.returncode == 130 and len(err.splitlines()) == 1 and "stopped" in err, err


@pytest.mark.parametrize("name", ["fc.bias", "bn1.running_var", None])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(name, tmp_path, capsys, monkeypatch):
    def train(net, optimizer, data, recipe, start, *others):
        loss, *results = real(net, optimizer, data, recipe, start, *others)
        if start == 2 and name:  # the loss, of the weights before the last step, is still finite
            net.state_dict()[name][1] = float("inf")
        elif start == 2:
            loss = float("nan")
        return loss, *results

    real = resnet.train
    monkeypatch.setattr(resnet, "train", train)
    status, out, err = run(capsys, *tiny_run(tmp_path))
    assert status == 1 and "not finite at iteration 4" in err and "--lr" in err
    assert len(err.splitlines()) == 1 and "finished" not in out
    assert [row[0] for row in facts(tmp_path / "run")["rows"]] == [2]


def test_rows_hold_what_was_trained_and_evaluated(tmp_path, capsys, monkeypatch):
    """A row every 2 of 5 iterations of 8 images, of known losses, answers and test errors."""
    steps = iter([(4.0, 8), (2.0, 4), (2.0**51, 3), (0.0, 1), (0.25, 2)])
    errors = iter([37.5, 12.5, 25.0])

    def propagate(*_, precision):
        return tuple(torch.tensor(number) for number in next(steps))

    monkeypatch.setattr(resnet, "forward_backward", propagate)
    monkeypatch.setattr(resnet, "evaluate", lambda *_: next(errors))
    monkeypatch.setattr(resnet, "measure_responses", lambda *_: [])
    argv = [*tiny_run(tmp_path), "--iterations 5 --batch-size 8 --device cpu"]
    for _ in range(2):  # the second time it reads its own checkpoint
        status, out, _ = run(capsys, *argv)
        assert status == 0 and "25.00 % after iteration 5" in out.splitlines()[-1]  # not the best
    rows = facts(tmp_path / "run")["rows"]
    assert rows[:2] == [[2, 0.1, 3.0, 75.0, 37.5], [4, 0.01, 2.0**50, 25.0, 12.5]]
    assert rows[2:] == [[5, 0.001, 0.25, 25.0, 25.0]]


BAD_ARGUMENTS = """--depth deep, --shortcut D, --plain --shortcut B, --dep 20, --iterations 0,
--batch-size 0, --eval-every -1, --lr -1, --momentum -1, --weight-decay -1, --lr nan, --lr inf,
--weight-decay inf, --weight-decay nan, --momentum nan, --momentum 1.5, --depth 57: 56 and 62,
--device tpu: tpu, --device cuda:99: cuda:99, --dataset folder --data-dir nowhere: nowhere,
--report nowhere: nowhere, --dataset synthetic --output-dir file: file"""


@pytest.mark.parametrize("case", re.split(r",\s", BAD_ARGUMENTS))
def test_bad_arguments_are_one_line(case, capsys, tmp_path, monkeypatch):
    """The line has the first argument in it, or what is written behind the colon."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    argv, _, words = case.partition(": ")
    err = refusal(capsys, argv)
    assert (words or argv.split()[0]) in err and "divisible" not in err


SPOILERS = {
    "test dog": lambda dog: shutil.rmtree(dog.parents[1] / "test" / "dog"),
    "dog": lambda dog: [path.unlink() for path in dog.iterdir()],
    "3.png image": lambda dog: (dog / "3.png").write_text("woof"),
    "3.png 33x32": lambda dog: Image.new("RGB", (33, 32)).save(dog / "3.png"),
    "3.png 32x32 RGBA": lambda dog: Image.new("RGBA", (32, 32)).save(dog / "3.png"),
    "3.png 32x32 I;16": lambda dog: Image.new("I;16", (32, 32)).save(dog / "3.png"),
    "--val 5,000": lambda dog: None,
}


@pytest.mark.parametrize("words", SPOILERS)
def test_bad_folders_are_one_line(words, tmp_path, capsys):
    argv = tiny_run(tmp_path)
    SPOILERS[words](tmp_path / "data" / "train" / "dog")
    err = refusal(capsys, *argv, "--val")
    assert all(word in err for word in words.split()), err


@pytest.mark.parametrize("trouble", ["damaged", "downloading", "No space left"])
def test_what_stops_a_download_is_one_line(trouble, tmp_path, capsys, monkeypatch):
    def extract(*_, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/c.tar.gz")
    if trouble == "No space left":
        monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", extract)
    if trouble != "downloading":
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    err = refusal(capsys, "--data-dir", tmp_path, "--output-dir", tmp_path / "run")
    assert "http://127.0.0.1:9/c.tar.gz" in err or trouble == "No space left"
    assert [w for w in ("damaged", "downloading", "No space left") if w in err] == [trouble]


@pytest.mark.parametrize("content", [None, b"", b"half"], ids=["missing", "empty", "damaged"])
@pytest.mark.parametrize("name", ["part0", "part1", "meta"])
def test_the_file_of_cifar_that_is_bad_is_named(name, content, tmp_path, capsys, monkeypatch):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / name
    path.unlink() if content is None else path.write_bytes(content)
    argv = ["--output-dir", tmp_path / "run", "--data-dir"]
    trouble = "missing" if content is None else "damaged or incomplete"
    err = refusal(capsys, *argv, tmp_path)
    assert f"{path} is {trouble}: " in err and "127.0.0.1:9/cifar-10-python.tar.gz" in err
    assert f"not {path.parent}" in refusal(capsys, *argv, path.parent)


def snippet(words):
    """Return the README's Python code that contains words."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return next(block for block in blocks if words in block)


def test_synthetic_data_can_be_learnt_and_the_net_is_used_as_in_the_readme(tmp_path, capsys):
    words = "--dataset synthetic --depth 8 --iterations 100 --batch-size 64 --output-dir"
    run(capsys, words, tmp_path / "run")
    data = resnet.make_synthetic()
    picture = torchvision.transforms.functional.to_pil_image(data.test_images[0])
    picture.save(tmp_path / "cat.png")
    lines = snippet("saved = torch.load(").replace('load_data("cifar10", "data")', "data")
    lines = lines.replace(".runs/resnet-20", str(tmp_path / "run")).replace("ResNet(20", "ResNet(8")
    space = {"data": data}
    exec(lines.replace("cat.png", str(tmp_path / "cat.png")), space)
    error, answer = capsys.readouterr().out.splitlines()
    logits = space["net"](resnet.normalise(data.test_images, space["saved"]["mean"]))
    wrong = (logits.argmax(dim=1) != data.test_labels).sum().item()
    assert wrong < 1000  # by chance it would be 1800
    assert float(error) == pytest.approx(100 * wrong / 2000, abs=0.1)
    assert float(error) == pytest.approx(space["saved"]["rows"][-1][4], abs=0.1)
    assert space["saved"]["classes"] == data.classes and answer == data.classes[logits[0].argmax()]


def test_training_in_python_as_in_the_readme(capsys):
    data = small_data()
    space = {key: getattr(data, key) for key in ("images", "labels", "test_images", "test_labels")}
    space |= {"labels": data.labels % 2, "test_labels": data.test_labels % 2}
    exec(snippet("make_optimizer(").replace("1000", "2"), space)
    assert space["loss"] > 0 and 0 <= space["error"] <= 100
    assert 0 <= float(capsys.readouterr().out) <= 100


def test_gradients_of_untrained_nets_as_the_readme_says(capsys):
    exec(snippet("forward_backward(net").replace("(20, 56, 110)", "(20, 56)"), {})
    ratios = [float(line.split(" = ")[1]) for line in capsys.readouterr().out.splitlines()]
    plain_20, residual_20, plain_56, residual_56 = ratios
    assert 0.5 < plain_20 < 10 and 50 < plain_56 < 2000
    assert 0.1 < residual_20 < 10 and 0.1 < residual_56 < 10


# ----- The saved runs -----------------------------------------------------------------------------

SAVED_RUNS = sorted((PROGRAM.parent / ".runs").glob("*/checkpoint.pt"))


def test_saved_runs_are_the_rows_of_the_readme():
    names = []
    for path in SAVED_RUNS:
        saved = torch.load(path, weights_only=True)
        depth = int(path.parent.name.rpartition("-")[2])
        net = resnet.ResNet(depth, plain=path.parent.name.startswith("plain"))
        net.load_state_dict(saved["model"])
        last = resnet.Row(*saved["rows"][-1])
        assert last.iteration == 64_000 and saved["momentum"] == {}
        assert resnet.name_net(saved["recipe"]).lower() == path.parent.name
        assert resnet.compare_to_paper(saved["recipe"], last.iteration) == "as in the paper"
        parameters = sum(parameter.numel() for parameter in net.parameters())
        errors = f"{last.train_error:.2f} % | {last.test_error:.2f} %"
        names.append(f"| {saved['net']} | {parameters:,} | {errors} |")
        log = path.with_name("log.csv").read_text().splitlines()
        assert [line.split(",") for line in log[1:]] == [list(map(str, r)) for r in saved["rows"]]
    table = README[README.index("| 64,000 iterations, CIFAR-10 |") :].split("\n\n")[0]
    rows = [" ".join(row.split("|")[:5]) for row in table.splitlines()[2:]]
    assert rows == [" ".join(name.split("|")[:5]) for name in names] and len(rows) >= 2


def torchrun(folder, *argv):
    """Two processes on the CPU: (exit status, stdout, resnet.py's own lines on stderr)."""
    command = [sys.executable, *split(["-m torch.distributed.run --nproc-per-node=2", *argv])]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parent), "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "timeout": 120}
    done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("resnet.py:")]
    return done.returncode, done.stdout, lines


def train_linear(processes):
    """Five steps of a net without BN: what watch() returns, and its tensors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).double()
    propagate = resnet.forward_backward
    if processes > 1:
        propagate = resnet.share_batches(net, propagate)
    recipe = resnet.Recipe(iterations=5, batch_size=8, lr=1e-3)
    return watch(net, small_data(dtype=torch.double), recipe, propagate), dict(net.state_dict())


def test_two_processes_equal_one(tmp_path):
    script = """import torch, test_resnet
torch.distributed.init_process_group("gloo")
torch.save(test_resnet.train_linear(2), f"{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()"""
    (tmp_path / "worker.py").write_text(script)
    assert torchrun(tmp_path, "worker.py")[0] == 0
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), train_linear(1), rtol=1e-10, atol=1e-12)


def test_torchrun(tmp_path):
    """One process prints and saves; the net that it has tested is the one that it saves."""
    argv = [PROGRAM, *tiny_run(tmp_path, train=9, test=503), "--device cpu --iterations 6"]
    cases = {"--batch-size 7": "divisible by 2", "--device cpu:0": "--device cpu:0: leave"}
    for change, words in cases.items():
        status, _, err = torchrun(tmp_path, *argv, change)
        assert status != 0 and err and all(words in line for line in err)
    status, out, err = torchrun(tmp_path, *argv, "--eval-every 3")
    assert (status, err) == (0, []) and "processes 2" in out and out.count("has finished") == 1
    saved = checkpoint(tmp_path / "run")
    data = resnet.load_data("folder", tmp_path / "data")
    assert [row[0] for row in saved["rows"]] == [3, 6]
    net = resnet.ResNet(8, num_classes=2)
    net.load_state_dict(saved["model"])
    assert saved["rows"][-1][4] == pytest.approx(resnet.evaluate(net, data))
    assert torchrun(tmp_path, *argv, "--eval-every 3")[1].splitlines() == out.splitlines()[-1:]


# ----- The report and the files -------------------------------------------------------------------


def test_responses_of_layers_that_are_known():
    """The first layer is 0 or 2, unevenly over the batches; each other is +k or -k."""
    net = resnet.ResNet(8, shortcut="B")
    blocks = [*net.stage1, *net.stage2, *net.stage3]
    known = [bn for block in blocks for bn in (block.bn1, block.bn2)]
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        for k, bn in enumerate(known, start=1):
            bn.bias.copy_(torch.tensor([k, -k]).repeat(len(bn.bias) // 2))
        net.conv1.weight[:, 0, 1, 1] = 1  # the first colour
        net.bn1.weight.fill_(2 * 1.00001**0.5)  # BN divides by the root of 1 + 1e-5
    images = torch.zeros(750, 3, 32, 32, dtype=torch.uint8)
    images[:250] = 255
    data = small_data(750)._replace(test_images=images, mean=torch.zeros(3, 32, 32))
    responses = resnet.measure_responses(net, data)
    assert responses == pytest.approx([2 * (1 / 3 * 2 / 3) ** 0.5, 1, 2, 3, 4, 5, 6], rel=1e-6)
    assert net.training and not any(module._forward_hooks for module in net.modules())


def write_run(folder, errors, responses=(), **changes):
    """A checkpoint made without the program. errors: (iteration, training error, test error)."""
    recipe = {"depth": 20, "plain": False, "shortcut": "A", "dataset": "cifar10", "val": False}
    recipe |= {"iterations": errors[-1][0], "batch_size": 128, "lr": 0.1, "momentum": 0.9}
    recipe |= {"weight_decay": 1e-4, "seed": 0, "warmup": False, "precision": "bf16"}
    recipe |= {"processes": 1, "images": "0123abcd", **changes}
    rows = [[i, 0.1, 1.5, train, test, 100, i // 100] for i, train, test in errors]
    model = {"weight": torch.empty(1000 * recipe["depth"], dtype=torch.int8)}
    saved = {"recipe": recipe, "rows": rows, "model": model, "device": "1 x 2 threads"}
    folder.mkdir(parents=True)
    torch.save({**saved, "responses": list(responses)}, folder / "checkpoint.pt")


REPORT = """\
plain-20 | as in the paper | bf16 | 9.75 %
plain-110 | as in the paper | bf16 | 65.00 % | more than 60 % (precision not stated)
ResNet-20 | as in the paper | bf16 | 6.25 % | 8.75 % (precision not stated)
ResNet-20 | as in the paper | float32 | 6.75 % | 8.75 %
ResNet-20 | dataset folder, iterations 2000, images aaaa | bf16 | 42.25 %
ResNet-20 | dataset folder, iterations 2000, images bbbb | bf16 | 12.25 %
ResNet-56 | unfinished after 500 | bf16 | 55.50 %
ResNet-110 | as in the paper | float32 | 6.50 % | 6.43 %, the best of five; mean 6.61 ± 0.16 %
ResNet-110 | val True, lr 0.05, warmup False, processes 4 | bf16 | 6.60 %
"""


def test_report_is_a_line_for_the_seeds_of_a_net(tmp_path, capsys):
    for seed, (train, test) in enumerate([(1.0, 8.0), (2.0, 9.0), (3.0, 8.5)]):
        write_run(tmp_path / f"a{seed}", [(32_000, 20, 22), (64_000, train, test)], seed=seed)

    def write(name, error, iteration=64_000, **changes):
        write_run(tmp_path / name, [(iteration, 4.0, error)], **changes)

    write("b", 9.75, plain=True)
    write("c", 55.5, 500, iterations=64_000, depth=56)
    write("d", 42.25, 2000, dataset="folder", images="aaaa", seed=7)
    write("e", 12.25, 2000, dataset="folder", images="bbbb", seed=8)
    write("deep/f", 6.5, depth=110, warmup=True, precision="float32")
    write("g", 6.6, depth=110, lr=0.05, val=True, processes=4)
    write("h", 6.25, processes=2, seed=9)  # BN of half a batch each: a line of its own
    write("i", 6.75, precision="float32")
    write("l", 65.0, plain=True, depth=110, warmup=True)
    write("same", 1.0)  # of the seed of a0: no evidence of its own
    write("list", 1.0, seed=[1])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "checkpoint.pt").write_text("no net")
    resnet.print_table(resnet.collect_runs(tmp_path))
    out = capsys.readouterr().out.splitlines()
    table = [re.split(r" *\| *", line.strip("| ")) for line in out if line.startswith("|")]
    assert {len(row) for row in table} == {10} and len(table) == 2 + 10
    # The mean of the seeds is 8.5 and, by hand, the deviation the root of (0.25 + 0.25 + 0) / 2.
    seeds = ["bf16", "3", "2.00 ± 1.00 %", "8.50 ± 0.50 %", "8.75 % (precision not stated)"]
    a = next(row for row in table if row[4] == "3")
    assert a == ["ResNet-20", "20,000", "as in the paper", *seeds, "0:10:40", "1 x 2 threads"]
    cells = [row[:1] + row[2:4] + row[6:8] for row in table[2:] if row != a]
    lines = [" | ".join(filter(None, row)) for row in cells]
    assert sorted(lines) == sorted(REPORT.splitlines())
    left_out = [line for line in out if line.startswith("left out: ")]
    for name, line in zip(["list", "same", "text"], left_out, strict=True):
        assert line.startswith(f"left out: {tmp_path / name / 'checkpoint.pt'}: ")
    assert "same recipe and seed" in left_out[1]


CHANGES = [{"shortcut": "B"}, {"shortcut": "C"}, {"depth": 26}, {"plain": True, "depth": 26}]
CHANGES += [{"plain": True, "depth": 1202, "warmup": True}, {"val": True}, {"lr": 0.05}]
CHANGES += [{"dataset": "cifar100"}, {"iterations": 64_001}, {"batch_size": 256}]
CHANGES += [{"momentum": 0.8}, {"weight_decay": 5e-4}, {"warmup": True}, {"processes": 4}]


@pytest.mark.parametrize("change", [*CHANGES, {"depth": 110}], ids=str)
def test_what_the_paper_did_not_do_is_not_as_in_the_paper(change, tmp_path):
    write_run(tmp_path / "a", [(64_001, 4.0, 6.5)], **{"iterations": 64_000, **change})
    assert [line.recipe for line in resnet.collect_runs(tmp_path)] != ["as in the paper"]


def test_figures_6_and_7_and_what_stops_them(tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    real = figure.savefig
    axes = []
    monkeypatch.setattr(figure, "savefig", lambda *a, **k: axes.extend(a[0].axes) or real(*a, **k))
    assert "no run to show" in refusal(capsys, "--report", tmp_path)
    write_run(tmp_path / "a", [(32_000, 30, 22), (64_000, 1, 8)], responses=[2, 4, 3])
    write_run(tmp_path / "b0", [(64_000, 50, 55)], plain=True)
    write_run(tmp_path / "b1", [(64_000, 40, 45)], plain=True, seed=1, responses=[1, 2])
    write_run(tmp_path / "c", [(64_000, 2, 7)], depth=56, precision="$x", responses=[0.1])
    write_run(tmp_path / "d", [(500, 2, 7)], depth=56, iterations=64_000)
    status, out, _ = run(capsys, "--report", tmp_path)
    for name in ("fig6.png", "fig7.png"):
        assert status == 0 and str(tmp_path / name) in out
        assert (tmp_path / name).stat().st_size > 10_000
    plain, residual, in_order, by_size = axes

    def curves(panel):
        return [(a.get_color(), a.get_linestyle(), list(a.get_ydata())) for a in panel.lines]

    b, a, c = ("C0", ":", [1, 2]), ("C0", "-", [2, 4, 3]), ("C1", "-", [0.1])
    assert curves(in_order) == [b, a, c]
    assert curves(by_size) == [("C0", ":", [2, 1]), ("C0", "-", [4, 3, 2]), c]
    assert sorted(curves(residual)[:2]) == [("C0", "-", [22, 8]), ("C0", "--", [30, 1])]
    for panel, x in ((in_order, [1, 2, 3]), (by_size, [1, 2, 3]), (residual, [32_000, 64_000])):
        assert list(panel.lines[1].get_xdata()) == x
    assert [colour for colour, *_ in curves(plain)] == ["C0"] * 4
    assert [colour for colour, *_ in curves(residual)] == ["C0"] * 2 + ["C1"] * 2 + ["C2"] * 2
    labels = [f"{name}, as in the paper, bf16" for name in ("plain-20", "ResNet-20")]
    assert [text.get_text() for text in plain.get_legend().texts] == labels[:1]
    labels.append(r"ResNet-56, as in the paper, \$x")
    assert [text.get_text() for text in in_order.get_legend().texts] == labels
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    status, out, err = run(capsys, "--report", tmp_path)
    assert status == 2 and "matplotlib" in err and err.count("\n") == 1 and "| 8.00 % |" in out


def test_metadata_for_uv_and_commands_of_the_readme():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.M | re.S)[1]
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    requirements = (PROGRAM.parent / "requirements.txt").read_text().split()
    assert [*metadata["dependencies"], "pytest>=8"] == requirements
    commands = re.findall(r"(?:python|uv run|torchrun [-=a-z0-9 ]*) resnet\.py *([^#`\n]*)", README)
    assert len(commands) >= 10
    for command in commands:
        args = resnet.make_parser().parse_args(command.replace("$depth", "56").split())
        resnet.blocks_per_stage(args.depth)
