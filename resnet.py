#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""CIFAR ResNets in one file: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015.

    python resnet.py --depth 56                              # ResNet-56 on CIFAR-10 by the paper's recipe
    python resnet.py --depth 56 --plain                      # the same net without its shortcuts
    python resnet.py --dataset synthetic --iterations 200    # no download, no GPU: about a minute
    python resnet.py --help

Parts 1 to 4 are the paper; a reader can stop there. Parts 5 to 10 are the program around it. Sections, equations,
tables and figures are those of arXiv:1512.03385, and so are words in quotes. "Choice" marks what it leaves open.
"""
import argparse
import contextlib
import csv
import ctypes
import io
import itertools
import json
import math
import os
import platform
import random
import shlex
import signal
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import distributed as dist
from torch import nn

# ----- 1. The residual block (sections 3.1 to 3.4). To copy: the three classes, which need torch and nn alone ------


class IdentityShortcut(nn.Module):
    """x itself; where the dimensions grow, every stride-th pixel of x, and zeros for the new channels.

    (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)), without parameters. Section 3.3, option A.
    Raises ValueError if C_out < C_in.
    """

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"no identity from {in_channels} to {out_channels} channels: use a ProjectionShortcut")
        before = (out_channels - in_channels) // 2  # Choice: half of the zeros before x, half after
        self.stride, self.zeros = stride, (before, out_channels - in_channels - before)

    def forward(self, x):
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if any(self.zeros):
            x = nn.functional.pad(x, (0, 0, 0, 0, *self.zeros))  # from the last dimension back: W, H, channels
        return x


class ProjectionShortcut(nn.Module):
    """W_s x of Eqn. 2: a 1x1 convolution and BN, which section 3.4 puts "right after each convolution".

    (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return self.bn(self.conv(x))


class ResidualBlock(nn.Module):
    """relu(y) with y = F(x) + x (Eqn. 1) or F(x) + W_s x (Eqn. 2); F is conv-BN-relu-conv-BN (Fig. 2, section 3.4).

    (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)).
    shortcut is an option of section 4.1: "A", identity everywhere; "B", projection where the dimensions change and
    identity elsewhere; "C", projection everywhere. None leaves it out: the plain block, relu(F(x)).
    Raises ValueError for any other, and where an identity would have to drop channels.
    """

    def __init__(self, in_channels, out_channels, stride=1, shortcut="A"):
        super().__init__()
        # No biases: the BN that follows has a shift. Choice: BN's momentum and epsilon are PyTorch's, 0.1 and 1e-5.
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        changes = stride > 1 or in_channels != out_channels
        if shortcut is None:
            self.shortcut = None
        elif shortcut == "C" or (shortcut == "B" and changes):
            self.shortcut = ProjectionShortcut(in_channels, out_channels, stride)
        elif shortcut in ("A", "B"):
            self.shortcut = IdentityShortcut(in_channels, out_channels, stride)
        else:
            raise ValueError(f'shortcut must be "A", "B", "C" or None, not {shortcut!r}')

    def forward(self, x):  # (N, C_in, H, W)
        y = torch.relu(self.bn1(self.conv1(x)))  # (N, C_out, H / stride, W / stride)
        y = self.bn2(self.conv2(y))  # F(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)  # Eqn. 1 or 2
        return torch.relu(y)  # "the second nonlinearity after the addition"


# ----- 2. The CIFAR nets (section 4.2) ----------------------------------------------------------------------------


def blocks_per_stage(depth):
    """The n >= 1 of depth = 6n + 2. Raises ValueError, which names the nearest two depths, if there is no such n."""
    n = max(1, (depth - 2) // 6)
    if depth != 6 * n + 2:
        raise ValueError(f"depth must be 6n + 2, such as 20, 32, 44, 56, 110 or 1202, not {depth}: "
                         f"the nearest are {6 * n + 2} and {6 * n + 8}")
    return n


class ResNet(nn.Module):
    """The net of 6n + 2 layers of section 4.2: (N, 3, 32, 32) -> logits (N, num_classes); the loss has the softmax.

    The layers counted are the first convolution, 6n convolutions in 3n blocks, and the fully connected layer; BN and
    the projections of options B and C are not. plain leaves out all shortcuts; shortcut is as in ResidualBlock.
    Raises ValueError for a depth that is not 6n + 2 or, unless plain, an unknown shortcut.
    """

    def __init__(self, depth, plain=False, shortcut="A", num_classes=10):
        super().__init__()
        n = blocks_per_stage(depth)
        option = None if plain else shortcut

        def stage(in_channels, out_channels, stride):  # n blocks, 2n layers
            blocks = [ResidualBlock(in_channels, out_channels, stride, option)]
            blocks += [ResidualBlock(out_channels, out_channels, 1, option) for _ in range(n - 1)]
            return nn.Sequential(*blocks)

        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = stage(16, 16, stride=1)
        self.stage2 = stage(16, 32, stride=2)
        self.stage3 = stage(32, 64, stride=2)
        self.fc = nn.Linear(64, num_classes)

        for module in self.modules():  # He initialisation: "Delving Deep into Rectifiers", Eqn. 10
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # Variance 2 / fan_in. Choice: fan-in, and the fully connected layer like the others.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)  # Choice

    def forward(self, x):  # (N, 3, 32, 32)
        x = torch.relu(self.bn1(self.conv1(x)))  # (N, 16, 32, 32)
        x = self.stage1(x)  # (N, 16, 32, 32)
        x = self.stage2(x)  # (N, 32, 16, 16)
        x = self.stage3(x)  # (N, 64, 8, 8)
        x = x.mean(dim=(2, 3))  # (N, 64): global average pooling
        return self.fc(x)  # (N, num_classes)


# ----- 3. The data (section 4.2) ----------------------------------------------------------------------------------


class Data(NamedTuple):
    """Images are uint8 (N, 3, 32, 32) and labels int64 (N,), all on one device; classes are the labels' names.

    mean is the per-pixel mean of the training images / 255, float (3, 32, 32).
    """

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    classes: list


def normalise(images, mean):
    """Images with "the per-pixel mean subtracted": uint8 (N, 3, 32, 32) -> float (N, 3, 32, 32) in [-1, 1]."""
    return images.float() / 255 - mean  # Choice: a scale of 1/255


def augment(images, dy, dx, flip):
    """The 32x32 crop at row dy, column dx of each image padded by 4 pixels on each side, mirrored where flip is 1.

    images (N, 3, 32, 32); dy, dx int64 (N,), 0 to 8; flip int64 (N,), 0 or 1 -> (N, 3, 32, 32).
    """
    # Choice: padded after normalise(), so that the padding, 0, is the mean image.
    padded = nn.functional.pad(images, (4, 4, 4, 4))  # (N, 3, 40, 40)
    line = torch.arange(32, device=images.device)
    rows = dy[:, None] + line  # (N, 32)
    columns = dx[:, None] + torch.where(flip[:, None] == 1, line.flip(0), line)  # (N, 32)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]  # (N, 1, 1, 1)
    channel = torch.arange(3, device=images.device)[:, None, None]  # (3, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def draw_epoch(count, seed, epoch):
    """Every image once, in random order, with a random crop and flip: int64 (4, count), rows index, dy, dx, flip.

    It depends on the arguments alone: a run that is resumed draws what it would have drawn.
    """
    # PyTorch's CPU generator uses only 32 bits of its seed: mix seed and epoch into those.
    g = torch.Generator().manual_seed(random.Random(f"{seed} {epoch}").getrandbits(32))
    index = torch.randperm(count, generator=g)
    dy, dx = torch.randint(9, (2, count), generator=g)
    flip = torch.randint(2, (count,), generator=g)
    return torch.stack([index, dy, dx, flip])


def batches(count, batch_size, seed, device, start=0):
    """Yield the columns of draw_epoch(count, seed, 0), 1, ... by batch_size, (4, batch_size), from batch start on.

    Choice: a batch may span two epochs, so that no image is dropped.
    """
    epoch, used = divmod(start * batch_size, count)
    draws = draw_epoch(count, seed, epoch)[:, used:].to(device)
    while True:
        while draws.shape[1] < batch_size:
            epoch += 1
            draws = torch.cat([draws, draw_epoch(count, seed, epoch).to(device)], dim=1)
        yield draws[:, :batch_size]
        draws = draws[:, batch_size:]


# ----- 4. The recipe (section 4.2) --------------------------------------------------------------------------------


def learning_rate(iteration, iterations, base=0.1, warm=False):
    """base, divided by 10 at 1/2 and again at 3/4 of the iterations: at 32k and 48k of 64k. iteration counts from 0.

    warm: in the warm-up that section 4.2 gives to 110 layers. Choice: then at most base / 10; no drop moves.
    """
    drops = (2 * iteration >= iterations) + (4 * iteration >= 3 * iterations)
    return base / 10 ** max(drops, int(warm))


@dataclass
class Progress:
    """Where the training stands."""

    iteration: int = 0  # iterations done
    warm: bool = False  # in the warm-up
    warm_wrong: torch.Tensor | int = 0  # wrong answers since the last multiple of 100 iterations, while warm


def make_optimizer(net, args):
    """SGD with the lr, momentum and weight_decay of args (the paper's: 0.1, 0.9 and 0.0001)."""
    # Choice: weight decay on all parameters, those of BN too; momentum as PyTorch defines it.
    return torch.optim.SGD(net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)


def step(net, optimizer, data, draws):
    """One iteration, on the images, crops and flips of draws, (4, batch_size): returns (loss, wrong answers).

    They are tensors of one number on the device: whoever reads them waits for it. With several processes (part 6),
    mine() takes this one's share of the batch, net averages the gradients itself and total() sums; with one, mine(x)
    and total(x) are x.
    """
    index, dy, dx, flip = map(mine, draws)  # (batch_size,) each, or this process's share
    images = augment(normalise(data.images[index], data.mean), dy, dx, flip)
    labels = data.labels[index]
    logits = net(images)
    loss = nn.functional.cross_entropy(logits, labels)  # with the softmax
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss = total(len(labels) * loss.detach()) / draws.shape[1]  # of the whole batch, which may be shared
    return loss, total((logits.argmax(dim=1) != labels).sum())


def train(net, optimizer, data, args, progress, step=step):
    """Train net on data; after each iteration yield (rate, loss, wrong answers in the batch), as step() returns them.

    args has, with the paper's values, iterations (64,000), batch_size (128) and lr (0.1), and seed. progress is where
    to begin, Progress(warm=True) for 110 layers, and is kept up to date.
    """
    draws = batches(len(data.images), args.batch_size, args.seed, data.images.device, progress.iteration)
    net.train()
    while progress.iteration < args.iterations:
        rate = learning_rate(progress.iteration, args.iterations, args.lr, progress.warm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, wrong = step(net, optimizer, data, next(draws))
        progress.iteration += 1
        if progress.warm:
            progress.warm_wrong += wrong
            if progress.iteration % 100 == 0:  # Choice: the training error is that of each 100 iterations
                progress.warm = bool(progress.warm_wrong >= 0.8 * 100 * args.batch_size)
                progress.warm_wrong = 0
        yield rate, loss, wrong


@torch.no_grad()
def evaluate(net, images, labels, mean):
    """The error of net in percent on "the single view of the original 32x32 image". Leaves net in training mode.

    images uint8 (N, 3, 32, 32), labels int64 (N,), mean float (3, 32, 32).
    """
    net.eval()
    parts = zip(mine(images).split(500), mine(labels).split(500), strict=True)
    wrong = total(sum((net(normalise(x, mean)).argmax(dim=1) != y).sum() for x, y in parts))
    net.train()
    return 100 * wrong.item() / len(labels)


# ----- 5. Where the images come from ------------------------------------------------------------------------------


class UserError(Exception):
    """What the user can mend: main() shows its one line and ends with status 2."""


def read_cifar(name, root):
    """CIFAR-10 or CIFAR-100 in root, downloaded on the first use; torchvision checks the MD5 of every file."""
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        train, test = source(root, train=True, download=True), source(root, train=False, download=True)
    except Exception as error:  # of the network, the disk, the archive or the pickles in it
        raise UserError(f"{name} cannot be downloaded or read ({error}): put {source.url}, whole, into the folder "
                        f"{root} and run again; --dataset synthetic needs no download") from error
    images, test_images = (torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, test))
    return images, torch.tensor(train.targets), test_images, torch.tensor(test.targets), train.classes


def read_folder(root):
    """Images of 32x32 RGB in root/train/<class>/ and root/test/<class>/, of any number of classes."""
    def read(path):
        from PIL import Image  # the reader that torchvision is installed with
        try:
            with Image.open(path) as image:
                found = f"{image.width}x{image.height} {image.mode}"
                if found == "32x32 RGB":  # no conversion: it would hide that there is an alpha channel, say
                    return torchvision.transforms.functional.pil_to_tensor(image)
        except Exception as error:  # a decoder may raise anything
            raise UserError(f"{path} cannot be read as an image: mend or remove it ({error})") from error
        raise UserError(f"{path} is {found}: convert every image to 32x32 RGB")

    try:
        train, test = (torchvision.datasets.ImageFolder(Path(root, part)) for part in ("train", "test"))
    except OSError as error:
        raise UserError(f"{root} must hold images in train/<class>/ and test/<class>/: {error}") from error
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise UserError(f"{root}/train and {root}/test must have the same classes: only one of them has {odd}")
    images, test_images = (torch.stack([read(path) for path, _ in part.samples]) for part in (train, test))
    return images, torch.tensor(train.targets), test_images, torch.tensor(test.targets), train.classes


def make_synthetic():
    """10,000 and 2,000 images from fixed seeds: class k is a ripple of the k-th of ten wavelengths.

    Centre, phase, colour and noise are random. The mirror image of a ripple is a ripple of the same class.
    """
    def make(count, seed):
        g = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 10
        cy, cx, phase = torch.rand(3, count, 1, 1, generator=g)
        radius = torch.hypot(torch.arange(32)[:, None] - 31 * cy, torch.arange(32) - 31 * cx)  # (count, 32, 32)
        cycles = (0.05 + 0.025 * labels)[:, None, None] * radius + phase
        colour = torch.rand(count, 3, 1, 1, generator=g) - 0.5
        images = 0.5 + colour * torch.cos(2 * math.pi * cycles)[:, None]  # (count, 3, 32, 32)
        images += 0.05 * torch.randn(images.shape, generator=g)
        return (255 * images.clamp(0, 1)).byte(), labels

    return *make(10_000, 0), *make(2_000, 1), [f"ripple {k}" for k in range(10)]


def load_data(name, root, val, device):
    """The Data called name. With val, 5,000 training images take the place of the test set: the 45k/5k split.

    Raises UserError if the data is missing, unreadable or too small.
    """
    if name == "folder":
        found = read_folder(root)
    else:
        found = make_synthetic() if name == "synthetic" else read_cifar(name, root)
    images, labels, test_images, test_labels, classes = found
    if val:  # Choice: without it, all 50k images of CIFAR are trained on
        if len(images) <= 5000:
            raise UserError(f"--val holds out 5,000 training images, but there are only {len(images):,}")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # one split, whatever --seed
        (test_images, images), (test_labels, labels) = ((t[order[:5000]], t[order[5000:]]) for t in (images, labels))
    mean = images.sum(dim=0, dtype=torch.int64) / (255 * len(images))  # (3, 32, 32), summed exactly
    return Data(*(t.to(device) for t in (images, labels, test_images, test_labels, mean)), classes)


# ----- 6. Several processes: torchrun --nproc-per-node=2 resnet.py ... --------------------------------------------


def join():
    """Become one of torchrun's processes, of which the first alone prints. Without torchrun, do nothing."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def place():
    """(rank, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mine(x):
    """This process's part of x along its first dimension: elements rank, rank + processes, and so on."""
    rank, processes = place()
    return x[rank::processes]


def total(x, operation=dist.ReduceOp.SUM):
    """The sum of x over all processes, or their maximum, in place. Waits until all have come here."""
    if dist.is_initialized():
        dist.all_reduce(x, operation)
    return x


def end(status, line):
    """End this process with the line on stderr; of several, the first to end shows its line: it has the cause."""
    first = True
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the store is torchrun's own, and may have gone; it outlives a restart
            port, key = int(os.environ["MASTER_PORT"]), f"resnet.py {os.environ['TORCHELASTIC_RESTART_COUNT']}"
            first = dist.TCPStore(os.environ["MASTER_ADDR"], port, timeout=timedelta(seconds=5)).add(key, 1) == 1
    if first:
        print(line, file=sys.stderr, flush=True)
    sys.exit(status)


# ----- 7. Speed: the same iteration, sooner. The net, its state_dict and the evaluation stay as they are -------------


class Autocast(nn.Module):
    """net with convolutions and products in bf16, (N, 3, 32, 32) -> float32 logits. Weights stay float32."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = self.net(images)
        return logits.float()


class GraphedStep:
    """step() on CUDA, recorded once as a CUDA graph, then replayed: no kernel waits until Python has launched it.

    The first three calls run step() itself, for the compiler, cuDNN's choices and the momentum, which must not be
    recorded. The rate is a constant in the recording: another rate, another recording.
    """

    def __init__(self):
        self.calls, self.rate, self.graph, self.results = 0, None, None, None

    def __call__(self, net, optimizer, data, draws):
        self.calls += 1
        if self.calls <= 3:  # on another stream than the default, which a recording must not depend on
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                results = step(net, optimizer, data, draws)
            here.wait_stream(side)
            return results
        rate = optimizer.param_groups[0]["lr"]
        if rate != self.rate:
            # Before the next is recorded: the memory of results and gradients is free again.
            self.graph = self.results = None
            optimizer.zero_grad()
            self.rate, self.draws, self.graph = rate, draws.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, and runs nothing
                self.results = step(net, optimizer, data, self.draws)
        self.draws.copy_(draws)
        self.graph.replay()
        return [result.clone() for result in self.results]  # the next replay overwrites them


def native_bf16(device):
    """Whether the device computes in bf16, rather than emulates it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def layout(args):
    """The memory format that args ask for."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def compile_blocks(net, args, device):
    """Compile the blocks of net. Raises whatever the compiler raises, and then leaves net as it was.

    All blocks of a shape share their code, and 14 layers have every shape: one step of such a net compiles all that
    there is to compile, for 1202 layers too.
    """
    small = ResNet(14, args.plain, args.shortcut).to(device, memory_format=layout(args))
    for part in (small, net):
        for block in part.modules():
            if isinstance(block, ResidualBlock):
                block.compile(dynamic=False)  # or PyTorch, seeing several shapes, makes slower code for any shape
        if part is small:
            images = torch.zeros(args.batch_size // args.processes, 3, 32, 32, device=device)
            (Autocast(small) if args.precision == "bf16" else small)(images).sum().backward()


def speed_up(net, args, device):
    """(the module to train in place of net, the step() to train it with, what is on and off in words).

    Compiles net's blocks in place, and sets what holds for the whole process: cuDNN's choices, glibc's memory. A
    compiler that fails is told in the words, not raised.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms
    elif device.type == "cpu" and sys.platform == "linux":
        # glibc gives memory back to the kernel, and asks for it again page by page, in each iteration, if it may.
        with contextlib.suppress(OSError, AttributeError):  # another C library
            for parameter, size in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD at its most
                ctypes.CDLL(None).mallopt(parameter, size)
    words = [args.precision, "channels_last" if args.channels_last else "no channels_last"]
    if args.compile or (args.compile is None and cuda):  # on a CPU it does not pay
        began = time.perf_counter()
        try:
            compile_blocks(net, args, device)
            words.append(f"blocks compiled in {time.perf_counter() - began:.0f} s")
        except Exception as error:  # no C compiler, no Triton, or one that fails
            words.append(f"not compiled ({type(error).__name__}: {' '.join(str(error).split())[:80]})")
    else:
        words.append("not compiled")
    graph = cuda and args.graph and args.processes == 1
    why = "" if graph or not args.graph else " (one process on CUDA only)"
    words.append("CUDA graph" if graph else f"no CUDA graph{why}")
    return Autocast(net) if args.precision == "bf16" else net, GraphedStep() if graph else step, ", ".join(words)


def peak_memory(device):
    """The most memory that this process has held so far, in words: on CUDA the device's, elsewhere the machine's."""
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_reserved(device) / 1e9:.2f} GB on the device"
    try:
        import resource
    except ImportError:  # on Windows
        return "peak memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def benchmark(model, one_step, optimizer, args, device):
    """Print what an iteration of train() takes on 10,000 random images: ms, images/s, TFLOP/s and peak memory.

    For comparison, the TFLOP/s of a product of square matrices. Times are medians: of 200 iterations after 20 on CUDA,
    of 20 after 3 elsewhere.
    """
    from torch.utils.flop_counter import FlopCounterMode
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10_000, 3, 32, 32), generator=g, dtype=torch.uint8).to(device)
    labels = torch.randint(10, (10_000,), generator=g).to(device)
    data = Data(images, labels, images, labels, torch.full((3, 32, 32), 0.5, device=device), list(range(10)))

    def mark():
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def gaps(call, before, count):  # seconds of each of count calls, after others that are not timed
        for _ in range(before):
            call()
        marks = [mark()]
        for _ in range(count):
            call()
            marks.append(mark())
        if device.type == "cuda":
            torch.cuda.synchronize()
            return [one.elapsed_time(other) / 1000 for one, other in itertools.pairwise(marks)]
        return [other - one for one, other in itertools.pairwise(marks)]

    iterations = train(model, optimizer, data, args, Progress(), one_step)
    cuda = device.type == "cuda"
    count = 200 if cuda else 20
    seconds = statistics.median(gaps(lambda: next(iterations), 20 if cuda else 3, count))
    memory = peak_memory(device)
    # Of convolutions and products, forward and backward. A multiply-add is two operations; the paper counts it as one.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ResNet(args.depth, args.plain, args.shortcut)(torch.zeros(args.batch_size, 3, 32, 32)).sum().backward()
    flop = counter.get_total_flops()
    size = 8192 if cuda else 2048
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)
    product = statistics.median(gaps(lambda: square @ square, 3, 10))
    print(f"{1000 * seconds:.2f} ms an iteration, the median of {count}: {args.batch_size / seconds:,.0f} images/s, "
          f"{flop / seconds / 1e12:.3f} TFLOP/s; {memory}\n"
          f"A product of {size} x {size} matrices in {args.precision}: {2 * size**3 / product / 1e12:.3f} TFLOP/s")


