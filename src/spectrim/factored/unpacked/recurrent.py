"""LSTM, GRU and RNN with every matrix as a layer, also the cells of a single step."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from spectrim.factored.unpacked.base import Unpacked, linear

State = tuple[Tensor, ...]  # hidden state, and cell state of an LSTM


def step(mode: str, given: Tensor, recurrent: Tensor, state: State) -> State:
    """Return the state after one step.

    ``mode``: LSTM, GRU, RNN_TANH or RNN_RELU. ``given``, ``recurrent``: what the matrices of input and hidden state
    put out, with their biases.
    """
    if mode == "GRU":
        (reset, update, new), (by_reset, by_update, by_new) = given.chunk(3, -1), recurrent.chunk(3, -1)
        z = (update + by_update).sigmoid()
        return ((1 - z) * (new + (reset + by_reset).sigmoid() * by_new).tanh() + z * state[0],)
    gates = given + recurrent
    if mode == "LSTM":
        enter, forget, new, out = gates.chunk(4, -1)
        cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
        return out.sigmoid() * cell.tanh(), cell
    return (gates.relu() if mode == "RNN_RELU" else gates.tanh(),)


class UnpackedRecurrent(Unpacked, nn.RNNBase):
    """A recurrent network whose ``weight_ih_l0`` is the weight of its layer ``ih_l0``, and so on.

    The input layer is called once on all steps, the recurrent one once a step, in a loop of Python.
    """

    @classmethod
    def packed_names(cls, module: Any) -> tuple[str, ...]:
        return tuple(chain.from_iterable(module._all_weights))

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        names = [name for name in cls.packed_names(module) if name.startswith("weight_")]
        parameters = module._parameters
        return {
            name.removeprefix("weight_"): linear(parameters[name], parameters.get(name.replace("weight_", "bias_")))
            for name in names
        }

    @classmethod
    def unpack(cls, module: Any) -> None:
        super().unpack(module)
        module._flat_weights_names, module._flat_weights, module._flat_weight_refs = [], [], []

    def pack(self) -> None:
        super().pack()
        self._flat_weights_names = list(chain.from_iterable(self._all_weights))
        self._init_flat_weights()

    def packed(self, name: str) -> Tensor | None:
        kind, _, layer = name.partition("_")
        return getattr(getattr(self, layer), kind)

    def _init_flat_weights(self) -> None:
        """Torch calls this where parameters move, to lay them in one piece of memory: there is none here."""
        if "_packed_names" not in vars(self):
            super()._init_flat_weights()

    def flatten_parameters(self) -> None:
        """Do nothing: models call it before they run an LSTM."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Return the outputs of the last layer and the last state, as LSTM, GRU and RNN do."""
        packed = isinstance(input, PackedSequence)
        batched = packed or input.dim() == 3
        x, sizes = (input.data, input.batch_sizes.tolist()) if packed else (input, None)
        if not packed:
            x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
        samples = sizes[0] if sizes else x.shape[1]
        states = self._states(hx, samples, x, batched, input.sorted_indices if packed else None)
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            directions = ["", "_reverse"] if self.bidirectional else [""]
            found = []
            for direction, suffix in enumerate(directions):
                outputs, state = self._through(f"l{layer}{suffix}", x, sizes, states[len(last)], bool(direction))
                found.append(torch.cat(outputs) if packed else torch.stack(outputs))
                last.append(state)
            x = torch.cat(found, -1)
        final = [torch.stack(parts) for parts in zip(*last, strict=True)]
        if packed:
            final = [part if input.unsorted_indices is None else part[:, input.unsorted_indices] for part in final]
            output: Any = input._replace(data=x)
        elif batched:
            output = x.transpose(0, 1) if self.batch_first else x
        else:
            output, final = x.squeeze(1), [part.squeeze(1) for part in final]
        return output, tuple(final) if self.mode == "LSTM" else final[0]

    def _states(self, hx: Any, samples: int, x: Tensor, batched: bool, order: Tensor | None) -> list[State]:
        """Return the first state of every layer and direction."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        if hx is None:
            sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
            parts = [x.new_zeros(count, samples, size) for size in sizes]
        else:
            parts = [part if batched else part.unsqueeze(1) for part in (hx if self.mode == "LSTM" else (hx,))]
            parts = [part if order is None else part[:, order] for part in parts]
        return list(zip(*(part.unbind(0) for part in parts), strict=True))

    def _through(
        self, name: str, x: Tensor, sizes: Sequence[int] | None, state: State, backwards: bool
    ) -> tuple[list[Tensor], State]:
        """Run one layer in one direction. Return its output at each step and its last state.

        ``sizes``: the number of samples of each step of a packed sequence, which falls; None: all of them.
        """
        given = getattr(self, f"ih_{name}")(x)
        steps = given.unbind(0) if sizes is None else given.split(list(sizes))
        outputs: list[Tensor] = [x] * len(steps)
        for index in reversed(range(len(steps))) if backwards else range(len(steps)):
            count = None if sizes is None else sizes[index]
            whole = count is None or count == len(state[0])
            here = state if whole else tuple(part[:count] for part in state)
            new = step(self.mode, steps[index], getattr(self, f"hh_{name}")(here[0]), here)
            if self.proj_size:
                new = (getattr(self, f"hr_{name}")(new[0]), *new[1:])
            outputs[index] = new[0]
            state = new if whole else tuple(torch.cat([a, b[count:]]) for a, b in zip(new, state, strict=True))
        return outputs, state


class UnpackedLSTM(UnpackedRecurrent, nn.LSTM):
    """An LSTM with a layer for each matrix."""

    kinds = (nn.LSTM,)


class UnpackedGRU(UnpackedRecurrent, nn.GRU):
    """A GRU with a layer for each matrix."""

    kinds = (nn.GRU,)


class UnpackedRNN(UnpackedRecurrent, nn.RNN):
    """An Elman network with a layer for each matrix."""

    kinds = (nn.RNN,)


class UnpackedCell(Unpacked, nn.RNNCellBase):
    """A cell that takes one step, with the layers ``ih`` and ``hh``."""

    packs = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        return {
            part: linear(getattr(module, f"weight_{part}"), getattr(module, f"bias_{part}")) for part in ("ih", "hh")
        }

    def packed(self, name: str) -> Tensor | None:
        kind, _, layer = name.partition("_")
        return getattr(getattr(self, layer), kind)

    def stepped(self, mode: str, input: Tensor, state: State | None) -> State:
        """Return the state after ``state``, which is zero by default."""
        if state is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            state = (zeros, zeros) if mode == "LSTM" else (zeros,)
        return step(mode, self.ih(input), self.hh(state[0]), state)


class UnpackedLSTMCell(UnpackedCell, nn.LSTMCell):
    """An LSTM cell with a layer for each matrix."""

    kinds = (nn.LSTMCell,)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        hidden, cell = self.stepped("LSTM", input, hx)
        return hidden, cell


class UnpackedGRUCell(UnpackedCell, nn.GRUCell):
    """A GRU cell with a layer for each matrix."""

    kinds = (nn.GRUCell,)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self.stepped("GRU", input, None if hx is None else (hx,))[0]


class UnpackedRNNCell(UnpackedCell, nn.RNNCell):
    """A cell of an Elman network with a layer for each matrix."""

    kinds = (nn.RNNCell,)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self.stepped(f"RNN_{self.nonlinearity.upper()}", input, None if hx is None else (hx,))[0]
