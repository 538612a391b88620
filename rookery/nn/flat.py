"""All parameters of a module in one flat buffer a group, and all their gradients in another.

One fused optimiser step, one gradient norm, one copy to publish and one all-reduce then serve the whole module, with no
list of tensors to walk. Elementwise optimisers (SGD, RMSprop, Adam) give the same as on the separate parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["FlatParameters"]

ALIGNMENT = 64  # bytes between the starts of parameters are a multiple of this, which vector and matrix units ask for


class FlatParameters:
    """Makes the parameters of a module views into one flat parameter a group.

    They stay the same objects with the same shape, strides and `requires_grad`, and so do the module's state dict and
    optimisers already made. Build it once the module is on its device: `module.to(...)` afterwards breaks the views.

    Attributes:
        groups: the flat 1-D parameters by name, with the flat gradient as `.grad`; give these to the optimiser.
            Numbers between parameters (padding) and their gradients are 0 and stay so.
        buffers: the module's, by name.

    Args:
        groups: parameters by name, each of the module's in exactly one; a group holds either trainable parameters or
            frozen ones, of one dtype on one device. By default "all", and "frozen" where there are any.

    Raises:
        ValueError: if the groups do not divide the module's parameters like that.
    """

    def __init__(self, module: nn.Module, groups: Mapping[str, Iterable[nn.Parameter]] | None = None) -> None:
        names = {parameter: name for name, parameter in module.named_parameters()}  # tied parameters come once
        members = _default_groups(names) if groups is None else _own_groups(names, groups)
        for group, parameters in members.items():
            _check_group(group, parameters, names)
        self.groups: dict[str, nn.Parameter] = {}
        self.buffers = dict(module.named_buffers())
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []  # each parameter, the flat ones too, and its gradient
        self._flat_gradients: list[Tensor] = []
        for group, parameters in members.items():
            self.groups[group] = self._join(parameters)
        self.zero_grad()

    def _join(self, parameters: list[nn.Parameter]) -> nn.Parameter:
        first = parameters[0]
        unit = max(1, ALIGNMENT // first.element_size())
        offsets, size = [], 0
        for parameter in parameters:
            offsets.append(size)
            size += -(-parameter.numel() // unit) * unit
        buffer = torch.zeros(size, dtype=first.dtype, device=first.device)
        gradient = torch.zeros_like(buffer) if first.requires_grad else None
        for parameter, offset in zip(parameters, offsets, strict=True):
            strides = torch.empty_like(parameter, device="meta").stride()  # the same, where the parameter is dense
            view = buffer.as_strided(parameter.shape, strides, offset)
            view.copy_(parameter.detach())
            parameter.data = view
            if gradient is not None:
                self._gradients.append((parameter, gradient.as_strided(parameter.shape, strides, offset)))
        flat = nn.Parameter(buffer, requires_grad=first.requires_grad)
        if gradient is not None:
            self._gradients.append((flat, gradient))
            self._flat_gradients.append(gradient)
        return flat

    def freeze(self) -> None:
        """Let nothing of it train any more; its gradients and their memory are gone."""
        for parameter, _ in self._gradients:
            parameter.grad = None
            parameter.requires_grad_(False)
        self._gradients, self._flat_gradients = [], []

    def zero_grad(self) -> None:
        """Fill the gradients with zeros, and attach them again where someone set `.grad` to None."""
        for gradient in self._flat_gradients:
            gradient.zero_()
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The flat gradients by group, 1-D, of the groups that have one."""
        return {name: group.grad for name, group in self.groups.items() if group.grad is not None}

    def values(self) -> Tensor:
        """A copy of everything, 1-D: what to publish or to average. All groups must be on one device."""
        flat = [group.detach() for group in self.groups.values()]
        return flat[0].clone() if len(flat) == 1 else torch.cat(flat)

    def load(self, values: Tensor) -> None:
        """Copy what `values()` of an equal module gave into the parameters, from any device."""
        sizes = [group.numel() for group in self.groups.values()]
        if values.shape != (sum(sizes),):
            raise ValueError(
                f"values has shape {tuple(values.shape)}, and this module needs ({sum(sizes)},); "
                "load what values() gave for a module of the same architecture and groups."
            )
        for group, part in zip(self.groups.values(), values.split(sizes), strict=True):
            group.detach().copy_(part)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all that the module has learnt: `parameters`, flat, and each buffer by name. What is published."""
        return {"parameters": self.values(), **{name: buffer.clone() for name, buffer in self.buffers.items()}}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Copy what `snapshot` of an equal module gave into this one."""
        self.load(values["parameters"])
        for name, buffer in self.buffers.items():
            buffer.copy_(values[name])


def _default_groups(names: dict[nn.Parameter, str]) -> dict[str, list[nn.Parameter]]:
    if not names:
        raise ValueError("The module has no parameters; there is nothing to make flat.")
    trainable = [parameter for parameter in names if parameter.requires_grad]
    frozen = [parameter for parameter in names if not parameter.requires_grad]
    return {name: parameters for name, parameters in (("all", trainable), ("frozen", frozen)) if parameters}


def _own_groups(
    names: dict[nn.Parameter, str], groups: Mapping[str, Iterable[nn.Parameter]]
) -> dict[str, list[nn.Parameter]]:
    """Each group without repeats (tied parameters), checked to divide the module's parameters."""
    members = {group: list(dict.fromkeys(parameters)) for group, parameters in groups.items()}
    owner: dict[nn.Parameter, str] = {}
    for group, parameters in members.items():
        if not parameters:
            raise ValueError(f"Group {group!r} is empty; leave it out.")
        for parameter in parameters:
            if parameter not in names:
                raise ValueError(
                    f"Group {group!r} holds a parameter of shape {tuple(parameter.shape)} that is not the module's; "
                    "take parameters from module.parameters()."
                )
            if parameter in owner:
                raise ValueError(
                    f"{names[parameter]} is in the groups {owner[parameter]!r} and {group!r}; put it in one of them."
                )
            owner[parameter] = group
    missing = [name for parameter, name in names.items() if parameter not in owner]
    if missing:
        raise ValueError(f"No group holds {', '.join(missing)}; put each parameter into one group.")
    return members


def _check_group(group: str, parameters: list[nn.Parameter], names: dict[nn.Parameter, str]) -> None:
    first = parameters[0]
    for parameter in parameters:
        for what in ("dtype", "device", "requires_grad"):
            mine, theirs = getattr(first, what), getattr(parameter, what)
            if mine != theirs:
                raise ValueError(
                    f"Group {group!r} mixes {what} {mine} ({names[first]}) and {theirs} ({names[parameter]}); "
                    "put them into separate groups."
                )
