# SPDX-License-Identifier: MIT
"""Tests of resnet.py: `python -m pytest`. They need no GPU and no download. They compare results
with the paper's numbers, arithmetic written out by hand, torchvision, or a loop over single images.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import multiprocessing
import os
import pickle
import re
import socket
import sys
import time
import types
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import hflip, pad

import resnet

CUDA = torch.device("cuda")


def run(capsys, words):
    """Run the program in this process: (exit status, stdout, stderr). It must give no warning."""
    status = 0
    with warnings.catch_warnings(action="error"):
        try:
            resnet.main(words.split())
        except SystemExit as end:
            status = end.code
    return status, *capsys.readouterr()


def refusal(capsys, words):
    """Return the line with which the program must stop, with status 2. Usage may precede it."""
    status, _, err = run(capsys, words)
    assert status == 2 and re.fullmatch(r"(usage: (.|\n)*\n)?resnet.py: error: .*\n", err), err
    return err.splitlines()[-1]


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


def size_of(net):
    """The layers and parameters of net. The paper does not count projections as layers."""
    kinds = nn.Conv2d | nn.Linear
    layers = [n for n, m in net.named_modules() if isinstance(m, kinds) and "shortcut" not in n]
    return len(layers), sum(p.numel() for p in net.parameters())


def small_data(count=40):
    """A resnet.Data of noise: so many images to train on, and as many to test on."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, count, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(10, (2, count), generator=g)
    return resnet.Data(images[0], labels[0], images[1], labels[1], list("abcdefghij"))


@pytest.fixture
def double():
    """float64 as the default: rounding does not hide a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ----- The nets (sections 3 and 4.2) --------------------------------------------------------------
def convolution_bn(x, convolution, bn, stride=1):
    """Both from their weights: BN by its formula, in training mode from the batch's statistics."""
    y = F.conv2d(x, convolution.weight, stride=stride, padding=convolution.weight.shape[-1] // 2)
    mean, variance = bn.running_mean, bn.running_var
    if bn.training:
        mean, variance = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), correction=0)
    scale = bn.weight / (variance + 1e-5).sqrt()
    return y * scale[:, None, None] + (bn.bias - mean * scale)[:, None, None]


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


@pytest.mark.parametrize("option", ["plain", "A", "C"])
def test_net_and_its_responses_equal_those_written_out(option, double):
    net, data = noisy(net_of(14, option)).eval(), small_data()
    images = resnet.normalise(data.test_images, data.mean)
    y = convolution_bn(images, net.conv1, net.bn1)
    responses, x = [y.std().item()], y.relu()
    for k, block in enumerate([*net.stage1, *net.stage2, *net.stage3]):
        stride = 2 if k in (2, 4) else 1
        y = convolution_bn(x, block.conv1, block.bn1, stride)
        z = convolution_bn(y.relu(), block.conv2, block.bn2)
        responses += [y.std().item(), z.std().item()]
        x = by_hand(block, x, stride, None if option == "plain" else option)
    assert_close(net(images), F.linear(x.mean(dim=(2, 3)), net.fc.weight, net.fc.bias))
    assert resnet.measure_responses(net.train(), data) == pytest.approx(responses)
    assert not any(module._forward_hooks for module in net.modules())


def test_parts_1_to_4_are_the_program_of_the_docstring(capsys):
    space = {"__name__": "part"}
    exec(Path(resnet.__file__).read_text(encoding="utf-8").partition("# ----- 5.")[0], space)
    space["load_cifar"] = lambda: space["Data"](*vars(small_data()).values())
    lines = re.findall(r"^    ((?:torch|data|net|train|print).*)", resnet.__doc__, re.M)
    code = "\n".join(lines).replace("cuda", "cpu")
    exec(code.replace("depth=56", "8, iterations=2, batch_size=8"), space)
    assert len(lines) == 5 and 0 <= float(capsys.readouterr().out) <= 100


@pytest.mark.parametrize("option", ["plain", "A", "B", "C"])
def test_parameters_and_layers(option):
    """Counted by hand from the widths; the paper's table rounds them."""
    counts = [269_722, 464_154, 658_586, 853_018, 1_727_962, 19_421_274]
    if option == "B":
        counts = [count + 2_752 for count in counts]
    if option == "C":
        counts = [283_962, 489_594, 695_226, 900_858, 1_826_202, 20_538_714]
    for depth, count in zip([20, 32, 44, 56, 110, 1202], counts, strict=True):
        with torch.device("meta"):  # shapes without memory
            assert size_of(net_of(depth, option)) == (depth, count)


@pytest.mark.parametrize("make", [lambda: net_of(56, "B"), lambda: resnet.ImageNetResNet(50)])
def test_he_initialisation(make):
    torch.manual_seed(0)
    net = make()
    for weight in (p.detach() for p in net.parameters() if p.dim() > 1):
        z = weight / (2 / weight[0].numel()) ** 0.5
        assert max(abs(z.std() - 1), abs(z.mean())) < 5 / z.numel() ** 0.5  # five deviations
    assert not net.fc.bias.any()


