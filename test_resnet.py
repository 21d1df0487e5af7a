# SPDX-License-Identifier: MIT
"""Tests of resnet.py: `python -m pytest`. They need no GPU and no download.

Results are compared with something that does not come from resnet.py: the paper's numbers,
arithmetic written out by hand, torchvision, or a loop over single images and pixels.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
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
    status = 0
    try:
        resnet.main(split(argv))
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def refusal(capsys, *argv):
    """Run the program, which must stop with status 2 and one line on stderr. Return this line."""
    status, _, err = run(capsys, *argv)
    assert status == 2 and len(err.splitlines()) == 1 and "delete" not in err, err
    return err


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def net_of(depth, option):
    """The net for "plain", "A", "B" or "C"."""
    return resnet.ResNet(depth, option == "plain", option.replace("plain", "A"))


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


def small_data(count=40):
    """A resnet.Data of noise: so many images to train on, and as many to test on."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, count, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(10, (2, count), generator=g)
    return resnet.Data(images[0], labels[0], images[1], labels[1], list("abcdefghij"))


def watch(net, data, recipe, compute=resnet.forward_backward, ends=()):
    """Train net up to each of ends: what train() returns, and each step's (rate, loss, error)."""
    optimizer = resnet.make_optimizer(net, recipe)
    results, steps = [], []

    def note(net, images, labels):
        loss, error = compute(net, images, labels)
        steps.append((optimizer.param_groups[0]["lr"], loss, error))
        return loss, error

    start = 0
    for stop in ends or [recipe.iterations]:
        results.append(resnet.train(net, optimizer, data, recipe, start, stop, note))
        start = stop
    return results, steps


