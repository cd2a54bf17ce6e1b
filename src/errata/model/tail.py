"""Running only the blocks from an edited layer up.

Training an edit at layer l changes nothing below it: those blocks are frozen and their output never moves. So the
batch is run once, whole; the residual stream that enters block l is kept, with everything else the blocks above
were given (masks, rotary tables, positions); and every training step then runs block l and what is above it, and the
vocabulary head only at the places whose prediction is asked for.

Where a block adds its MLP's output straight to the residual stream (Llama, GPT-J, ...; not Gemma 2 or OLMo 2, which
normalise it first), block l itself need not run either: its output is the recorded one plus the change. Whether
that is so is found by trying, not by name, once per model and layer.

In an encoder-decoder model the tail is the encoder's blocks from the edited one up, and then the whole decoder.

The result equals the full run to rounding. `Tail(full=True)` is the same interface by full forwards: the oracle in
tests and the baseline in benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.errors import TailError
from errata.model.anatomy import output_width
from errata.model.probes import adding, by_rows, probing
from errata.model.sequences import ForwardPass, each_tensor

if TYPE_CHECKING:
    from errata.model.editable import EditableModel
    from errata.model.tokens import TokenBatch

__all__ = ["Recording", "Tail"]

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Recording:
    """One batch as it enters the tail.

    Attributes:
        batch: the padded rows.
        inputs: per edited layer, the inputs of its MLP output projection, [rows, columns, key width]. For layers
            above the lowest one they are those of the recorded pass, before any change below them.
        outputs: the outputs of that projection in the lowest layer, [rows, columns, hidden].
        entering: what enters the lowest block, [rows, columns, hidden].
        leaving: what leaves it.
        calls: for every block of the tail, the other arguments it was called with.
        forward_pass: the sequences of the pass, for routed adapters in the tail; None if recorded in
            `EditableModel.bare`, where nothing is routed.
    """

    batch: TokenBatch
    inputs: dict[int, Tensor]
    outputs: Tensor
    entering: Tensor
    leaving: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    forward_pass: ForwardPass | None


def _of_rows(recording: Recording, kept: Tensor) -> Recording:
    old, batch = recording.batch, recording.batch.of_rows(kept.to(recording.batch.ids.device))
    shape = tuple(old.ids.shape)
    cache, own_cache = (one.arguments().get("past_key_values") for one in (old, batch))

    def narrow(value: Tensor) -> Tensor:
        of_places = value.shape[:2] == shape
        of_keys = value.dim() == 4 and len(value) == shape[0]
        return value[kept.to(value.device)] if of_places or of_keys else value

    def argument(value: Any) -> Any:
        return own_cache if value is cache else each_tensor(value, narrow)

    calls = tuple(
        (tuple(argument(value) for value in args), {name: argument(value) for name, value in kwargs.items()})
        for args, kwargs in recording.calls
    )
    return Recording(
        batch,
        {layer: narrow(inputs) for layer, inputs in recording.inputs.items()},
        narrow(recording.outputs),
        narrow(recording.entering),
        narrow(recording.leaving),
        calls,
        None,
    )


def _states(output: Any) -> Tensor:
    """A block's new residual stream; some families return it in a tuple."""
    states = output[0] if isinstance(output, tuple) else output
    assert isinstance(states, Tensor)
    return states


