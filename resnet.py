# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26"]
# ///
# SPDX-License-Identifier: MIT
"""CIFAR ResNets in one file: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015.

    python resnet.py --depth 56                              # ResNet-56 on CIFAR-10 by the paper's recipe
    python resnet.py --depth 56 --plain                      # the same net without its shortcuts
    python resnet.py --dataset synthetic --iterations 200    # no download, no GPU: about a minute

Parts 1 to 4 are the paper on CIFAR-10, and you can stop there; parts 5 to 8 and 10 make a program of it; part 9 has the
nets of ImageNet. Deeper plain nets train worse ("degradation"), though extra layers that pass on their input would do
no harm. Why, the paper leaves open; its remedy is the residual block, which makes such layers easy to learn. Sections,
equations, tables, figures and words in quotes are those of arXiv:1512.03385. "Choice" marks what it leaves open.
"""
import argparse
import functools
import hashlib
import io
import math
import operator
import os
import signal
import statistics
import sys
import time
from collections import namedtuple
from datetime import timedelta
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends the program at once, also while it imports torch, which takes seconds
    def stop(*_):
        print("resnet.py: stopped. The same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        os._exit(130)
    signal.signal(signal.SIGINT, stop)

import torch
import torchvision
from torch import distributed as dist
from torch import nn

# ----- 1. The residual block (sections 3.1 to 3.4). This part can be copied: it needs torch and nn alone ----------

class IdentityShortcut(nn.Module):
    """x itself; where the dimensions change, every stride-th pixel of x, and zeros for the new channels.
    (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)), without parameters. Section 3.3, option A.
    Raises ValueError if C_out < C_in."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"no identity from {in_channels} to {out_channels} channels: use a ProjectionShortcut")
        before = (out_channels - in_channels) // 2  # Choice: half of the zeros before x, half after
        self.stride, self.zeros = stride, (before, out_channels - in_channels - before)

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        if any(self.zeros):  # to pad without need would copy x
            x = nn.functional.pad(x, (0, 0, 0, 0, *self.zeros))  # from the last dimension back: W, H, channels
        return x


class ProjectionShortcut(nn.Module):
    """W_s x of Eqn. 2: a 1x1 convolution and BN, which section 3.4 puts "right after each convolution".
    (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return self.bn(self.conv(x))


def make_shortcut(option, in_channels, out_channels, stride=1):
    """The shortcut of an option of section 4.1. Raises ValueError for any other.
    "A": identity everywhere. "B": projection where the dimensions change, identity elsewhere. "C": projection
    everywhere. None: no shortcut, for a plain block."""
    changes = stride > 1 or in_channels != out_channels
    if option is None:
        return None
    if option == "C" or (option == "B" and changes):
        return ProjectionShortcut(in_channels, out_channels, stride)
    if option in ("A", "B"):
        return IdentityShortcut(in_channels, out_channels, stride)
    raise ValueError(f'shortcut must be "A", "B", "C" or None, not {option!r}')


class ResidualBlock(nn.Module):
    """relu(y) with y = F(x) + x (Eqn. 1) or F(x) + W_s x (Eqn. 2); F is conv-BN-relu-conv-BN (Fig. 2, section 3.4).
    (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)).
    shortcut is an option of make_shortcut(), which raises ValueError; None leaves it out: the plain block, relu(F(x)).
    Why + x: F learns only the change to x. With F = 0 the block is the identity, as x is a relu's: relu(x) = x."""

    def __init__(self, in_channels, out_channels, stride=1, shortcut="A"):
        super().__init__()
        # No biases: the BN that follows has a shift. Choice: BN's momentum and epsilon are PyTorch's, 0.1 and 1e-5.
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = make_shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, x):  # (N, C_in, H, W)
        y = torch.relu(self.bn1(self.conv1(x)))  # (N, C_out, ceil(H / stride), ceil(W / stride))
        y = self.bn2(self.conv2(y))  # F(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)  # Eqn. 1 or 2
        return torch.relu(y)  # "the second nonlinearity after the addition"


# ----- 2. The CIFAR nets (section 4.2) ----------------------------------------------------------------------------

def blocks_per_stage(depth):
    """The n >= 1 of depth = 6n + 2. Raises ValueError, which names the nearest two depths, if there is no such n."""
    n = max(1, (depth - 2) // 6)
    if depth != 6 * n + 2:
        raise ValueError(f"depth must be 6n + 2, not {depth}: the nearest are {6 * n + 2} and {6 * n + 8}")
    return n


def make_stage(n, in_channels, out_channels, stride, shortcut, block=ResidualBlock):
    """n blocks in a row. The first goes from in_channels to out_channels and has the stride."""
    blocks = [block(in_channels, out_channels, stride, shortcut)]
    blocks += [block(out_channels, out_channels, 1, shortcut) for _ in range(n - 1)]
    return nn.Sequential(*blocks)


def initialise(net):
    """The initialisation of He et al., "Delving Deep into Rectifiers", Eqn. 10: weights of variance 2 / fan_in."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # Choice: the fan-in, not the fan-out; and the fully connected layer like the others, with a bias of 0.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.zeros_(net.fc.bias)


class ResNet(nn.Module):
    """The net of 6n + 2 layers of section 4.2: (N, 3, 32, 32) -> logits (N, num_classes); the loss has the softmax.
    The layers counted are the first convolution, 6n convolutions in 3n blocks, and the fully connected layer; BN and
    the projections of options B and C are not. plain leaves out all shortcuts; shortcut is as in ResidualBlock, for
    CIFAR the paper has A. Raises ValueError for a depth that is not 6n + 2 or, unless plain, an unknown shortcut."""

    def __init__(self, depth, plain=False, shortcut="A", num_classes=10):
        super().__init__()
        n, option = blocks_per_stage(depth), None if plain else shortcut
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = make_stage(n, 16, 16, stride=1, shortcut=option)
        self.stage2 = make_stage(n, 16, 32, stride=2, shortcut=option)
        self.stage3 = make_stage(n, 32, 64, stride=2, shortcut=option)
        self.fc = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x):  # (N, 3, 32, 32)
        x = torch.relu(self.bn1(self.conv1(x)))  # (N, 16, 32, 32)
        x = self.stage1(x)  # (N, 16, 32, 32)
        x = self.stage2(x)  # (N, 32, 16, 16)
        x = self.stage3(x)  # (N, 64, 8, 8)
        x = x.mean(dim=(2, 3))  # (N, 64): global average pooling
        return self.fc(x)  # (N, num_classes)


# ----- 3. The data (section 4.2). All images and labels are tensors on the device, uint8 and int64 ----------------

def normalise(images, mean):
    """Images with "the per-pixel mean subtracted": uint8 (N, 3, 32, 32) -> float (N, 3, 32, 32) in [-1, 1].
    mean is that of the training images / 255, float (3, 32, 32). Choice: a scale of 1/255."""
    return images.float() / 255 - mean


def augment(images, dy, dx, flip):
    """The 32x32 crop at row dy, column dx of each image padded by 4 pixels on each side, mirrored where flip is 1.
    images (N, 3, 32, 32); dy, dx int64 (N,), 0 to 8; flip int64 (N,), 0 or 1 -> (N, 3, 32, 32)."""
    # Choice: padded after normalise(), so that the padding, 0, is the mean image.
    padded = nn.functional.pad(images, (4, 4, 4, 4))  # (N, 3, 40, 40)
    crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 9, 9, 32, 32): all crops, as views without a copy
    crop = crops[torch.arange(len(images), device=images.device), :, dy, dx]  # (N, 3, 32, 32)
    return torch.where(flip[:, None, None, None] == 1, crop.flip(3), crop)


@functools.lru_cache(maxsize=2)  # a batch may need two epochs
def draw_epoch(count, seed, epoch, device):
    """Every image once, in random order, with a random crop and flip: int64 (4, count), rows index, dy, dx, flip."""
    # PyTorch's CPU generator uses only 32 bits of its seed: mix seed and epoch into those.
    g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4]))
    index = torch.randperm(count, generator=g)
    dy, dx = torch.randint(9, (2, count), generator=g)
    flip = torch.randint(2, (count,), generator=g)
    return torch.stack([index, dy, dx, flip]).to(device)


def draw_batch(count, batch_size, seed, iteration, device):
    """What an iteration, counted from 0, trains on: int64 (4, batch_size), rows index, dy, dx, flip.
    It depends on the arguments alone, so that a run can go on from any iteration."""
    first = iteration * batch_size  # Choice: a batch may span two epochs, so that no image is dropped
    epochs = range(first // count, (first + batch_size - 1) // count + 1)
    draws = torch.cat([draw_epoch(count, seed, epoch, device) for epoch in epochs], dim=1)
    return draws[:, first % count :][:, :batch_size]


# ----- 4. The recipe (section 4.2) --------------------------------------------------------------------------------

BATCH_SIZE = 128  # Choice: BN sees all of them; on the paper's two GPUs presumably 64 each
ITERATIONS = 64_000
LEARNING_RATE = 0.1
MOMENTUM = 0.9  # Choice: PyTorch's form; Caffe's differs only just after a change of the rate
WEIGHT_DECAY = 0.0001  # Choice: on all parameters, those of BN too
WARM_UP_DEPTH = 110  # from this depth on. Choice: 1202 layers warm up as 110 do


def make_optimizer(net, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY):
    return torch.optim.SGD(net.parameters(), lr, momentum, weight_decay=weight_decay)


def learning_rate(iteration, iterations=ITERATIONS, base=LEARNING_RATE, warming_up=False):
    """base, divided by 10 at 1/2 and again at 3/4 of the iterations: at 32k and 48k. iteration counts from 0.
    In the warm-up, as 0.1 is too large to start 110 layers, it is base / 10. Choice: the drops do not wait for it."""
    drops = (2 * iteration >= iterations) + (4 * iteration >= 3 * iterations)
    return base / 10 ** max(drops, int(warming_up))


def sum_over_processes(x):
    """The sum of a tensor over all processes of torchrun, in place; without torchrun, x itself."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def forward_backward(net, images, labels, precision=torch.float32):
    """Leave the gradients of the loss in net's parameters. Returns (loss, number of wrong answers).
    Both are tensors on the device: reading them synchronises with the GPU."""
    net.zero_grad()
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        logits = net(images).to(images.dtype)  # (N, num_classes), for a loss in float32
    loss = nn.functional.cross_entropy(logits, labels)  # with the softmax
    loss.backward()
    return loss.detach(), (logits.argmax(dim=1) != labels).sum()


def train(net, optimizer, images, labels, mean, start=0, warming_up=False, iterations=ITERATIONS,
          batch_size=BATCH_SIZE, lr=LEARNING_RATE, seed=0, share=slice(None), forward_backward=forward_backward):
    """A generator: train net; after each iteration, yield (iterations done, rate, loss, wrong answers, warming_up).
    images uint8 (N, 3, 32, 32), labels int64 (N,), mean float (3, 32, 32). start is the number of iterations done
    before; while warming up, a multiple of 100. share: this process's part of a batch. forward_backward: see part 6."""
    net.train()
    warm_up_wrong = 0
    for iteration in range(start, iterations):
        rate = learning_rate(iteration, iterations, lr, warming_up)
        for group in optimizer.param_groups:
            group["lr"] = rate
        draws = draw_batch(len(images), batch_size, seed, iteration, images.device)
        index, dy, dx, flip = draws[:, share]
        x = augment(normalise(images[index], mean), dy, dx, flip)  # (batch_size / processes, 3, 32, 32)
        loss, wrong = forward_backward(net, x, labels[index])
        optimizer.step()
        if warming_up:  # "until the training error is below 80%"
            warm_up_wrong += wrong
            if (iteration + 1) % 100 == 0:  # Choice: the training error is that of each 100 iterations
                warming_up = bool(sum_over_processes(warm_up_wrong) >= 0.8 * 100 * batch_size)
                warm_up_wrong = 0
        yield iteration + 1, rate, loss, wrong, warming_up


@torch.no_grad()
def count_wrong(net, images, labels, mean):
    """The number of wrong answers on "the single view of the original 32x32 image", a tensor on the device.
    images uint8 (N, 3, 32, 32), labels int64 (N,), mean float (3, 32, 32). Leaves net in training mode, for train()."""
    net.eval()
    batches = zip(images.tensor_split(20), labels.tensor_split(20), strict=True)  # DDP (part 7): 20 in each process
    wrong = sum((net(normalise(x, mean)).argmax(dim=1) != y).sum() for x, y in batches)
    net.train()
    return wrong


@torch.no_grad()
def measure_responses(net, images, mean):
    """Fig. 7: the standard deviation of each 3x3 layer's response, "after BN and before nonlinearity".
    images uint8 (N, 3, 32, 32), mean float (3, 32, 32) -> a list of 6n + 1 numbers, in the order of the layers.
    In the paper, ResNets respond less than plain nets: F is nearer to 0 than what a plain block learns. And the deeper
    the ResNet is, the less each layer changes the signal. Leaves net in training mode."""
    # Choice: of test images, with BN as in testing, over all images, channels and pixels together.
    moments = {}  # {layer: (mean response, mean squared response)}, so far as the images have been seen

    def add(layer, inputs, response):
        variance, average = (value.item() for value in torch.var_mean(response, correction=0))
        first, second = moments.get(layer, (0, 0))
        share = len(response) / len(images)
        moments[layer] = first + share * average, second + share * (variance + average**2)

    layers = [layer for name, layer in net.named_modules() if name.endswith(("bn1", "bn2"))]  # not those of projections
    hooks = [layer.register_forward_hook(add) for layer in layers]
    net.eval()
    for x in images.split(500):
        net(normalise(x, mean))
    net.train()
    for hook in hooks:
        hook.remove()
    return [math.sqrt(max(second - first**2, 0)) for first, second in map(moments.get, layers)]


# ----- 5. Where the images come from ------------------------------------------------------------------------------

UserError = argparse.ArgumentTypeError  # main() prints it as one line, without a traceback


def read_cifar(name, root):
    """CIFAR-10 or CIFAR-100 in root, downloaded on the first use; torchvision checks the MD5 of every file."""
    source = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    try:
        train, test = source(root, train=True, download=True), source(root, train=False, download=True)
    except Exception as error:  # of the network, the disk, the archive or the files in it
        archive = Path(root, source.filename)
        trouble = f"{archive} is damaged" if archive.is_file() else f"{name} cannot be downloaded ({error})"
        raise UserError(f"{trouble}: put {source.url} into {root}, or try --dataset synthetic") from error
    images, test_images = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test))
    return images, torch.tensor(train.targets), test_images, torch.tensor(test.targets), train.classes


