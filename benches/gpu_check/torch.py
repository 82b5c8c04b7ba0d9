# Times of PyTorch for products and attention, in CUDA graphs, as lines of `name | numbers | microseconds`.
import statistics
import sys
import torch

assert torch.cuda.is_available(), "there is no device"
print("version", torch.__version__, flush=True)


def measure(f, count):
    f(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            f(i)
    graph.replay()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        begin.record()
        for _ in range(4):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / 4 / count)
    return statistics.median(times)


def say(name, numbers, f, count):
    try:
        print(name, *numbers, "%.2f" % measure(f, count), flush=True)
    except Exception as e:
        print("failed", name, *numbers, str(e).splitlines()[0][:100], flush=True)


def of(kind, *shape):
    x = torch.randn(*shape, device="cuda")
    if kind == "int8":
        return (x * 40).clamp(-127, 127).to(torch.int8)
    return x.to(torch.bfloat16 if kind == "bf16" else torch.float8_e4m3fn)


one = torch.ones((), device="cuda")
for n, k in [(8192, 8192), (14336, 4096), (4096, 14336), (28672, 8192)]:
    for kind in ["bf16", "fp8", "int8"]:
        size = n * k * (2 if kind == "bf16" else 1)
        weights = [of(kind, n, k) for _ in range(max(2, min(16, (256 << 20) // size + 1)))]
        for m in [1, 8, 16, 64, 512, 2048, 4096] if kind == "bf16" else [512, 2048, 4096]:
            x = of(kind, m, k)
            product = {
                "bf16": lambda i: torch.nn.functional.linear(x, weights[i]),
                "fp8": lambda i: torch._scaled_mm(x, weights[i].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
                "int8": lambda i: torch._int_mm(x, weights[i].t()),
            }[kind]
            say(kind, (m, n, k), product, len(weights))
        del weights
for t in [512, 2048, 8192]:
    q, keys, values = (of("bf16", 1, 32, t, 128) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    say("attention", (t,), lambda i: attend(q, keys, values, is_causal=True), 2)
sys.stdout.flush()