class Tail:
    """The part of a model that an edit at `layers` can change.

    Args:
        model: the model to run, in the state in which the edit will be used.
        layers: the layers whose MLP output projection will be changed; the lowest one decides where the tail begins.
        residual: take changes of the lowest layer as changes of what leaves its block, in place of its MLP's output.
        full: run whole forward passes instead (slow; for comparison).
    """

    def __init__(
        self, model: EditableModel, layers: int | tuple[int, ...], *, residual: bool = False, full: bool = False
    ) -> None:
        self.model = model
        chosen = (layers,) if isinstance(layers, int) else layers
        self.layers = tuple(sorted({model.anatomy.layer(layer) for layer in chosen}))
        self.residual = residual
        self.full = full

    @property
    def first(self) -> int:
        return self.layers[0]

    @property
    def _additive(self) -> bool:
        """True when the lowest block is known to pass a change of its MLP output on as it is."""
        return self.model.verdicts.get(f"additive {self.first}", False)

    def _path(self, layer: int) -> str:
        return self.model.anatomy.mlp_output[layer]

    def _blocks(self) -> list[nn.Module]:
        return [self.model.module(path) for path in self.model.anatomy.blocks[self.first :]]

    @torch.no_grad()
    def record(self, batch: TokenBatch) -> Recording:
        """Run the whole model once over a batch and keep what the tail needs.

        Raises:
            TailError: blocks and final norm do not reproduce what the trunk returns, or something attached beside that
                norm answers in the model's place, so that nothing could be learned from its answers.
        """
        anatomy = self.model.anatomy
        if anatomy.final_norm and getattr(self.model.module(anatomy.final_norm), "is_edited_linear", False):
            raise TailError(
                "an adapter is attached that answers in the model's place (serac); detach it while other edits are "
                "trained, and attach it again"
            )
        inputs: dict[int, Tensor] = {}
        kept: dict[str, Any] = {}
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def at_linear(layer: int) -> Callable[..., None]:
            def probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                inputs[layer] = by_rows(args[0], len(batch.ids))
                if layer == self.first:
                    kept["outputs"] = by_rows(output, len(batch.ids))

            return probe

        def at_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            kept.setdefault("entering", states)
            kept.setdefault("pass", self.model.sequences.current)
            calls.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        def after_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kept.setdefault("leaving", _states(output))
            kept["last"] = _states(output)

        tail_blocks = anatomy.blocks[self.first :]
        after: dict[str, Any] = {self._path(layer): at_linear(layer) for layer in self.layers}
        after |= dict.fromkeys(tail_blocks, after_block)
        self.model.sequences.acquire()
        try:
            with probing(self.model.model, before=dict.fromkeys(tail_blocks, at_block), after=after):
                states = self.model.trunk_states(batch)
        finally:
            self.model.sequences.release()
        recording = Recording(
            batch, inputs, kept["outputs"], kept["entering"], kept["leaving"], tuple(calls), kept["pass"]
        )
        # Every prompt has now been read: routes above the edited layer are decided and stay.
        if recording.forward_pass is not None:
            recording.forward_pass.store.frozen = True
        verdicts = self.model.verdicts
        if "final norm" not in verdicts:
            verdicts["final norm"] = self._has_final_norm(kept["last"], states)
        if f"additive {self.first}" not in verdicts:
            verdicts[f"additive {self.first}"] = self._is_additive(recording)
        return recording

    @torch.no_grad()
    def narrowed(self, recording: Recording, kept: Tensor) -> Recording | None:
        """What was recorded of some of the rows, kept [rows] bool; None where only another pass can tell.

        Which of the blocks' arguments belong to rows is seen by their shapes. Whether that is right is found by trying,
        once per model and layer.
        """
        verdict, verdicts = f"narrowed {self.first}", self.model.verdicts
        if self.full or self.model.is_encoder_decoder or not verdicts.get(verdict, True):
            return None
        if not self.model.treats_rows_alike:  # whose routes the rows took is not told by shapes
            return None
        found = _of_rows(recording, kept)
        if verdict not in verdicts:
            try:
                verdicts[verdict] = self._agree(found, recording, kept)
            except RuntimeError:  # shapes that do not fit each other: its blocks take something else by rows
                verdicts[verdict] = False
        return found if verdicts[verdict] else None

    def _agree(self, one: Recording, other: Recording, kept: Tensor | None = None) -> bool:
        """Whether two recordings say the same behind prompts, no change made; `kept` are the other's rows one has."""
        rows, columns = one.batch.saying_places()
        found = self.run(one, {}, rows, columns).float()
        rows, columns = other.batch.saying_places()
        if kept is not None:
            mine = kept.to(rows.device)[rows]
            rows, columns = rows[mine], columns[mine]
        expected = self.run(other, {}, rows, columns).float()
        allowed = max(1e-3, 16 * torch.finfo(one.outputs.dtype).eps)
        return bool((found - expected).abs().max() <= allowed * expected.abs().max())

    def _has_final_norm(self, last: Tensor, states: Tensor) -> bool:
        """Whether it takes the final norm, or nothing (BART), to get from the last block to what the trunk returned."""
        norm = self.model.anatomy.final_norm
        errors = []
        for with_norm in (True, False) if norm else (False,):
            got = self._finish(last, with_norm)
            errors.append(float((got - states.to(got.device)).abs().max() / states.abs().max().clamp(min=1e-6)))
            if errors[-1] < max(1e-3, 4 * torch.finfo(states.dtype).eps):
                return with_norm
        raise TailError(
            f"between its last block and its output, {type(self.model.model).__name__} does "
            + (f"more than the final norm {norm!r}" if norm else "something, and no final norm was found")
            + f" (relative difference {errors[0]:.1e}); name the right one: AnatomyDeclaration(final_norm=...)"
        )

    def _finish(self, states: Tensor, with_norm: bool | None = None) -> Tensor:
        """From the last block's output to what the trunk returns; through the norm as was found by trying."""
        anatomy = self.model.anatomy
        if self.model.verdicts["final norm"] if with_norm is None else with_norm:
            assert anatomy.final_norm is not None
            norm = self.model.module(anatomy.final_norm)
            # With layers on several devices, the norm need not be where the last block is.
            states = norm(next((states.to(p.device) for p in norm.parameters()), states))
        project = getattr(self.model.module(anatomy.trunk), "project_out", None)  # OPT with a narrower embedding
        return states if project is None else project(states)

    def _is_additive(self, recording: Recording) -> bool:
        """Whether the lowest block passes a change of its MLP output on as it is."""
        width = output_width(self.model.module(self._path(self.first)))
        generator = torch.Generator().manual_seed(0)
        scale = float(recording.leaving.float().std()) or 1.0
        bump = (torch.randn(width, generator=generator) * scale).to(recording.leaving)
        # Each sum on the way is rounded to the model's precision, relative to what is being added.
        sizes = [t.abs().float() for t in (recording.entering, recording.outputs, recording.leaving, bump)]
        rounding = 4 * torch.finfo(recording.leaving.dtype).eps * sum(size.to(bump.device) for size in sizes)
        with adding(
            self.model.model,
            {self._path(self.first): lambda inputs: bump.expand(*inputs.shape[:2], width)},
            len(recording.batch.ids),
        ):
            moved = self._run_block(0, recording.entering, recording)
        difference = (moved.float() - recording.leaving.float() - bump.float()).abs()
        return bool((difference < 1e-3 * scale + rounding).all())

    def _run_block(self, index: int, states: Tensor, recording: Recording) -> Tensor:
        args, kwargs = recording.calls[index]
        with self.model.sequences.entered(recording.forward_pass):
            return _states(self._blocks()[index](states, *args, **kwargs))

    def _leaving(self, change: Change | None) -> AbstractContextManager[None]:
        """A context in which what leaves the lowest block is changed."""

        def probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            assert change is not None
            states = _states(output)
            changed = states + change(states).to(states)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        after = {} if change is None else {self.model.anatomy.blocks[self.first]: probe}
        return probing(self.model.model, after=after)

    def run(
        self, recording: Recording, changes: Mapping[int, Change] | Change, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """Logits at the given places, [places, vocabulary], with the changes made.

        Args:
            changes: per layer, a function from the inputs of its MLP output projection, [rows, columns, key
                width], to what is added to its output, [rows, columns, hidden]; a bare function means the lowest layer.
                (With `residual`, that of the lowest layer is given what leaves its block, [rows, columns, hidden].)
            rows, columns: the places, [places] each.
        """
        return self.model.head(self.states(recording, changes, rows, columns))

    def states(
        self, recording: Recording, changes: Mapping[int, Change] | Change, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """What the vocabulary head reads at the given places, [places, hidden]."""
        per_layer = {self.first: changes} if callable(changes) else dict(changes)
        by_path = {self._path(layer): change for layer, change in per_layer.items()}
        at_block = by_path.pop(self._path(self.first), None) if self.residual else None
        if self.full:
            self.model.sequences.acquire()
            try:
                with adding(self.model.model, by_path, len(recording.batch.ids)), self._leaving(at_block):
                    states = self.model.answer_states(recording.batch)
                return states[rows.to(states.device), columns.to(states.device)]
            finally:
                self.model.sequences.release()
        start = 0
        states = recording.entering
        if at_block is not None:
            states = recording.leaving + at_block(recording.leaving).to(recording.leaving)
            start = 1
        elif self._additive and self.first in per_layer:
            change = per_layer[self.first](recording.inputs[self.first])
            states = recording.leaving + change.to(recording.leaving)
            del by_path[self._path(self.first)]
            start = 1
        blocks = self._blocks()
        with (
            adding(self.model.model, by_path, len(recording.batch.ids)),
            self.model.sequences.entered(recording.forward_pass),
        ):
            for block, (args, kwargs) in zip(blocks[start:], recording.calls[start:], strict=True):
                states = _states(block(states, *args, **kwargs))
        if self.model.is_encoder_decoder:
            states = self.model.answer_states(recording.batch, self._finish(states))
            return states[rows.to(states.device), columns.to(states.device)]
        return self._finish(states[rows.to(states.device), columns.to(states.device)])