# ----- 8. A run and its folder: checkpoint.pt to go on from, log.csv for its rows, run.json to repeat it -----------

# Table 6: the test error, with option A.
PAPER = {20: "8.75 %", 32: "7.51 %", 44: "7.17 %", 56: "6.97 %", 1202: "7.93 %",
         110: "6.43 %, the best of five runs, and 6.61 +/- 0.16 % their mean"}
# NET must be as in a checkpoint's arguments to evaluate it, NET and RECIPE to go on from it.
NET = ["depth", "plain", "shortcut"]
RECIPE = ["dataset", "val", "batch_size", "lr", "momentum", "weight_decay", "warmup", "seed", "processes",
          "precision"]


@dataclass
class Run(Progress):
    """With net and optimizer, all that it takes to go on as if the run had never stopped."""

    loss: torch.Tensor | float = 0.0  # the sum of the losses since the last row of the log
    wrong: torch.Tensor | int = 0  # wrong answers since then
    seconds: float = 0.0  # of training, evaluating and saving, without the time between stop and resumption
    rows: list = field(default_factory=list)
    planned: list = field(default_factory=list)  # args.iterations; more than one if a resumed run was given others


def write(path, content):
    """Write these bytes to path: beside it, down to the disk, then renamed over it. OSError leaves path as it was."""
    new = Path(f"{path}.new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def write_log(folder, args, rows):
    """Write log.csv, all of it: that mends whatever an interruption has done to it."""
    text = io.StringIO(newline="")
    log = csv.writer(text)
    log.writerow(["iteration", "rate", "train_loss", "train_error", f"{'val' if args.val else 'test'}_error",
                  "images_per_s", "seconds"])
    log.writerows(rows)
    write(folder / "log.csv", text.getvalue().encode())


def save(folder, net, optimizer, data, args, progress):
    """Write checkpoint.pt, of tensors and plain values alone, and log.csv. Of several processes, the first does."""
    if place()[0] > 0:
        return
    plain = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in vars(progress).items()}
    file = io.BytesIO()  # a full disk is told more clearly by write() than by torch.save()
    torch.save({"arguments": vars(args), "classes": data.classes, "mean": data.mean, "model": net.state_dict(),
                "optimizer": optimizer.state_dict(), "progress": plain}, file)
    write(folder / "checkpoint.pt", file.getbuffer())
    write_log(folder, args, progress.rows)