def test_bad_depths_shortcuts_and_processes_are_refused():
    bad = [(resnet.ResNet, (depth,), f"6n .* not {depth}$") for depth in (57, 21, 2, -4)]
    bad += [(resnet.ImageNetResNet, (57,), "not 57"), (resnet.ImageNetResNet, (50, True), "plain")]
    bad += [(resnet.ResidualBlock, (32, 16), "ProjectionShortcut")]
    recipe_of = lambda processes: resnet.Recipe(processes=processes)  # noqa: E731
    bad += [(recipe_of, (3,), "divisible by 3"), (recipe_of, (0,), "at least 1")]
    for function, arguments, words in [*bad, (resnet.ResidualBlock, (16, 16, 1, "D"), "'D'")]:
        with pytest.raises(ValueError, match=words):
            function(*arguments)


@pytest.mark.parametrize("depth,flops", {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}.items())
def test_imagenet_nets_are_those_of_table_1_and_of_torchvision(depth, flops):
    torch.manual_seed(0)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = resnet.ImageNetResNet(depth)
        net(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(flops, rel=0.02)  # multiply-adds
    theirs = noisy(getattr(torchvision.models, f"resnet{depth}")(num_classes=7)).double().eval()
    ours = resnet.ImageNetResNet(depth, num_classes=7).double().eval()
    assert size_of(ours)[0] == depth
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    for module in theirs.modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck):  # it strides in the 3x3
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    images = torch.randn(2, 3, 75, 64, dtype=torch.double)
    assert_close(ours(images), theirs(images))


# ----- The data and the recipe (section 4.2) ------------------------------------------------------
def test_augment_equals_a_loop_over_all_crops_and_flips():
    cases = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    images = torch.rand(len(cases), 3, 32, 32) + 1  # no pixel looks like the padding
    ours = resnet.augment(images, *cases.T)
    for image, (dy, dx, flip), result in zip(images, cases.tolist(), ours, strict=True):
        expected = pad(image, [4])[:, dy : dy + 32, dx : dx + 32]
        assert torch.equal(result, hflip(expected) if flip else expected)


def test_draws_reach_every_crop_and_flip_evenly_and_depend_on_seed_and_epoch():
    _, dy, dx, flip = resnet.draw_epoch(81 * 2 * 100, 3, 5, "cpu")
    counts = torch.bincount((dy * 9 + dx) * 2 + flip)
    assert len(counts) == 162 and counts.min() > 50 and counts.max() < 150  # 5 deviations from 100
    keys = itertools.product((0, 1, 11, 256, 2**16, 2**32 - 1), (0, 1, 11, 256, 2**16, 2**24))
    draws = torch.stack([resnet.draw_epoch(50, *key, "cpu") for key in keys])
    assert all(len(draws[:, row].unique(dim=0)) == 36 for row in range(4))


@pytest.mark.parametrize(("images", "size"), [(10, 4), (10, 5), (3, 8), (7, 7), (50, 1)])
def test_no_image_is_dropped_or_repeated_within_an_epoch(images, size):
    epochs = torch.cat([resnet.draw_epoch(images, 7, epoch, "cpu") for epoch in range(5)], dim=1)
    assert epochs[0].view(5, images).sort().values.tolist() == [list(range(images))] * 5
    for iteration, batch in enumerate(epochs.split(size, dim=1)):
        draws = resnet.draw_batch(images, size, 7, iteration, "cpu")
        assert draws.shape == (4, size) and torch.equal(draws[:, : batch.shape[1]], batch)


def test_cifar_files_are_read_plane_by_plane(tmp_path, capsys, monkeypatch):
    """A small data set in CIFAR's format: 3072 bytes an image, all red ones first, row by row."""
    source = torchvision.datasets.CIFAR10
    pixels, labels = torch.randint(256, (2, 5, 3072), dtype=torch.uint8), torch.randint(10, (2, 5))
    parts = [{"data": p.numpy(), "labels": k.tolist()} for p, k in zip(pixels, labels, strict=True)]
    parts = [pickle.dumps(part) for part in (*parts, {"label_names": list("abcdefghij")})]
    folder = tmp_path / source.base_folder
    folder.mkdir()
    files = [[f"part{k}", hashlib.md5(part).hexdigest()] for k, part in enumerate(parts)]
    for (file, _), part in zip(files, parts, strict=True):
        (folder / file).write_bytes(part)
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/cifar.tar.gz")
    monkeypatch.setattr(source, "train_list", files[:1])
    monkeypatch.setattr(source, "test_list", files[1:2])
    monkeypatch.setattr(source, "meta", source.meta | {"filename": "part2", "md5": files[2][1]})
    data = resnet.load_data(resnet.Recipe(), tmp_path)
    images = pixels.view(2, 5, 3, 32, 32)
    assert torch.equal(torch.stack([data.images, data.test_images]), images)
    assert torch.equal(torch.stack([data.labels, data.test_labels]), labels)
    assert data.classes == list("abcdefghij")
    (folder / "part1").write_bytes(b"half")  # and it cannot be downloaded
    err = refusal(capsys, f"--data-dir {tmp_path} --output-dir {tmp_path}/run")
    assert str(tmp_path) in err and source.url in err and "refused" in err
    monkeypatch.setattr(resnet, "load_cifar", lambda root, source: source)
    assert resnet.load_data(resnet.Recipe(dataset="cifar100"), "") is torchvision.datasets.CIFAR100


