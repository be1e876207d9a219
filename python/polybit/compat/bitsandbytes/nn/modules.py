"""Layers and parameters as bitsandbytes lays them out: codes [bytes, 1] with a QuantState, int8 rows with SCB."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from polybit import checkpoint
from polybit import nn as native
from polybit.compat.bitsandbytes import functional
from polybit.compat.bitsandbytes.autograd._functions import MatmulLtState, matmul, matmul_4bit
from polybit.compat.bitsandbytes.functional import QuantState
from polybit.compat.bitsandbytes.optim import GlobalOptimManager
from polybit.compat.bitsandbytes.utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, OutlierTracer

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="_Module8bit")
Device = int | str | torch.device | None


class StableEmbedding(native.StableEmbedding):
    """An embedding with a Xavier-uniform table, a layer norm behind it, and 32-bit optimizer states."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            device, dtype,
        )  # fmt: skip
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def forward(self, input: Tensor) -> Tensor:
        """input int64 or int32 [...] -> [..., embedding_dim] in the weight's dtype."""
        return super().forward(input)


class Embedding(nn.Embedding):
    """nn.Embedding with a Xavier-uniform table and 32-bit optimizer states."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            device=device,
        )  # fmt: skip
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Xavier-uniform, and zeros at padding_idx."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class Params4bit(nn.Parameter):
    """A 4-bit weight: dense until it is moved to a device (`.to("cpu")` counts), then packed codes [bytes, 1].

    data: the dense weight, or codes with their `quant_state` and bnb_quantized=True. `module`: whoever gets the
    quant_state, too. Other keyword arguments are ignored.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Any

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        """See the class."""
        data = torch.empty(0) if data is None else data
        if quant_state is not None and data.is_floating_point() and data.shape == quant_state.shape:
            bnb_quantized = False  # new values with the attributes of the old weight: RandLora and RoAd merge so
        self: Any = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self  # type: ignore[no-any-return]

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: Device = "cuda",
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """A weight of packed codes and the entries of a state dict that belong to it (QuantState.from_dict)."""
        state = QuantState.from_dict(quantized_stats, torch.device(device))  # type: ignore[arg-type]
        self = cls(
            data.to(device), requires_grad, state, state.blocksize, state.nested, state.quant_type, data.dtype, module,
            True,
        )  # fmt: skip
        if module is not None:
            module.quant_state = state  # type: ignore[assignment]
        return self

    def _quantize(self, device: Device) -> Params4bit:
        self.data, self.quant_state = functional.quantize_4bit(
            self.data.to(device),
            blocksize=self.blocksize,
            compress_statistics=bool(self.compress_statistics),
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        if self.module is not None:
            self.module.quant_state = self.quant_state
        self.bnb_quantized = True
        return self

    def cpu(self) -> Params4bit:  # type: ignore[override]
        """`.to("cpu")`."""
        return self.to(device="cpu")

    def cuda(self, device: Device = None, non_blocking: bool = False) -> Params4bit:  # type: ignore[override]
        """`.to("cuda")`."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device: Device = None, non_blocking: bool = False) -> Params4bit:  # type: ignore[override]
        """`.to("xpu")`."""
        return self.to(device="xpu" if device is None else device, non_blocking=non_blocking)

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Quantize, where that has not been done, or move codes and state; codes keep their dtype.

        The state is moved in place: nn.Module.to() takes over the data alone.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized and device is not None and device.type != "meta":
            return self._quantize(device)
        if self.quant_state is not None and device is not None:
            self.quant_state.to(device)
        kept = None if self.bnb_quantized else dtype
        moved = super().to(device=device, dtype=kept, non_blocking=non_blocking)
        return Params4bit(moved, **self._attributes())

    # What FSDP asks for by the keys of a state dict.
    @property
    def absmax(self) -> Any:
        """Scales."""
        return self._of_state("absmax")

    @property
    def code(self) -> Any:
        """The value of each code."""
        return self._of_state("code")

    @property
    def quant_map(self) -> Any:
        """The value of each code."""
        return self._of_state("code")

    @property
    def offset(self) -> Any:
        """The mean of the scales, of a nested state."""
        return self._of_state("offset")

    @property
    def state2(self) -> Any:
        """The state of the scales, of a nested state."""
        return self._of_state("state2")

    @property
    def nested_absmax(self) -> Any:
        """The scales of the scales."""
        return self._of_state("absmax", nested=True)

    @property
    def nested_blocksize(self) -> Any:
        """Scales per scale of scales."""
        return self._of_state("blocksize", nested=True)

    @property
    def nested_quant_map(self) -> Any:
        """The value of each code of a scale."""
        return self._of_state("code", nested=True)

    @property
    def nested_dtype(self) -> Any:
        """The dtype of the scales."""
        return self._of_state("dtype", nested=True)

    @property
    def nested_offset(self) -> Any:
        """The mean of the scales."""
        return self._of_state("offset")

    def _attributes(self) -> dict[str, Any]:
        # accelerate's init_empty_weights leaves an entry "requires_grad" among them.
        return {**self.__dict__, "requires_grad": self.requires_grad}

    def _of_state(self, name: str, nested: bool = False) -> Any:
        state: Any = self.__dict__.get("quant_state")
        if state is not None and nested:
            state = state.state2
        if state is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute of a quantized weight: {name!r}")
        return getattr(state, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.data = state.pop("data")
        self.requires_grad = state.pop("requires_grad")
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        # `module` stays: it is whoever holds this parameter, and knows its copy when it is copied itself.
        new = type(self)(self.data.clone(), **self._attributes())
        memo[id(self)] = new
        new.quant_state = copy.deepcopy(self.quant_state, memo)
        if self.module is not None:
            new.module = memo.get(id(self.module), self.module)
        return new

    def __copy__(self) -> Params4bit:
        return type(self)(self.data, self.requires_grad, **self.__dict__)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func not in (torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split):
            return result
        # Pieces of the codes are parameters with the state of the whole.
        return tuple(cls(piece, args[0].requires_grad, **args[0].__dict__) for piece in result)


def _rebuild(cls: type[Params4bit], state: dict[str, Any]) -> Params4bit:
    new = cls()
    new.__setstate__(state)
    return new


def fix_4bit_weight_quant_state_from_module(module: Any) -> None:
    """Give a weight that lost its quant_state (FSDP made a new parameter of it) the one that its module has."""
    if getattr(module.weight, "quant_state", None) is not None:
        return
    if getattr(module, "quant_state", None) is None:
        logger.warning("%s: not quantized yet; move it to a device first: .to(device)", type(module).__name__)
    assert module.weight.shape[1] == 1
    if not isinstance(module.weight, Params4bit):
        module.weight = Params4bit(module.weight, quant_storage=module.quant_storage, bnb_quantized=True)
    module.weight.quant_state = module.quant_state


class _Module4bit(nn.Module):
    """What layers with a Params4bit share: the state dict."""

    weight: Any
    quant_storage: torch.dtype

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        mine = {name: value for name, value in state_dict.items() if name in checkpoint.owned_keys(state_dict, key)}
        if len(mine) < 2:  # a dense weight, or none
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        loaded = checkpoint.from_tensors(mine, key)  # checks every entry
        sizes = self._weight_shape()
        if loaded.shape != sizes:
            error_msgs.append(f"size mismatch for {key}: {list(loaded.shape)} in the checkpoint, {list(sizes)} here")
            return
        rest = {name: value for name, value in state_dict.items() if name not in mine}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(name for name in missing if name != key)
        data = mine.pop(key)
        device = data.device if self.weight.is_meta else self.weight.device
        if not local_metadata.get("assign_to_params_buffers", False):
            data, mine = data.clone(), {name: value.clone() for name, value in mine.items()}
        stats = {name.removeprefix(key + "."): value for name, value in mine.items()}
        self.weight = Params4bit.from_prequantized(data.detach(), stats, device=device, module=self)
        self.quant_storage = data.dtype

    def _weight_shape(self) -> torch.Size:
        raise NotImplementedError


class Linear4bit(_Module4bit, nn.Linear):
    """y = x W^T + b with a 4-bit W, quantized when the layer is moved to a device.

    compute_dtype: the dtype of the product (default: of x, for fp32 and bf16). compress_statistics: double
    quantization. quant_type: "fp4" or "nf4". quant_storage: the dtype that the codes are viewed as.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage
        self.support_avx512bf16_for_cpu = False  # weights are never repacked in place

    def set_compute_type(self, x: Tensor) -> None:
        """Compute in the dtype of the first input, if that is fp32 or bf16."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype in (None, torch.float32):
            logger.warning(
                "Linear4bit: an fp16 input with compute_dtype %s is slow; set compute_dtype (bnb_4bit_compute_dtype)",
                self.compute_dtype,
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        fix_4bit_weight_quant_state_from_module(self)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        state = self.weight.quant_state
        assert state is not None
        return matmul_4bit(x, self.weight, state, bias=bias).to(dtype)

    def _weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))


class LinearFP4(Linear4bit):
    """Linear4bit in fp4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """Linear4bit in nf4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class Int8Params(nn.Parameter):
    """An int8 weight: dense until it is moved to a device, then codes [N, K] with CB (the same) and SCB, fp32 [N].

    has_fp16_weights: it stays dense. Other keyword arguments are ignored.
    """

    CB: Tensor | None
    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        """See the class."""
        self: Any = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.CB, self.SCB, self.has_fp16_weights = CB, SCB, has_fp16_weights
        return self  # type: ignore[no-any-return]

    def _quantize(self, device: Device) -> Any:
        if self.has_fp16_weights:
            return super().to(device)
        q, absmax, _ = functional.int8_vectorwise_quant(self.data.to(device))
        self.data = self.CB = q
        self.SCB = absmax
        return self

    def cpu(self) -> Any:  # type: ignore[override]
        """`.to("cpu")`."""
        return self.to(device="cpu")

    def cuda(self, device: Device = None, non_blocking: bool = False) -> Any:  # type: ignore[override]
        """`.to("cuda")`."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device: Device = None, non_blocking: bool = False) -> Any:  # type: ignore[override]
        """`.to("xpu")`."""
        return self.to(device="xpu" if device is None else device, non_blocking=non_blocking)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize, where that has not been done, or move codes and scales."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        quantized = self.data.dtype == torch.int8
        if not quantized and device is not None and device.type != "meta" and self.data.device.type == "cpu":
            return self._quantize(device)
        moved = super().to(device=device, dtype=None if quantized else dtype, non_blocking=non_blocking)
        new = Int8Params(moved, self.requires_grad, self.has_fp16_weights)
        if quantized:
            new.CB = new.data
            new.SCB = None if self.SCB is None else self.SCB.to(new.device)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        data = self.data.clone()
        CB = None if self.CB is None else data if self.CB.data_ptr() == self.data.data_ptr() else self.CB.clone()
        SCB = None if self.SCB is None else self.SCB.clone()
        new = memo[id(self)] = type(self)(data, self.requires_grad, self.has_fp16_weights, CB, SCB)
        return new


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Take `weight_format` out of a state dict. Raises ValueError if the rows are not stored as rows."""
    if f"{prefix}weight" not in state_dict:
        return
    layout: Any = state_dict.pop(f"{prefix}weight_format", "row")
    layout = layout.item() if isinstance(layout, Tensor) else layout
    layout = INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.get(layout, layout)
    if layout != "row":
        raise ValueError(f"{prefix}weight_format: only 'row' (0) is supported, got {layout!r}")


class _Module8bit(nn.Module):
    """What layers with an Int8Params share: the state dict."""

    weight: Any

    def _scales(self) -> Tensor | None:
        scales: Tensor | None = getattr(self.weight, "SCB", None)
        return scales

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight: Any = self.weight  # torch took over its data alone
        if weight.dtype == torch.int8:
            weight.CB = weight.data
            weight.SCB = None if weight.SCB is None else weight.SCB.to(weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scales = self._scales()
        if self.weight.dtype == torch.int8 and scales is not None:
            destination[prefix + "SCB"] = scales if keep_vars else scales.detach()
            destination[prefix + "weight_format"] = torch.tensor(0, dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        scales: Any = state_dict.get(prefix + "SCB")
        codes: Any = state_dict.get(key)
        mine = (key, prefix + "SCB", prefix + "weight_format")
        rest = {name: value for name, value in state_dict.items() if name not in mine}
        if scales is None or codes is None or codes.dtype != torch.int8:
            rest = state_dict
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        if rest is state_dict:
            missing_keys.extend(missing)
            return
        missing_keys.extend(name for name in missing if name != key)
        maybe_rearrange_weight(
            dict(state_dict), prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if codes.shape != self.weight.shape or scales.shape != codes.shape[:1]:
            error_msgs.append(f"size mismatch for {key}: {list(codes.shape)} and scales {list(scales.shape)}")
            return
        device = codes.device if self.weight.is_meta else self.weight.device
        if not local_metadata.get("assign_to_params_buffers", False):
            codes, scales = codes.clone(), scales.clone()
        codes = codes.detach().to(device)
        self.weight = Int8Params(codes, False, False, codes, scales.detach().to(device))


class Embedding8bit(_Module8bit, nn.Embedding):
    """A table of int8 rows, quantized when the layer is moved to a device."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)
        self._register_load_state_dict_pre_hook(maybe_rearrange_weight)  # type: ignore[no-untyped-call]

    def forward(self, input: Tensor) -> Tensor:
        """input int64 or int32 [...] -> [..., embedding_dim] in the table's dtype.

        Raises RuntimeError if the table has not been quantized.
        """
        if self.weight.SCB is None:
            raise RuntimeError("Embedding8bit: not quantized yet; move it to a device first: .to(device)")
        y: Tensor = torch.ops.polybit.gather_int8(input, self.weight.data, self.weight.SCB, self.dtype)
        return y


class Embedding4bit(_Module4bit, nn.Embedding):
    """A table of rows in 4 bits, quantized when the layer is moved to a device; a lookup restores its rows alone."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.quant_storage = quant_storage
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )

    def forward(self, input: Tensor) -> Tensor:
        """input int64 or int32 [...] -> [..., embedding_dim] in the table's dtype."""
        fix_4bit_weight_quant_state_from_module(self)
        state = self.weight.quant_state
        assert state is not None
        sizes = self.num_embeddings, self.embedding_dim, state.blocksize, 4, 0, 0
        y: Tensor = torch.ops.polybit.gather_kbit(input, *functional.operands(self.weight, state), *sizes, self.dtype)
        return y

    def _weight_shape(self) -> torch.Size:
        return torch.Size((self.num_embeddings, self.embedding_dim))


class EmbeddingFP4(Embedding4bit):
    """Embedding4bit in fp4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """Embedding4bit in nf4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class Linear8bitLt(_Module8bit, nn.Linear):
    """y = x W^T + b by LLM.int8(), in training and evaluation alike.

    has_fp16_weights: W is dense, trained, and quantized in each pass; else it is quantized when the layer is moved to a
    device. threshold: columns of x with a value of that size are multiplied in high precision; 0: none. `index`: kept,
    not used.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: Device = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.index = index
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.weight = Int8Params(self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights)
        self._register_load_state_dict_pre_hook(maybe_rearrange_weight)  # type: ignore[no-untyped-call]

    def _scales(self) -> Tensor | None:
        return self.state.SCB if self.weight.SCB is None else self.weight.SCB

    def init_8bit_state(self) -> None:
        """Take codes and scales over from the weight, which keeps them."""
        self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        state: Any = self.state
        device = self.weight.device
        state.CB = None if state.CB is None else state.CB.to(device)
        state.SCB = None if state.SCB is None else state.SCB.to(device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        self.state.is_training = self.training
        if self.weight.CB is not None:
            self.init_8bit_state()
        return matmul(x, self.weight, state=self.state, bias=self.bias)


class OutlierAwareLinear(nn.Linear):
    """A linear layer that a subclass quantizes by the outliers that an OutlierTracer has found."""

    def __init__(self, input_features: int, output_features: int, bias: bool = True, device: Device = None) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor | None) -> Any:
        """The subclass' forward pass."""
        raise NotImplementedError("OutlierAwareLinear: override forward_with_outliers(x, outlier_idx)")

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        """The subclass' quantization of the weight."""
        raise NotImplementedError("OutlierAwareLinear: override quantize_weight(w, outlier_idx)")

    def forward(self, x: Tensor) -> Any:
        """Quantize the weight, the first time; then forward_with_outliers."""
        if self.outlier_dim is None:
            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                logger.warning("OutlierAwareLinear: call OutlierTracer.get_instance().initialize(model) first")
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            self.weight.data.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
