# SPDX-License-Identifier: MIT
"""Tests of resnet.py: `python -m pytest`. They need no GPU and no download.

What is tested is compared with something that does not come from resnet.py: the paper's numbers, arithmetic written
out by hand, torchvision, or a loop over single images and pixels.
"""
import ast
import builtins
import copy
import csv
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
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

import resnet

PROGRAM = Path(resnet.__file__)
SOURCE = PROGRAM.read_text(encoding="utf-8")
README = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")


def run(capsys, *argv):
    """Run the program in this process: (exit status, stdout, stderr)."""
    status = None
    try:
        resnet.main([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return (1, out, f"{err}{status}") if isinstance(status, str) else (status or 0, out, err)


def rows_of(folder):
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def net_of(depth, option):
    return resnet.ResNet(depth, plain=True) if option == "plain" else resnet.ResNet(depth, shortcut=option)


def noisy(net):
    """net with BN parameters and statistics that are not the initial zeros and ones, which would hide mistakes."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return net


def layers_and_parameters(net):
    """Their numbers: the paper counts convolutions and fully connected layers, but not the projections."""
    layers = [name for name, module in net.named_modules()
              if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name]
    return len(layers), sum(p.numel() for p in net.parameters())


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
    w, stride = dict(block.named_parameters()), block.conv1.stride[0]

    def convolution_bn(x, convolution, bn, stride):
        weight, (batch, _, height, width) = w[f"{convolution}.weight"], x.shape
        columns = F.unfold(x, weight.shape[-1], padding=weight.shape[-1] // 2, stride=stride)
        y = (weight.flatten(1) @ columns).view(batch, -1, -(-height // stride), -(-width // stride))
        mean = y.mean(dim=(0, 2, 3), keepdim=True)
        variance = ((y - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        return (y - mean) / (variance + 1e-5).sqrt() * w[f"{bn}.weight"][:, None, None] + w[f"{bn}.bias"][:, None, None]

    y, last = convolution_bn(x, "conv1", "bn1", stride), 3 if "conv3.weight" in w else 2
    for k in range(2, last + 1):
        y = convolution_bn(y.clamp(min=0), f"conv{k}", f"bn{k}", 1)
    if "shortcut.conv.weight" in w:
        y = y + convolution_bn(x, "shortcut.conv", "shortcut.bn", stride)
    elif block.shortcut is not None:
        shortcut = torch.zeros_like(y)
        first = (y.shape[1] - x.shape[1]) // 2
        shortcut[:, first:first + x.shape[1]] = x[:, :, ::stride, ::stride]
        y = y + shortcut
    return y.clamp(min=0)


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 16, 2), (8, 16, 1), (8, 8, 2), (3, 8, 2)], ids=str)
@pytest.mark.parametrize("shortcut", ["A", "B", "C", None])
@pytest.mark.parametrize("kind", [resnet.ResidualBlock, resnet.BottleneckBlock])
def test_block_equals_the_block_written_out(kind, shortcut, shape):
    torch.manual_seed(0)
    block = noisy(kind(*shape, shortcut)).double()
    projects = shortcut == "C" or (shortcut == "B" and shape != (8, 8, 1))
    assert ("shortcut.conv.weight" in block.state_dict(), block.shortcut is None) == (projects, shortcut is None)
    x = torch.randn(4, shape[0], 9, 7, dtype=torch.double, requires_grad=True)
    y, expected = block(x), by_hand(block, x)
    torch.testing.assert_close(y, expected)
    weight, inputs = torch.randn_like(y), [x, *block.parameters()]
    for ours, theirs in zip(torch.autograd.grad((y * weight).sum(), inputs),
                            torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_part_1_can_be_copied_out_with_torch_alone():
    lines = SOURCE.splitlines()
    one, two = (next(i for i, line in enumerate(lines) if line.startswith(f"# ----- {k}.")) for k in (1, 2))
    space = {}
    exec("\n".join(["import torch", "from torch import nn", *lines[one:two]]), space)
    assert space["ResidualBlock"](16, 32, stride=2, shortcut="B")(torch.zeros(1, 16, 8, 8)).shape == (1, 32, 4, 4)
    assert type(space["make_shortcut"]("A", 16, 32, 2)) is space["IdentityShortcut"]


def test_parts_1_to_4_are_a_whole_program():
    """Cut off before part 5, what is left defines every name that it uses, and trains a net by the paper's recipe."""
    text, space = SOURCE[:SOURCE.index("# ----- 5.")], {"__name__": "paper"}
    exec(text, space)
    nodes = list(ast.walk(ast.parse(text)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    local = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    local |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    local |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert not used - local - {*space, *dir(builtins)}
    data, net = small_data(count=256), space["ResNet"](8)
    before, optimizer = net.fc.weight.clone(), space["make_optimizer"](net)
    iteration, rate, _, wrong, warming_up = next(space["train"](net, optimizer, *data))
    assert (iteration, rate, warming_up) == (1, 0.1, False) and wrong <= 128 and not torch.equal(before, net.fc.weight)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"], group["dampening"]) == (0.9, 1e-4, False, 0)
    assert 0 <= space["count_wrong"](net, *data) <= 256 and space["ITERATIONS"] == 64_000
    assert len(group["params"]) == len(list(net.parameters())) and space["WARM_UP_DEPTH"] == 110


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
    assert layers_and_parameters(net) == (depth, expected)
    assert all(module.bias is None for module in net.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("plain", [False, True])
def test_net_equals_the_net_written_out(plain):
    """ResNet-20 in evaluation mode as a flat list of convolutions, from its weights in their order."""
    torch.manual_seed(0)
    net = noisy(resnet.ResNet(20, plain=plain)).double().eval()
    tensors = iter([t for name, t in net.state_dict().items() if "num_batches" not in name])

    def conv_bn(x, stride=1):
        x = F.conv2d(x, next(tensors), stride=stride, padding=1)
        scale, shift, mean, variance = (next(tensors)[:, None, None] for _ in range(4))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    images = torch.randn(3, 3, 32, 32, dtype=torch.double)
    x = conv_bn(images).relu()
    for block in range(9):
        stride = 2 if block in (3, 6) else 1
        y = conv_bn(conv_bn(x, stride).relu())
        zeros = torch.zeros(3, (y.shape[1] - x.shape[1]) // 2, *y.shape[2:], dtype=torch.double)
        x = (y if plain else y + torch.cat([zeros, x[:, :, ::stride, ::stride], zeros], dim=1)).relu()
    torch.testing.assert_close(net(images), F.linear(x.mean(dim=(2, 3)), next(tensors), next(tensors)))
    assert next(tensors, None) is None


@pytest.mark.parametrize("make", [lambda: resnet.ResNet(56, shortcut="B"), lambda: resnet.ImageNetResNet(50)])
def test_he_initialisation(make):
    torch.manual_seed(0)
    net = make()
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            z = module.weight.detach() / (2 / module.weight[0].numel()) ** 0.5
            assert abs(z.std() - 1) < 5 / z.numel() ** 0.5 and abs(z.mean()) < 5 / z.numel() ** 0.5, name  # 5 errors
    assert not net.fc.bias.any()


@pytest.mark.parametrize(("depth", "nearest"), [(57, "56 and 62"), (21, "20 and 26"), (-4, "8 and 14")])
def test_bad_depths_and_blocks_are_refused(depth, nearest):
    with pytest.raises(ValueError, match=f"{nearest}$"):
        resnet.ResNet(depth)
    with pytest.raises(ValueError, match="ProjectionShortcut"):
        resnet.IdentityShortcut(32, 16)
    with pytest.raises(ValueError, match="'D'"):
        resnet.ResidualBlock(16, 16, shortcut="D")
    for bad, plain in ((depth, False), (50, True)):
        with pytest.raises(ValueError, match=f"18, 34, 50, 101 or 152, and 18 or 34 if plain, not {bad}"):
            resnet.ImageNetResNet(bad, plain)


@pytest.mark.parametrize("make", [lambda: net_of(8, "plain"), lambda: net_of(8, "A"), lambda: net_of(8, "C"),
    lambda: resnet.ImageNetResNet(34, plain=True), lambda: resnet.ImageNetResNet(50, shortcut="A")])
def test_nets_pickle_copy_export_and_load(make):
    torch.manual_seed(0)
    net, x, other = noisy(make()).eval(), torch.randn(2, 3, 32, 32), make().eval()
    y, _ = net(x), other.load_state_dict(net.state_dict())
    assert all(torch.equal(twin(x), y) for twin in (other, pickle.loads(pickle.dumps(net)), copy.deepcopy(net)))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), y)
    names = {key.split(".")[0] for key in net.state_dict()}
    assert names - {"stage4"} == {"conv1", "bn1", "stage1", "stage2", "stage3", "fc"}


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


def test_draws_reach_every_crop_and_flip_evenly_and_depend_on_seed_and_epoch():
    index, dy, dx, flip = resnet.draw_epoch(81 * 2 * 100, 3, 5, "cpu")
    counts = torch.bincount((dy * 9 + dx) * 2 + flip, minlength=162)
    assert len(counts) == 162 and counts.min() > 50 and counts.max() < 150  # 100 +- 5 standard deviations
    assert torch.equal(index, resnet.draw_epoch.__wrapped__(16_200, 3, 5, "cpu")[0])  # without the cache
    keys = itertools.product((0, 1, 2, 256, 2**16, 2**32 - 1), (0, 1, 2, 256, 2**16, 2**24))  # seeds and epochs
    draws = torch.stack([resnet.draw_epoch(50, *key, "cpu") for key in keys])
    assert all(len(draws[:, row].unique(dim=0)) == 36 for row in range(4))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 5), (3, 8), (7, 7), (50, 1)])
def test_no_image_is_dropped_or_repeated_within_an_epoch(count, batch_size):
    """Batches are the epochs' columns, one after the other, whichever batch is asked for first."""
    epochs = torch.cat([resnet.draw_epoch(count, 7, epoch, "cpu") for epoch in range(5)], dim=1)
    for iteration in random.Random(0).sample(range(5 * count // batch_size), 5 * count // batch_size):
        draws = resnet.draw_batch(count, batch_size, 7, iteration, "cpu")
        assert torch.equal(draws, epochs[:, iteration * batch_size:(iteration + 1) * batch_size])
    assert epochs[0].view(5, count).sort().values.tolist() == [list(range(count))] * 5


@pytest.mark.parametrize(("name", "key", "names"), [
    ("cifar10", "labels", "label_names"), ("cifar100", "fine_labels", "fine_label_names")])
def test_cifar_files_are_read_plane_by_plane(name, key, names, tmp_path, monkeypatch):
    """A small data set in CIFAR's own file format: 3072 bytes an image, all red ones first, row by row."""
    source = getattr(torchvision.datasets, name.upper())
    folder = tmp_path / source.base_folder
    folder.mkdir()
    pixels, labels = torch.randint(256, (2, 5, 3072), dtype=torch.uint8), torch.randint(10, (2, 5))
    for part in range(2):
        entry = {"data": pixels[part].numpy(), key: labels[part].tolist()}
        (folder / f"part{part}").write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({names: list("abcdefghij")}))
    monkeypatch.setattr(source, "train_list", [["part0", None]])
    monkeypatch.setattr(source, "test_list", [["part1", None]])
    monkeypatch.setattr(source, "meta", {"filename": "meta", "key": names, "md5": None})
    *tensors, classes = resnet.load_data(name, tmp_path)
    expected = pixels[0].view(5, 3, 32, 32), labels[0], pixels[1].view(5, 3, 32, 32), labels[1]
    assert classes == list("abcdefghij") and all(map(torch.equal, tensors, expected))


def test_val_holds_out_5000_training_images():
    whole, split = (resnet.load_data("synthetic", None, val) for val in (False, True))
    torch.manual_seed(1)  # another seed of the run does not move the split
    assert torch.equal(split[2], resnet.load_data("synthetic", None, True)[2])
    parts = [[(image.numpy().tobytes(), label.item()) for image, label in zip(*pair, strict=True)]
             for pair in (whole[:2], split[:2], split[2:4])]
    assert [len(part) for part in parts] == [10_000, 5_000, 5_000] and sorted(parts[0]) == sorted(parts[1] + parts[2])
    assert 2_300 < len({*parts[0][:5_000]} & {*parts[2]}) < 2_700  # it is a sample of the whole, not a range


# ----- Section 4.2: the recipe --------------------------------------------------------------------------------------

def test_learning_rate_at_its_edges():
    rates = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    for iteration, rate in rates.items():
        assert resnet.learning_rate(iteration, 64_000) == pytest.approx(rate, rel=1e-12)
    assert [resnet.learning_rate(i, 8, base=1) for i in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [resnet.learning_rate(i, 8, base=1, warming_up=True) for i in range(8)] == [0.1] * 6 + [0.01] * 2
    assert [resnet.learning_rate(i, 1) for i in range(1)] == [0.1]
    assert [resnet.learning_rate(i, 3, base=1) for i in range(3)] == [1, 1, 0.1]


def steps_of(net, data, model=None, momentum=0.9, weight_decay=1e-4, **arguments):
    """What train() yields for this net, or model around it."""
    optimizer = resnet.make_optimizer(net, momentum=momentum, weight_decay=weight_decay)
    return resnet.train(model or net, optimizer, *data, **arguments)


def small_data(count=40, classes=10):
    """(images, labels, mean): noise."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=g)
    return images, labels, images.double().mean(dim=0).float() / 255


@pytest.mark.parametrize(("right", "ends"), [([0] * 4, None), ([10] * 4, None), ([11] * 4, 100), ([0, 10, 11, 0], 300)])
def test_warmup_ends_when_the_training_error_is_below_80_percent(right, ends):
    """A net that answers so many of 50 rightly; each 100 iterations are looked at by themselves."""
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.calls = nn.Parameter(torch.zeros(2)), 0

        def forward(self, x):
            answers = (torch.arange(len(x)) < right[self.calls // 100 % 4]).long()
            self.calls += 1
            return F.one_hot(answers, 2).float() + 0 * self.bias

    data = torch.zeros(50, 3, 32, 32, dtype=torch.uint8), torch.ones(50, dtype=torch.long), torch.zeros(3, 32, 32)
    steps = list(steps_of(Scripted(), data, warming_up=True, batch_size=50, iterations=800))
    ends = ends or 1000
    expected = [0.01 if i < ends or i >= 400 else 0.1 for i in range(600)] + [0.001] * 200
    assert [rate for _, rate, *_ in steps] == pytest.approx(expected)
    assert [warming_up for *_, warming_up in steps] == [i < ends for i in range(1, 801)]


def test_train_is_the_recipe_written_out():
    """Four steps of SGD with momentum and weight decay on padded, cropped and flipped images, all by hand."""
    torch.manual_seed(0)
    images, labels, mean = small_data(count=10)  # batches of 8 of 10: they cross epochs
    mean, net = mean.double(), resnet.ResNet(8).double()
    other = copy.deepcopy(net)
    data, recipe = (images, labels, mean), {"momentum": 0.8, "weight_decay": 0.01, "batch_size": 8, "seed": 3}
    steps = list(steps_of(net, data, iterations=4, **recipe))
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    draws = torch.cat([resnet.draw_epoch(10, 3, epoch, "cpu") for epoch in range(4)], dim=1)
    for step in range(4):
        batch, answers = [], []
        for index, dy, dx, flip in draws[:, 8 * step:8 * step + 8].T.tolist():
            image = F.pad(images[index] / 255 - mean, (4, 4, 4, 4))[:, dy:dy + 32, dx:dx + 32]
            batch.append(image.flip(2) if flip else image)
            answers.append(labels[index])
        logits = other(torch.stack(batch))
        loss = -logits.log_softmax(dim=1)[range(8), torch.stack(answers)].mean()
        wrong = sum(int(row.argmax()) != label for row, label in zip(logits, answers, strict=True))
        rate = [0.1, 0.1, 0.01, 0.001][step]
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        for p, v, g in zip(other.parameters(), velocity, gradients, strict=True):
            v.mul_(0.8).add_(g + 0.01 * p.detach())
            p.data.sub_(rate * v)
        iteration, their_rate, their_loss, their_wrong, warming_up = steps[step]
        assert (iteration, their_rate, their_wrong, warming_up) == (step + 1, pytest.approx(rate), wrong, False)
        torch.testing.assert_close(their_loss, loss.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_count_wrong_equals_a_loop_over_single_images():
    torch.manual_seed(0)
    images, labels, mean = small_data(count=503)
    net = noisy(resnet.ResNet(8)).train()
    before, wrong = copy.deepcopy(net.state_dict()), resnet.count_wrong(net, images, labels, mean)
    assert net.training and all(map(torch.equal, before.values(), net.state_dict().values()))
    with torch.no_grad():
        answers = torch.cat([net.eval()(image[None] / 255 - mean).argmax(dim=1) for image in images])
    assert wrong == (answers != labels).sum()
    answers[:303] = (answers[:303] + 1) % 10
    assert resnet.count_wrong(net, images, answers, mean) == 303
    assert resnet.count_wrong(net, images[:3], answers[:3], mean) == 3


def test_responses_of_layers_that_are_known():
    """The first layer is 0 or 2, unevenly over the batches; each other one is +k or -k, whatever comes in."""
    net = resnet.ResNet(8, shortcut="B")
    known = [bn for block in (*net.stage1, *net.stage2, *net.stage3) for bn in (block.bn1, block.bn2)]
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        for k, bn in enumerate(known, start=1):
            bn.bias.copy_(torch.tensor([k, -k]).repeat(len(bn.bias) // 2))
        net.conv1.weight[:, 0, 1, 1] = 1  # the first colour
        net.bn1.weight.fill_(2 * 1.00001**0.5)  # BN divides by the root of 1 + 1e-5
    images = torch.zeros(750, 3, 32, 32, dtype=torch.uint8)
    images[:250] = 255
    responses = resnet.measure_responses(net, images, torch.zeros(3, 32, 32))
    assert responses == pytest.approx([2 * (1 / 3 * 2 / 3) ** 0.5, 1, 2, 3, 4, 5, 6], rel=1e-6)
    assert net.training and not any(module._forward_hooks for module in net.modules())


# ----- Speed --------------------------------------------------------------------------------------------------------

def fast(device, *argv):
    """The arguments as run() has them when it calls speed_up()."""
    args = resnet.make_parser().parse_args([str(word) for word in argv])
    args.device = torch.device(device)
    return args


@pytest.mark.parametrize("option", ["plain", "A", "C"])
def test_bf16_is_of_convolutions_and_products_alone(option):
    torch.manual_seed(0)
    net, seen = net_of(8, option), set()
    other, batch = copy.deepcopy(net), (torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    loss, expected = resnet.forward_backward(net, *batch, torch.bfloat16)[0], resnet.forward_backward(other, *batch)[0]
    assert seen == {torch.bfloat16} and loss.dtype == torch.float32 and abs(loss / expected - 1) < 0.05
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.9


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_blocks_equal_eager_ones():
    torch.manual_seed(0)
    torch._dynamo.reset()
    images, labels, mean = small_data()
    net = resnet.ResNet(26).double().to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    torch.set_default_dtype(torch.float64)  # what is compiled holds for one default
    try:
        step = resnet.speed_up(net, fast("cpu", "--precision", "float32"), 8)
        ours = list(steps_of(net, (images, labels, mean.double()), batch_size=8, iterations=4, forward_backward=step))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(block._compiled_call_impl for block in net.modules() if isinstance(block, resnet.ResidualBlock))
    torch.testing.assert_close(ours, list(steps_of(other, (images, labels, mean.double()), batch_size=8, iterations=4)))
    torch.testing.assert_close(dict(net.state_dict()), dict(other.state_dict()), rtol=1e-7, atol=1e-9)
    assert len(ours) == 4 and copy.deepcopy(net).state_dict().keys() == other.state_dict().keys()


def test_without_a_compiler_the_net_stays_as_it_was(tmp_path):
    script = """import torch, resnet, test_resnet
net = resnet.ResNet(8)
step = resnet.speed_up(net, test_resnet.fast("cpu", "--precision", "float32"), 4)
loss, _ = step(net, torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
print(loss.isfinite().item(), [module for module in net.modules() if module._compiled_call_impl])"""
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False,
                          cwd=PROGRAM.parent)
    first, last = done.stdout.splitlines()
    assert first.startswith("speed   float32, not compiled (") and last == "True []"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("option", ["plain", "A", "C", "fails"])
def test_graphed_and_compiled_equal_eager(option, capsys):
    """40 iterations across both drops of the rate, with no synchronisation once there is a graph; one may fail."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    data, fails = [tensor.cuda() for tensor in small_data(count=2000)], option == "fails"
    net = net_of(14, "A" if fails else option).cuda().to(memory_format=torch.channels_last)
    other, arguments = copy.deepcopy(net), {"batch_size": 32, "iterations": 40, "lr": 0.01}
    if fails:
        net.register_forward_hook(lambda module, inputs, logits: logits.sum().item() and None)
    argv = ["--plain"] if option == "plain" else ["--shortcut", "C" if option == "C" else "A"]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.cuda.stream(torch.cuda.Stream()):
        step = resnet.speed_up(net, fast("cuda", *argv, "--precision", "float32"), 32)
        ours, theirs = steps_of(net, data, forward_backward=step, **arguments), steps_of(other, data, **arguments)
        for k in range(40):
            torch.cuda.set_sync_debug_mode("error" if k > 5 and not fails else "default")
            _, _, loss, wrong, _ = next(ours)
            torch.cuda.set_sync_debug_mode("default")
            _, _, expected, wrong_expected, _ = next(theirs)
            torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
            assert abs(wrong.item() - wrong_expected.item()) <= 1
    assert type(step) is resnet.CUDAGraph and (step.graph is None) == fails
    assert capsys.readouterr().out.count("recording it failed") == fails
    for ours, theirs in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


# ----- A run ----------------------------------------------------------------------------------------------------------

# A run of some seconds that warms up for a part of them.
LONG = ["--dataset", "synthetic", "--depth", 8, "--iterations", 400, "--batch-size", 4, "--eval-every", 100, "--warmup",
        "--device", "cpu"]


def in_child(folder, limit):
    sys.stdout = sys.stderr = open(f"{folder}.txt", "a")  # noqa: SIM115 - until this process ends
    torch.set_num_threads(1)
    if limit:
        import resource  # not on Windows
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    resnet.main([str(word) for word in [*LONG, "--output-dir", folder]])


def spawn(folder, limit=None):
    """Start the LONG run in a process of its own, forked from one that has imported torch already."""
    if sys.platform == "win32":
        pytest.skip("needs forks and signals")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=in_child, args=(folder, limit))
    child.start()
    return child


def facts(folder):
    """All that must be the same in two runs, without tensors: not images/s and seconds."""
    saved = checkpoint(folder)
    assert [list(map(str, row)) for row in saved["rows"]] == [list(row.values()) for row in rows_of(folder)]
    for key in ("model", "momentum"):
        saved[key] = {name: tensor.tolist() for name, tensor in saved[key].items()}
    return {**saved, "rows": [row[:5] for row in saved["rows"]], "mean": saved["mean"].tolist()}


def test_12_kills_change_nothing(tmp_path):
    """SIGKILL at random moments; the same command each time; the run ends like one that was left alone."""
    spawn(tmp_path / "alone").join()
    expected, whole = facts(tmp_path / "alone"), 1 + checkpoint(tmp_path / "alone")["rows"][-1][6]  # seconds
    assert [row[0] for row in expected["rows"]] == [100, 200, 300, 400]
    assert {0.01, 0.1} <= {round(row[1], 9) for row in expected["rows"]}  # it warms up, but not all the time
    chance, kills, finished, midway = random.Random(0), 0, 0, 0
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


@pytest.fixture
def short_run(tmp_path, capsys):
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--depth", 8, "--output-dir",
            tmp_path / "run", "--iterations", 4, "--eval-every", 2, "--batch-size", 6, "--precision", "bf16"]
    assert run(capsys, *argv)[0] == 0
    return argv


def test_the_same_command_goes_on_and_then_says_that_it_has_finished(short_run, tmp_path, capsys, monkeypatch):
    folder, real = tmp_path / "other", resnet.train
    argv = [*short_run, "--output-dir", folder]
    monkeypatch.setattr(resnet, "train", lambda *args: (step if step[0] < 4 else sys.exit(9) for step in real(*args)))
    assert run(capsys, *argv)[0] == 9
    monkeypatch.undo()
    assert [row["iteration"] for row in rows_of(folder)] == ["2"] and checkpoint(folder)["responses"] == []
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "on from iteration 2" in out and f"delete {folder}" in out
    assert facts(folder) == facts(tmp_path / "run")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.pt")}
    status, out, _ = run(capsys, *argv)
    error = f"{float(rows_of(folder)[-1]['test_error']):.2f} % after iteration 4"
    for words in (error, str(folder / "checkpoint.pt"), f"delete {folder}", "--output-dir"):
        assert status == 0 and words in out.splitlines()[-1] and "Warning" not in out
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.pt")}
    saved, net = checkpoint(folder), resnet.ResNet(8, num_classes=2)
    net.load_state_dict(saved["model"])
    test_images = resnet.load_data("folder", tmp_path / "data")[2]
    assert saved["responses"] == pytest.approx(resnet.measure_responses(net, test_images, saved["mean"]), rel=1e-4)
    assert saved["versions"].startswith(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python 3.")
    torch.save({**saved, "code": "of another program"}, folder / "checkpoint.pt")
    assert "Warning: resnet.py has changed" in run(capsys, *argv)[1].splitlines()[-1]


@pytest.mark.parametrize(("change", "words"), [
    (["--plain"], "plain False, not True"), (["--lr", 1], "lr 0.1, not 1.0"), (["--warmup"], "warmup False, not True"),
    (["--iterations", 8], "iterations 4, not 8"), (["--precision", "float32"], "precision bf16, not float32"),
    (["--depth", 14, "--seed", 1], "depth 8, not 14; seed 0, not 1"), (["--data-dir", {"train": 7}], "images "),
    (["--data-dir", {"test": 5}], "images "), (["--data-dir", {"classes": ("cat", "fox")}], "images ")], ids=str)
def test_another_recipe_is_refused_and_other_images(change, words, short_run, tmp_path, capsys):
    if change[0] == "--data-dir":
        change = ["--data-dir", write_folder(tmp_path / "others", **change[1])]
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    status, _, err = run(capsys, *short_run, *change)
    assert status == 2 and words in err and "--output-dir" in err and len(err.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def forged(saved):
    """(name, content) of files that are no checkpoint, though some look like one."""
    def with_number(column, value):
        row = saved["rows"][-1]
        return f"row {column} {value!r}", {**saved, "rows": [[*row[:column], value, *row[column + 1:]]]}

    for value in (None, "text", [], {}, [[1, 2]], torch.zeros(3), torch.zeros(2, 2, dtype=torch.bool)):
        for key in ("recipe", "rows", "model", "momentum"):
            yield f"{key} {value!r}", {**saved, key: value}
        for key, name in (("model", "fc.bias"), ("momentum", "fc.bias"), ("recipe", "iterations"), ("recipe", "lr")):
            yield f"{key} {name} {value!r}", {**saved, key: {**saved[key], name: value}}
        yield from (with_number(column, value) for column in range(7))
    for column, value in ((0, -5), (0, 0), (0, 10**9), (0, 4.0), (6, 1e15), (2, float("nan")), (3, float("inf"))):
        yield with_number(column, value)
    for key in ("recipe", "rows", "model", "momentum", "warming_up", "code"):
        yield f"without {key}", {name: value for name, value in saved.items() if name != key}
    yield "another program's", torchvision.models.resnet18().state_dict()
    yield "code that is run", {**saved, "rows": Bomb()}


def test_what_is_no_checkpoint_is_told_in_one_line_and_left_as_it_is(short_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    whole, saved = path.read_bytes(), checkpoint(tmp_path / "run")
    contents = [*forged(saved), ("empty", b""), ("text", b"no net"), ("half", whole[:len(whole) // 2])]
    assert len(contents) > 110
    for name, content in contents:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        status, _, err = run(capsys, *short_run)
        assert status == 2 and str(path) in err and len(err.splitlines()) == 1, name
        assert path.read_bytes() == before and not Path("exploded").exists()


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    folder = tmp_path / "full"
    child = spawn(folder)
    while not (folder / "checkpoint.pt").exists():
        time.sleep(0.01)
    child.kill()
    before, child = checkpoint(folder)["rows"], spawn(folder, limit=100_000)
    child.join()
    last = (tmp_path / "full.txt").read_text().splitlines()[-1]
    assert child.exitcode == 1 and f"{folder / 'checkpoint.pt'} cannot be written (File too large)" in last
    assert "same command" in last and checkpoint(folder)["rows"] == before and len(list(folder.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("seconds", [0.2, 0.5, 1, 2, 4])
def test_ctrl_c_is_one_line_also_while_importing(seconds, tmp_path):
    child = subprocess.Popen([sys.executable, PROGRAM, "--dataset", "synthetic", "--output-dir", tmp_path], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.returncode == 130 and len(err.splitlines()) == 1 and "stopped" in err, err


@pytest.mark.parametrize("name", ["fc.bias", "bn1.running_var", None])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(name, short_run, tmp_path, capsys, monkeypatch):
    """A loss is of the weights before the step: it may be finite although the step broke the net."""
    def train(net, *args):
        for iteration, rate, loss, *others in real(net, *args):
            if name and iteration == 4:
                net.state_dict()[name][1] = float("inf")
            yield iteration, rate, loss if name or iteration < 4 else loss * float("nan"), *others

    real = resnet.train
    monkeypatch.setattr(resnet, "train", train)
    status, out, err = run(capsys, *short_run, "--output-dir", tmp_path / "inf")
    assert status == 1 and "not finite at iteration 4" in err and "--lr" in err and len(err.splitlines()) == 1
    assert "finished" not in out and [row["iteration"] for row in rows_of(tmp_path / "inf")] == ["2"]


def test_rows_hold_what_was_trained_and_evaluated(tmp_path, capsys, monkeypatch):
    """A row every 2 of 5 iterations of 8 images, of known losses, answers and errors; the mean image by a loop."""
    steps = [(1, 0.1, 4.0, 8), (2, 0.1, 2.0, 4), (3, 0.01, 2.0**51, 3), (4, 0.01, 0, 1), (5, 0.001, 0.25, 2)]
    errors = iter([3, 1, 2])
    monkeypatch.setattr(resnet, "train", lambda *_: (
        (number, rate, torch.tensor(loss), torch.tensor(wrong), False) for number, rate, loss, wrong in steps))
    monkeypatch.setattr(resnet, "count_wrong", lambda *_: torch.tensor(next(errors)))
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data"), "--depth", 8, "--iterations", 5,
            "--batch-size", 8, "--eval-every", 2, "--output-dir", tmp_path / "run"]
    status, out, _ = run(capsys, *argv)
    assert status == 0 and "25.00 % after iteration 5" in out.splitlines()[-1]  # the last, not the best
    assert run(capsys, *argv)[0] == 0  # a run that has diverged reads its own checkpoint
    *tensors, classes = resnet.load_data("folder", tmp_path / "data")
    assert [t.tolist() for t in tensors[1::2]] == [[0] * 6 + [1] * 6, [0] * 4 + [1] * 4] and classes == ["cat", "dog"]
    assert tensors[2][7, :, 0, 0].tolist() == [103, 50, 100]  # the last dog
    assert [[float(value) for value in row.values()][:5] for row in rows_of(tmp_path / "run")] == [
        [2, 0.1, 3.0, 75.0, 37.5], [4, 0.01, 2.0**50, 25.0, 12.5], [5, 0.001, 0.25, 25.0, 25.0]]
    by_loop, mean = sum(image.double() / 255 for image in tensors[0]) / 12, checkpoint(tmp_path / "run")["mean"]
    torch.testing.assert_close(mean.double(), by_loop, rtol=1e-6, atol=0)
    torch.testing.assert_close(resnet.normalise(tensors[0], mean)[3], tensors[0][3] / 255 - by_loop.float())


@pytest.mark.parametrize(("argv", "words"), [
    (["--depth", "57"], "56 and 62"), (["--depth", "deep"], "--depth"), (["--shortcut", "D"], "--shortcut"),
    (["--plain", "--shortcut", "B"], "--plain"), (["--iterations", "0"], "--iterations"), (["--dep", "20"], "--dep"),
    (["--batch-size", "0"], "--batch-size"), (["--eval-every", "-1"], "--eval-every"), (["--lr", "-1"], "rate"),
    (["--momentum", "-1"], "momentum"), (["--weight-decay", "-1"], "weight_decay"), (["--device", "tpu"], "tpu"),
    (["--device", "cuda:99"], ""), (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
    (["--report", "nowhere"], "nowhere"), (["--dataset", "synthetic", "--output-dir", "file"], "file")])
def test_bad_arguments_are_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    status, _, err = run(capsys, *argv)
    assert status == 2 and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("spoiler", "words"), [
    (lambda root: shutil.rmtree(root / "test" / "dog"), ["train", "test", "dog"]),
    (lambda root: [path.unlink() for path in (root / "train" / "dog").iterdir()], ["dog"]),
    (lambda root: (root / "train" / "dog" / "3.png").write_text("woof"), ["3.png", "image"]),
    (lambda root: Image.new("RGB", (33, 32)).save(root / "train" / "dog" / "3.png"), ["3.png", "33x32 RGB"]),
    (lambda root: Image.new("RGBA", (32, 32)).save(root / "train" / "dog" / "3.png"), ["3.png", "32x32 RGBA"]),
    (lambda root: Image.new("I;16", (32, 32)).save(root / "train" / "dog" / "3.png"), ["3.png", "32x32 I;16"]),
    (lambda root: None, ["--val", "5,000"])])
def test_bad_folders_are_one_line(spoiler, words, tmp_path, capsys):
    spoiler(write_folder(tmp_path / "data"))
    argv = ["--dataset", "folder", "--data-dir", tmp_path / "data", "--val", "--output-dir", tmp_path / "run"]
    status, _, err = run(capsys, *argv)
    assert status == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err


@pytest.mark.parametrize("damaged", [False, True])
def test_failed_download_and_damaged_archive_are_one_line(damaged, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    archive = tmp_path / "data" / "cifar-10-python.tar.gz"
    if damaged:
        archive.parent.mkdir()
        archive.write_bytes(b"half of it")
    status, _, err = run(capsys, "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "run")
    assert status == 2 and len(err.splitlines()) == 1 and "http://127.0.0.1:9/cifar-10-python.tar.gz" in err
    assert (f"{archive} is damaged" in err, "cannot be downloaded" in err) == (damaged, not damaged)


def test_synthetic_data_can_be_learnt_and_the_saved_net_loads_by_the_lines_of_the_readme(tmp_path, capsys):
    run(capsys, "--dataset", "synthetic", "--depth", 8, "--iterations", 100, "--batch-size", 64, "--output-dir",
        tmp_path / "run")
    lines = README[README.index("saved = torch.load("):].split("```")[0]
    lines = lines.replace("runs/resnet-56", str(tmp_path / "run")).replace("ResNet(56", "ResNet(8")
    space = {"torch": torch, **vars(resnet)}
    exec(lines, space)
    _, _, images, labels, classes = resnet.make_synthetic()
    wrong = (space["net"](resnet.normalise(images, space["saved"]["mean"])).argmax(dim=1) != labels).sum().item()
    assert space["saved"]["classes"] == classes and wrong < 1000  # by chance it would be 1800
    assert float(rows_of(tmp_path / "run")[-1]["test_error"]) == pytest.approx(100 * wrong / 2000, abs=0.1)


# ----- Several processes ----------------------------------------------------------------------------------------------

def torchrun(folder, program, *argv):
    """Two processes on this machine's CPU: (exit status, standard output, lines of resnet.py on standard error)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", program, *argv]
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(PROGRAM.parent), "OMP_NUM_THREADS": "1"}, timeout=120)
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.startswith("resnet.py:")]


WORKER = """
import sys, torch, resnet, test_resnet
torch.distributed.init_process_group("gloo")
net, steps, wrong = test_resnet.frozen_steps(torch.distributed.get_rank(), 2)
if torch.distributed.get_rank() == 0:
    torch.save((net.state_dict(), steps, wrong), sys.argv[1])
torch.distributed.destroy_process_group()
"""


def frozen_steps(rank, processes):
    """Five steps of a net whose BN is in evaluation mode, and an evaluation: by shares, with sums over them."""
    torch.manual_seed(0)
    net = noisy(resnet.ResNet(8)).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().train = lambda mode: None
    images, labels, mean = small_data(count=503)
    model = nn.parallel.DistributedDataParallel(net) if processes > 1 else net
    share = slice(rank, None, processes)
    steps = [(resnet.sum_over_processes(loss) / processes, resnet.sum_over_processes(wrong))
             for _, _, loss, wrong, _ in steps_of(net, (images, labels, mean.double()), model, batch_size=8, lr=1e-3,
                                                  iterations=5, share=share)]
    wrong = resnet.count_wrong(model, images[share], labels[share], mean.double())
    return net, steps, resnet.sum_over_processes(wrong)


def test_two_processes_equal_one(tmp_path):
    """With BN's statistics fixed, the gradients of two halves of a batch are those of the whole."""
    (tmp_path / "worker.py").write_text(WORKER)
    assert torchrun(tmp_path, "worker.py", "out.pt")[0] == 0
    state, steps, wrong = torch.load(tmp_path / "out.pt", weights_only=True)
    net, expected, expected_wrong = frozen_steps(0, 1)
    assert wrong == expected_wrong
    torch.testing.assert_close(steps, expected)
    torch.testing.assert_close(dict(state), dict(net.state_dict()), rtol=1e-10, atol=1e-12)


def test_torchrun(tmp_path):
    """One process prints and saves; the net that all evaluate, by shares, is the one that is saved."""
    argv = ["--dataset", "folder", "--data-dir", write_folder(tmp_path / "data", train=9, test=503), "--depth", 8,
            "--iterations", 6, "--eval-every", 3, "--device", "cpu", "--output-dir", "run", "--batch-size"]
    status, _, err = torchrun(tmp_path, PROGRAM, *argv, 7)
    assert status != 0 and err and all("divisible by 2" in line for line in err)
    status, out, err = torchrun(tmp_path, PROGRAM, *argv, 6)
    assert (status, err) == (0, []) and "processes 2" in out and out.count("has finished") == 1
    saved, net = checkpoint(tmp_path / "run"), resnet.ResNet(8, num_classes=2)
    net.load_state_dict(saved["model"])
    wrong = resnet.count_wrong(net, *resnet.load_data("folder", tmp_path / "data")[2:4], saved["mean"]).item()
    assert [row[0] for row in saved["rows"]] == [3, 6] and saved["rows"][-1][4] == pytest.approx(100 * wrong / 1006)
    assert "on from iteration 6" in torchrun(tmp_path, PROGRAM, *argv, 6)[1]


# ----- The nets of ImageNet: Table 1, and torchvision -----------------------------------------------------------------

IMAGENET = {18: (11_689_512, 1.8), 34: (21_797_672, 3.6), 50: (25_557_032, 3.8), 101: (44_549_160, 7.6),
            152: (60_192_808, 11.3)}  # parameters, and Table 1's billions of multiply-adds


def multiply_adds(net):
    """Of convolutions and fully connected layers for an image of 224x224, a net on the meta device."""
    counts = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, inputs, y: counts.append(y.numel() * m.weight[0].numel()))
    net(torch.empty(1, 3, 224, 224, device="meta"))
    return sum(counts) / 1e9


@pytest.mark.parametrize("depth", IMAGENET)
def test_imagenet_nets_are_those_of_table_1_and_torchvisions_with_another_stride(depth):
    torch.manual_seed(0)
    with torch.device("meta"):
        ours, vgg = resnet.ImageNetResNet(depth), (torchvision.models.vgg16(), torchvision.models.vgg19())
    parameters, billions = IMAGENET[depth]
    assert layers_and_parameters(ours) == (depth, parameters)
    assert multiply_adds(ours) == pytest.approx(billions, rel=0.02) and billions < min(map(multiply_adds, vgg))
    theirs = noisy(getattr(torchvision.models, f"resnet{depth}")(num_classes=7)).double().eval()
    ours = resnet.ImageNetResNet(depth, num_classes=7).double().eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    for module in theirs.modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck):  # it strides in the 3x3 convolution
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    images = torch.randn(2, 3, 75, 64, dtype=torch.double)
    torch.testing.assert_close(ours(images), theirs(images))


# ----- The report and the files ---------------------------------------------------------------------------------------

def write_run(folder, errors, asked=None, parameters=269_722, device="1 x 2 CPU threads", net="ResNet-20", responses=(),
              **changes):
    """A run's checkpoint, made without the program: errors are (iteration, training error, test error)."""
    folder.mkdir(parents=True)
    recipe = {"depth": 20, "plain": False, "shortcut": "A", "dataset": "cifar10", "val": False,
              "iterations": asked or errors[-1][0], "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4,
              "seed": 0, "warmup": False, "precision": "bf16", "processes": 1, "images": "0123abcd", **changes}
    rows = [[i, 0.1, 1.5, train, test, 100, i // 100] for i, train, test in errors]
    torch.save({"net": net, "recipe": recipe, "rows": rows, "device": device, "responses": list(responses),
                "momentum": {"all": torch.empty(parameters, dtype=torch.int8)}}, folder / "checkpoint.pt")


def test_report_is_a_line_for_the_seeds_of_a_net(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed, (train, test) in enumerate([(1.0, 8.0), (2.0, 9.0), (3.0, 8.5)]):
        write_run(tmp_path / f"a{seed}", [(32_000, 20.0, 22.0), (64_000, train, test)], seed=seed)
    write_run(tmp_path / "b", [(64_000, 3.0, 9.75)], net="plain-20", plain=True, device="1 x H100")
    write_run(tmp_path / "c", [(500, 50.0, 55.5)], asked=64_000, net="ResNet-56", depth=56)
    write_run(tmp_path / "d", [(2000, 40.0, 42.25)], dataset="folder", images="aaaa", seed=7)
    write_run(tmp_path / "e", [(2000, 40.0, 12.25)], dataset="folder", images="bbbb", seed=8)
    write_run(tmp_path / "deep" / "f", [(64_000, 4.0, 6.5)], net="ResNet-110", depth=110, warmup=True)
    write_run(tmp_path / "g", [(64_000, 4.0, 6.6)], net="ResNet-110", depth=110, lr=0.05, val=True, processes=4)
    write_run(tmp_path / "h", [(64_000, 4.0, 6.25)], processes=2, seed=9, device="2 x")  # BN of half a batch each
    write_run(tmp_path / "same", [(64_000, 4.0, 1.0)], seed=0)  # of the seed of a0: no evidence of its own
    write_run(tmp_path / "bar", [(64_000, 4.0, 1.0)], device="a|b", seed=11)
    write_run(tmp_path / "list", [(64_000, 4.0, 1.0)], depth=26, seed=[1])
    write_run(tmp_path / "long", [(1e20, 4.0, 1.0)], seed=13)
    write_run(tmp_path / "escape\n", [(64_000, 4.0, 1.0)], device="\x1b[2J", seed=12)
    status, out, err = run(capsys, "--report", tmp_path)
    assert (status, err) == (0, "") and "\x1b" not in out
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert [len(row) for row in table] == [10] * (2 + 8)
    table = {(row[0], row[2], row[9]): row[3:9] for row in table[2:]}
    two = "1 x 2 CPU threads"  # mean 8.5 and, by hand, the root of (0.25 + 0.25 + 0) / 2
    row = table["ResNet-20", "as in the paper", two]
    assert row == ["bf16", "3", "2.00 ± 1.00 %", "8.50 ± 0.50 %", "8.75 %", "0:10:40"]
    assert table["ResNet-20", "as in the paper", "2 x"][3:5] == ["6.25 %", "8.75 %"]
    assert table["plain-20", "as in the paper", "1 x H100"][3:5] == ["9.75 %", ""]
    assert table["ResNet-56", "unfinished after 500", two][3:5] == ["55.50 %", ""]
    assert table["ResNet-20", "dataset folder, iterations 2000, images aaaa", two][3] == "42.25 %"
    assert table["ResNet-20", "dataset folder, iterations 2000, images bbbb", two][3] == "12.25 %"
    assert table["ResNet-110", "as in the paper", two][4].startswith("6.43 %")
    assert table["ResNet-110", "val True, lr 0.05, warmup False, processes 4", two][3:5] == ["6.60 %", ""]
    left_out = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 5 and "same recipe and seed" in left_out[-1]


def test_figures_6_and_7_and_what_stops_them(tmp_path, capsys, monkeypatch):
    figure, axes = pytest.importorskip("matplotlib.figure").Figure, []
    real = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path, dpi: axes.extend(self.axes) or real(self, path, dpi=dpi))
    assert "no run to show" in run(capsys, "--report", tmp_path)[2]
    write_run(tmp_path / "a", [(32_000, 30.0, 22.0), (64_000, 1.0, 8.0)], responses=[0.2, 0.4, 0.3])
    write_run(tmp_path / "b0", [(64_000, 50.0, 55.5)], net="plain-20", plain=True)
    write_run(tmp_path / "b1", [(64_000, 40.0, 45.5)], net="plain-20", plain=True, seed=1, responses=[1, 2])
    write_run(tmp_path / "c", [(64_000, 2.0, 7.0)], net="ResNet $x", depth=56, parameters=853_018, responses=[0.1])
    write_run(tmp_path / "d", [(500, 2.0, 7.0)], asked=64_000, net="ResNet-56", depth=56, parameters=853_018)
    status, out, _ = run(capsys, "--report", tmp_path)
    for name in ("fig6.png", "fig7.png"):
        assert status == 0 and str(tmp_path / name) in out and (tmp_path / name).stat().st_size > 10_000
    plain, residual, in_order, by_size = axes
    for panel, responses in ((in_order, [[1, 2], [0.2, 0.4, 0.3], [0.1]]), (by_size, [[2, 1], [0.4, 0.3, 0.2], [0.1]])):
        assert [list(line.get_ydata()) for line in panel.lines] == responses
        assert [line.get_linestyle() for line in panel.lines] == [":", "-", "-"]
        assert [line.get_color() for line in panel.lines] == ["C0", "C0", "C1"]
    assert list(in_order.lines[1].get_xdata()) == list(by_size.lines[1].get_xdata()) == [1, 2, 3]
    colours = [[line.get_color() for line in panel.lines] for panel in (plain, residual)]
    assert colours == [["C0"] * 4, ["C0", "C0", "C1", "C1", "C2", "C2"]]
    texts = [f"{name}, as in the paper, bf16" for name in ("plain-20", "ResNet-20", r"ResNet \$x")]
    assert [text.get_text() for text in in_order.get_legend().texts] == texts
    assert [text.get_text() for text in plain.get_legend().texts] == texts[:1]
    training, test = residual.lines[:2]
    assert (training.get_linestyle(), list(training.get_ydata())) == ("--", [30.0, 1.0])
    assert (test.get_linestyle(), list(test.get_ydata()), list(test.get_xdata())) == ("-", [22.0, 8.0], [32e3, 64e3])
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
        resnet.blocks_per_stage(resnet.make_parser().parse_args(command.replace("$depth", "56").split()).depth)