def test_data_refuses_other_types_shapes_and_labels():
    data = small_data()
    images, labels = data.images, data.labels
    refused = [(images / 255, labels, "uint8"), (images[:, :, :28], labels, "32")]
    refused += [(images, labels[:, None], r"\(N,\)"), (images, labels[1:], r"\(N,\)")]
    refused += [(images, labels.int(), "int64"), (images, labels + 1, "classes minus 1")]
    refused += [(images, torch.full_like(labels, -100), "from 0"), (images[:0], labels[:0], "must")]
    for *bad, words in refused:
        for parts in ([*bad, images, labels], [images, labels, *bad]):
            with pytest.raises(ValueError, match=words):
                resnet.Data(*parts, data.classes)
    with pytest.raises(ValueError, match="uint8"):  # else they would be scaled twice
        resnet.normalise(images / 255, data.mean)


def test_val_holds_out_the_last_5000_images_and_the_mean_is_of_the_others(monkeypatch):
    data = small_data(10_000)
    monkeypatch.setattr(resnet, "make_synthetic", lambda: data)
    part = resnet.load_data(resnet.Recipe(dataset="synthetic", val=True), None)
    assert torch.equal(torch.cat([part.images, part.test_images]), data.images)
    assert torch.equal(part.test_labels, data.labels[5000:]) and len(part.labels) == 5000
    assert torch.equal(part.mean, part.images.double().mean(dim=0).div(255).float())


def test_learning_rate_at_its_edges_and_the_other_defaults():
    paper = resnet.Recipe(56)
    edges = (0, 31_999, 32_000, 47_999, 48_000, 63_999)
    rates = [resnet.learning_rate(iteration, paper) for iteration in edges]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12)
    for depth, first in {104: 0.1, 110: 0.01, 1202: 0.01}.items():
        rates = [resnet.learning_rate(i, resnet.Recipe(depth)) for i in (0, 399, 400)]
        assert rates == pytest.approx([first, first, 0.1])
    defaults = [20, False, "A", "cifar10", False, 64_000, 128, 0.1, 0.9, 1e-4, 0, False, 1]
    assert list(vars(resnet.Recipe()).values()) == defaults
    group = resnet.make_optimizer(resnet.ResNet(8), paper).param_groups[0]
    keys = ("lr", "momentum", "weight_decay", "nesterov", "dampening")
    assert [group[key] for key in keys] == [0.1, 0.9, 1e-4, False, 0]
    for iterations, rates in {8: [1] * 4 + [0.1, 0.1, 0.01, 0.01], 3: [1, 1, 0.1], 1: [1]}.items():
        recipe = resnet.Recipe(iterations=iterations, lr=1)
        assert [resnet.learning_rate(i, recipe) for i in range(iterations)] == rates


def test_train_is_the_recipe_written_out(double):
    torch.manual_seed(0)
    data = small_data(count=10)  # batches of 8 of 10: they cross epochs
    net = nn.Sequential(resnet.ResNet(8), nn.Dropout(0)).eval()
    other = copy.deepcopy(net).train()
    recipe = resnet.Recipe(8, iterations=4, batch_size=8, seed=3)
    groups = [{"params": [parameter], "lr": 7.0} for parameter in net.parameters()]
    optimizer = torch.optim.SGD(groups, momentum=0.8, weight_decay=0.01)
    results = [resnet.train(net, optimizer, data, recipe, *row) for row in ((0, 1), (1, None))]
    assert all(module.training for module in net.modules())
    losses, errors, velocity = [], [], [torch.zeros_like(p) for p in other.parameters()]
    draws = torch.cat([resnet.draw_epoch(10, 3, epoch, "cpu") for epoch in range(4)], dim=1)
    mean = data.images.double().mean(dim=0)
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
    first, others = (losses[0], 100 * errors[0]), (sum(losses[1:]) / 3, 100 * sum(errors[1:]) / 3)
    assert_close(results, [first, others], rtol=1e-5, atol=1e-6)
    assert_close(net.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="from iteration 4 to 4"):
        resnet.train(net, optimizer, data, recipe, 4)


def test_evaluate_equals_a_loop_over_single_images():
    torch.manual_seed(0)
    data = small_data(count=503)
    net = noisy(resnet.ResNet(8)).eval()
    with torch.no_grad():
        answers = [net((i / 255 - data.mean)[None]).argmax(dim=1) for i in data.test_images]
    data.test_labels.copy_(torch.cat(answers))
    data.test_labels[:303] = (data.test_labels[:303] + 1) % 10
    logits = []
    net.train().register_forward_hook(lambda net, inputs, output: logits.append(output))
    assert resnet.evaluate(net, data) == pytest.approx(30300 / 503)
    assert not any(module.training for module in net.modules()) and not logits[0].requires_grad


def test_bf16_is_of_all_layers_up_to_the_logits():
    losses = []
    for kind in (torch.float32, torch.bfloat16):
        recipe = resnet.Recipe(
            8, False, "C", iterations=1, batch_size=8, bf16=kind is torch.bfloat16
        )
        net, kinds = resnet.make_net(recipe), []
        for module in net.modules():
            module.register_forward_hook(lambda *args, kinds=kinds: kinds.append(args[2].dtype))
        losses.append(
            resnet.train(net, resnet.make_optimizer(net, recipe), small_data(), recipe)[0]
        )
        assert set(kinds) == {kind}
    assert 0 < abs(losses[1] / losses[0] - 1) < 0.05
    assert losses[1] != torch.tensor(losses[1]).bfloat16().item()  # the loss itself is in float32