@pytest.fixture
def double():
    """float64 as the default, also for what is compiled."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


def test_parts_1_to_4_are_the_program_of_the_docstring(capsys):
    space = {"__name__": "part"}
    exec(SOURCE[: SOURCE.index("# ----- 5.")], space)
    space["load_cifar"] = lambda: space["Data"](*vars(small_data()).values())
    space["paper_recipe"] = lambda depth: space["Recipe"](iterations=2, batch_size=8)
    lines = re.findall(r"^    ((?:data|net|train|print).*)", resnet.__doc__, re.M)
    exec("\n".join(lines).replace("cuda", "cpu").replace("ResNet(56)", "ResNet(8)"), space)
    assert len(lines) == 4 and 0 <= float(capsys.readouterr().out) <= 100


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
    words = option == "plain", option.replace("plain", "A")
    net, other = (noisy(kind(depth, *words)).eval() for _ in range(2))
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


# ----- The data and the recipe (section 4.2), and what makes them faster --------------------------


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
    index, dy, dx, flip = resnet.draw_epoch(81 * 2 * 100, 3, 5)
    counts = torch.bincount((dy * 9 + dx) * 2 + flip, minlength=162)
    assert len(counts) == 162 and counts.min() > 50 and counts.max() < 150  # 5 deviations from 100
    assert torch.equal(index, resnet.draw_epoch(16_200, 3, 5)[0])
    keys = itertools.product((0, 1, 2, 256, 2**16, 2**32 - 1), (0, 1, 2, 256, 2**16, 2**24))
    draws = torch.stack([resnet.draw_epoch(50, *key) for key in keys])
    assert all(len(draws[:, row].unique(dim=0)) == 36 for row in range(4))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 5), (3, 8), (7, 7), (50, 1)])
def test_no_image_is_dropped_or_repeated_within_an_epoch(count, batch_size):
    epochs = torch.cat([resnet.draw_epoch(count, 7, epoch) for epoch in range(5)], dim=1)
    assert epochs[0].view(5, count).sort().values.tolist() == [list(range(count))] * 5
    batches = 5 * count // batch_size
    for start in range(batches):
        draws = resnet.draw_batches(count, batch_size, 7, start, "cpu")
        draws = torch.cat(list(itertools.islice(draws, batches - start)), dim=1)
        assert torch.equal(draws, epochs[:, start * batch_size : batches * batch_size])


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
def test_cifar_files_are_read_plane_by_plane(name, tmp_path, capsys, monkeypatch):
    (images, test_images), labels = write_cifar(tmp_path, name, monkeypatch)
    data = resnet.load_data(name, tmp_path)
    pairs = ((data.images, images), (data.labels, labels[0]))
    pairs += ((data.test_images, test_images), (data.test_labels, labels[1]))
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert_close(data.mean.double(), images.double().mean(dim=0) / 255, rtol=1e-6, atol=0)
    assert data.classes == list("abcdefghij")
    folder = tmp_path / getattr(torchvision.datasets, name.upper()).base_folder
    (folder / "part1").write_bytes(b"half")  # and it cannot be downloaded
    argv = ["--dataset", name, "--data-dir", tmp_path, "--output-dir", tmp_path / "run"]
    err = refusal(capsys, *argv)
    assert str(folder) in err and "127.0.0.1:9" in err and "refused" in err


def test_data_refuses_other_types_and_shapes():
    good = small_data()
    images, labels = good.images, good.labels
    refused = [(images / 255, labels, "uint8"), (images.numpy(), labels, "uint8")]
    refused += [(images[:, :, :28], labels, "32"), (images[:, 0], labels, "32")]
    refused += [(images, labels[:, None], r"\(N,\)"), (images, labels[1:], r"\(N,\)")]
    refused += [(images, labels.int(), "int64"), (images, labels.tolist(), "int64")]
    for bad_images, bad_labels, words in refused:
        with pytest.raises(ValueError, match=words):
            resnet.Data(bad_images, bad_labels, images, labels, [])
        with pytest.raises(ValueError, match=words):
            resnet.Data(images, labels, bad_images, bad_labels, [])
    with pytest.raises(ValueError, match="uint8"):  # else they would be scaled twice
        resnet.normalise(images / 255, good.mean)
    with pytest.raises(AttributeError):
        good.images = images


def test_val_holds_out_5000_training_images():
    whole = resnet.load_data("synthetic", None)
    torch.manual_seed(1)  # another seed of the run does not move the split
    part, again = (resnet.load_data("synthetic", None, val=True) for _ in range(2))
    assert torch.equal(part.test_images, again.test_images)

    def pairs(images, labels):
        return [(image.numpy().tobytes(), int(k)) for image, k in zip(images, labels, strict=True)]

    everything = pairs(whole.images, whole.labels)
    rest, held_out = pairs(part.images, part.labels), pairs(part.test_images, part.test_labels)
    assert [len(rest), len(held_out)] == [5_000, 5_000]
    assert sorted(everything) == sorted(rest + held_out)
    assert 2_300 < len({*everything[:5_000]} & {*held_out}) < 2_700  # a sample, not a range
    assert_close(part.mean.double(), part.images.double().mean(dim=0) / 255, rtol=1e-6, atol=0)


def test_learning_rate_at_its_edges_and_the_other_defaults():
    paper = resnet.paper_recipe(56)
    rates = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    for iteration, rate in rates.items():
        assert resnet.learning_rate(iteration, paper) == pytest.approx(rate, rel=1e-12)
    warm_ups = {104: 0, 110: 400, 1202: 400}
    for depth, warm_up in warm_ups.items():
        recipe = resnet.paper_recipe(depth)
        expected = {"iterations": 64_000, "batch_size": 128, "lr": 0.1, "warm_up": warm_up}
        expected |= {"momentum": 0.9, "weight_decay": 1e-4, "seed": 0}
        assert recipe._asdict() == expected
        first, last = (resnet.learning_rate(i, recipe) for i in (0, 399))
        assert first == last == pytest.approx(0.01 if warm_up else 0.1)
        assert resnet.learning_rate(400, recipe) == 0.1
    group = resnet.make_optimizer(resnet.ResNet(8), paper).param_groups[0]
    assert [group[key] for key in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 1e-4]

    def rates_of(iterations, warm_up=0):
        recipe = resnet.Recipe(iterations=iterations, lr=1, warm_up=warm_up)
        return [resnet.learning_rate(i, recipe) for i in range(iterations)]

    assert rates_of(8) == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rates_of(8, warm_up=3) == [0.1, 0.1, 0.1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rates_of(8, warm_up=9) == [0.1] * 6 + [0.01] * 2
    assert rates_of(1) == [1] and rates_of(3) == [1, 1, 0.1]


def test_train_is_the_recipe_written_out(double):
    torch.manual_seed(0)
    data = small_data(count=10)  # batches of 8 of 10: they cross epochs
    net = resnet.ResNet(8).eval()
    other = copy.deepcopy(net).train()
    recipe = resnet.Recipe(4, batch_size=8, momentum=0.8, weight_decay=0.01, seed=3)
    results, steps = watch(net, data, recipe, ends=(1, 4))
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    draws = torch.cat([resnet.draw_epoch(10, 3, epoch) for epoch in range(4)], dim=1)
    mean = data.images.double().mean(dim=0)
    losses, errors = [], []
    for step, rate in enumerate([0.1, 0.1, 0.01, 0.001]):
        index, dy, dx, flip = draws[:, 8 * step : 8 * step + 8]
        logits = other(resnet.augment((data.images[index] - mean) / 255, dy, dx, flip))
        loss = -logits.log_softmax(dim=1)[range(8), data.labels[index]].mean()
        losses.append(loss.item())
        errors.append((logits.argmax(dim=1) != data.labels[index]).sum().item() / 8)
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        for p, v, g in zip(other.parameters(), velocity, gradients, strict=True):
            v.mul_(0.8).add_(g + 0.01 * p.detach())
            p.data.sub_(rate * v)
        step = [float(number) for number in steps[step]]
        assert step == pytest.approx([rate, losses[-1], errors[-1]], rel=1e-5)
    first, others = (losses[0], 100 * errors[0]), (sum(losses[1:]) / 3, 100 * sum(errors[1:]) / 3)
    assert_close(results, [first, others], rtol=1e-5, atol=1e-6)
    assert_close(net.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)
    for start, stop in ((2, 2), (5, 4), (4, None)):
        with pytest.raises(ValueError, match=f"{start} to 4|{start} to {stop}"):
            resnet.train(net, resnet.make_optimizer(net, recipe), data, recipe, start, stop)


def test_train_sets_the_rate_of_all_groups_and_the_mode_and_shows_the_loss(capsys):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.Dropout()).eval()
    groups = [{"params": [parameter], "lr": 7.0} for parameter in net.parameters()]
    optimizer = torch.optim.SGD(groups, lr=7.0)
    recipe = resnet.Recipe(iterations=40, batch_size=2, lr=0.001)
    resnet.train(net, optimizer, small_data(), recipe, 0, 39)
    assert capsys.readouterr().out == "" and all(module.training for module in net.modules())
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-5])
    loss, _ = resnet.train(net, optimizer, small_data(), recipe, 39, 40, show=True)
    assert capsys.readouterr().out.split() == ["40", "loss", f"{loss:.4f}"]


def test_evaluate_equals_a_loop_over_single_images():
    torch.manual_seed(0)
    data = small_data(count=503)
    net = noisy(resnet.ResNet(8)).eval()
    with torch.no_grad():
        answers = [net((i / 255 - data.mean)[None]).argmax(dim=1) for i in data.test_images]
    answers = torch.cat(answers)
    answers[:303] = (answers[:303] + 1) % 10
    data = resnet.Data(data.images, data.labels, data.test_images, answers, data.classes)
    before = copy.deepcopy(net.train().state_dict())
    net.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    recorded = []
    assert resnet.evaluate(net, data) == pytest.approx(30300 / 503)
    assert not any(module.training for module in net.modules()) and not any(recorded)
    assert all(map(torch.equal, before.values(), net.state_dict().values()))


@pytest.mark.parametrize("option", ["plain", "A", "C"])
def test_bf16_is_of_all_layers_up_to_the_logits(option):
    torch.manual_seed(0)
    net = net_of(8, option)
    other = copy.deepcopy(net)
    batch = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    seen = set()
    for module in net.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    loss, _ = resnet.forward_backward(net, *batch, bf16=True)
    expected, _ = resnet.forward_backward(other, *batch)
    assert seen == {torch.bfloat16} and loss.dtype == torch.float32
    assert 0 < abs(loss / expected - 1) < 0.05
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.9


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
def test_compiled_blocks_equal_eager_ones(double):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = net_of(20, "A").to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    job = small_data(), resnet.Recipe(iterations=4, batch_size=8)
    compute = resnet.choose_compute(net, 8, bf16=False, compiled=True, graph=False)
    assert_close(watch(net, *job, compute), watch(other, *job))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5  # blocks of five shapes
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
    if device == "cuda":
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # it needs a driver
    recipe = resnet.Recipe(iterations=6, batch_size=8, warm_up=2)
    compute = functools.partial(resnet.forward_backward, bf16=True)
    with FakeTensorMode():
        with torch.device(device):
            net = resnet.ResNet(14, shortcut="B")
            images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
            labels = torch.zeros(20, dtype=torch.int64)
        data = resnet.Data(images, labels, images, labels, [])
        resnet.train(net, resnet.make_optimizer(net, recipe), data, recipe, compute=compute)
        resnet.evaluate(net, data)
    assert reads == [device] * 3  # the loss and the two errors, at the end


def test_the_logic_around_a_cuda_graph(monkeypatch):
    """In place of the graph, the recorded call is repeated, and its results are overwritten."""
    calls, recorded = [], []

    class Graph:
        def replay(self):
            images, labels, *kept = calls[-1]
            results = resnet.forward_backward(net, images, labels)
            for old, new in zip(kept, [*results, *gradients()], strict=True):
                old.copy_(new)
            net.zero_grad()  # a graph does not set the attribute of the parameters

    @contextlib.contextmanager
    def record(graph, stream):
        recorded.append(copy.deepcopy(net.state_dict()))
        yield
        net.load_state_dict(recorded[0])  # nothing runs while a graph is recorded

    def gradients():
        return [parameter.grad for parameter in net.parameters()]

    def compute(net, images, labels):
        assert net.training and (len(calls) < 3 or not any(g is not None for g in gradients()))
        results = resnet.forward_backward(net, images, labels)
        calls.append([images, labels, *results, *gradients()])
        return results

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    net = noisy(resnet.ResNet(8)).eval()
    other = copy.deepcopy(net)
    replay = resnet.as_cuda_graph(net, 8, compute)
    assert_close([recorded[0], net.state_dict()], [other.state_dict()] * 2, rtol=0, atol=0)
    job = small_data(), resnet.Recipe(iterations=4, batch_size=8)
    ours, theirs = watch(net, *job, replay), watch(other, *job)
    assert_close([ours, net.state_dict()], [theirs, other.state_dict()], rtol=0, atol=0)
    assert len({float(loss) for _, loss, _ in ours[1]}) == 4 and len(calls) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float64", "float32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("option", ["plain", "A", "C"])
def test_graphed_and_compiled_equal_eager(option, compiled, precision, request):
    """In float64 across both drops of the rate; the others, only while rounding is small."""
    stop, rtol = {"float64": (40, 1e-7), "float32": (5, 1e-3), "bf16": (5, 5e-2)}[precision]
    if precision == "float64":
        request.getfixturevalue("double")
    torch._dynamo.reset()
    torch.manual_seed(0)
    data = small_data(count=2000).to("cuda")
    recipe = resnet.Recipe(iterations=40, batch_size=32, lr=0.01)
    net = net_of(14, option).cuda().to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    bf16 = precision == "bf16"
    calls = itertools.count(1)

    def strict(*batch):
        """Waiting for the GPU is an error, until train() ends by reading its sums."""
        torch.cuda.set_sync_debug_mode("error" if next(calls) < stop else "default")
        return fast(*batch)

    flags = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with flags, torch.cuda.stream(torch.cuda.Stream()):
        fast = resnet.choose_compute(net, 32, bf16, compiled, graph=True)
        eager = resnet.choose_compute(other, 32, bf16, compiled=False, graph=False)
        _, ours = watch(net, data, recipe, strict, ends=[stop])
        _, theirs = watch(other, data, recipe, eager, ends=[stop])
    torch.cuda.synchronize()
    for (rate, loss, error), (rate2, expected, error2) in zip(ours, theirs, strict=True):
        assert rate == rate2 and (precision != "float64" or error == error2)
        assert_close(loss, expected, rtol=rtol, atol=0)
    if precision == "float64":
        assert_close(net.state_dict(), other.state_dict(), rtol=rtol, atol=1e-9)


# ----- A run, of one process or two ---------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The synthetic images are 40 and 40, so that a run takes a moment."""
    monkeypatch.setattr(resnet, "make_synthetic", small_data)