@contextlib.contextmanager
def reading(path):
    """Whatever is wrong with the checkpoint in path, raise UserError: the file may hold anything."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch.load() warns of some foreign files
            yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint that this program saved ({type(error).__name__})") from error


def load(path, args, keys):
    """The checkpoint in path and its Run.

    Raises UserError if there is no checkpoint in the file, or one of a run whose arguments keys were others than args.
    """
    with reading(path):
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        saved = torch.load(path, map_location="cpu", weights_only=True)  # plain values, never code
        begun, progress = saved["arguments"], Run(**saved["progress"])
        other = [f"{key} {begun[key]}, not {vars(args)[key]}" for key in keys
                 if vars(args)[key] not in (None, begun[key])]  # None: as in the checkpoint
        if other:
            raise UserError(f"{path} is of a run with {'; '.join(other)}: repeat the arguments of that run, "
                            "or name another --output-dir")
        return saved, progress


@contextlib.contextmanager
def catch_signals():
    """A list to which SIGINT and SIGTERM add their number, instead of what they do elsewhere."""
    caught = []
    before = {number: signal.signal(number, lambda number, frame: caught.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        if not dist.is_initialized():  # torchrun sends SIGTERM if one process dies: let end() show its line first
            for number, handler in before.items():
                signal.signal(number, handler)


def fit(net, optimizer, data, args, progress, folder, caught, again, model=None, one_step=step):
    """Train model, which is net or wraps it, by one_step; at each evaluation print a row and save net.

    Returns the last error in percent. A signal in caught ends the run after the iteration or evaluation at hand; it is
    saved, and again is shown as the command to go on with. A full disk, and a loss or weight that is not finite, end it
    too, by SystemExit.
    """
    live, test = sys.stdout is not None and sys.stdout.isatty(), "val" if args.val else "test"

    def show(line, end="\n"):
        print(f"\r\033[K{line}" if live else line, end=end, flush=True)

    def stop(status, line):
        show("", end="")
        end(status, f"resnet.py: stopped {line}")

    def keep():
        try:
            save(folder, net, optimizer, data, args, progress)
        except OSError as error:
            stop(1, f"by the disk: {error}; the last checkpoint is kept. To go on: {again}")

    def signalled():  # the signal that any process has caught, or 0: all stop, or none does
        return total(torch.tensor(max(caught, default=0)), dist.ReduceOp.MAX).item()

    keep()  # before the first iteration: so a run can be resumed from its beginning on
    show(f"iteration     rate  train loss  train error  {test:>4} error  images/s   elapsed")
    model = model or net
    if dist.is_initialized():  # BN's statistics are each process's own, as presumably on the paper's two GPUs
        with warnings.catch_warnings(action="ignore"):  # PyTorch warns that the option is to be renamed
            model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    done, counted = progress.iteration, time.perf_counter()  # from here on, for images/s
    began, shown = counted - progress.seconds, counted
    for rate, loss, wrong in train(model, optimizer, data, args, progress, one_step):
        iteration = progress.iteration
        progress.loss, progress.wrong = progress.loss + loss, progress.wrong + wrong
        due = iteration % args.eval_every == 0 or iteration == args.iterations
        number = signalled()
        if not (due or number) and time.perf_counter() - shown < (1 if live else 30):  # a line is overwritten, or stays
            continue  # without reading the sums: that would wait for the device
        steps = iteration - (progress.rows[-1][0] if progress.rows else 0)
        train_loss, train_error = float(progress.loss) / steps, 100 * int(progress.wrong) / (steps * args.batch_size)
        weights = net.state_dict().values() if due or number else ()  # the loss is of those before the last update
        if not (math.isfinite(train_loss) and all(tensor.isfinite().all() for tensor in weights)):
            stop(1, f"by a loss or weight that is not finite, at iteration {iteration:,} (loss {train_loss}); the last "
                    "checkpoint is kept: try a lower --lr, and another --output-dir")
        shown = time.perf_counter()
        speed = (iteration - done) * args.batch_size / (shown - counted)  # of training, without evaluating and saving
        progress.seconds = shown - began
        line = f"{iteration:>9,}  {rate:>7g}  {train_loss:>10.4f}  {train_error:>9.2f} %"
        if due:
            if dist.is_initialized():  # all evaluate what the first process saves
                for statistic in net.buffers():
                    dist.broadcast(statistic, 0)
            with torch.compiler.set_stance("force_eager"):  # compiled code is for training
                error = evaluate(net, data.test_images, data.test_labels, data.mean)
            progress.seconds = time.perf_counter() - began
            elapsed = timedelta(seconds=round(progress.seconds))
            show(f"{line}  {error:>8.2f} %  {speed:>8,.0f}  {elapsed!s:>8}")
            progress.rows += [[iteration, rate, train_loss, train_error, error, round(speed), round(progress.seconds)]]
            progress.loss, progress.wrong = 0.0, 0
            number = signalled()
        if due or number:
            keep()
            done, counted = iteration, time.perf_counter()
            shown = counted
        else:
            left = timedelta(seconds=round((args.iterations - iteration) * args.batch_size / speed))
            show(f"{line}{speed:>22,.0f}  {left} left", end="" if live else "\n")
        if number and iteration < args.iterations:
            total(torch.zeros(1))  # until the first process has saved
            stop(128 + number, f"by {signal.Signals(number).name}; iteration {iteration:,} of {args.iterations:,} is "
                               f"saved. To go on: {again}")
    return progress.rows[-1][4]


# ----- 9. The report: runs side by side, as in Table 6 and Fig. 6 ---------------------------------------------------


def name_of(args):
    """The net of args in words: "plain-20", or "ResNet-20, option A"."""
    return f"plain-{args.depth}" if args.plain else f"ResNet-{args.depth}, option {args.shortcut}"


def departures(args, planned):
    """How a run departs from the paper's, as a list of words; planned is as in Run.

    Seed and precision do not count, nor one device in place of the paper's two.
    """
    defaults, found = make_parser().parse_args([]), []
    if args.dataset != "cifar10":
        found.append(f"images of {args.data_dir}" if args.dataset == "folder" else f"{args.dataset} data")
    found += ["tested on --val images"] if args.val else []
    if planned != [64_000]:
        found.append(" then ".join(f"{iterations:,}" for iterations in planned) + " iterations")
    found += [f"{key.replace('_', ' ')} {vars(args)[key]:g}" for key in ("batch_size", "lr", "momentum", "weight_decay")
              if vars(args)[key] != vars(defaults)[key]]
    if args.warmup != (args.depth >= 110):
        found.append(f"{'with' if args.warmup else 'without'} warm-up")
    return found + ([f"{args.processes} processes"] if args.processes > 2 else [])  # the paper's two GPUs


def paper_error(args, notes):
    """What Table 6 has for the net of args, if notes, from departures(), is empty; otherwise ""."""
    return "" if notes or args.plain or args.shortcut != "A" else PAPER.get(args.depth, "")


def read_runs(root):
    """(groups of runs in root and its folders, lines that say which are left out and why).

    The runs of a group have the same net, data, recipe, precision, processes and hardware, and different seeds. A run
    is a Namespace of path, args, rows (of log.csv), name, notes (its departures), hardware and parameters.
    """
    runs, left_out = {}, []
    for path in sorted(root.rglob("run.json")):
        try:
            facts = json.loads(path.read_text())
            args = argparse.Namespace(**facts["arguments"])
            with open(path.with_name("log.csv"), newline="") as file:
                head, *rows = csv.reader(file)
            rows = [[float(cell) for cell in row] for row in rows]
            if len(head) != 7 or any(len(row) != 7 or not all(map(math.isfinite, row)) for row in rows):
                raise ValueError("a row of log.csv is not seven numbers")
            if not rows:
                raise ValueError("log.csv has no row yet")
            done, asked = int(rows[-1][0]), int(facts["planned"][-1])
            notes = departures(args, facts["planned"])
            notes = (*notes, f"unfinished, {done:,} of {asked:,}") if done < asked else tuple(notes)
            run = argparse.Namespace(path=path.parent, args=args, rows=rows, name=name_of(args), notes=notes,
                                     hardware=str(facts["hardware"]), parameters=int(facts["parameters"]))
            run.hardware = f"{int(args.processes)} x " * (args.processes > 1) + run.hardware
            group = (not args.plain, int(args.depth), str(args.shortcut), notes, str(args.precision), run.hardware)
            if args.seed in (seeds := runs.setdefault(group, {})):
                raise ValueError(f"the same seed as {seeds[args.seed].path}")
            seeds[args.seed] = run
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, csv.Error) as error:
            why = f"no {error} in run.json" if isinstance(error, KeyError) else f"{error}"
            left_out.append(f"left out: {path.parent}: {' '.join(why.split())}")
    return [list(runs[group].values()) for group in sorted(runs)], left_out


def spread(values):
    """Mean +/- sample standard deviation of values in percent; of one value, itself."""
    if len(values) == 1:
        return f"{values[0]:.2f} %"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} % (n = {len(values)})"


def report(root):
    """Print the runs in root and its folders as a Markdown table, a line for the seeds of a net, and draw fig6.png."""
    if not root.is_dir():
        raise UserError(f"--report {root} is not a folder")
    groups, left_out = read_runs(root)
    if groups:
        print("| net | parameters | data and recipe | precision | training error | test error | the paper | time | on |"
              f"\n{9 * '|---'}|")
    for group in groups:
        first, last = group[0], [run.rows[-1] for run in group]
        seconds = timedelta(seconds=round(statistics.mean(row[6] for row in last)))
        print(f"| {first.name} | {first.parameters:,} | {', '.join(first.notes) or 'as in the paper'} | "
              f"{first.args.precision} | {spread([row[3] for row in last])} | {spread([row[4] for row in last])} | "
              f"{paper_error(first.args, first.notes)} | {seconds} | {first.hardware} |")
    if left_out:
        print("\n".join(left_out))
    if not groups:
        raise UserError(f"--report {root}: no run to show in it (a run's folder has run.json and log.csv)")
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("the figure needs matplotlib: pip install matplotlib") from None
    figure, panels = pyplot.subplots(1, 2, sharey=True, figsize=(12, 5), layout="constrained")
    depths = sorted({group[0].args.depth for group in groups})
    machines = {group[0].hardware for group in groups}
    top, used = 0, set()
    for group in groups:
        first = group[0]
        panel, k = panels[0 if first.args.plain else 1], depths.index(first.args.depth)
        while (panel, k) in used:  # a colour a depth; of several groups of a depth, each has its own
            k += len(depths)
        used.add((panel, k))
        label = ", ".join([first.name, *first.notes, first.args.precision] + [first.hardware] * (len(machines) > 1))
        for run in group:
            x = [row[0] for row in run.rows]
            panel.plot(x, [row[3] for row in run.rows], "--", color=f"C{k % 10}", linewidth=1)
            panel.plot(x, [row[4] for row in run.rows], color=f"C{k % 10}", linewidth=2.5, label=label)
            label = None
            # The first fifth, where every net is near chance, may leave the top.
            top = max([top] + [error for row in run.rows if 5 * row[0] >= x[-1] for error in row[3:5]])
    for panel, title in zip(panels, ("plain", "residual"), strict=True):
        panel.set(title=title, xlabel="iteration", ylim=(0, min(100, 1.05 * top)))
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    panels[0].set_ylabel("error (%): training dashed, test bold")
    try:
        figure.savefig(root / "fig6.png", dpi=100)
    except OSError as error:
        raise UserError(f"{root / 'fig6.png'} cannot be written: {error.strerror}") from error
    print(f"figure: {root / 'fig6.png'}")


# ----- 10. The command line ---------------------------------------------------------------------------------------


def number(kind, low, high=1e9):
    """An argparse type: a number of this kind, low <= number < high."""
    def parse(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {low} <= {kind.__name__} < {high}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message, "invalid int value"
    return parse


def make_parser():
    """The argparse parser; its errors are one line, without the usage."""
    parser = argparse.ArgumentParser(description="CIFAR ResNets and plain nets of He et al., 2015.", allow_abbrev=False)
    parser.error = lambda message: end(2, f"{parser.prog}: error: {' '.join(message.split())}")

    def add(group, flag, text, default=None, **kwargs):
        text += "" if default is None or default is False else f" (default: {default})"
        group.add_argument(flag, help=text, default=default, **kwargs)

    group = parser.add_argument_group("net")
    add(group, "--depth", "6n + 2: 20, 32, 44, 56, 110, 1202, ...", 20, type=number(int, -math.inf, 1e5), metavar="N")
    group = group.add_mutually_exclusive_group()
    add(group, "--plain", "leave out the shortcuts", False, action="store_true")
    add(group, "--shortcut", "option of section 4.1", "A", choices=["A", "B", "C"])
    group = parser.add_argument_group("data")
    add(group, "--dataset", "folder: 32x32 RGB images in DIR/train/CLASS/ and DIR/test/CLASS/; synthetic: no files",
        "cifar10", choices=["cifar10", "cifar100", "folder", "synthetic"])
    add(group, "--data-dir", "where the data is, or is downloaded to", "data", metavar="DIR")
    add(group, "--val", "hold out 5,000 training images and test on them instead", False, action="store_true")
    group = parser.add_argument_group("recipe", "The paper's, if nothing else is asked for.")
    add(group, "--iterations", "the rate drops at 1/2 and 3/4 of them (default: 64000, or those of the run resumed)",
        type=number(int, 1), metavar="N")
    add(group, "--batch-size", "images an iteration", 128, type=number(int, 1, 1e5), metavar="N")
    add(group, "--lr", "learning rate", 0.1, type=number(float, 0), metavar="X")
    add(group, "--momentum", "of SGD", 0.9, type=number(float, 0, 1), metavar="X")
    add(group, "--weight-decay", "of all parameters", 1e-4, type=number(float, 0), metavar="X")
    add(group, "--warmup", "a tenth of the rate until the training error is below 80%% (default: from 110 layers on)",
        action=argparse.BooleanOptionalAction)  # Choice: 1202 layers warm up as 110 do
    add(group, "--seed", "of weights, order and augmentation", 0, type=number(int, 0, 2**32), metavar="N")
    group = parser.add_argument_group("speed", "None of it changes what is computed, but for rounding.")
    add(group, "--precision", "of training (default: bf16 where the device has it, or that of the run resumed)",
        choices=["bf16", "float32"])
    add(group, "--channels-last", "the layout of weights and feature maps", True, action=argparse.BooleanOptionalAction)
    add(group, "--compile", "compile the blocks (default: on CUDA)", action=argparse.BooleanOptionalAction)
    add(group, "--graph", "on CUDA, replay an iteration as one CUDA graph", True, action=argparse.BooleanOptionalAction)
    group = parser.add_argument_group("run")
    add(group, "--device", "cuda, cuda:N, mps or cpu (default: the first of them there is)")
    add(group, "--output-dir", "the run's folder (default: runs/resnet-56, runs/plain-56, ...)", metavar="DIR")
    add(group, "--eval-every", "iterations from row to row (default: a tenth of all, at most 500)",
        type=number(int, 1), metavar="N")
    group = group.add_mutually_exclusive_group()
    add(group, "--resume", "go on with the run in its folder, from its last checkpoint", False, action="store_true")
    add(group, "--test-only", "evaluate the net that is saved in the run's folder", False, action="store_true")
    add(group, "--report", "compare the runs in this folder: a table, and the figure DIR/fig6.png", metavar="DIR")
    add(group, "--benchmark", "time iterations on random images; no data and no folder", False, action="store_true")
    return parser


def pick_device(name):
    """The torch.device of this name, or the best there is; of CUDA, made the current one, and without TF32.

    Raises UserError if a tensor cannot be put on it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if name.split(":")[0] not in ("cuda", "mps", "cpu"):
            raise ValueError("choose cuda, cuda:N, mps or cpu")
        if dist.is_initialized() and name != "cpu":
            if name != "cuda":
                raise ValueError("under torchrun choose cuda, which gives each process a GPU, or cpu")
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = torch.zeros(1, device=name).device
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used: {line}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and events are those of the current device
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 is float32
    return device