# ----- A run: begun, stopped, resumed, finished ---------------------------------------------------
@pytest.fixture
def small(monkeypatch):
    """The synthetic images are 40 and 40, so that a run takes a moment."""
    monkeypatch.setattr(resnet, "make_synthetic", small_data)


def tiny(folder, more=""):
    words = "--dataset synthetic --depth 8 --iterations 4 --eval-every 2 --batch-size 8"
    return f"{words} --device cpu {more} --output-dir {folder}"


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def facts(folder):
    """All that must be the same in two runs, without tensors: not images/s and seconds."""
    saved = load(folder)
    titles, *logged = (folder / "log.csv").read_text().splitlines()
    assert titles == "iteration,rate,train_loss,train_error,test_error,images_per_s,seconds"
    assert [",".join(map(str, row)) for row in saved["rows"]] == logged
    saved["rows"] = [row[:5] for row in saved["rows"]]
    return tree_map(lambda value: value.tolist() if torch.is_tensor(value) else value, saved)


def assert_runs_are_close(ours, theirs, rtol):
    ours, theirs = facts(ours), facts(theirs)
    for key in ("rows", "model", "responses"):
        assert_close(ours[key], theirs[key], rtol=rtol, atol=rtol / 1000)


def test_a_run_is_what_python_does_and_starts_from_its_seed(small, tmp_path, capsys):
    words = "--shortcut B --bf16 --seed 5 --lr 0.2 --momentum 0.8 --weight-decay 0.01"
    status, out, _ = run(capsys, tiny(tmp_path, words) + " --iterations 5")
    torch.manual_seed(5)
    net = resnet.ResNet(8, shortcut="B").to(memory_format=torch.channels_last)
    recipe = resnet.Recipe(8, False, "B", "synthetic", False, 5, 8, 0.2, 0.8, 0.01, 5, True)
    optimizer = resnet.make_optimizer(net, recipe)
    data, rows = small_data(), []
    for start, stop, rate in ((0, 2, 0.2), (2, 4, 0.02), (4, 5, 0.002)):
        loss, error = resnet.train(net, optimizer, data, recipe, start, stop)
        rows.append([stop, pytest.approx(rate), loss, error, resnet.evaluate(net, data)])
    saved = load(tmp_path)
    assert status == 0 and [row[:5] for row in saved["rows"]] == rows and "resuming" not in out
    assert saved["responses"] == resnet.measure_responses(net, data)
    assert all(map(torch.equal, saved["model"].values(), net.state_dict().values()))
    assert all(tensor.is_contiguous() for tensor in saved["model"].values())  # for safetensors
    assert torch.equal(saved["mean"], data.mean) and saved["classes"] == data.classes
    assert saved["machine"].startswith("1 x cpu") and torchvision.__version__ in saved["machine"]
    for words in (f"{size_of(net)[1]:,} parameters", saved["machine"], str(tmp_path)):
        assert words in out
    row = next(line.split() for line in out.splitlines() if line.startswith(" "))
    assert row[:7] == "2 0.2 {2:.4f} {3:.2f} % {4:.2f} %".format(*rows[0]).split()
    assert f"test error {rows[-1][4]:.2f} %" in out.splitlines()[-1]


def test_the_same_command_resumes_and_then_finishes(small, tmp_path, capsys, monkeypatch):
    """Also a run of a GPU on a machine without one."""
    words, path = tiny(tmp_path / "run", "--bf16"), tmp_path / "run" / "checkpoint.pt"
    assert run(capsys, tiny(tmp_path / "alone", "--bf16"))[0] == 0
    with mock.patch.object(resnet, "print_row", lambda row: sys.exit(9)):
        assert run(capsys, words)[0] == 9
    saved = load(tmp_path / "run")
    assert [row[0] for row in saved["rows"]] == [2] and len(saved["responses"]) == 7
    saved["rows"][0][6], saved["machine"] = 5000, "1 x a GPU"  # seconds, and elsewhere
    with mock.patch.object(torch.serialization, "location_tag", lambda storage: "cuda:0"):
        torch.save(saved, path)
    status, out, _ = run(capsys, words)
    assert status == 0 and "resuming at iteration 2;" in out and len(out.splitlines()) == 8
    ours, alone = facts(tmp_path / "run"), facts(tmp_path / "alone")
    assert ours.pop("machine") == f"1 x a GPU; then {alone.pop('machine')}" and ours == alone
    assert 5000 <= load(tmp_path / "run")["rows"][1][6] < 5100
    before = {path: path.stat().st_mtime_ns for path in (path, path.with_name("log.csv"))}
    monkeypatch.setattr(resnet, "load_data", None)  # it is not needed any more
    status, out, err = run(capsys, words)
    assert (status, err) == (0, "") and "has finished" in out and len(out.splitlines()) == 1
    assert before == {path: path.stat().st_mtime_ns for path in path.parent.iterdir()}