def read_folder(root):
    """Images of 32x32 RGB in root/train/<class>/ and root/test/<class>/, of any number of classes."""
    from PIL import Image  # which torchvision depends on
    train, test = (torchvision.datasets.ImageFolder(Path(root, part)) for part in ("train", "test"))
    if train.classes != test.classes:
        raise UserError(f"{root}/train and {root}/test differ in classes: {set(train.classes) ^ set(test.classes)}")
    images = []
    for path, _ in train.samples + test.samples:
        try:
            with Image.open(path) as image:
                images.append(torchvision.transforms.functional.pil_to_tensor(image))
                form = f"{image.width}x{image.height} {image.mode}"
        except Exception as error:  # each decoder has its own
            form = f"no image ({error})"
        if form != "32x32 RGB":  # converting would silently drop an alpha channel, for example
            raise UserError(f"{path} is {form}: replace it by an image of 32x32 RGB, or remove it")
    images, test_images = torch.stack(images).split([len(train), len(test)])
    return images, torch.tensor(train.targets), test_images, torch.tensor(test.targets), train.classes


def make_synthetic():
    """10,000 and 2,000 images, always the same: class k is a ripple of the k-th of ten wavelengths."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(12_000) % 10
    cy, cx, phase = torch.rand(3, 12_000, 1, 1, generator=g)
    radius = torch.hypot(torch.arange(32)[:, None] - 31 * cy, torch.arange(32) - 31 * cx)  # (12000, 32, 32)
    cycles = (0.05 + 0.025 * labels)[:, None, None] * radius + phase
    colour = torch.rand(12_000, 3, 1, 1, generator=g) - 0.5
    images = 0.5 + colour * torch.cos(2 * math.pi * cycles)[:, None]  # (12000, 3, 32, 32)
    images += 0.05 * torch.randn(images.shape, generator=g)
    images = (255 * images.clamp(0, 1)).byte()
    return images[:10_000], labels[:10_000], images[10_000:], labels[10_000:], [f"ripple {k}" for k in range(10)]


def load_data(name, root, val=False):
    """(images, labels, test images, test labels, names of the classes). Raises UserError or OSError.
    With val, 5,000 training images take the place of the test set: section 4.2's "45k/5k train/val split"."""
    images, labels, test_images, test_labels, classes = (
        make_synthetic() if name == "synthetic" else read_folder(root) if name == "folder" else read_cifar(name, root))
    if val and len(images) <= 5000:
        raise UserError(f"--val holds out 5,000 training images, but there are only {len(images):,}")
    if val:  # Choice: without it, all 50k images of CIFAR are trained on
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # one split, whatever --seed
        test_images, test_labels = images[order[:5000]], labels[order[:5000]]
        images, labels = images[order[5000:]], labels[order[5000:]]
    return images, labels, test_images, test_labels, classes


