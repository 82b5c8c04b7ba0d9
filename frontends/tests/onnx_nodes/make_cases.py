#!/usr/bin/env python3
"""Write the node tests of the ONNX standard, from the Python package `onnx`.

    make_cases.py OUTDIR

OUTDIR/NAME/model.onnx is the model of one operator; test_data_set_0/input_N.pb and
output_N.pb are its inputs and outputs as TensorProto. Cases whose inputs or outputs
are no tensors (sequences, maps, optional values) have their model only.
"""

import os
import sys

from onnx import TensorProto, numpy_helper
from onnx.backend.test.case import node


def write(path, message):
    with open(path, "wb") as f:
        f.write(message.SerializeToString())


def main(out):
    cases = node.collect_testcases()
    for case in cases:
        folder = os.path.join(out, case.name)
        data = os.path.join(folder, "test_data_set_0")
        os.makedirs(data, exist_ok=True)
        write(os.path.join(folder, "model.onnx"), case.model)
        inputs, outputs = case.data_sets[0]
        for kind, values, infos in (
            ("input", inputs, case.model.graph.input),
            ("output", outputs, case.model.graph.output),
        ):
            for i, (value, info) in enumerate(zip(values, infos)):
                if not info.type.HasField("tensor_type"):
                    continue
                if not isinstance(value, TensorProto):
                    value = numpy_helper.from_array(value, info.name)
                write(os.path.join(data, f"{kind}_{i}.pb"), value)
    print(f"{len(cases)} cases in {out}")


if __name__ == "__main__":
    main(sys.argv[1])
