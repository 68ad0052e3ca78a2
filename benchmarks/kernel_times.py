# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Time of the TTT kernels on a GPU, beside the PyTorch op, flash-linear-attention and attention of the same width.

    python benchmarks/kernel_times.py --lengths 4096 65536 --batches 1 4

Each time is the median over several runs, in milliseconds, and stands beside its floor: the larger of the bytes that
must be moved over the copy bandwidth and the operations over the matrix rate, both measured in the same run.
flash-linear-attention is measured where it is installed.
"""

import argparse
import platform
import signal
import statistics
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from reporting import RESULTS, store


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also without an installation

import ops_ttt_omni as ops
import ttt_kernels


COMPILED_UP_TO = 1024  # torch.compile unrolls the mini-batches
EAGER_UP_TO = 65536
TIME_LIMIT = 60  # seconds for one candidate at one size
BUDGET_MS = 200  # for the repetitions of one measurement


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=("linear", "mlp"), default="linear")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 18)])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--mini-batch", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="names of the candidates to measure; default: all")
    parser.add_argument("--output", type=Path, help="JSON file; default: results/kernel_times-<layer>-<device>.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these kernels are measured on a GPU")
    warnings.filterwarnings("ignore")

    floors = measure_floors()
    print(f"{torch.cuda.get_device_name()}: copy {floors['bytes_per_s'] / 1e12:.2f} TB/s, "
          f"bf16 product {floors['flops_per_s'] / 1e12:.0f} TFLOP/s")  # fmt: skip
    results = []
    for batch in args.batches:
        for length in args.lengths:
            results += measure_prefill(args, batch, length, floors)
        results += measure_decode(args, batch)
    report = {
        "device": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "versions": versions(),
        "floors": floors,
        "settings": {"layer": args.layer, "heads": args.heads, "head_dim": args.head_dim,
                     "mini_batch": args.mini_batch, "dtype": "bfloat16"},
        "results": results,
    }  # fmt: skip
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    store(args.output or RESULTS / f"kernel_times-{args.layer}-{name}.json", report)


def measure_prefill(args, batch: int, length: int, floors: dict) -> list[dict]:
    """Forward and forward + backward of every candidate at one size."""
    results = []
    for backward in (False, True):
        floor = prefill_floor(args, batch, length, backward, floors)
        for name, make in candidates(args, length).items():
            if args.only and name not in args.only:
                continue
            time = guarded(make, args, batch, length, backward)
            results.append(entry("forward + backward" if backward else "forward", name, batch, length, time, floor))
    return results


def measure_decode(args, batch: int) -> list[dict]:
    """One token per row, replayed from a CUDA graph, at a position half through the mini-batch and at its last one."""
    results = []
    for position in (args.mini_batch // 2, args.mini_batch - 1):
        what = "decode, last position" if position == args.mini_batch - 1 else "decode"
        tokens, parameters, state = inputs(args, batch, 1)
        run = ttt_kernels.ttt_linear_decode if args.layer == "linear" else ttt_kernels.ttt_mlp_decode
        run = torch.no_grad()(run)
        state[-1].fill_(position)
        # States enough to be past the cache, as a model of many layers has them.
        size = sum(x.numel() * x.element_size() for x in state)
        states = [[x.clone() for x in state] for _ in range(min(64, 2**28 // size + 1))]
        graph = torch.cuda.CUDAGraph()
        run(*tokens, *parameters, *states[0])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for s in states:
                run(*tokens, *parameters, *s)
        time = median_ms(graph.replay) / len(states)
        copies = [torch.empty(size // 4, device="cuda") for _ in range(len(states) + 1)]
        copy = torch.cuda.CUDAGraph()
        with torch.cuda.graph(copy):
            for source, target in zip(copies, copies[1:]):
                target.copy_(source)
        floor = {"floor_ms": median_ms(copy.replay) / len(states), "bound": "a copy of the state"}
        results.append(entry(what, "ours", batch, 1, time, floor))
    return results


def entry(what, name, batch, length, time, floor) -> dict:
    result = {"what": what, "candidate": name, "batch": batch, "length": length, "ms": time} | floor
    shown = f"{time:10.3f} ms {time / floor['floor_ms']:7.1f} x floor" if isinstance(time, float) else time
    floor = f"floor {floor['floor_ms']:.3f} ms: {floor['bound']}"
    print(f"{what:22} {name:18} B {batch:2} T {length:6} {shown:>30} ({floor})", flush=True)
    return result


def candidates(args, length: int) -> dict:
    """Functions that make a run at one size, by name."""
    chosen = {"ours": ours}
    if length <= EAGER_UP_TO:
        chosen["torch"] = torch_op
    if length <= COMPILED_UP_TO:
        chosen["torch compiled"] = lambda *a: torch_op(*a, compiled=True)
    if args.layer == "linear":
        chosen["fla chunk"] = lambda *a: fla_op("chunk_ttt_linear", *a)
        chosen["fla fused_chunk"] = lambda *a: fla_op("fused_chunk_ttt_linear", *a)
    chosen["attention"] = attention
    return chosen


def inputs(args, batch: int, length: int, requires_grad: bool = False):
    """Random tokens (q, k, v, lr), parameters (token_scale, LayerNorm) and a state, as a model's layer has them."""
    heads, d, m, cuda = args.heads, args.head_dim, args.mini_batch, {"device": "cuda"}
    q, k, v = (torch.randn(batch, length, heads, d, **cuda).bfloat16().transpose(1, 2) for _ in range(3))
    lr = (torch.rand(batch, length, heads, **cuda) / d).transpose(1, 2)
    scale = (1 / torch.arange(1, m + 1, **cuda)).clamp_min(m**-0.5)
    parameters = [scale, torch.ones(heads, d, **cuda), torch.zeros(heads, d, **cuda)]
    widths = [(d, d)] if args.layer == "linear" else [(d, 4 * d), (4 * d, d)]
    state = []
    for rows, columns in widths:
        state += [torch.randn(batch, heads, rows, columns, **cuda) * 0.02]
        state += [torch.zeros(batch, heads, 1, columns, **cuda)]
    pending = (d, d) if args.layer == "linear" else (d, 4 * d, 4 * d, d)
    state += [torch.zeros(batch, heads, m, width, **cuda) for width in pending]
    state.append(torch.zeros(batch, dtype=torch.long, **cuda))
    tokens = [q, k, v, lr]
    for x in (*tokens, *parameters, *state[:-1]):
        x.requires_grad_(requires_grad)
    return tokens, parameters, state