# ----- 6. Speed: the same iteration, faster. The net and its state_dict stay as they are --------------------------

class CUDAGraph:
    """forward_backward on CUDA, recorded as a CUDA graph and replayed: one call launches all kernels."""
    def __init__(self, forward_backward):
        self.forward_backward, self.calls, self.graph = forward_backward, 0, None

    def __call__(self, net, images, labels):
        self.calls += 1
        if self.calls == 4:  # the first three compile, and let cuDNN choose its algorithms
            net.zero_grad()  # frees the old gradients: the recording makes its own
            self.images, self.labels = images.clone(), labels.clone()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):  # records, and runs nothing
                    self.results = self.forward_backward(net, self.images, self.labels)
                self.graph = graph
            except Exception as error:
                print(f"no CUDA graph: recording it failed ({error!r:.150})", flush=True)
        if self.graph is None:
            return self.forward_backward(net, images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()  # writes the gradients anew
        return [result.clone() for result in self.results]  # the next replay overwrites them


def speed_up(net, args, batch_size):
    """A faster forward_backward for batches of this size: bf16 and, unless args.eager, compiled blocks, CUDA graph."""
    def compile_blocks(net):
        for module in net.modules():
            if isinstance(module, ResidualBlock):
                module.compile(dynamic=False)  # or PyTorch, seeing several shapes, makes slower code for any shape
    step = functools.partial(forward_backward, precision=torch.bfloat16 if args.precision == "bf16" else torch.float32)
    if args.eager:
        print(f"speed   {args.precision}, eager", flush=True)
        return step
    # Blocks of a shape share code: a step of 14 layers compiles all that 1202 need, or fails here, with net untouched.
    small = ResNet(14, args.plain, args.shortcut).to(args.device, memory_format=torch.channels_last)
    try:
        compile_blocks(small)
        images = torch.zeros(batch_size, 3, 32, 32, device=args.device)
        step(small, images, images[:, 0, 0, 0].long())
        compile_blocks(net)
        compiled = "compiled blocks"
    except Exception as error:  # there is no C compiler or no Triton, or it fails
        compiled = f"not compiled ({error!r:.150})"
    graph = args.device.type == "cuda" and not dist.is_initialized()  # DDP cannot be recorded
    print(f"speed   {args.precision}, {compiled}, {'CUDA graph' if graph else 'no CUDA graph'}", flush=True)
    return CUDAGraph(step) if graph else step


# ----- 7. A run: the same command begins it, goes on from its last checkpoint, or says that it has finished -------

# A row of the log. Errors are in percent; training loss and error are of the iterations since the row before.
Row = namedtuple("Row", "iteration rate train_loss train_error test_error images_per_s seconds")
# These arguments do not change what is computed. All others are the run's recipe, which it keeps.
NOT_RECIPE = ("data_dir", "device", "eager", "eval_every", "output_dir", "report")


def read_checkpoint(path):
    """(what is saved in path, its rows). Raises an exception of any kind if it is not a checkpoint."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    rows = [Row(*row) for row in saved["rows"]]
    numbers = all(type(value) in (int, float) and 0 <= value < math.inf for row in rows for value in row)
    timedelta(seconds=rows[-1].seconds)  # raises OverflowError for more than it can hold
    if not numbers or not 0 < operator.index(rows[-1].iteration) <= saved["recipe"].get("iterations"):
        raise ValueError("its rows are not those of a run")
    return saved, rows


def load_checkpoint(path, net, optimizer, recipe):
    """Put what a checkpoint holds into net and optimizer. Returns (rows, warming_up, code). Raises UserError."""
    try:
        saved, rows = read_checkpoint(path)
        other = [f"{k} {saved['recipe'][k]}, not {v}" for k, v in recipe.items() if saved["recipe"][k] != v]
        if not other:
            net.load_state_dict(saved["model"])
            for p, momentum in zip(net.parameters(), saved["momentum"].values(), strict=True):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p).copy_(momentum.view_as(p))
            return rows, bool(saved["warming_up"]), str(saved["code"])
    except Exception as error:  # the file may hold anything
        raise UserError(f"{path} cannot be read as a checkpoint ({error!r:.150}): name another --output-dir") from error
    raise UserError(f"{path} is of a run with {'; '.join(other)}: repeat its arguments or name another --output-dir")


def save_checkpoint(folder, checkpoint):
    """Write log.csv, then checkpoint.pt. At any moment each of them is the old file or the new one."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    log = "".join(",".join(map(str, row)) + "\n" for row in [Row._fields, *checkpoint["rows"]])
    for path, data in ((folder / "log.csv", log.encode()), (folder / "checkpoint.pt", content.getbuffer())):
        new = Path(f"{path}.{os.getpid()}")  # another process may be writing too
        try:
            with open(new, "wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            os.replace(new, path)
        except OSError as error:
            sys.exit(f"resnet.py: {path} cannot be written ({error.strerror}): mend that, then give the same command")
        finally:
            new.unlink(missing_ok=True)


def run(args):
    """Train the net of args, from the start or from its last checkpoint. Raises UserError or OSError."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if min(args.iterations, args.batch_size, args.eval_every + 1) < 1 or args.batch_size % processes:
        raise UserError(f"--iterations, --eval-every, --batch-size must be positive, the last divisible by {processes}")
    try:  # each of these raises one of these errors for a bad argument
        blocks_per_stage(args.depth)
        make_optimizer(nn.Linear(1, 1), args.lr, args.momentum, args.weight_decay)
        torch.manual_seed(args.seed)
        if dist.is_initialized() and torch.cuda.is_available() and args.device in (None, "cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        args.device = torch.ones(1, device=args.device or torch.accelerator.current_accelerator(True) or "cpu").device
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(str(error)) from error
    hardware = f"{args.device.type}, {torch.get_num_threads()} threads"
    native_bf16 = torch.cpu.get_capabilities().get("avx512_bf16")
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        torch.cuda.set_stream(torch.cuda.Stream())  # a CUDA graph cannot be recorded on the default stream
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False  # the fastest, without TF32
        hardware, native_bf16 = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if native_bf16 else "float32")  # Choice: the paper names no precision
    args.eager = args.eager or args.device.type != "cuda"  # elsewhere, compiling does not pay
    args.warmup = args.depth >= WARM_UP_DEPTH if args.warmup is None else args.warmup
    unit = 100 if args.warmup else 1  # train() counts errors by 100 iterations, and a checkpoint has no part of a count
    eval_every = math.ceil((args.eval_every or min(1000, args.iterations / 10)) / unit) * unit
    name = f"{'plain' if args.plain else 'ResNet' if args.shortcut == 'A' else f'ResNet-{args.shortcut}'}-{args.depth}"
    extras = [args.dataset] * (args.dataset != "cifar10") + ["val"] * args.val + [f"seed{args.seed}"] * (args.seed != 0)
    folder = Path(args.output_dir or f"runs/{'-'.join([name.lower(), *extras])}")
    folder.mkdir(parents=True, exist_ok=True)
    open(folder / "log.csv", "a").close()  # fails at once if the folder cannot be written to
    if rank > 0:
        sum_over_processes(torch.zeros(1))  # waits until the first process has downloaded the data
    *tensors, classes = load_data(args.dataset, args.data_dir, args.val)
    if rank == 0:
        sum_over_processes(torch.zeros(1))  # now the others go on
    digests = [hashlib.sha256(tensor.numpy()).hexdigest() for tensor in tensors]
    images, labels, test_images, test_labels = (tensor.to(args.device) for tensor in tensors)
    mean = images.sum(dim=0, dtype=torch.int64) / (255 * len(images))  # (3, 32, 32), summed exactly
    net = ResNet(args.depth, args.plain, args.shortcut, len(classes)).to(args.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(net, args.lr, args.momentum, args.weight_decay)
    recipe = {key: value for key, value in vars(args).items() if key not in NOT_RECIPE}
    recipe.update(processes=processes, images=hashlib.sha256(repr([classes, digests]).encode()).hexdigest()[:8])
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {sys.version.split()[0]}"
    about = {"net": name, "recipe": recipe, "mean": mean, "classes": classes, "versions": versions,
             "device": f"{processes} x {hardware}"}
    code = code_now = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    rows, warming_up, last = [], args.warmup, Row(0, 0, 0, 0, 0, 0, 0)
    path, advice = folder / "checkpoint.pt", f"To begin anew, delete {folder} or name another --output-dir"
    if path.exists():
        rows, warming_up, code = load_checkpoint(path, net, optimizer, recipe)
        last = rows[-1]
    if code != code_now:
        advice = f"Warning: resnet.py has changed since this run began. {advice}"
    if sum_over_processes(torch.tensor(last.iteration)) != processes * last.iteration:
        raise UserError(f"{folder} must be on a disk that all machines share")
    step = speed_up(net, args, args.batch_size // processes) if last.iteration < args.iterations else None
    model = nn.parallel.DistributedDataParallel(net) if dist.is_initialized() else net  # DDP averages the gradients
    print(f"net     {name}, {sum(p.numel() for p in net.parameters()):,} parameters, on {hardware}, {versions}\n"
          f"recipe  {', '.join(f'{key} {value}' for key, value in recipe.items())}\n"
          f"output  {folder}{f', on from iteration {last.iteration:,}. {advice}' if rows else ''}\n"
          "iteration     rate  train loss  train error  test error  images/s   elapsed", flush=True)
    share, live, began = slice(rank, None, processes), sys.stdout.isatty(), time.perf_counter() - last.seconds
    steps = train(model, optimizer, images, labels, mean, last.iteration, warming_up, args.iterations, args.batch_size,
                  args.lr, args.seed, share, step)
    for row_end in range(last.iteration + eval_every, args.iterations + eval_every, eval_every):
        loss_sum = wrong_sum = 0
        row_began = shown = time.perf_counter()
        for iteration, rate, loss, wrong, warming_up in islice(steps, min(row_end, args.iterations) - last.iteration):
            loss_sum, wrong_sum = loss_sum + loss, wrong_sum + wrong
            if live and time.perf_counter() - shown >= 1:  # the next line overwrites this one
                shown = time.perf_counter()
                left = round((args.iterations - iteration) * (shown - row_began) / (iteration - last.iteration))
                print(f"{iteration:>9,}  loss {loss.item():.4f}  {timedelta(seconds=left)} left", end=" \r", flush=True)
        done = iteration - last.iteration
        train_loss = sum_over_processes(loss_sum).item() / (done * processes)
        train_error = 100 * sum_over_processes(wrong_sum).item() / (done * args.batch_size)
        images_per_s = round(done * args.batch_size / (time.perf_counter() - row_began))
        largest = nn.utils.get_total_norm([t for t in net.state_dict().values() if t.is_floating_point()], math.inf)
        if not math.isfinite(train_loss + largest.item()):  # the loss is from before the last step: look at both
            sys.exit(f"resnet.py: the loss or a weight is not finite at iteration {iteration:,}: try a lower --lr")
        with torch.compiler.set_stance("force_eager"):  # what is compiled is for training
            wrong = sum_over_processes(count_wrong(model, test_images[share], test_labels[share], mean)).item()
            responses = measure_responses(net, test_images, mean) if iteration == args.iterations else []
        last = Row(iteration, rate, train_loss, train_error, 100 * wrong / len(test_labels), images_per_s,
                   round(time.perf_counter() - began))
        rows.append(last)
        print(f"{iteration:>9,}  {rate:>7g}  {train_loss:>10.4f}  {train_error:>9.2f} %  {last.test_error:>8.2f} %  "
              f"{images_per_s:>8,}  {timedelta(seconds=last.seconds)!s:>8}", flush=True)
        if rank == 0:
            momentum = {key: optimizer.state[p].get("momentum_buffer", 0 * p.data) for key, p in net.named_parameters()}
            save_checkpoint(folder, {**about, "code": code, "model": net.state_dict(), "momentum": momentum, "rows":
                                     list(map(list, rows)), "responses": responses, "warming_up": warming_up})
    print(f"{name} has finished, trained in {args.precision}: test error {last.test_error:.2f} % after iteration "
          f"{last.iteration:,}. The net is in {path}. {advice}")


# ----- 8. The report: runs side by side, as in Table 6, Fig. 6 and Fig. 7 -----------------------------------------

PAPER = {"ResNet-20": "8.75 %", "ResNet-32": "7.51 %", "ResNet-44": "7.17 %", "ResNet-56": "6.97 %",  # Table 6
         "ResNet-110": "6.43 %, the best of five; mean 6.61 ± 0.16 %", "ResNet-1202": "7.93 %"}


def departures(recipe):
    """What in a recipe is not the paper's, in words, and the checksum of images that are not CIFAR-10's.
    Precision, and one process in place of two GPUs, do not count."""
    paper = {**vars(make_parser().parse_args([])), "warmup": recipe["depth"] >= WARM_UP_DEPTH,
             "processes": min(recipe["processes"], 2), "images": recipe["dataset"] == "cifar10" and recipe["images"]}
    skip = ("depth", "plain", "shortcut", "seed", "precision")
    return [f"{key} {value}" for key, value in recipe.items() if key not in skip and value != paper[key]]


def draw_figures(groups, root):
    """Fig. 6, errors against iterations, and Fig. 7, the responses of finished runs. groups is made by report()."""
    from matplotlib.figure import Figure
    figure6, figure7 = Figure(figsize=(12, 5), layout="constrained"), Figure(figsize=(12, 7), layout="constrained")
    panels, (in_order, by_size) = figure6.subplots(1, 2, sharey=True), figure7.subplots(2, 1, sharey=True)
    kinds = sorted({(parameters, *words) for _, parameters, _, _, *words in groups})
    for (residual, parameters, _, *words), runs in sorted(groups.items()):
        panel, dash = (panels[1], "-") if residual else (panels[0], ":")
        label = ", ".join(words).replace("$", r"\$")
        colour = f"C{kinds.index((parameters, *words[1:])) % 10}"  # the same for a plain net and its residual one
        for k, (rows, _, _) in enumerate(runs.values()):
            iterations, text = [row.iteration for row in rows], "" if k else label  # one line for all seeds
            panel.plot(iterations, [row.train_error for row in rows], "--", color=colour, linewidth=1)
            panel.plot(iterations, [row.test_error for row in rows], color=colour, linewidth=2.5, label=text)
        panel.legend(fontsize=8)
        finished = [responses for _, _, responses in runs.values() if responses]
        for k, responses in enumerate(finished):
            layers, text = range(1, len(responses) + 1), "" if k else label
            in_order.plot(layers, responses, dash, color=colour, label=text)
            by_size.plot(layers, sorted(responses, reverse=True), dash, color=colour)
            in_order.legend(fontsize=8)
    top = min(100, max(2 * rows[-1].test_error + 1 for runs in groups.values() for rows, _, _ in runs.values()))
    panels[0].set(title="plain", xlabel="iteration", ylabel="error (%): training dashed, test bold", ylim=(0, top))
    panels[1].set(title="residual", xlabel="iteration")
    in_order.set(title="responses of the 3x3 layers: plain dotted", xlabel="layer", ylabel="std", yscale="log")
    by_size.set(xlabel="layer, sorted by the size of its response", ylabel="std")
    for name, figure in (("fig6.png", figure6), ("fig7.png", figure7)):
        figure.savefig(root / name, dpi=100)
        print(f"figure: {root / name}")


def report(root):
    """Print the runs below root as a Markdown table, a line for a net with all its seeds; draw Fig. 6 and Fig. 7."""
    def spread(errors):
        return f"{statistics.mean(errors):.2f}{f' ± {statistics.stdev(errors):.2f}' if len(errors) > 1 else ''} %"
    groups = {}  # {what the runs of a line have in common: {seed: (rows, device, responses)}}
    for path in sorted(root.rglob("checkpoint.pt")):
        try:
            saved, rows = read_checkpoint(path)
            recipe, done, seed = saved["recipe"], rows[-1].iteration, operator.index(saved["recipe"]["seed"])
            notes = departures(recipe) + [f"unfinished after {done}"] * (done < recipe["iterations"])
            parameters = sum(tensor.numel() for tensor in saved["momentum"].values())
            words = saved["net"], ", ".join(notes) or "as in the paper", recipe["precision"]
            if not "".join([*words, saved["device"]]).replace("|", "\n").isprintable():  # no bar, no control character
                raise ValueError("its texts do not fit into a table")
            responses = [float(std) for std in saved.get("responses", [])]
            runs = groups.setdefault((not recipe["plain"], parameters, recipe["processes"], *words), {})
            if runs.setdefault(seed, (rows, saved["device"], responses))[0] is not rows:
                raise ValueError("another run has the same recipe and seed")
        except Exception as error:  # the file may hold anything
            print(f"left out: {str(path)!r}: {error!r:.200}")
    if not groups:
        raise UserError(f"--report {root}: there is no run to show in this folder")
    print("| net | parameters | recipe | precision | seeds | training error | test error | paper | time | on |")
    print(10 * "|---" + "|")
    for (_, parameters, _, name, notes, precision), runs in sorted(groups.items()):
        last = [rows[-1] for rows, _, _ in runs.values()]
        cells = [name, f"{parameters:,}", notes, precision, len(runs), spread([row.train_error for row in last]),
                 spread([row.test_error for row in last]), PAPER.get(name, "") if notes == "as in the paper" else "",
                 timedelta(seconds=round(statistics.mean(row.seconds for row in last))),
                 ", ".join(sorted({device for _, device, _ in runs.values()}))]
        print(f"| {' | '.join(map(str, cells))} |")
    draw_figures(groups, root)


# ----- 9. Appendix: the nets of ImageNet (sections 3.3, 3.4 and 4.1). The program does not train them -------------

class BottleneckBlock(nn.Module):
    """ResidualBlock with another F: 1x1, 3x3 and 1x1 convolutions, the first two of C_out / 4 channels (Fig. 5, right).
    (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)). Raises ValueError as ResidualBlock does."""

    def __init__(self, in_channels, out_channels, stride=1, shortcut="B"):
        super().__init__()
        width = out_channels // 4
        # Choice: the stride is in the first convolution, as Table 1's multiply-adds ask; torchvision has it in the 3x3.
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = make_shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, x):  # (N, C_in, H, W)
        y = torch.relu(self.bn1(self.conv1(x)))  # (N, C_out / 4, ceil(H / stride), ceil(W / stride))
        y = torch.relu(self.bn2(self.conv2(y)))  # (N, C_out / 4, ceil(H / stride), ceil(W / stride))
        y = self.bn3(self.conv3(y))  # F(x): (N, C_out, ceil(H / stride), ceil(W / stride))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return torch.relu(y)


class ImageNetResNet(nn.Module):
    """A net of Table 1: (N, 3, 224, 224) -> logits (N, num_classes). 18, 34, 50, 101 or 152 layers; plain: 18 or 34.
    plain and shortcut are as in ResNet. The paper has option A for 18 and 34 layers in Table 2, B for 50 and more.
    This is the net alone, without section 3.4's data and recipe: torchvision's reference training can take such a net.
    Raises ValueError for another depth or, unless plain, an unknown shortcut."""

    def __init__(self, depth, plain=False, shortcut="B", num_classes=1000):
        super().__init__()
        blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
        if depth not in blocks or (plain and depth >= 50):
            raise ValueError(f"depth must be 18, 34, 50, 101 or 152, and 18 or 34 if plain, not {depth}")
        n1, n2, n3, n4 = blocks[depth]
        block, c = (ResidualBlock, 64) if depth < 50 else (BottleneckBlock, 256)  # c: the channels of stage 1
        option = None if plain else shortcut
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.stage1 = make_stage(n1, 64, c, 1, option, block)  # conv2_x in Table 1
        self.stage2 = make_stage(n2, c, 2 * c, 2, option, block)
        self.stage3 = make_stage(n3, 2 * c, 4 * c, 2, option, block)
        self.stage4 = make_stage(n4, 4 * c, 8 * c, 2, option, block)
        self.fc = nn.Linear(8 * c, num_classes)
        initialise(self)

    def forward(self, x):  # (N, 3, 224, 224)
        x = torch.relu(self.bn1(self.conv1(x)))  # (N, 64, 112, 112)
        x = nn.functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)  # (N, 64, 56, 56)
        x = self.stage1(x)  # (N, c, 56, 56)
        x = self.stage2(x)  # (N, 2c, 28, 28)
        x = self.stage3(x)  # (N, 4c, 14, 14)
        x = self.stage4(x)  # (N, 8c, 7, 7)
        return self.fc(x.mean(dim=(2, 3)))  # (N, num_classes)


# ----- 10. The command line ---------------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="CIFAR ResNets and plain nets of He et al., 2015")
    parser.error = lambda message: parser.exit(2, f"resnet.py: error: {' '.join(message.split())}\n")  # one line
    add, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--depth", type=int, default=20, metavar="N", help="6n + 2: 20, 32, 44, 56, 110, 1202, ... (default: 20)")
    either("--plain", action="store_true", help="leave out the shortcuts")
    either("--shortcut", choices=["A", "B", "C"], default="A", help="option of section 4.1 (default: A)")
    add("--dataset", choices=["cifar10", "cifar100", "folder", "synthetic"], default="cifar10", help="default: cifar10")
    add("--data-dir", default="data", metavar="DIR", help="of CIFAR's archive, or of train/CLASS/ and test/CLASS/")
    add("--val", action="store_true", help="hold out 5,000 training images and test on them instead")
    for flag, default in (("--iterations", ITERATIONS), ("--batch-size", BATCH_SIZE), ("--lr", LEARNING_RATE),
                          ("--momentum", MOMENTUM), ("--weight-decay", WEIGHT_DECAY), ("--seed", 0)):
        add(flag, type=type(default), default=default, metavar="N", help="(default: %(default)s)")
    add("--warmup", action=argparse.BooleanOptionalAction, help=f"(default: from {WARM_UP_DEPTH} layers on)")
    add("--precision", choices=["bf16", "float32"], help="of training (default: bf16 where the device has it)")
    add("--device", help="cuda, cuda:N, mps or cpu (default: the first of them there is)")
    add("--eager", action="store_true", help="on CUDA, neither compile the blocks nor record a CUDA graph")
    add("--eval-every", type=int, default=0, metavar="N", help="iterations a row (default: a tenth, at most 1000)")
    add("--output-dir", metavar="DIR", help="the run's folder (default: runs/resnet-56, runs/plain-56, ...)")
    add("--report", type=Path, metavar="DIR", help="compare the runs in DIR: a table, fig6.png and fig7.png")
    return parser


def main(argv=None):
    """The program. Ends with one line: status 2 if the user can correct it, 1 if a run has to stop."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if dist.is_torchelastic_launched():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            if dist.get_rank() > 0:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process alone prints
        report(args.report) if args.report else run(args)
    except (UserError, OSError, ImportError, torch.OutOfMemoryError) as error:
        parser.error(str(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
