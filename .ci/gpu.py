"""Everything that needs a CUDA device, in one call: the tests, then the speed of training.

    python .ci/gpu.py

Without a device, it only shows that this script itself works.
"""

import argparse
import gc
import itertools
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import resnet  # noqa: E402

CUDA = torch.cuda.is_available()
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def measure(data, depth, bf16, graph, memory_format, iterations):
    """Return images/s of training, after ten iterations that do not count."""
    recipe = resnet.Recipe(depth, bf16=bf16, lr=0.01, batch_size=128 if CUDA else 2)
    net = resnet.make_net(recipe).to(data.images.device, memory_format=memory_format)
    optimizer = resnet.make_optimizer(net, recipe)
    if graph:
        resnet.capture_graphs(net, recipe)
    warm_up = 10 if CUDA else 1
    resnet.train(net, optimizer, data, recipe, 0, warm_up)
    began = time.perf_counter()
    resnet.train(net, optimizer, data, recipe, warm_up, warm_up + iterations)
    return iterations * recipe.batch_size / (time.perf_counter() - began)


parser = argparse.ArgumentParser()
parser.add_argument("--depths", type=int, nargs="*", default=[20, 56, 110, 1202])
args = parser.parse_args()
tests = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "real"]
subprocess.run(tests, cwd=ROOT, check=False)

device, machine = resnet.choose_device(None)
data = resnet.make_synthetic().to(device)
print(f"\n{machine}\n\n| layers | precision | memory format | graph | images/s | ms | GB |")
print("|---" * 7 + "|")
cases = itertools.product(args.depths, (False, True), FORMATS, (True, False) if CUDA else (False,))
for depth, bf16, name, graph in cases:
    iterations = max(30, 8000 // depth) if CUDA else 1
    try:
        speed = measure(data, depth, bf16, graph, FORMATS[name], iterations)
        result = f"{speed:,.0f} | {128_000 / speed:.2f}"
    except (resnet.UserError, RuntimeError) as error:
        result = f"{resnet.one_line(error)} | "
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0
    precision = "bf16" if bf16 else "float32"
    words = [str(depth), precision, name, "yes" if graph else "no", result, f"{memory:.1f}"]
    print(f"| {' | '.join(words)} |", flush=True)
    gc.collect()  # the net that was captured
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
