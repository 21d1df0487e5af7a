"""Everything that needs a CUDA device, in one call: the tests, then the speed of training.

    python .ci/gpu.py

Without a device, it only shows that this script itself works.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

PROGRAM = Path(__file__).parent.parent / "resnet.py"
CASES = {
    "float32, no graph": ["--no-graph"],
    "float32": [],
    "bf16, no graph": ["--bf16", "--no-graph"],
    "bf16": ["--bf16"],
}


def measure(depth, iterations, switches):
    """Train on synthetic images in two rows. Return images/s of the second one."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"--dataset synthetic --lr 0.01 --depth {depth} --iterations {2 * iterations}"
        words = [*words.split(), "--eval-every", str(iterations), "--output-dir", folder, *switches]
        subprocess.run([sys.executable, PROGRAM, *words], check=True, stdout=subprocess.DEVNULL)
        with open(Path(folder, "log.csv"), newline="") as file:
            return float(list(csv.DictReader(file))[-1]["images_per_s"])


parser = argparse.ArgumentParser()
parser.add_argument("--depths", type=int, nargs="*", default=[20, 56, 110, 1202])
parser.add_argument("--iterations", type=int, default=400 if torch.cuda.is_available() else 2)
args = parser.parse_args()
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"{name}, torch {torch.__version__}", flush=True)
tests = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "cuda"]
subprocess.run(tests, cwd=PROGRAM.parent, check=False)
for depth in args.depths:
    for case, switches in CASES.items():
        speed = measure(depth, args.iterations, switches)
        line = f"{depth:>5} layers  {case:<18} {speed:>8,.0f} images/s {128_000 / speed:>8.2f} ms"
        print(line, flush=True)