def test_what_is_no_checkpoint_of_this_run_is_left_as_it_is(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(capsys, tiny("run"))
    monkeypatch.setattr(resnet, "load_data", None)
    path = Path("run", "checkpoint.pt")
    whole, saved = path.read_bytes(), load(Path("run"))
    changes = {"--plain": "plain False", "--shortcut B": "shortcut A", "--depth 14": "depth 8"}
    changes |= {"--dataset cifar100": "dataset synthetic", "--lr 1 --bf16": "lr 0.1, bf16 False"}
    for change, words in changes.items():
        err = refusal(capsys, f"{tiny('run')} {change}")
        assert f"{path} belongs to a run with {words}: " in err and path.read_bytes() == whole
    bomb = type("Bomb", (), {"__reduce__": lambda self: (open, ("exploded", "w"))})
    bad = [b"", b"no net", whole[: len(whole) // 2], torchvision.models.resnet18().state_dict()]
    bad += [{**saved, "rows": bomb()}, [1, 2], {**saved, "rows": []}, {**saved, "rows": [[1, 2]]}]
    bad += [{**saved, "recipe": recipe} for recipe in ({"colour": "red"}, {"depth": 57}, None)]
    for content in bad:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        assert f"{path} cannot be loaded (" in refusal(capsys, tiny("run"))
        assert path.read_bytes() == before and not Path("exploded").exists()
        assert f"left out: {path}" in run(capsys, "--report .")[1]


@pytest.mark.parametrize(("trouble", "status"), [("stopped", 130), ("run/.* File", 2), ("", 1)])
def test_what_goes_wrong_in_a_save_loses_nothing(trouble, status, small, tmp_path, capsys):
    """Ctrl-C or, by a limit on the size of files, a full disk in the second one. Or `| head`."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder, synced = tmp_path / "run", []
    reader, writer = os.pipe()

    def sync(file):
        synced.append(os.fstat(file).st_size)
        if status == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        elif status == 1:
            os.close(reader)
        elif len(synced) == 2:
            raise KeyboardInterrupt

    out = open(writer, "w")  # noqa: SIM115
    with mock.patch.object(os, "fsync", sync), out, contextlib.redirect_stdout(out):
        ended, _, err = run(capsys, tiny(folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended == status and re.search(trouble, err) and len(err.splitlines()) == bool(trouble)
    assert synced[0] == (folder / "checkpoint.pt").stat().st_size > 100_000
    assert [row[0] for row in load(folder)["rows"]] == [2]
    assert all(run(capsys, tiny(each))[0] == 0 for each in (folder, tmp_path / "alone"))
    assert facts(folder) == facts(tmp_path / "alone")


def test_bad_arguments_are_refused_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resnet, "load_data", None)
    Path("file").touch()
    bad = """--depth deep: --depth, --depth 57: 57, --shortcut D: --shortcut, --dep 20: --dep,
    --plain --shortcut C: plain, --iterations 0: iterations, --batch-size 0: batch, --lr nan: lr,
    --lr -1: lr, --lr inf: lr, --weight-decay inf: decay, --weight-decay -1: decay, --seed -1: seed,
    --seed 4294967296: seed, --momentum 1: momentum, --momentum -1: momentum, --eval-every 0: eval,
    --device hpu: hpu, --device cuda:99: cuda:99, --device meta: meta, --report nowhere: nowhere,
    --output-dir file: file"""
    for case in re.split(r",\s+", bad):
        words, culprit = case.split(": ")
        assert culprit in refusal(capsys, words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_are_named_by_what_is_not_the_default(small, capsys, tmp_path, monkeypatch):
    """A short run has about ten rows, needs no torch.distributed, and saves no loss of nan."""
    recipe = resnet.Recipe(shortcut="C", seed=1, bf16=True)
    assert resnet.name_folder(recipe) == Path("runs", "resnet-c-20-seed-1-bf16")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resnet, "dist", types.SimpleNamespace(is_available=lambda: False))
    assert run(capsys, "--dataset synthetic --depth 8 --iterations 17 --batch-size 4")[0] == 0
    saved = load(Path("runs", "resnet-8-dataset-synthetic-iterations-17-batch_size-4"))
    assert [row[0] for row in saved["rows"]] == [2, 4, 6, 8, 10, 12, 14, 16, 17]
    assert "iteration 2: try a lower --lr" in refusal(capsys, tiny("diverges", "--lr 1e30"))
    assert not list(Path("diverges").iterdir())


# ----- A CUDA device, real or not -----------------------------------------------------------------
class PretendedCuda(TorchFunctionMode):
    """Whatever is asked to be on a CUDA device is on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.device:
            cpu = torch.device("cpu")
            args, kwargs = tree_map_only(torch.device, lambda device: cpu, (args, kwargs))
        return function(*args, **(kwargs or {}))


def tensors_in(*values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class PretendedGraph(TorchDispatchMode):
    """Records operations and their tensors; then, as a CUDA graph, repeats them in their memory."""

    replays = 0

    def __enter__(self):
        self.calls, self.before = [], {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tensors_in(args, kwargs):
            self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        results = function(*args, **(kwargs or {}))
        for tensor in tensors_in(results):
            self.before.setdefault(id(tensor), (tensor, tensor))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in self.before.values():  # a capture computes nothing
            tensor.data.copy_(value)  # unlike tensor.copy_(), autograd does not see this

    @torch.no_grad()
    def replay(self):
        PretendedGraph.replays += 1
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tensors_in(results), tensors_in(again), strict=True):
                old.copy_(new)


def pretended_gpus():
    """Replaces the lowest functions of PyTorch that need a GPU. Yields a list of devices set."""
    devices, gpu = [], types.SimpleNamespace(name="a pretended GPU", major=9, minor=0)
    c = {"_cuda_getDeviceCount": lambda: 2, "_accelerator_getAccelerator": lambda: CUDA}
    c |= {"_cuda_setDevice": devices.append, "_cuda_getDevice": lambda: 0}
    cuda = {"_lazy_init": lambda: None, "_get_device_properties": lambda index: gpu}
    cuda |= {"CUDAGraph": PretendedGraph, "graph": lambda graph, **keywords: graph}
    cuda |= dict.fromkeys(("Stream", "stream", "current_stream", "synchronize"), mock.MagicMock())
    many = functools.partial(mock.patch.multiple, create=True)
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True)
    pool = many(torch.cuda.graphs, graph_pool_handle=lambda: None)
    with many(torch._C, **c), many(torch.cuda, **cuda), pool, flags, PretendedCuda():
        yield devices


pretended_cuda = pytest.fixture(pretended_gpus)


@pytest.fixture(params=["pretended", "real"])
def cuda(request):
    """A GPU: which kind it is, and a mock that counts the replays of CUDA graphs."""
    if request.param == "pretended":
        request.getfixturevalue("pretended_cuda")
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    graph = torch.cuda.CUDAGraph
    with mock.patch.object(graph, "replay", autospec=True, side_effect=graph.replay) as replay:
        yield request.param, replay


@pytest.mark.parametrize("name, rank", [*itertools.product([None, "cuda", "cuda:1"], [0, 1])])
def test_the_cuda_device_has_an_index(name, rank, pretended_cuda, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    device, words = resnet.choose_device(name)
    index = 1 if name == "cuda:1" else rank
    assert device == torch.device("cuda", index) and pretended_cuda == [index]
    assert words.startswith(f"a pretended GPU, torch {torch.__version__}")
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision in ("none", "ieee")


@pytest.mark.parametrize("switch", ["", "--no-graph", "--bf16", "--plain", "--shortcut C"])
def test_a_stopped_run_on_cuda_equals_one_on_a_cpu(switch, cuda, small, tmp_path, capsys, request):
    kind, replay = cuda
    if switch != "--bf16":  # which needs float32
        request.getfixturevalue("double")
    words = f"{switch} --lr 0.01 --eval-every 1"
    assert run(capsys, tiny(tmp_path / "cpu", words))[0] == 0
    words = f"{tiny(tmp_path / 'cuda', words)} --device cuda"
    with mock.patch.object(resnet, "print_row", lambda row: sys.exit(9)):
        assert run(capsys, words)[0] == 9
    assert run(capsys, words)[0] == 0
    assert replay.call_count == (0 if switch == "--no-graph" else 8)  # forward and backward
    if switch != "--bf16":
        assert_runs_are_close(tmp_path / "cuda", tmp_path / "cpu", rtol=1e-6)
    ours, theirs = (facts(tmp_path / each) | {"machine": None} for each in ("cuda", "cpu"))
    assert switch != "--bf16" or kind == "real" or ours == theirs  # both in channels_last
    losses = [[row[2] for row in each["rows"]] for each in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_capture_changes_nothing_or_says_how_to_go_on(cuda, double):
    data, net = small_data().to(CUDA), noisy(net_of(14, "C")).to(CUDA)
    other = copy.deepcopy(net)
    resnet.capture_graphs(net, resnet.Recipe(14, batch_size=4))
    assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)
    for function in (resnet.evaluate, resnet.measure_responses):
        assert function(net, data) == pytest.approx(function(other, data))
    error = torch.OutOfMemoryError("CUDA out of memory")
    fails = mock.patch.object(torch.cuda, "CUDAGraph", side_effect=error)
    with fails, pytest.raises(resnet.UserError, match=r"CUDA out of memory.* --no-graph"):
        resnet.capture_graphs(other, resnet.Recipe(14, batch_size=4))


def test_nothing_mixes_devices_or_waits_for_the_gpu(tmp_path, monkeypatch):
    """Without a GPU: tensors that have a device, but no content. bool() and int() of them raise."""
    reads, saved = [], []
    read = lambda tensor: reads.append((tensor.device.type, tensor.requires_grad)) or 0  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "item", read)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # it needs a driver
    monkeypatch.setattr(resnet.Data, "__post_init__", lambda data: None)  # it reads the labels
    monkeypatch.setattr(resnet, "save_checkpoint", lambda path, content: saved.append(content))
    recipe = resnet.Recipe(14, shortcut="B", iterations=6, batch_size=8)
    with FakeTensorMode():
        with CUDA:
            net = resnet.make_net(recipe)
            images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
            labels = torch.zeros(20, dtype=torch.int64)
        data = resnet.Data(images, labels, images, labels, [])
        optimizer = resnet.make_optimizer(net, recipe)
        resnet.train(net, optimizer, data, recipe)
        resnet.evaluate(net, data)
        # The two sums of train(), which keep no graph, and the answers that evaluate() counts.
        assert [each for each in reads if each[0] == "cuda"] == [("cuda", False)] * 3
        resnet.save_run(tmp_path, recipe, [], data, net, optimizer, "")
    assert {t.device.type for t in (saved[0]["mean"], *saved[0]["model"].values())} == {"cpu"}


# ----- Several processes --------------------------------------------------------------------------
def start(function, *args):
    if sys.platform == "win32":
        pytest.skip("needs forks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that a process begins with torch imported
    process = context.Process(target=function, args=args)
    process.start()
    return process


def join(*processes):
    return [process.join(100) or process.exitcode for process in processes]  # None: it hangs


def run_in_child(folder, environment, words):
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    resnet.make_synthetic = small_data
    sys.stdout = sys.stderr = open(f"{folder}.out", "w")  # noqa: SIM115 - until the process ends
    resnet.main(f"{tiny(folder)} {words}".split())


def run_in_child_on_cuda(folder, environment, words):
    """On a pretended GPU. The words for the backends are replaced too: NCCL needs a real one."""
    init, backends = resnet.dist.init_process_group, []
    resnet.dist.init_process_group = lambda words: backends.append(words) or init("gloo")
    with contextlib.contextmanager(pretended_gpus)() as devices:
        run_in_child(folder, environment, f"{words} --device cuda")
    assert backends == ["cpu:gloo,cuda:nccl"] and devices == [0] and PretendedGraph.replays == 12


def start_machines(path, number, words, function=run_in_child):
    """Start the program as torchrun does, with an output folder for each process."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
    world |= {"WORLD_SIZE": str(number), "LOCAL_RANK": "0"}
    ranks = [world | {"RANK": str(rank)} for rank in range(number)]
    return [start(function, f"{path}{rank['RANK']}", rank, words) for rank in ranks]


@pytest.mark.parametrize("number", [1, 2])
def test_kills_change_nothing_also_on_two_machines_without_a_shared_disk(number, double, tmp_path):
    """Only the first one prints and saves: each row at once, and the net that it has tested."""
    case = number, "--iterations 60 --eval-every 5"
    alone, out = start_machines(tmp_path / "alone", *case), tmp_path / "killed0.out"
    for rows in (1, 2):
        out.unlink(missing_ok=True)
        killed = start_machines(tmp_path / "killed", *case)
        while not (out.exists() and len(re.findall(r"^ +\d.*\n", out.read_text(), re.M)) >= rows):
            time.sleep(0.01)
            assert all(process.is_alive() for process in killed)
        for process in killed:
            process.kill()
        assert join(*killed) == [-9] * number
    assert 3 <= len(load(tmp_path / "killed0")["rows"]) < 12
    assert join(*start_machines(tmp_path / "killed", *case), *alone) == [0] * 2 * number
    assert facts(tmp_path / "killed0") == facts(tmp_path / "alone0")
    assert "  loss " not in (tmp_path / "alone0.out").read_text()  # that is for a terminal
    if number == 2:
        assert not (tmp_path / "alone1.out").read_text() + "".join(os.listdir(tmp_path / "killed1"))
    saved, net = load(tmp_path / "alone0"), resnet.ResNet(8)
    net.load_state_dict(saved["model"])
    assert saved["rows"][-1][4] == resnet.evaluate(net, small_data())


def test_two_gpus_equal_two_cpus(tmp_path):
    """With CUDA graphs inside DistributedDataParallel, and a net that has BN and projections."""
    words = "--shortcut B --iterations 6 --lr 0.01"
    processes = start_machines(tmp_path / "cpu", 2, words)
    processes += start_machines(tmp_path / "cuda", 2, words, run_in_child_on_cuda)
    assert join(*processes) == [0] * 4
    assert_runs_are_close(tmp_path / "cuda0", tmp_path / "cpu0", rtol=1e-6)


def run_linear_in_child(folder, environment, words):
    """On one machine, and a net without BN, so that a batch can be shared and nothing changes."""

    def make_linear(recipe, num_classes):
        torch.manual_seed(recipe.seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))

    def load_slowly(data):  # the second process has to wait until the first one has the data
        time.sleep(0.5 if environment["RANK"] == "0" else 0)
        Path(f"{folder}.loaded").touch()
        return data

    resnet.make_net, resnet.hold_out = make_linear, load_slowly
    run_in_child(folder, environment | {"LOCAL_RANK": environment["RANK"]}, f"{words} --val")


def test_two_processes_equal_one(tmp_path):
    case = "--lr 0.001", run_linear_in_child
    processes = start_machines(tmp_path / "1-", 1, *case)
    processes += start_machines(tmp_path / "2-", 2, *case)
    assert join(*processes) == [0] * 3
    assert os.path.getmtime(tmp_path / "2-0.loaded") <= os.path.getmtime(tmp_path / "2-1.loaded")
    assert_runs_are_close(tmp_path / "2-0", tmp_path / "1-0", rtol=1e-10)


# ----- Synthetic data, and the report -------------------------------------------------------------
def test_synthetic_data_can_be_learnt(tmp_path, capsys):
    words = "--dataset synthetic --depth 8 --plain --iterations 60 --batch-size 64 --eval-every 60"
    run(capsys, f"{words} --lr 0.02 --output-dir {tmp_path}")
    assert load(tmp_path)["rows"][-1][4] < 75  # by chance it would be 90
    data = resnet.make_synthetic()
    assert len(torch.cat([data.images, data.test_images]).unique(dim=0)) == 12_000


def write_run(folder, errors, responses=(1.0,), **changes):
    """A checkpoint of these errors: (iteration, training error, test error)."""
    recipe = vars(resnet.Recipe(**{"iterations": errors[-1][0], **changes}))
    rows = [[i, 0.1, 1.5, train, test, 100, i // 100] for i, train, test in errors]
    saved = {"recipe": recipe, "rows": rows, "responses": list(responses), "machine": "a GPU"}
    folder.mkdir(parents=True)
    torch.save(saved, folder / "checkpoint.pt")


def test_report_and_figures(tmp_path, capsys, monkeypatch):
    # By hand, the deviation of the errors 8, 9 and 8.5 is the root of (0.25 + 0.25 + 0) / 2.
    for seed, (train, test) in enumerate([(1.0, 8.0), (2.0, 9.0), (3.0, 8.5)]):
        write_run(tmp_path / f"a{seed}", [(32_000, 20, 22), (64_000, train, test)], seed=seed)
    write_run(tmp_path / "b", [(32_000, 50, 55), (64_000, 8, 9.75)], [2, 4, 3], plain=True)
    write_run(tmp_path / "c", [(500, 4, 45)], iterations=64_000, depth=56)
    write_run(tmp_path / "e", [(64_000, 12, 13.25)], depth=56, plain=True)  # with c's colour
    write_run(tmp_path / "d", [(2000, 4, 42.25)], dataset="cifar100", val=True, depth=110)
    write_run(tmp_path / "f", [(64_000, 4, 6.25)], processes=2, bf16=True, seed=9)
    write_run(tmp_path / "same", [(64_000, 4, 1)])  # of the seed of a0: no evidence of its own
    write_run(tmp_path.with_suffix(".elsewhere") / "g", [(64_000, 4, 8.5)], shortcut="B")
    (tmp_path / "link").symlink_to(tmp_path.with_suffix(".elsewhere"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "checkpoint.pt").write_text("no net")

    monkeypatch.setattr(resnet, "dist", types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    status, out, err = run(capsys, f"--report {tmp_path}")
    assert status == 2 and "pip" in err and "halted" in err and 8 * "|---" + "|\n" in out
    table = re.findall(r"^\| (.*)", out, re.M)
    expected = """plain-20 | default | 1 | 8.00 % | 9.75 % |  | 0:10:40
    plain-56 | default | 1 | 12.00 % | 13.25 % |  | 0:10:40
    ResNet-20 | default | 3 | 2.00 ± 1.00 % | 8.50 ± 0.50 % | 8.75 % | 0:10:40
    ResNet-20 | bf16, processes 2 | 1 | 4.00 % | 6.25 % | 8.75 % | 0:10:40
    ResNet-B-20 | default | 1 | 4.00 % | 8.50 % |  | 0:10:40
    ResNet-56 | unfinished after 500 | 1 | 4.00 % | 45.00 % |  | 0:00:05
    ResNet-110 | dataset cifar100, val, iterations 2000 | 1 | 4.00 % | 42.25 % |  | 0:00:20"""
    assert sorted(table[1:]) == sorted(f"{line.strip()} | a GPU |" for line in expected.split("\n"))
    assert table[1][:8] == "plain-20" and table[-1][:10] == "ResNet-110"
    left_out = re.findall(f"^left out: {tmp_path}/(.*)/checkpoint.pt", out, re.M)
    assert left_out == ["text", "same"]
    table6 = [error.split()[0] for error in resnet.PAPER_ERRORS.values()]
    assert table6 == ["8.75", "7.51", "7.17", "6.97", "6.43", "7.93"]

    monkeypatch.undo()
    figure, axes = pytest.importorskip("matplotlib.figure").Figure, []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda *a, **k: axes.extend(a[0].axes) or save(*a, **k))
    assert run(capsys, f"--report {tmp_path}")[0] == 0
    assert all((tmp_path / f"fig{k}.png").stat().st_size > 10_000 for k in (6, 7))
    facts_of = lambda c: (c.get_color(), c.get_linestyle(), *c.get_xydata().T.tolist())  # noqa: E731
    plain, residual, in_order, by_size = [[*map(facts_of, panel.lines)] for panel in axes]
    assert plain[0] == ("C0", "--", [32_000, 64_000], [50, 8]) and plain[1][3] == [55, 9.75]
    assert residual[:2] == [("C0", "--", plain[0][2], [20, 1]), ("C0", "-", plain[0][2], [22, 8])]
    assert [line[0] for line in plain + residual if line[3][-1] in (13.25, 45)] == ["C1", "C1"]
    assert in_order[0] == ("C0", ":", [1, 2, 3], [2, 4, 3]) and by_size[0][3] == [4, 3, 2]
    assert axes[0].get_ylim()[1] == 91 and len({colour for colour, *_ in residual}) == 5
    names = [text.get_text() for text in axes[1].get_legend().texts]
    assert len(names) == 5 and names[0] == "ResNet-20" and "ResNet-20, bf16, processes 2" in names
