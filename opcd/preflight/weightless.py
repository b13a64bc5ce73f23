"""Models without numbers: every tensor has its size, its dtype and its device, and no memory.

They are torch's fake tensors. A pass over them is the pass itself, every operation of it, so that
what it keeps and what it takes is counted and not estimated.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from opcd.models.adapter import add_lora
from opcd.models.by_name import load_config
from opcd.models.head import take_plain_head
from opcd.models.lm import keep_softcap, switch_off_dropout

T = TypeVar("T")


class Weightless:
    """Makes models by name without their weights, which may meet in one pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Who asks for the address of numbers that are not there is a kernel of its own, and gets an
        # error: launched with a null pointer it would end all work of the process on the GPU.
        with functorch.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
            # Token ids and positions of a pass are real: code may look at them.
            self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        """As `load_model` would load it."""
        model: PreTrainedModel = self._placed(_on_meta(name, dtype))
        return model

    def student(
        self, name: str, dtype: torch.dtype, lora_rank: int, lora_alpha: float
    ) -> PreTrainedModel | PeftModel:
        """What `build_distiller` trains."""
        model: PreTrainedModel | PeftModel
        if lora_rank:
            with torch.device("meta"):
                model = add_lora(_on_meta(name, dtype), lora_rank, lora_alpha)
        else:
            model = _on_meta(name, torch.float32).requires_grad_(True)
        switch_off_dropout(model)
        placed: PreTrainedModel | PeftModel = self._placed(model)
        return placed

    def _placed(self, model: Any) -> Any:
        """The model, its tensors on the device of the run."""
        made: dict[Tensor, Tensor] = {}  # tied ones stay one
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = made.setdefault(tensor, self._on_device(tensor))
        take_plain_head(model)
        return model.eval()

    def _on_device(self, tensor: Tensor) -> Tensor:
        with self._mode:
            found = torch.empty_like(tensor, device=self._device)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(found, tensor.requires_grad)
        return found

    def like(self, tensor: Tensor) -> Tensor:
        """Another of the same size, as gradients are."""
        with self._mode:
            return torch.empty_like(tensor)


def _on_meta(name: str, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name), dtype=dtype)
    keep_softcap(model)
    return model.requires_grad_(False)


class Tally(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, real ones and those without numbers.

    `live` is what is there, `peak` the most that was, beyond what stood before. A number that code
    asks of a tensor without any is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}  # by storage; 0 for what stood before

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._know(tensor, before=True)
        found = _without_numbers(function, args)
        if found is None:
            found = function(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            self._know(tensor, before=False)
        return found

    def kept_by(self, call: Callable[[], T]) -> tuple[T, int]:
        """`call()` inside, and the bytes that it leaves for backward."""
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with self, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = call()
        return found, sum(self._sizes.get(key, 0) for key in saved)

    def _know(self, tensor: Tensor, before: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = 0 if before else storage.nbytes()
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors, each storage once."""
    return sum({(s := t.untyped_storage())._cdata: s.nbytes() for t in tensors}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _without_numbers(function: Any, args: tuple[Any, ...]) -> Any:
    """What torch does not give for fake tensors by itself; None for all else."""
    aten = torch.ops.aten
    if not (args and isinstance(args[0], FakeTensor)):
        return None
    if function is aten._local_scalar_dense.default:
        return torch.zeros((), dtype=args[0].dtype).item()
    if function is aten._grouped_mm.default:  # torch's own is for bf16 alone, its kernels are not
        a, b = args[:2]
        if a.dim() == b.dim() == 2:
            return a.new_empty(args[2].shape[0], a.shape[0], b.shape[1])
        return a.new_empty(a.shape[1] if a.dim() > b.dim() else a.shape[-2], b.shape[-1])
    return None