def begin(args, folder, path, title, test):
    """The checkpoint in path to evaluate or go on from, or None, and the Run to go on with; fills in args.

    Returns None for a run that has finished. Raises UserError if args may not begin there.
    """
    saved, progress = None, Run(warm=args.warmup)
    if args.test_only:
        if not path.exists():
            raise UserError(f"{path} does not exist: train the net first, or name its folder by --output-dir")
        saved, progress = load(path, args, NET + ["val"] * args.val)  # one trained without it saw what --val holds out
    elif args.resume and path.exists():
        saved, progress = load(path, args, NET + RECIPE)
        args.iterations = args.iterations or saved["arguments"]["iterations"]
        args.eval_every = args.eval_every or saved["arguments"]["eval_every"]
        args.precision = args.precision or saved["arguments"]["precision"]
        if progress.rows and progress.rows[-1][0] == progress.iteration == args.iterations:
            if place()[0] == 0:
                write_log(folder, args, progress.rows)
            print(f"{title} in {folder} has finished: {test} error {progress.rows[-1][4]:.2f} % after the last of "
                  f"{args.iterations:,} iterations")
            return None
        if progress.iteration >= args.iterations:
            raise UserError(f"{path} has {progress.iteration:,} iterations: ask for more by --iterations")
    elif args.resume:
        if (folder / "log.csv").exists():
            raise UserError(f"{folder} has a log.csv, but no checkpoint.pt to go on from: name another --output-dir")
    elif any((folder / file).exists() for file in ("run.json", "log.csv", "checkpoint.pt")):
        raise UserError(f"{folder} already holds a run: go on with it by --resume, or name another --output-dir")
    here = progress.iteration if saved else -1
    if total(torch.tensor(here), dist.ReduceOp.MAX).item() > here:
        raise UserError(f"{path} must be on a disk that all machines share")
    args.iterations = args.iterations or 64_000
    args.eval_every = args.eval_every or min(500, math.ceil(args.iterations / 10))
    if args.iterations not in progress.planned[-1:]:
        progress.planned.append(args.iterations)
    return saved, progress


