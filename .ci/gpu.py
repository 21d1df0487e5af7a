"""Everything that needs a CUDA device, in one call.

    python .ci/gpu.py                   # the tests, the speed with and without each trick
    python .ci/gpu.py --data-dir DIR    # also two timed runs of 64,000 iterations, --dataset folder
    python .ci/gpu.py --peer DIR        # also akamaster/pytorch_resnet_cifar10, checked out in DIR

Without a device, it only shows that this script itself works.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent.parent
PEER = """
import sys, time, numpy, torch, torchvision
folder, net, images, output = sys.argv[1:]
sys.path.insert(0, folder)
class Random(torchvision.datasets.CIFAR10):  # its own loader and transforms, random images
    def __init__(self, root, train, transform, download=False):
        self.transform, self.target_transform = transform, None
        count = int(images) if train else 128
        self.data = numpy.random.randint(0, 256, (count, 32, 32, 3), dtype=numpy.uint8)
        self.targets = numpy.random.randint(0, 10, len(self.data)).tolist()
torchvision.datasets.CIFAR10 = Random
if not torch.cuda.is_available():  # it calls .cuda() whatever there is
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self: self
import trainer
epoch = trainer.train
def timed(loader, *rest):
    began = time.perf_counter()
    epoch(loader, *rest)  # reads the loss of each iteration: when it returns, the device is done
    print(f"peer: {len(loader.dataset) / (time.perf_counter() - began):,.0f} images/s")
trainer.train = timed
sys.argv[1:] = ["--arch", net, "--epochs", "2", "--save-dir", output, "--print-freq", "100000"]
trainer.main()
"""


def call(title, *words, only=""):
    print(f"== {title}", flush=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=HERE, text=True, capture_output=True, check=False
    )
    lines = done.stdout.splitlines() + (done.stderr.splitlines()[-15:] if done.returncode else [])
    print("\n".join(line for line in lines if only in line or done.returncode))
    print(f"   status {done.returncode}, {time.perf_counter() - began:.0f} s in all", flush=True)


def speed(depth, *switches):
    """Train on synthetic images; print images/s of each half. The first compiles and records."""
    with tempfile.TemporaryDirectory() as folder:
        call(
            f"{depth} layers {' '.join(switches)}",
            "resnet.py",
            "--dataset",
            "synthetic",
            "--depth",
            depth,
            "--iterations",
            2 * args.iterations,
            "--eval-every",
            args.iterations,
            "--no-warmup",
            "--lr",
            0.01,
            "--output-dir",
            folder,
            *switches,
            only="--eager does not",
        )
        with open(Path(folder, "log.csv"), newline="") as file:
            rates = [int(row["images_per_s"]) for row in csv.DictReader(file)]
        print(
            "   images/s", *rates, *(f"{128_000 / rate:.2f} ms" for rate in rates[-1:]), flush=True
        )


parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--peer")
parser.add_argument("--depths", type=int, nargs="*", default=[20, 56, 110, 1202])
parser.add_argument(
    "--iterations", type=int, default=400 if torch.cuda.is_available() else 10, help="timed"
)
parser.add_argument("--peer-images", type=int, default=50_000, help="an epoch of the peer")
args = parser.parse_args()
call("tests on CUDA", "-m", "pytest", "-q", "-rs", "-k", "graphed or compiled or bf16")
for switches in (
    ["--precision", "float32", "--eager"],
    ["--eager"],
    ["--precision", "float32"],
    [],
):
    for depth in args.depths[:3]:
        speed(depth, *switches)
for depth in args.depths[3:]:
    speed(depth)
with tempfile.TemporaryDirectory() as folder:
    for depth in args.depths[:3] if args.peer else ():
        call(
            f"{depth} layers, peer, two epochs",
            "-c",
            PEER,
            Path(args.peer).resolve(),
            f"resnet{depth}",
            args.peer_images,
            folder,
            only="peer: ",
        )
    for depth in (20, 110) if args.data_dir else ():
        call(
            f"{depth} layers, 64,000 iterations",
            "resnet.py",
            "--depth",
            depth,
            "--dataset",
            "folder",
            "--data-dir",
            Path(args.data_dir).resolve(),
            "--eval-every",
            8000,
            "--output-dir",
            f"{folder}/{depth}",
        )
