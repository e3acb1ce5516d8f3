"""Check optimisation profiles before TensorRT sees them: TensorRT would log a bad one, and then report that there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files.atomic import ExportError

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # min, opt, max
Profile = dict[str, Range]
NAMES = ("min", "opt", "max")
MAX_DIM = 2**31 - 1


@dataclass(frozen=True)
class GraphTensor:
    """An input or output of an ONNX graph. dims: an int where static, else the dimension's name ("" if it has none)."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    @property
    def dynamic(self) -> bool:
        return any(isinstance(dim, str) for dim in self.dims)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(str(dim) or '?' for dim in self.dims)})"


def check_text(op: str, path: object, message: Any) -> None:
    """Raise ExportError if a string of a protobuf message is not UTF-8: TensorRT's log could not pass it to Python."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                check_text(op, path, inner)
        elif field.type == field.TYPE_STRING:
            for text in (value,) if isinstance(value, (str, bytes)) else value:
                if not isinstance(text, str):
                    raise ExportError(
                        f"{op}: {str(path)!r} is not valid ONNX: {field.name}: got {text[:100]!r}, allowed: UTF-8"
                    )


def graph_inputs(model: Any) -> list[GraphTensor]:
    """The inputs that a caller must feed: the graph's inputs without its initializers."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [_tensor(value) for value in model.graph.input if value.name not in constants]


def graph_outputs(model: Any) -> list[GraphTensor]:
    return [_tensor(value) for value in model.graph.output]


def _tensor(value: Any) -> GraphTensor:
    import onnx

    kind = value.type.tensor_type
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim)
    return GraphTensor(value.name, onnx.TensorProto.DataType.Name(kind.elem_type), dims)


def check_profiles(
    op: str, inputs: Sequence[GraphTensor], profiles: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None
) -> list[Profile]:
    """Check profiles against the graph's inputs. Only a static input may be missing from a profile.

    Returns:
        A list of {input: (min, opt, max)}, three tuples of ints.

    Raises:
        ExportError: a profile does not fit; the message names profile and input, what came and what is allowed.
    """
    given = [profiles] if isinstance(profiles, Mapping) else list(profiles or [])
    dynamic = [tensor for tensor in inputs if tensor.dynamic]
    if dynamic and not given:
        wanted = "; ".join(map(str, dynamic))
        raise ExportError(f"{op}: profiles: got none, allowed: a (min, opt, max) for each dynamic input: {wanted}")
    return [_check_profile(op, f"profiles[{index}]", inputs, profile) for index, profile in enumerate(given)]


def _check_profile(op: str, where: str, inputs: Sequence[GraphTensor], profile: Any) -> Profile:
    if not isinstance(profile, Mapping):
        raise ExportError(f"{op}: {where}: got {type(profile).__name__}, allowed: a dict of input: (min, opt, max)")
    known = {tensor.name: tensor for tensor in inputs}
    unknown = [str(name) for name in profile if name not in known]
    if unknown:
        raise ExportError(f"{op}: {where}: got {', '.join(unknown)}, allowed inputs: {', '.join(map(str, inputs))}")
    missing = [str(tensor) for tensor in inputs if tensor.dynamic and tensor.name not in profile]
    if missing:
        raise ExportError(f"{op}: {where}: no (min, opt, max) for {', '.join(missing)}, allowed: one for each dynamic input")
    checked = {name: _check_range(op, f"{where}[{name!r}]", known[name], value) for name, value in profile.items()}
    _check_shared_dims(op, where, [(known[name], ranges) for name, ranges in checked.items()])
    return checked


def _check_range(op: str, where: str, tensor: GraphTensor, value: Any) -> Range:
    try:
        low, best, high = (tuple(shape) for shape in value)
    except (TypeError, ValueError):
        raise ExportError(f"{op}: {where}: got {value!r}, allowed: three shapes, (min, opt, max)") from None
    for label, shape in zip(NAMES, (low, best, high)):
        if not all(isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim <= MAX_DIM for dim in shape):
            raise ExportError(f"{op}: {where}: {label}: got {shape}, allowed: integers from 0 to {MAX_DIM}")
        if _is_scalar_list(tensor):
            continue  # may be a shape tensor, whose profile holds values, not dimensions: known after parsing only
        if len(shape) != len(tensor.dims):
            raise ExportError(
                f"{op}: {where}: {label}: got {shape} of rank {len(shape)}, allowed: rank {len(tensor.dims)}, {tensor}"
            )
        wrong = [axis for axis, dim in enumerate(tensor.dims) if isinstance(dim, int) and shape[axis] != dim]
        if wrong:
            raise ExportError(
                f"{op}: {where}: {label}: got {shape}, allowed: {tensor.dims[wrong[0]]} at dimension {wrong[0]}, {tensor}"
            )
    if not len(low) == len(best) == len(high) or not all(a <= b <= c for a, b, c in zip(low, best, high)):
        raise ExportError(f"{op}: {where}: got min {low}, opt {best}, max {high}, allowed: min <= opt <= max in each dimension")
    return low, best, high


def fits(shape: tuple[int, ...], ranges: Range) -> bool:
    """Whether a shape lies within a profile's ranges."""
    low, _, high = ranges
    return len(shape) == len(low) and all(a <= dim <= b for a, dim, b in zip(low, shape, high))


def _is_scalar_list(tensor: GraphTensor) -> bool:
    return len(tensor.dims) <= 1 and not tensor.dynamic and tensor.dtype in ("INT32", "INT64")


def _check_shared_dims(op: str, where: str, ranges: Sequence[tuple[GraphTensor, Range]]) -> None:
    """Dimensions of one name must be equal in every input when the engine runs, so their ranges must be equal too."""
    seen: dict[str, tuple[str, Shape]] = {}
    for tensor, shapes in ranges:
        for axis, dim in enumerate(tensor.dims):
            if not isinstance(dim, str) or not dim:
                continue
            came = (shapes[0][axis], shapes[1][axis], shapes[2][axis])
            first, allowed = seen.setdefault(dim, (tensor.name, came))
            if came != allowed:
                raise ExportError(
                    f"{op}: {where}[{tensor.name!r}]: dimension {dim!r}: got min, opt, max {came},"
                    f" allowed: {allowed} as in {first!r}, because dimensions of one name are equal"
                )


def add_profiles(op: str, builder: Any, network: Any, config: Any, profiles: Sequence[Profile]) -> None:
    """Hand checked profiles to the builder's configuration. An input that is a shape tensor takes values, not dimensions."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for index, profile in enumerate(profiles):
        native = builder.create_optimization_profile()
        for tensor in tensors:
            if tensor.name not in profile:
                if tensor.is_shape_tensor:
                    raise ExportError(
                        f"{op}: profiles[{index}]: no (min, opt, max) for {tensor.name!r}, allowed: its values,"
                        " because the graph reads it as a shape"
                    )
                continue
            setter = native.set_shape_input if tensor.is_shape_tensor else native.set_shape
            setter(tensor.name, *profile[tensor.name])
        if config.add_optimization_profile(native) < 0:
            raise ExportError(f"{op}: profiles[{index}]: refused by TensorRT: got {profile}")
