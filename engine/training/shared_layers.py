"""FC6 and FC7 shared among ranks (--parallel hybrid), as Krizhevsky proposed (arXiv 1404.5997, section 4).

The convolutions, where the work is, see a rank's own images, and DistributedDataParallel adds their gradients up. FC6 and FC7,
where the weights are (119.6 of D's 138.4 million), are never sent: of n ranks, each has an n-th of FC6's outputs and the part of
FC7 that takes them in, with their momentum. What travels is activations:

    features of own images → gathered from all ranks → own n-th of FC6 → ReLU, dropout → own part of FC7
        → added up over the ranks, each getting its own images' → bias, ReLU, dropout, FC8, the loss

and in the backward pass the same way back. Where ranks are on several machines, those of one machine share the layers, and each
n-th's gradient is added up over the machines.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import TrainingError
from common.ranks import Ranks
from engine.training.data_parallel import GRADIENT_DTYPES
from model.dropout import Dropout
from model.vgg import FC_WIDTH, VGG

FC6, FC7 = "classifier.0", "classifier.3"
_GROUPS: dict[str, dist.ProcessGroup] = {}
"""By name: layers keep no group, which could not be copied with them."""
# Of each tensor that is shared, the dimension along which it is: FC6 by outputs, FC7 by inputs. FC7's bias is not.
_DIMENSIONS = {f"{FC6}.weight": 0, f"{FC6}.bias": 0, f"{FC7}.weight": 1}


class SharedLayers:
    """FC6 and FC7 of a model, of which this rank has its part from now on; and how to put them together again."""

    def __init__(self, model: VGG, ranks: Ranks, *, sharing: int, grad_compression: str) -> None:
        """Replace the layers of the model, whole on every rank; every rank must call this.

        sharing: consecutive ranks that share one set of the layers; it divides the number of ranks and FC_WIDTH.
        grad_compression: of the gradients that travel between machines, as data_parallel() has it. Raises TrainingError: what the
        ranks gather and add up does not come out right.
        """
        self.sharing, self._world_size = sharing, ranks.world_size
        self._names = [name for name, _ in model.named_parameters()]
        mesh = dist.init_device_mesh(
            ranks.device.type, (ranks.world_size // sharing, sharing), mesh_dim_names=("machines", "parts")
        )
        self._group, self._replicas = mesh.get_group("parts"), mesh.get_group("machines")
        _GROUPS[self._group.group_name] = self._group
        self.rank = ranks.rank % sharing
        self._check_links(ranks.device)
        own = self.own(model.state_dict())
        name = self._group.group_name
        model.classifier[0] = GatheringLinear(own[f"{FC6}.weight"], own[f"{FC6}.bias"], ranks=sharing, group=name)
        model.classifier[3] = ScatteringLinear(own[f"{FC7}.weight"], own[f"{FC7}.bias"], ranks=sharing, group=name)
        # Whatever these gradients are, they are no other rank's.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(_DIMENSIONS))
        parameters = dict(model.named_parameters())
        self._parts = [parameters[name] for name in _DIMENSIONS]
        self._everyones = parameters["classifier.6.bias"]
        self._travels_as = GRADIENT_DTYPES[grad_compression]
        self._under_way: list[tuple[dist.Work, Tensor, Tensor]] = []
        self.last_pass = True
        """Whether the gradients of the next backward pass complete the step's. To be set before it."""
        if ranks.world_size > sharing:
            for part in self._parts:
                part.register_post_accumulate_grad_hook(self._add_up_over_machines)

    def _add_up_over_machines(self, part: Tensor) -> None:
        """Beside the backward pass of the convolutions."""
        if self.last_pass:
            sent = _gradient(part).to(self._travels_as)
            work = dist.all_reduce(sent, group=self._replicas, async_op=True)
            assert work
            self._under_way.append((work, sent, part))

    def finish_gradients(self, *, scaled: bool) -> None:
        """After the step's last backward pass: make the parts' gradients those of the mean over all ranks' losses.

        scaled: for fp16, whose loss is scaled: where the gradients of one rank are not finite, no rank's are from here on, so
        that all of them skip the step.
        """
        for work, sent, part in self._under_way:
            work.wait()  # on a GPU it is torch's stream that waits
            if (gradient := _gradient(part)) is not sent:
                gradient.copy_(sent)
        self._under_way.clear()
        gradients = [_gradient(part) for part in self._parts]
        torch._foreach_div_(gradients, self._world_size)
        if scaled:
            finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all().float()
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
            gradient = _gradient(self._everyones)
            gradient.copy_(torch.where(finite > 0, gradient, torch.nan))

    @property
    def parameters_elsewhere(self) -> int:
        """Of the layers' numbers, those that other ranks have."""
        return (self.sharing - 1) * sum(part.numel() for part in self._parts)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def own(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of a model's state dict: copies of what is shared, the rest as it is."""
        return {name: self._own(name, value) for name, value in state.items()}

    def own_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same of a state of an optimizer over all parameters."""
        return self._of_each_momentum(self._own, state)

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A model's state dict, put together on rank 0; on the others something of no use. Every rank must call this."""
        return {name: self._whole(name, value) for name, value in state.items()}

    def whole_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same of the optimizer's."""
        return self._of_each_momentum(self._whole, state)

    def _of_each_momentum(self, change: Callable[[str, Any], Any], state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state with each value of each weight changed, by the weight's name."""
        changed = {
            number: {key: change(self._names[number], value) for key, value in entry.items()}
            for number, entry in state["state"].items()
        }
        return {**state, "state": changed}

    def _own(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name not in _DIMENSIONS:
            return value
        return value.chunk(self.sharing, _DIMENSIONS[name])[self.rank].clone(memory_format=torch.contiguous_format)

    def _whole(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name not in _DIMENSIONS or self._is_of_another_machine:
            return value
        # One message after the other: gloo's gather does not hear that a connection was closed.
        if self.rank > 0:
            dist.send(value, group=self._group, group_dst=0)
            return value
        parts = [value.cpu()]
        for rank in range(1, self.sharing):
            part = torch.empty_like(value)
            dist.recv(part, group=self._group, group_src=rank)
            parts.append(part.cpu())
        return torch.cat(parts, _DIMENSIONS[name])

    @property
    def _is_of_another_machine(self) -> bool:
        return dist.get_rank() >= self.sharing

    # ---- links ---------------------------------------------------------------------------------------------------

    def _check_links(self, device: torch.device) -> None:
        """A tiny gather and a tiny sum, compared with what must come out."""
        name, ranks = self._group.group_name, self.sharing
        number = torch.tensor([[self.rank + 1.0]], device=device)
        gathered = _gathered(number, ranks, name)
        everyones = torch.arange(1.0, ranks + 1, device=device)[:, None]
        summed = _summed(everyones * number, ranks, name)
        total = ranks * (ranks + 1) / 2
        if gathered.tolist() != everyones.tolist() or summed.tolist() != [[total * (self.rank + 1)]]:
            raise TrainingError(
                f"rank {dist.get_rank()}: gathering and adding up over {ranks} ranks gives wrong numbers: a fault of the links "
                "between them or of the library; use --parallel data, or other ranks"
            )


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


class GatheringLinear(nn.Module):
    """A part of a linear layer's outputs, for the images of all ranks."""

    def __init__(self, weight: Tensor, bias: Tensor, *, ranks: int, group: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self._ranks, self._group = ranks, group

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, inputs] of this rank → [ranks · n, outputs / ranks], each rank's images together, in the ranks' order."""
        return F.linear(_Gather.apply(x, self._ranks, self._group), self.weight, self.bias)


class ScatteringLinear(nn.Module):
    """A linear layer of which each rank has the weights of a part of the inputs, for this rank's images."""

    def __init__(self, weight: Tensor, bias: Tensor, *, ranks: int, group: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self._ranks, self._group = ranks, group

    def forward(self, x: Tensor) -> Tensor:
        """x: [ranks · n, inputs / ranks], of all ranks' images → [n, outputs] of this rank's."""
        outputs = _SumAndScatter.apply(F.linear(x, self.weight), self._ranks, self._group)
        return outputs + self.bias.to(outputs.dtype)


class _Gather(torch.autograd.Function):
    """Rows of all ranks. Each rank's gradient is for all of them: what a rank's rows get is the sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: int, group: str) -> Tensor:
        ctx.ranks, ctx.group = ranks, group
        return _gathered(rows, ranks, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _summed(gradients[0], ctx.ranks, ctx.group), None, None


class _SumAndScatter(torch.autograd.Function):
    """The sum of all ranks' rows, of which each rank gets its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: int, group: str) -> Tensor:
        ctx.ranks, ctx.group = ranks, group
        return _summed(rows, ranks, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _gathered(gradients[0], ctx.ranks, ctx.group), None, None


# Compiled, they are torch's functional collectives, which torch.compile takes into its graph; their autograd has had another name
# in each version of torch. Called one by one, they wait for other ranks with Python's lock in hand: no signal would be heard.
def _gathered(rows: Tensor, ranks: int, group: str) -> Tensor:
    rows = rows.contiguous()
    if torch.compiler.is_compiling():
        operators = torch.ops._c10d_functional
        return operators.wait_tensor(operators.all_gather_into_tensor(rows, ranks, group))
    everyones = rows.new_empty(ranks * len(rows), *rows.shape[1:])
    dist.all_gather(list(everyones.chunk(ranks)), rows, group=_GROUPS[group])
    return everyones


def _summed(rows: Tensor, ranks: int, group: str) -> Tensor:
    rows = rows.contiguous()
    if torch.compiler.is_compiling():
        operators = torch.ops._c10d_functional
        return operators.wait_tensor(operators.reduce_scatter_tensor(rows, "sum", ranks, group))
    own = rows.new_empty(len(rows) // ranks, *rows.shape[1:])
    dist.reduce_scatter(own, list(rows.chunk(ranks)), group=_GROUPS[group])
    return own


def number_dropout(
    layers: Iterable[nn.Module], *, seed: int, device: torch.device, shared: SharedLayers | None, share: int
) -> list[Dropout]:
    """Have the dropout among the layers draw its masks by the samples' numbers; returns it. share: images of a rank in a step."""
    found = [layer for layer in layers if isinstance(layer, Dropout)]
    for number, dropout in enumerate(found):
        sharing = {"ranks": shared.sharing, "rank": shared.rank, "share": share, "units": FC_WIDTH} if shared else {}
        # The second one is behind FC7, where each rank is back at its own images.
        dropout.number_samples(f"{seed} {number}", device=device, **(sharing if number == 0 else {}))
    return found