def tiny(folder, more=""):
    words = "--dataset synthetic --depth 8 --iterations 4 --eval-every 2 --batch-size 8"
    return [words, "--device cpu", more, "--output-dir", folder]


def facts(folder):
    """All that must be the same in two runs, without tensors: not images/s and seconds."""
    saved = load(folder)
    titles, *logged = (folder / "log.csv").read_text().splitlines()
    assert titles == "iteration,rate,train_loss,train_error,test_error,images_per_s,seconds"
    assert [",".join(map(str, row)) for row in saved["rows"]] == logged
    momentum = [s["momentum_buffer"].tolist() for s in saved["optimizer"].get("state", {}).values()]
    model = {name: tensor.tolist() for name, tensor in saved["model"].items()}
    rows = [row[:5] for row in saved["rows"]]
    return {
        **saved,
        "rows": rows,
        "model": model,
        "optimizer": momentum,
        "mean": saved["mean"].sum(),
    }


def test_a_run_is_what_python_does_and_starts_from_its_seed(small, tmp_path, capsys):
    words = "--shortcut B --bf16 --warm-up 1 --seed 5 --lr 0.2 --momentum 0.8 --weight-decay 0.01"
    status, out, _ = run(capsys, *tiny(tmp_path, words), "--iterations 5")
    assert status == 0
    torch.manual_seed(5)
    net = resnet.ResNet(8, shortcut="B").to(memory_format=torch.channels_last)
    recipe = resnet.Recipe(5, 8, 0.2, warm_up=1, momentum=0.8, weight_decay=0.01, seed=5)
    compute = functools.partial(resnet.forward_backward, bf16=True)
    optimizer = resnet.make_optimizer(net, recipe)
    data, rows = small_data(), []
    for start, stop, rate in ((0, 2, 0.2), (2, 4, 0.02), (4, 5, 0.002)):
        loss, error = resnet.train(net, optimizer, data, recipe, start, stop, compute)
        rows.append([stop, pytest.approx(rate), loss, error, resnet.evaluate(net, data)])
    saved = load(tmp_path)
    assert [row[:5] for row in saved["rows"]] == rows and rows[0][2] != rows[1][2]
    assert saved["responses"] == resnet.measure_responses(net, data)
    assert all(map(torch.equal, saved["model"].values(), net.state_dict().values()))
    assert saved["model"]["conv1.weight"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(saved["mean"], data.mean) and saved["classes"] == data.classes
    assert saved["machine"].startswith("1 x cpu") and torchvision.__version__ in saved["versions"]
    parameters = f"{sum(p.numel() for p in net.parameters()):,} parameters"
    for words in (parameters, f"torch {torch.__version__}", saved["machine"], str(tmp_path)):
        assert words in out
    assert f"{saved['rows'][-1][4]:.2f} % after iteration 5" in out.splitlines()[-1]


def test_a_short_run_has_ten_rows(small, tmp_path, capsys):
    words = "--dataset synthetic --depth 8 --iterations 17 --batch-size 4 --output-dir"
    assert run(capsys, words, tmp_path)[0] == 0
    assert [row[0] for row in load(tmp_path)["rows"]] == [2, 4, 6, 8, 10, 12, 14, 16, 17]


def test_the_same_command_resumes_and_then_finishes(small, tmp_path, capsys, monkeypatch):
    def stop_at_2(*args):
        return real(*args) if args[4] < 2 else sys.exit(9)  # args[4] is start

    argv = tiny(tmp_path / "run", "--bf16")
    assert run(capsys, *tiny(tmp_path / "alone", "--bf16"))[0] == 0
    real = resnet.train
    monkeypatch.setattr(resnet, "train", stop_at_2)
    assert run(capsys, *argv)[0] == 9
    monkeypatch.setattr(resnet, "train", real)
    saved = load(tmp_path / "run")
    assert [row[0] for row in saved["rows"]] == [2] and saved["responses"] == []
    saved["rows"][0][6] = 1000  # seconds
    del saved["settings"]["val"]  # of an older version: it had the default
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "resuming at iteration 2;" in out
    assert facts(tmp_path / "run") == facts(tmp_path / "alone")
    assert load(tmp_path / "run")["rows"][-1][6] >= 1000
    assert load(tmp_path / "run")["optimizer"] == {}
    (tmp_path / "run" / "log.csv").write_text("out of date")
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "") and "has finished" in out and len(out.splitlines()) == 1
    assert facts(tmp_path / "run") == facts(tmp_path / "alone")
    before = [path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()]
    run(capsys, *argv)
    assert before == [path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()]


