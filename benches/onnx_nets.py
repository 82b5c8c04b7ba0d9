"""Networks for `results/onnx.md`, and what ONNX Runtime makes of them.

    python benches/onnx_nets.py make DIR             writes the networks, quantized ones too, their inputs and its outputs
    python benches/onnx_nets.py compare DIR NAME OUT  compares what `quantc run --output OUT` wrote with them
    python benches/onnx_nets.py time DIR NAME        times ONNX Runtime on two threads

It needs the packages numpy, onnx, onnx_ir and onnxruntime.
"""

import pathlib
import sys
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

rng = np.random.default_rng(0)


class Net:
    def __init__(self):
        self.nodes, self.weights = [], []

    def weight(self, array):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def op(self, kind, inputs, domain="", **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def conv(self, x, channels, outs, kernel, stride, groups=1, clip=True):
        fan = channels // groups * kernel * kernel
        w = (rng.standard_normal((outs, channels // groups, kernel, kernel)) * np.sqrt(2 / fan)).astype(np.float32)
        b = (rng.standard_normal(outs) * 0.1).astype(np.float32)
        x = self.op("Conv", [x, self.weight(w), self.weight(b)], kernel_shape=[kernel] * 2, strides=[stride] * 2,
                    pads=[kernel // 2] * 4, group=groups)
        return self.op("Clip", [x, "zero", "six"]) if clip else x

    def save(self, path, inputs, output):
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in inputs]
        out = [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])]
        six = [numpy_helper.from_array(np.float32(v), n) for n, v in (("zero", 0), ("six", 6))]
        graph = helper.make_graph(self.nodes, "net", info, out, self.weights + six)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 9
        onnx.save(model, path)


def mobile(path):
    """The shapes of MobileNetV2 with random weights."""
    net = Net()
    x, channels = net.conv("x", 3, 32, 3, 2), 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for wide, outs, count, stride in stages:
        for i in range(count):
            step, y = stride if i == 0 else 1, x
            if wide > 1:
                y = net.conv(y, channels, channels * wide, 1, 1)
            y = net.conv(y, channels * wide, channels * wide, 3, step, groups=channels * wide)
            y = net.conv(y, channels * wide, outs, 1, 1, clip=False)
            x = net.op("Add", [x, y]) if step == 1 and channels == outs else y
            channels = outs
    x = net.op("Flatten", [net.op("GlobalAveragePool", [net.conv(x, channels, 1280, 1, 1)])])
    w = net.weight((rng.standard_normal((1000, 1280)) * 0.03).astype(np.float32))
    y = net.op("Gemm", [x, w, net.weight(np.zeros(1000, np.float32))], transB=1)
    net.save(path, [("x", [1, 3, 224, 224])], (y, [1, 1000]))


def dense(path):
    """Products, a function and a norm, for MatMulNBits."""
    net = Net()
    x = net.op("MatMul", ["x", net.weight((rng.standard_normal((256, 384)) / 16).astype(np.float32))])
    x = net.op("Sigmoid", [x])
    x = net.op("MatMul", [x, net.weight((rng.standard_normal((384, 96)) / 20).astype(np.float32))])
    net.save(path, [("x", [7, 256])], (net.op("Softmax", [x], axis=-1), [7, 96]))


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options)


def make(folder):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    folder.mkdir(parents=True, exist_ok=True)
    mobile(folder / "mobile.onnx")
    dense(folder / "dense.onnx")
    images = rng.random((8, 3, 224, 224), dtype=np.float32)
    np.save(folder / "samples.npy", images)

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = [{"x": images[i : i + 1]} for i in range(4)]

        def get_next(self):
            return self.left.pop() if self.left else None

    for name, kind in (("mobile_qdq", QuantFormat.QDQ), ("mobile_qop", QuantFormat.QOperator)):
        quantize_static(folder / "mobile.onnx", folder / f"{name}.onnx", Reader(), quant_format=kind, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    quantizer = MatMulNBitsQuantizer(onnx.load(folder / "dense.onnx"), bits=4, block_size=32, is_symmetric=False)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "dense_4bit.onnx"))
    for name in ("mobile", "mobile_qdq", "mobile_qop", "dense", "dense_4bit"):
        net = session(folder / f"{name}.onnx")
        x = images[7:] if name.startswith("mobile") else rng.standard_normal((7, 256)).astype(np.float32)
        np.save(folder / f"{name}.x.npy", x)
        np.save(folder / f"{name}.y.npy", net.run(None, {net.get_inputs()[0].name: x})[0])


def compare(folder, name, out):
    want = np.load(folder / f"{name}.y.npy")
    got = np.load(next(out.glob("*.npy")))
    apart = np.abs(got - want) / np.abs(want).max()
    print(f"{name}: largest difference {apart.max():.2e} of the largest number, mean {apart.mean():.2e}")


def timed(folder, name):
    net = session(folder / f"{name}.onnx")
    x = {net.get_inputs()[0].name: np.load(folder / f"{name}.x.npy")}
    times = []
    for _ in range(30):
        start = time.perf_counter()
        net.run(None, x)
        times.append(time.perf_counter() - start)
    print(f"{name}: {sorted(times)[15] * 1e3:.2f} ms")


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    folder = pathlib.Path(folder)
    {"make": lambda: make(folder), "compare": lambda: compare(folder, rest[0], pathlib.Path(rest[1])),
     "time": lambda: timed(folder, rest[0])}[command]()
