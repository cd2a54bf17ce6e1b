"""Which modules of a model play which role, found by structure and never by the model's name.

Knows module trees. Knows nothing of edits, and runs no forward pass.

How the roles are found, for any text model that transformers can load:

* the **blocks** are the longest list of equal modules that hold an attention, in what transformers calls the model's
  text decoder (not in a vision tower); in an encoder-decoder model, in its encoder (see `encoder_decoder`);
* inside a block, the **attention** is the outermost submodule whose `forward` takes an attention mask; its
  output projection is the last linear layer declared in it that writes to the residual stream;
* the **MLP output projection** is the one linear layer outside the attention that writes to the residual stream;
* the **final norm** is the last norm-like child of the module that holds the blocks; if there is none, a child behind
  the blocks that has no parameters and takes nothing but the states (OLMo 1);
* the **head** is what the model itself returns as its output embeddings.

A linear layer is an `nn.Linear` or GPT-2's `Conv1D`, which stores the transpose. Weights are always read and
written here in "output x input" orientation.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from errata.errors import AnatomyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Anatomy",
    "AnatomyDeclaration",
    "attention_of",
    "find_anatomy",
    "input_width",
    "is_linear",
    "mlp_projections",
    "output_width",
    "weight_of",
]


def is_linear(module: nn.Module) -> bool:
    """True for a plain linear layer: `nn.Linear`, `Conv1D`, or one that errata wraps (it says so itself)."""
    return isinstance(module, (nn.Linear, Conv1D)) or getattr(module, "is_edited_linear", False) is True


def weight_of(module: nn.Module) -> Tensor:
    """The weight as a view of shape [outputs, inputs]; writing to it writes to the module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False) is True
    return weight.t() if transposed else weight


def input_width(module: nn.Module) -> int:
    """How many features a linear layer reads."""
    return int(weight_of(module).shape[1])


def output_width(module: nn.Module) -> int:
    """How many features a linear layer writes."""
    return int(weight_of(module).shape[0])


@dataclass(frozen=True)
class AnatomyDeclaration:
    """Roles given by hand, for a model whose structure does not show them.

    Paths of modules are given as in `named_modules()`; those of projections are relative to a block.
    """

    blocks: str | None = None
    mlp_output: str | None = None
    attention_output: str | None = None
    final_norm: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """The roles of a model's modules, as paths from its root.

    Attributes:
        trunk: the module that holds the blocks; its forward takes token ids and an attention mask.
        blocks: one path per block, in order; an encoder-decoder model's are those of its encoder.
        mlp_output: the MLP output projection of each block; its input is the *key* of a token.
        attention_output: the attention output projection of each block.
        final_norm: the norm behind the last block, if there is one; `Tail` finds out by trying whether it stands there.
        head: the vocabulary projection.
        hidden_size: width of the residual stream.
        key_width: input width of the MLP output projection of each block.
    """

    trunk: str
    blocks: tuple[str, ...]
    mlp_output: tuple[str, ...]
    attention_output: tuple[str, ...]
    final_norm: str | None
    head: str
    hidden_size: int
    key_width: tuple[int, ...]

    def layer(self, index: int) -> int:
        """A block's number with negative numbers counted from the top. Raises AnatomyError out of range."""
        count = len(self.blocks)
        if not -count <= index < count:
            raise AnatomyError(f"layer {index} does not exist: this model has {count} blocks, 0 to {count - 1}")
        return index % count


def _norm_like(module: nn.Module, hidden: int) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(p.shape == (hidden,) for p in parameters) and not list(module.children())


def _bare_norms(trunk: nn.Module, list_name: str) -> list[str]:
    """Children behind the blocks that may be norms without parameters; `Tail` checks whether one is by trying."""
    names = [name for name, _ in trunk.named_children()]
    found = []
    for name in names[names.index(list_name) + 1 :] if list_name in names else []:
        child = trunk.get_submodule(name)
        has_state = any(True for _ in child.parameters()) or any(True for _ in child.buffers())
        taken = [p for p in inspect.signature(child.forward).parameters.values() if p.default is p.empty]
        if not has_state and len(taken) == 1 and not isinstance(child, (nn.Dropout, nn.Identity)):
            found.append(name)
    return found