def with_backward(forward, leaves, backward: bool):
    """A run of `forward`, which returns the output, or of it and its gradients."""
    if not backward:
        return torch.no_grad()(forward)
    o = forward()
    do = torch.randn_like(o)
    del o
    return lambda: torch.autograd.grad(forward(), leaves, do)


def ours(args, batch, length, backward):
    tokens, parameters, state = inputs(args, batch, length, backward)
    op = ttt_kernels.ttt_linear if args.layer == "linear" else ttt_kernels.ttt_mlp
    leaves = [*tokens, *parameters, *state[: 2 if args.layer == "linear" else 4]]
    return with_backward(lambda: op(*tokens, *parameters, *state)[0], leaves, backward)


def torch_op(args, batch, length, backward, compiled=False):
    tokens, parameters, state = inputs(args, batch, length, backward)
    op, cls = (ops.ttt_linear, ops.TTTLinearState) if args.layer == "linear" else (ops.ttt_mlp, ops.TTTMLPState)
    leaves = [*tokens, *parameters, *state[: 2 if args.layer == "linear" else 4]]
    state = cls(state[-1], *state[:-1])

    def forward():
        return op(*tokens, *parameters, state, checkpoint_group_size=16, backend="torch")[0]

    return with_backward(torch.compile(forward) if compiled else forward, leaves, backward)


def fla_op(name, args, batch, length, backward):
    import fla.ops.ttt

    (q, k, v, lr), (_, weight, bias), state = inputs(args, batch, length)
    weight, bias = weight.bfloat16(), bias.bfloat16()  # its backward pass takes no others
    leaves = [x.requires_grad_(backward) for x in (q, k, v, lr, weight, bias, *state[:2])]
    op = getattr(fla.ops.ttt, name)

    def forward():
        tokens = (x.transpose(1, 2) for x in (q, k, v))
        eta = lr.transpose(1, 2).unsqueeze(-1).bfloat16()
        return op(*tokens, weight, bias, eta, chunk_size=args.mini_batch, initial_state=state[0],
                  initial_state_bias=state[1], output_final_state=True)[0]  # fmt: skip

    return with_backward(forward, leaves, backward)


def attention(args, batch, length, backward):
    (q, k, v, _), _, _ = inputs(args, batch, length, backward)
    return with_backward(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], backward)


def prefill_floor(args, batch, length, backward, floors) -> dict:
    """Least time for a prefill: q, k, v read and o written once (their gradients too), and the products."""
    width = args.heads * args.head_dim
    d, m, f = args.head_dim, args.mini_batch, 4 * args.head_dim
    moved = batch * length * width * 2 * (4 + 7 * backward)
    # Per token: k W, q W, the update; q k^T and its product with u. For the MLP both layers, and the gradient's W2^T.
    flops = 2 * (3 * d * d + 2 * m * d) if args.layer == "linear" else 2 * (7 * d * f + 2 * m * (d + f))
    flops *= batch * length * args.heads * (1 + 2 * backward)
    times = {"bytes": moved / floors["bytes_per_s"] * 1e3, "flops": flops / floors["flops_per_s"] * 1e3}
    bound = max(times, key=times.get)
    return {"floor_ms": times[bound], "bound": bound}


def measure_floors() -> dict:
    """Copy bandwidth (read + written) and rate of bf16 products on random data."""
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    copy = median_ms(lambda: y.copy_(x))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b)
    return {"bytes_per_s": 2 * x.nbytes / copy * 1e3, "flops_per_s": 2 * 8192**3 / product * 1e3}


def median_ms(run) -> float:
    """Median time of `run` over as many repetitions, from 3 to 100, as fit in the budget."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    times = []
    while len(times) < 3 or (sum(times) < BUDGET_MS and len(times) < 100):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def guarded(make, *size):
    """The time of a candidate, or one line on why there is none."""

    def stop(*_):
        raise TimeoutError(f"no time within {TIME_LIMIT} s, compilation included")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIME_LIMIT)
    try:
        try:
            return median_ms(make(*size))
        finally:
            signal.alarm(0)  # not while the error is handled
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finally:
        torch.cuda.empty_cache()


def driver_version() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else "unknown"


def versions() -> dict:
    """Versions of what has a part in the times."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    try:
        import fla

        found["flash-linear-attention"] = fla.__version__
    except ImportError:
        found["flash-linear-attention"] = "not installed"
    return found | {"cuda": torch.version.cuda}


if __name__ == "__main__":
    main()
