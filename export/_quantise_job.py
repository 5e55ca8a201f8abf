"""The child process that writes a file in smaller numbers.

Run by path in a fresh process, because the quantisers of onnxruntime put a folder of theirs on the path of modules,
print, and advise on the root logger. Reads a job as JSON; calibration inputs lie in archives of arrays.
"""

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

LARGEST_HALF = 65504.0


class Refused(Exception):
    """The job cannot be done as it was given."""


def main() -> None:
    """Read the job, write the file, answer."""
    job = json.load(sys.stdin)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    ways = {"int8": static, "int8-dynamic": dynamic, "int8-weights": weights_alone, "fp16": halved}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            ways[job["method"]](job)
    except Exception as error:  # quantisers have no family of their own
        said = (str(error).strip().splitlines() or ["no message"])[0]
        name = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
        print(json.dumps({"refused": f"{name}{said}"}))
        return
    print(json.dumps({"done": True}))


def static(job: dict[str, Any]) -> None:
    """Weights and activations, these as far as calibration data say."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(job["feeds"])

        def get_next(self) -> Any:
            path = next(self.rest, None)
            if path is None:
                return None
            with np.load(path) as archive:
                return {name: archive[f"arr_{index}"] for index, name in enumerate(job["names"])}

    prepared = job["target"] + ".prepared"  # the quantiser finds what it can change by the shapes that are written down
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(job["path"]), data_prop=True), prepared)
    quantize_static(
        prepared,
        job["target"],
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=job["reduce_range"],
        activation_type=QuantType.QUInt8 if job["activations"] == "uint8" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )


def dynamic(job: dict[str, Any]) -> None:
    """Weights beforehand, activations at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, prepared = onnx.load(job["path"]), job["target"] + ".prepared"
    split_gemms(model)  # the quantiser stumbles over transposed weights
    onnx.save(model, prepared)
    options = {"per_channel": True, "reduce_range": job["reduce_range"]}
    quantize_dynamic(prepared, job["target"], weight_type=QuantType.QInt8, **options)


def weights_alone(job: dict[str, Any]) -> None:
    """Weights of linear layers, in blocks of 32."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(job["path"])
    split_gemms(model)
    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    if not any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node):
        raise Refused("no linear layer has constant weights.")
    onnx.save(quantizer.model.model, job["target"])


def split_gemms(model: ModelProto) -> None:
    """Every ``Gemm`` with a constant weight as ``MatMul`` and ``Add``, which alone has kernels for stored integers."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in weights or not plain:
            nodes.append(node)
            continue
        nodes += as_product(model, node, weights[node.input[1]], bool(options.get("transB", 0)))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def as_product(model: ModelProto, node: NodeProto, weight: TensorProto, transposed: bool) -> Iterator[NodeProto]:
    name = f"{weight.name}_product"
    if name not in {tensor.name for tensor in model.graph.initializer}:
        array = numpy_helper.to_array(weight)
        model.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(array.T if transposed else array), name)
        )
    biased = len(node.input) > 2 and node.input[2]
    product = f"{node.output[0]}_product" if biased else node.output[0]
    yield onnx.helper.make_node("MatMul", [node.input[0], name], [product], name=node.name)
    if biased:
        yield onnx.helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{node.name}_bias")


def halved(job: dict[str, Any]) -> None:
    """Everything between inputs and outputs."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(job["path"])
    largest = max(
        (
            float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
            for tensor in model.graph.initializer
            if tensor.data_type == TensorProto.FLOAT
        ),
        default=0.0,
    )
    if largest > LARGEST_HALF:
        raise Refused(f"fp16 ends at {LARGEST_HALF:g}, but a weight is {largest:g}")
    made = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
    made.topological_sort()  # casts of inputs come last otherwise
    onnx.save(made.model, job["target"])


if __name__ == "__main__":
    main()