DIFFERENT = """--plain: plain False, --shortcut B: shortcut A, --depth 14: depth 8, --lr 1: lr 0.1,
--iterations 8: iterations 4, --batch-size 4: batch_size 8, --warm-up 1: warm_up 0, --bf16: bf16 F,
--momentum 0.5: momentum 0.9, --weight-decay 0: weight_decay 0.0001, --seed 1: seed 0,
--val: val False, --dataset cifar100: dataset synthetic, --seed 0: colour red"""


def test_another_recipe_is_refused(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resnet, "hold_out", lambda data: data)
    monkeypatch.setattr(resnet, "load_cifar", lambda *_: small_data())
    assert run(capsys, *tiny(tmp_path))[0] == 0
    path = tmp_path / "checkpoint.pt"
    for case in re.split(r",\s", DIFFERENT):
        change, words = case.split(": ")
        if "colour" in words:  # a setting of another version
            saved = load(tmp_path)
            saved["settings"]["colour"] = "red"
            torch.save(saved, path)
        before = path.read_bytes()
        err = refusal(capsys, *tiny(tmp_path), change)
        assert words in err and str(path) in err and path.read_bytes() == before


def test_what_is_no_checkpoint_is_left_as_it_is(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(capsys, *tiny(tmp_path / "run"))
    path = tmp_path / "run" / "checkpoint.pt"
    whole, saved = path.read_bytes(), load(tmp_path / "run")
    unfinished = {**saved, "rows": saved["rows"][:1]}
    bomb = type("Bomb", (), {"__reduce__": lambda self: (open, ("exploded", "w"))})
    bad = [b"", b"no net", whole[: len(whole) // 2], torchvision.models.resnet18().state_dict()]
    bad += [{**saved, "rows": bomb()}, [1, 2], {**unfinished, "optimizer": {"state": {}}}]
    for key in ("settings", "rows", "model"):
        bad.append({name: value for name, value in saved.items() if name != key})
        bad += [{**saved, key: value} for value in (None, {}, [[1, 2]], [[None] * 7])]
    for content in bad:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        err = refusal(capsys, *tiny(tmp_path / "run"))
        assert str(path) in err and "loaded (" in err and "weights_only" not in err
        assert path.read_bytes() == before and not Path("exploded").exists()
        assert run(capsys, "--report", tmp_path)[0] in (0, 2)  # it does not need all of the file
    del saved["settings"]
    torch.save(saved, path)
    assert "'settings'" in refusal(capsys, *tiny(tmp_path / "run"))
    path.write_bytes(whole)

    def too_large(*_, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate")

    monkeypatch.setattr(torch, "load", too_large)
    assert "out of memory" in refusal(capsys, *tiny(tmp_path / "run"))
    monkeypatch.setattr(resnet, "train", too_large)
    assert "out of memory" in refusal(capsys, *tiny(tmp_path / "new"))


TROUBLES = ["stopped", "File too large", "log.csv", "another run", "Broken pipe"]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_goes_wrong_in_a_save_loses_nothing(trouble, small, tmp_path, capsys, monkeypatch):
    """In that of the second row. A limit on the size of files stands for a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run"
    path, log = folder / "checkpoint.pt", folder / "log.csv"
    synced, tested = [], []
    evaluate, print_row = resnet.evaluate, resnet.print_row

    def watch_sync(file):
        synced.append(os.fstat(file).st_size)
        if len(synced) == 2 and trouble == "stopped":
            raise KeyboardInterrupt

    def evaluate_and_spoil(*args):
        tested.append(None)
        if len(tested) == 2:
            os.link(path, tmp_path / "first")  # it is to be replaced, not written to
        if len(tested) == 2 and trouble == "File too large":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        if len(tested) == 2 and trouble == "log.csv":
            log.unlink()
            log.mkdir()  # stands for a file that another program has locked
        if len(tested) == 2 and trouble == "another run":
            path.write_bytes(path.read_bytes())
        return evaluate(*args)

    def print_or_break(row):
        if len(tested) > 1 and trouble == "Broken pipe":
            raise BrokenPipeError(32, "Broken pipe")
        print_row(row)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(resnet, "evaluate", evaluate_and_spoil)
    monkeypatch.setattr(resnet, "print_row", print_or_break)
    try:
        status, _, err = run(capsys, *tiny(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == (130 if trouble == "stopped" else 2) and trouble in err
    assert len(err.splitlines()) == 1 and "delete" not in err
    assert sorted(folder.iterdir()) == [path, log] and synced[0] > 100_000
    assert [row[0] for row in torch.load(tmp_path / "first")["rows"]] == [2]
    lost = trouble in ("stopped", "File too large", "another run")
    assert [row[0] for row in load(folder)["rows"]] == ([2] if lost else [2, 4])
    if trouble == "log.csv":
        log.rmdir()
    monkeypatch.setattr(resnet, "print_row", print_row)
    assert run(capsys, *tiny(folder))[0] == 0 and run(capsys, *tiny(tmp_path / "alone"))[0] == 0
    assert facts(folder) == facts(tmp_path / "alone")


@pytest.mark.parametrize("name", ["fc.bias", "bn1.running_var", "loss"])
def test_what_is_not_finite_is_not_saved(name, small, tmp_path, capsys, monkeypatch):
    def train(net, optimizer, data, recipe, start, *others):
        loss, error = real(net, optimizer, data, recipe, start, *others)
        if start == 2 and name != "loss":  # it is of the weights before the last step
            net.state_dict()[name][1] = float("inf")
        return (float("nan") if start == 2 and name == "loss" else loss), error

    real = resnet.train
    monkeypatch.setattr(resnet, "train", train)
    err = refusal(capsys, *tiny(tmp_path))
    assert "not finite at iteration 4" in err and "--lr" in err
    assert [row[0] for row in facts(tmp_path)["rows"]] == [2]


BAD_ARGUMENTS = """--depth deep, --depth 57: 56 and 62, --shortcut D, --shortcut AB,
--plain --shortcut A, --dep 20, --iterations 0, --batch-size 0, --eval-every 0, --eval-every 1.5,
--lr -1, --lr nan, --lr inf, --weight-decay inf, --momentum nan, --momentum 1, --warm-up -1,
--seed 99999999999999999999, --seed -1, --dataset folder, --precision bf16, --device tpu: tpu,
--device cuda:99: cuda:99, --device meta: meta, --report nowhere: nowhere,
--output-dir file: file"""


@pytest.mark.parametrize("case", re.split(r",\s", BAD_ARGUMENTS))
def test_bad_arguments_are_one_line_at_once(case, capsys, tmp_path, monkeypatch):
    """The line has the first argument in it, or what is written behind the colon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resnet, "load_data", None)
    Path("file").touch()
    argv, _, words = case.partition(": ")
    assert (words or argv.split()[0]) in refusal(capsys, argv)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_paths_of_the_home_folder_and_names_of_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    words = ["--data-dir=~/a", "--output-dir=~/b", "--report", "~/c"]
    args = resnet.make_parser().parse_args(words)
    assert (args.data_dir, args.output_dir, args.report) == tuple(tmp_path / n for n in "abc")
    names = {"": "resnet-20", "--depth 56 --plain": "plain-56", "--shortcut B": "resnet-b-20"}
    names |= {"--depth 110": "resnet-110", "--bf16 --seed 1": "resnet-20-seed-1-bf16"}
    for words, name in names.items():
        args = resnet.make_parser().parse_args(words.split())
        assert resnet.name_folder(resnet.make_settings(args, 1)) == Path("runs", name)


def start(function, *args):
    """Start a process that begins with torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def run_in_child(folder):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell's "&" started us
    resnet.make_synthetic = small_data
    sys.stdout = sys.stderr = open(f"{folder}.out", "w")  # noqa: SIM115 - until the process ends
    words = "--dataset synthetic --depth 8 --iterations 600 --batch-size 4 --warm-up 200"
    resnet.main(split([words, "--eval-every 15 --device cpu --output-dir", folder]))


@pytest.mark.skipif(sys.platform == "win32", reason="needs forks and signals")
def test_kills_change_nothing_and_lines_appear_at_once(tmp_path):
    """Killed shortly after its first row, again and again: by Ctrl-C and by SIGKILL."""
    alone = start(run_in_child, tmp_path / "alone")
    alone.join()
    assert "  loss " not in (tmp_path / "alone.out").read_text()  # that is for a terminal
    folder, out = tmp_path / "killed", tmp_path / "killed.out"
    chance = random.Random(0)
    ends = []
    for kill in [signal.SIGINT, *[signal.SIGKILL] * 5, None]:
        out.unlink(missing_ok=True)
        child = start(run_in_child, folder)
        while kill and not (out.exists() and re.search(r"^ +\d", out.read_text(), re.M)):
            time.sleep(0.02)
            assert child.is_alive()  # each row is written to the file at once
        if kill:
            time.sleep(chance.uniform(0, 0.2))
            os.kill(child.pid, kill)
        child.join()
        ends.append(child.exitcode)
        assert kill != signal.SIGINT or "stopped" in out.read_text().splitlines()[-1]
    assert ends == [130] + [-9] * 5 + [0]
    assert len(facts(folder)["rows"]) == 40 and facts(folder) == facts(tmp_path / "alone")


def train_linear(rank, processes, folder):
    """Five steps of a net without BN: what watch() returns, and its tensors."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))

    def compute(net, images, labels):
        assert len(images) == len(labels) == 8 // processes
        return resnet.forward_backward(net, images, labels)

    if processes > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=processes)
        compute = resnet.share_batches(net, compute)
    recipe = resnet.Recipe(iterations=5, batch_size=8, lr=1e-3)
    results = watch(net, small_data(), recipe, compute), dict(net.state_dict())
    torch.save(results, folder / f"{rank} of {processes}")


@pytest.mark.skipif(sys.platform == "win32", reason="needs forks")
def test_two_processes_equal_one(tmp_path):
    ranks = [(0, 1), (0, 2), (1, 2)]
    children = [start(train_linear, *rank, tmp_path) for rank in ranks]
    for child in children:
        child.join()
    one, *two = [torch.load(tmp_path / f"{rank} of {count}") for rank, count in ranks]
    assert_close(two, [one, one], rtol=1e-10, atol=1e-12)


def test_torchrun(tmp_path, monkeypatch):
    """One process prints and saves; the net that it has tested is the one that it saves."""
    script = """import resnet, test_resnet
resnet.make_synthetic = test_resnet.small_data
resnet.main()"""
    (tmp_path / "worker.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "worker.py"]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parent), "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, *split(tiny("run"))], **options, check=True)
    assert "destroy_process_group" not in done.stderr and done.stdout.count(" 0.1 ") == 1
    assert done.stdout.count("processes 2") == done.stdout.count("has finished") == 1
    saved = load(tmp_path / "run")
    assert [row[0] for row in saved["rows"]] == [2, 4]
    net = resnet.ResNet(8)
    net.load_state_dict(saved["model"])
    assert saved["rows"][-1][4] == resnet.evaluate(net, small_data())

    monkeypatch.setattr(resnet.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(resnet.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(resnet.dist, "get_world_size", lambda: 2)
    cases = {"--batch-size 7": "divisible by 2", "--device cpu:0": "--device cpu:0: leave"}
    for change, words in cases.items():
        args = resnet.make_parser().parse_args(split(tiny(tmp_path / "new", change)))
        with pytest.raises(resnet.UserError, match=words):
            resnet.run(args)


def snippet(words):
    """Return the README's Python code that contains words."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return next(block for block in blocks if words in block)


def test_synthetic_data_can_be_learnt_and_the_net_is_used_as_in_the_readme(tmp_path, capsys):
    words = "--dataset synthetic --depth 8 --iterations 100 --batch-size 64 --eval-every 100"
    run(capsys, words, "--output-dir", tmp_path)
    data = resnet.make_synthetic()
    picture = torchvision.transforms.functional.to_pil_image(data.test_images[0])
    picture.save(tmp_path / "cat.png")
    lines = snippet("torch.load(").replace("load_cifar()", "data").replace("ResNet(20", "ResNet(8")
    lines = lines.replace(".runs/resnet-20", str(tmp_path)).replace(
        "cat.png", f"{tmp_path}/cat.png"
    )
    space = {"data": data}
    exec(lines.replace("import load_cifar, ", "import "), space)
    error, answer = capsys.readouterr().out.splitlines()
    logits = space["net"](resnet.normalise(data.test_images, space["saved"]["mean"]))
    wrong = (logits.argmax(dim=1) != data.test_labels).sum().item()
    assert wrong < 1000  # by chance it would be 1800
    assert float(error) == pytest.approx(100 * wrong / 2000, abs=0.1)
    assert float(error) == pytest.approx(space["saved"]["rows"][-1][4], abs=0.1)
    assert answer == data.classes[logits[0].argmax()]


def test_own_images_as_in_the_readme(tmp_path, capsys):
    data = small_data()
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                picture = torchvision.transforms.functional.to_pil_image(data.images[i])
                picture.save(tmp_path / part / name / f"{i}.png")
    space = {}
    exec(snippet("ImageFolder(").replace("my_images", str(tmp_path)).replace("1000", "2"), space)
    assert 0 <= float(capsys.readouterr().out) <= 100
    assert space["data"].classes == ["cat", "dog"]
    assert space["data"].labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(space["data"].test_images[4:], data.images[:4])


def test_gradients_of_untrained_nets_as_the_readme_says(capsys):
    exec(snippet("forward_backward(net").replace("(20, 56, 110)", "(20, 56)"), {})
    ratios = [float(line.split(" = ")[1]) for line in capsys.readouterr().out.splitlines()]
    plain_20, residual_20, plain_56, residual_56 = ratios
    assert 0.5 < plain_20 < 10 and 50 < plain_56 < 2000
    assert 0.1 < residual_20 < 10 and 0.1 < residual_56 < 10


def test_saved_runs_are_the_rows_of_the_readme():
    saved_runs = sorted((PROGRAM.parent / ".runs").glob("*/checkpoint.pt"))
    assert len(saved_runs) >= 2
    for path in saved_runs:
        run = resnet.read_run(path)
        settings, last = run["settings"], run["rows"][-1]
        assert last.iteration == 64_000 and run["difference"] == "as in the paper"
        assert run["name"].lower() == path.parent.name and run["optimizer"] == {}
        assert len(run["responses"]) == settings["depth"] - 1
        net = resnet.ResNet(settings["depth"], settings["plain"])
        net.load_state_dict(run["model"])
        assert layers_and_parameters(net)[1] == run["parameters"]
        errors = rf"\| {last.train_error:.2f} % \| {last.test_error:.2f} % \|"
        assert re.search(rf"\| {run['name']} .*{errors}", README)
        log = path.with_name("log.csv").read_text().splitlines()
        assert [line.split(",") for line in log[1:]] == [list(map(str, r)) for r in run["rows"]]


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
    labels = torch.zeros(750, dtype=torch.int64)
    data = resnet.Data(0 * images, labels, images, labels, [])
    responses = resnet.measure_responses(net, data)
    assert responses == pytest.approx([2 * (1 / 3 * 2 / 3) ** 0.5, 1, 2, 3, 4, 5, 6], rel=1e-6)
    assert not any(module._forward_hooks for module in net.modules())


def write_run(folder, errors, responses=(), **changes):
    """A checkpoint made without the program. errors: (iteration, training error, test error)."""
    settings = {"depth": 20, "plain": False, "shortcut": "A", "dataset": "cifar10", "val": False}
    settings |= {"iterations": errors[-1][0], "batch_size": 128, "lr": 0.1, "warm_up": 0}
    settings |= {"momentum": 0.9, "weight_decay": 1e-4, "seed": 0, "bf16": True, "processes": 1}
    settings |= changes
    rows = [[i, 0.1, 1.5, train, test, 100, i // 100] for i, train, test in errors]
    model = {
        "weight": torch.empty(1000 * settings["depth"], dtype=torch.int8),
        "num": torch.ones(5),
    }
    saved = {"settings": settings, "rows": rows, "model": model, "optimizer": {}}
    saved |= {"responses": list(responses), "machine": "a GPU", "versions": "torch 2"}
    folder.mkdir(parents=True)
    torch.save(saved, folder / "checkpoint.pt")


REPORT = """\
plain-20 | as in the paper | bf16 | 9.75 %
plain-110 | as in the paper | bf16 | 65.00 % | more than 60 % (precision not stated)
ResNet-20 | as in the paper | bf16 | 6.25 % | 8.75 % (precision not stated)
ResNet-20 | as in the paper | float32 | 6.75 % | 8.75 %
ResNet-20 | dataset cifar100, iterations 2000 | bf16 | 42.25 %
ResNet-56 | unfinished after 500 | bf16 | 55.50 %
ResNet-110 | as in the paper | float32 | 6.50 % | 6.43 %, the best of five; mean 6.61 ± 0.16 %
ResNet-110 | val True, lr 0.05, warm_up 0, processes 4 | bf16 | 6.60 %
"""


def test_report_is_a_line_for_the_seeds_of_a_net(tmp_path, capsys):
    for seed, (train, test) in enumerate([(1.0, 8.0), (2.0, 9.0), (3.0, 8.5)]):
        write_run(tmp_path / f"a{seed}", [(32_000, 20, 22), (64_000, train, test)], seed=seed)

    def write(name, error, iteration=64_000, **changes):
        write_run(tmp_path / name, [(iteration, 4.0, error)], **changes)

    write("b", 9.75, plain=True)
    write("c", 55.5, 500, iterations=64_000, depth=56)
    write("d", 42.25, 2000, dataset="cifar100", seed=7)
    write("deep/f", 6.5, depth=110, warm_up=400, bf16=False)
    write("g", 6.6, depth=110, lr=0.05, val=True, processes=4)
    write("h", 6.25, processes=2, seed=9)  # BN of half a batch each: a line of its own
    write("i", 6.75, bf16=False)
    write("l", 65.0, plain=True, depth=110, warm_up=400)
    write("same", 1.0)  # of the seed of a0: no evidence of its own
    write("list", 1.0, seed=[1], lr=7)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "checkpoint.pt").write_text("no net")
    resnet.print_table(resnet.collect_runs(tmp_path))
    out = capsys.readouterr().out.splitlines()
    table = [re.split(r" *\| *", line.strip("| ")) for line in out if line.startswith("|")]
    assert {len(row) for row in table} == {10} and len(table) == 2 + 9
    # The mean of the seeds is 8.5 and, by hand, the deviation the root of (0.25 + 0.25 + 0) / 2.
    seeds = ["bf16", "3", "2.00 ± 1.00 %", "8.50 ± 0.50 %", "8.75 % (precision not stated)"]
    a = next(row for row in table if row[4] == "3")
    assert a == ["ResNet-20", "20,000", "as in the paper", *seeds, "0:10:40", "a GPU, torch 2"]
    cells = [row[:1] + row[2:4] + row[6:8] for row in table[2:] if row != a]
    lines = [" | ".join(filter(None, row)) for row in cells]
    assert sorted(lines) == sorted(REPORT.splitlines())
    left_out = [line for line in out if line.startswith("left out: ")]
    for name, line in zip(["list", "same", "text"], left_out, strict=True):
        assert line.startswith(f"left out: {tmp_path / name / 'checkpoint.pt'}")
    assert "same settings and seed" in left_out[1]


CHANGES = [{"shortcut": "B"}, {"shortcut": "C"}, {"depth": 26}, {"plain": True, "depth": 26}]
CHANGES += [{"plain": True, "depth": 1202, "warm_up": 400}, {"val": True}, {"lr": 0.05}]
CHANGES += [{"dataset": "cifar100"}, {"iterations": 64_001}, {"batch_size": 256}]
CHANGES += [{"momentum": 0.8}, {"weight_decay": 5e-4}, {"warm_up": 1}, {"processes": 4}]
CHANGES += [{"colour": "red"}, {"depth": 110}]


def test_what_the_paper_did_not_do_is_not_as_in_the_paper(tmp_path):
    for k, change in enumerate(CHANGES):
        write_run(tmp_path / str(k), [(64_001, 4.0, 6.5)], **{"iterations": 64_000, **change})
    differences = [runs[0]["difference"] for runs in resnet.collect_runs(tmp_path)]
    assert len(differences) == len(CHANGES) and "as in the paper" not in differences
    errors = [float(resnet.PAPER_ERRORS[f"ResNet-{depth}"].split()[0]) for depth in DEPTHS]
    assert errors == [8.75, 7.51, 7.17, 6.97, 6.43, 7.93]  # Table 6


def test_figures_6_and_7_and_what_stops_them(tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    warnings.simplefilter("error")
    real = figure.savefig
    axes = []
    monkeypatch.setattr(figure, "savefig", lambda *a, **k: axes.extend(a[0].axes) or real(*a, **k))
    (tmp_path / "empty").mkdir()
    assert "no run to show" in refusal(capsys, "--report", tmp_path)
    write_run(tmp_path / "b0", [(32_000, 50, 55), (64_000, 8, 9.4)], plain=True)
    assert run(capsys, "--report", tmp_path)[0] == 0  # an empty panel, and no responses
    assert axes[0].get_ylim() == pytest.approx((0, 19.8))
    axes.clear()
    write_run(tmp_path / "a", [(32_000, 30, 22), (64_000, 1, 8)], responses=[2, 4, 3])
    write_run(tmp_path / "b1", [(64_000, 40, 45)], plain=True, seed=1, responses=[1, 2])
    write_run(tmp_path / "c", [(64_000, 2, 7)], depth=56, dataset="$x", responses=[0.1])
    write_run(tmp_path / "d", [(64_000, 2, 7)], depth=56, bf16=False)
    write_run(tmp_path / "e", [(64_000, 2, 7)], depth=56, shortcut="B")
    out = run(capsys, "--report", tmp_path)[1]
    for name in ("fig6.png", "fig7.png"):
        assert str(tmp_path / name) in out and (tmp_path / name).stat().st_size > 10_000
    plain, residual, in_order, by_size = axes

    def curves(panel):
        return [(a.get_color(), a.get_linestyle(), list(a.get_ydata())) for a in panel.lines]

    def names(panel):
        return [text.get_text() for text in panel.get_legend().texts]

    c = (in_order.lines[2].get_color(), "-", [0.1])
    assert curves(in_order) == [("C0", ":", [1, 2]), ("C0", "-", [2, 4, 3]), c]
    assert curves(by_size) == [("C0", ":", [2, 1]), ("C0", "-", [4, 3, 2]), c]
    assert sorted(curves(residual)[:2]) == [("C0", "-", [22, 8]), ("C0", "--", [30, 1])]
    assert list(residual.lines[1].get_xdata()) == [32_000, 64_000]
    assert list(in_order.lines[1].get_xdata()) == [1, 2, 3]
    assert {colour for colour, *_ in curves(plain)} == {"C0"} and plain.get_ylim()[1] == 91
    assert len({colour for colour, *_ in curves(residual)}) == 4  # options and precisions apart
    assert names(plain) == ["plain-20, as in the paper, bf16"]  # one for both seeds
    assert names(in_order)[2] == r"ResNet-56, dataset \$x, bf16"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    status, out, err = run(capsys, "--report", tmp_path)
    assert status == 2 and "pip install matplotlib" in err and err.count("\n") == 1
    assert "| 8.00 % |" in out


def test_metadata_for_uv_and_commands_of_the_readme():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.M | re.S)[1]
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    requirements = (PROGRAM.parent / "requirements.txt").read_text().split()
    assert [*metadata["dependencies"], "pytest>=8"] == requirements
    commands = re.findall(r"(?:python|uv run|torchrun [-=a-z0-9 ]*) resnet\.py *([^#`\n]*)", README)
    assert len(commands) >= 8
    for command in commands:
        resnet.make_parser().parse_args(command.split())