def run(parser, argv, again):
    """Train, or with --test-only evaluate, as argv asks; again is the command to go on with. Raises UserError."""
    args = parser.parse_args(argv)
    if args.report is not None:
        report(Path(args.report))
        return
    try:
        blocks_per_stage(args.depth)
    except ValueError as error:
        raise UserError(f"argument --depth: {error}") from None
    rank, args.processes = place()
    if args.batch_size % args.processes:
        raise UserError(f"--batch-size {args.batch_size} cannot be split evenly among {args.processes} processes")
    args.warmup = args.depth >= 110 if args.warmup is None else args.warmup
    name = "plain" if args.plain else "resnet" if args.shortcut == "A" else f"resnet-{args.shortcut}"
    name += f"-{args.depth}"
    name += "" if args.dataset == "cifar10" else f"-{args.dataset}"
    name += "-val" if args.val else ""
    name += f"-seed{args.seed}" if args.seed else ""
    folder = Path(args.output_dir or f"runs/{name}")
    path = folder / "checkpoint.pt"
    title = name_of(args)
    test = "validation" if args.val else "test"
    saved, progress = None, Run()
    if args.benchmark:
        if args.processes > 1:
            raise UserError("argument --benchmark: it times one process, without torchrun")
        args.iterations = 64_000
    else:
        begun = begin(args, folder, path, title, test)
        if begun is None:
            return
        saved, progress = begun

    device = pick_device(args.device)
    args.precision = args.precision or ("bf16" if native_bf16(device) else "float32")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, torchvision)] + [f"Python {platform.python_version()}"]
    several = "" if args.processes == 1 else f"{args.processes} processes, each on "
    print(f"device  {several}{device} ({hardware}), {', '.join(versions)}", flush=True)
    turn = (rank > 0) + (os.environ.get("LOCAL_RANK", "0") != "0")
    for k in range(0 if args.benchmark else 3):  # the first of all processes downloads; then that of each other disk
        if k == turn:
            data = load_data(args.dataset, args.data_dir, args.val, device)
        total(torch.zeros(1))
    torch.manual_seed(args.seed)
    net = ResNet(args.depth, args.plain, args.shortcut, 10 if args.benchmark else len(data.classes))
    net = net.to(device, memory_format=layout(args))
    optimizer = make_optimizer(net, args)
    if saved:
        with reading(path):
            if saved["classes"] != data.classes:
                raise UserError(f"{path} is of a net for the classes {', '.join(saved['classes'])}, not "
                                f"{', '.join(data.classes)}")
            if args.resume and not torch.equal(saved["mean"], data.mean.cpu()):
                raise UserError(f"{path} is of a run on other images than those of --data-dir {args.data_dir}")
            net.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
    parameters = sum(p.numel() for p in net.parameters())
    print(f"net     {title}, {parameters:,} parameters", flush=True)
    if not args.benchmark:
        print(f"data    {args.dataset}, {len(data.images):,} training and {len(data.test_images):,} {test} images, "
              f"{len(data.classes)} classes", flush=True)
    if args.test_only:
        error = evaluate(net, data.test_images, data.test_labels, saved["mean"].to(device))
        print(f"{title}, after {progress.iteration:,} iterations: {test} error {error:.2f} %")
        return

    model, one_step, words = speed_up(net, args, device)
    print(f"speed   {words}", flush=True)
    if args.benchmark:
        benchmark(model, one_step, optimizer, args, device)
        return
    print(f"recipe  {args.iterations:,} iterations of {args.batch_size}, SGD, rate {args.lr:g}, "
          f"momentum {args.momentum:g}, weight decay {args.weight_decay:g}, warm-up {'on' if args.warmup else 'off'}, "
          f"seed {args.seed}\noutput  {folder}{f', on from iteration {progress.iteration:,}' if saved else ''}",
          flush=True)
    with catch_signals() as caught:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if not args.resume:
                open(folder / "run.json", "x").close()  # of two runs that want the folder, one gets it
            repeat = {"arguments": vars(args), "planned": progress.planned, "versions": versions,
                      "device": str(device), "hardware": hardware, "parameters": parameters}
            write(folder / "run.json", json.dumps(repeat, indent=2).encode())
        error = fit(net, optimizer, data, args, progress, folder, caught, again, model, one_step)
    paper = paper_error(args, departures(args, progress.planned))
    paper = f" (the paper: {paper})" if paper else ""
    print(f"{title}: {test} error {error:.2f} % after the last iteration{paper}; the net is in {path}; "
          f"{peak_memory(device)}")
    if caught:
        sys.exit(128 + max(caught))


def main(argv=None):
    """The program. Ends with one line and status 2 for what the user can mend, 1 for a run that had to stop."""
    parser = make_parser()
    warnings.filterwarnings("ignore", module="PIL")  # of bad images: the error is enough
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a folder's name, say, that the terminal cannot show
    words = sys.argv[1:] if argv is None else argv
    again, nodes = "python", os.environ.get("GROUP_WORLD_SIZE", "1")
    if dist.is_torchelastic_launched():  # on several machines, each had a command of its own
        again = f"torchrun --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}" if nodes == "1" else "torchrun ..."
    again += " " + shlex.join([sys.argv[0], *words] + ["--resume"] * ("--resume" not in words))
    try:
        join()
        run(parser, argv, again)
    except UserError as error:
        parser.error(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        end(1, "resnet.py: stopped: nobody reads its output any more; a training goes on by --resume")
    except OSError as error:
        parser.error(f"{error} (--output-dir and --data-dir choose the folders)")
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        if any(phrase in line for phrase in ("out of memory", "allocate memory", "not enough memory")):
            parser.error(f"{line} (a smaller --batch-size or --depth needs less)")
        if "gloo/transport" not in line:
            raise
        end(1, f"resnet.py: stopped: another process has ended. To go on: {again}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