def _takes_attention_mask(module: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(module.forward).parameters


def attention_of(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The outermost attention inside a block, with its path there; None if it has none."""
    for name, module in block.named_modules():
        if name and _takes_attention_mask(module) and any(is_linear(m) for m in module.modules()):
            return name, module
    return None


def _describe(block: nn.Module) -> str:
    """The modules of a block that hold parameters, as lines for an error message."""
    lines = []
    for name, module in block.named_modules():
        own = [f"{key} {tuple(p.shape)}" for key, p in module.named_parameters(recurse=False) if p.dim() > 1]
        if own:
            lines.append(f"  {name or '(the block itself)'}: {type(module).__name__}, {', '.join(own)}")
    return "\n".join(lines) or "  (no weights of two or more dimensions)"


def _reader(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part of a model that reads prompts as text, with its path: the decoder, or the encoder in front of it."""
    if model.config.is_encoder_decoder and model.main_input_name != "input_ids":
        raise AnatomyError(
            f"the encoder of {type(model).__name__} reads {model.main_input_name}, not text; errata edits what is "
            "asked in text"
        )
    part = model.get_encoder() if model.config.is_encoder_decoder else model.get_decoder()
    return next(((name, module) for name, module in model.named_modules() if module is part), ("", model))


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    where, reader = _reader(model)
    candidates: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in reader.named_modules(prefix=where):
        alike = isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
        if alike and attention_of(module[0]) is not None:
            candidates.append((sum(p.numel() for p in module.parameters()), name, module))
    if not candidates:
        lists = [
            f"  {name}: {len(module)} x {type(module[0]).__name__}"
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module)
        ]
        raise AnatomyError(
            "no list of blocks with an attention was found. Module lists seen:\n"
            + ("\n".join(lists) or "  (none)")
            + "\nIf one of them holds the blocks, name it: AnatomyDeclaration(blocks=...)"
        )
    _, name, blocks = max(candidates, key=lambda candidate: candidate[0])
    return name, blocks


def _mlp_output_of(block: nn.Module, attention: str, hidden: int, where: str) -> str:
    fused = [
        f"{name}.{key}"
        for name, module in block.named_modules()
        if not isinstance(module, (nn.Conv1d, nn.Conv2d))
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2
    ]
    if fused:
        raise AnatomyError(
            f"{where} holds fused mixture-of-experts weights ({', '.join(fused)}): no single linear layer carries a "
            f"token's key, so this model cannot be edited yet. Candidate modules:\n{_describe(block)}\nTo edit one "
            "of them all the same, name it: AnatomyDeclaration(mlp_output='path inside the block')"
        )
    linears = [
        (name, module)
        for name, module in block.named_modules()
        if is_linear(module) and not (name == attention or name.startswith(attention + "."))
    ]
    writers = [name for name, module in linears if output_width(module) == hidden]
    if len(writers) > 1:
        # Equal widths make the inner projections look alike; the one that reads the inner width is meant.
        narrower = [name for name in writers if input_width(block.get_submodule(name)) != hidden]
        writers = narrower if len(narrower) == 1 else writers
    if len(writers) != 1:
        found = "none" if not writers else f"{len(writers)}: {', '.join(writers)}"
        raise AnatomyError(
            f"expected one linear layer outside the attention of {where} that writes to the residual stream "
            f"(width {hidden}), found {found}. Candidate modules:\n{_describe(block)}\nIf one of them is the MLP "
            "output projection, name it: AnatomyDeclaration(mlp_output='path inside the block')"
        )
    return str(writers[0])


def _attention_output_of(block: nn.Module, attention: str, hidden: int, where: str) -> str:
    module = block.get_submodule(attention)
    writers = [
        f"{attention}.{name}"
        for name, m in module.named_modules()
        if name and is_linear(m) and output_width(m) == hidden
    ]
    if not writers:
        raise AnatomyError(
            f"the attention {where}.{attention} has no linear layer that writes to the residual stream (width "
            f"{hidden}). Candidate modules:\n{_describe(block)}\nName it: AnatomyDeclaration(attention_output=...)"
        )
    return writers[-1]


def mlp_projections(model: PreTrainedModel, mlp_output: str) -> tuple[str, ...]:
    """The linear layers of an MLP, given the path of its output projection: that one, and those declared beside it.

    Beside it stands what feeds it (gate and up, c_fc, fc1, ...); where that is kept elsewhere, there is only the one.
    """
    parent = mlp_output.rpartition(".")[0]
    beside = model.get_submodule(parent).named_children()
    return tuple(_join(parent, name) for name, module in beside if is_linear(module))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def find_anatomy(model: PreTrainedModel, declared: AnatomyDeclaration | None = None) -> Anatomy:
    """Find the roles of a model's modules; what `declared` names is taken as given.

    Raises:
        AnatomyError: a role cannot be found or a declared path does not exist; the message lists what was seen.
    """
    declared = declared or AnatomyDeclaration()
    paths = {name for name, _ in model.named_modules()}

    def given(path: str | None) -> str | None:
        if path is not None and path not in paths:
            raise AnatomyError(f"the declared module {path!r} does not exist in {type(model).__name__}")
        return path

    if (list_path := given(declared.blocks)) is not None:
        blocks = model.get_submodule(list_path)
        if not isinstance(blocks, nn.ModuleList):
            raise AnatomyError(f"the declared blocks {list_path!r} are no list of modules")
    else:
        list_path, blocks = _find_blocks(model)
    trunk_path = list_path.rpartition(".")[0]
    embedding = model.get_input_embeddings()
    hidden = _hidden_size(blocks[0], embedding)

    mlp_outputs, attention_outputs, key_widths = [], [], []
    for index, block in enumerate(blocks):
        where = f"{list_path}.{index}"
        attention = attention_of(block)
        if declared.mlp_output is None and attention is None:
            raise AnatomyError(f"{where} has no attention. Modules:\n{_describe(block)}")
        mlp = declared.mlp_output or _mlp_output_of(block, attention[0] if attention else "", hidden, where)
        attn = declared.attention_output or _attention_output_of(
            block, attention[0] if attention else "", hidden, where
        )
        for path in (mlp, attn):
            if _join(where, path) not in paths or not is_linear(model.get_submodule(_join(where, path))):
                raise AnatomyError(
                    f"{_join(where, path)!r} is no linear layer. Modules of the block:\n{_describe(block)}"
                )
        mlp_outputs.append(_join(where, mlp))
        attention_outputs.append(_join(where, attn))
        key_widths.append(input_width(model.get_submodule(mlp_outputs[-1])))

    head_path = given(declared.head)
    if head_path is None:
        head = model.get_output_embeddings()
        head_path = next((name for name, module in model.named_modules() if module is head), None)
        if head is None or head_path is None:
            raise AnatomyError(
                f"{type(model).__name__} has no vocabulary head; load it as a causal language model, or name the "
                "head: AnatomyDeclaration(head=...)"
            )
    norm_path = given(declared.final_norm)
    if norm_path is None:
        trunk = model.get_submodule(trunk_path)
        norms = [name for name, child in trunk.named_children() if _norm_like(child, hidden)]
        norms = norms or _bare_norms(trunk, list_path.rpartition(".")[2])
        norm_path = _join(trunk_path, norms[-1]) if norms else None
    return Anatomy(
        trunk=trunk_path,
        blocks=tuple(f"{list_path}.{i}" for i in range(len(blocks))),
        mlp_output=tuple(mlp_outputs),
        attention_output=tuple(attention_outputs),
        final_norm=norm_path,
        head=head_path,
        hidden_size=hidden,
        key_width=tuple(key_widths),
    )


def _hidden_size(block: nn.Module, embedding: nn.Module | None) -> int:
    """Width of the residual stream: that of the norms which are children of a block.

    Not the embedding's (OPT-350m projects it) and not the attention's (Gemma's is wider or narrower).
    """
    norms = [child for child in block.children() if not list(child.children()) and not is_linear(child)]
    widths = [p.shape[0] for norm in norms for p in norm.parameters() if p.dim() == 1]
    if widths:
        return int(max(set(widths), key=widths.count))
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor):
        return int(weight.shape[1])
    raise AnatomyError("the width of the residual stream could not be found: the blocks have no norms")
