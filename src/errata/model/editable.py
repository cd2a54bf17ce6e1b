"""A loaded language model that can be edited: its tokenizer, its anatomy, and the places where adapters attach.

The base model is never written to. Its parameters are frozen (`requires_grad` is switched off) when it becomes
editable, so that training an edit computes no gradient that nobody asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from errata.errors import ArtifactError, ConfigError, ModelError, unknown_name
from errata.model.anatomy import Anatomy, AnatomyDeclaration, find_anatomy
from errata.model.edited_linear import Contribution, EditedLinear
from errata.model.encoder_decoder import decoder_start, encode_pair, head_inputs, pad_pairs
from errata.model.fingerprint import weights_fingerprint
from errata.model.generation import greedy, stop_tokens
from errata.model.head import checked_head
from errata.model.prefixed_attention import PrefixContribution, PrefixedAttention
from errata.model.scoring import perplexity
from errata.model.sequences import BASE, AdapterNames, SequenceTracker
from errata.model.spans import SubjectSpan, locate_subject
from errata.model.tokens import Passage, TokenBatch, encode_passage, pad

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EditableModel", "auto_class"]


def _existing_device(device: str | torch.device) -> torch.device:
    """A device that this machine has. Raises ConfigError that names those there are."""
    known = ["cpu"]
    if torch.cuda.is_available():
        known += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        known.append("mps")
    for kind in ("xpu", "npu", "hpu"):  # accelerators that torch only knows with a package of their own
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            known += [kind, *(f"{kind}:{i}" for i in range(backend.device_count()))]
    if str(device) not in known:
        why = ""
        if str(device).startswith("cuda"):
            why = " (this torch is built without CUDA)" if not torch.version.cuda else " (no such GPU is visible)"
        raise ConfigError(unknown_name("device", str(device), known) + why)
    return torch.device(device)


def _existing_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A floating-point dtype of torch, or "auto". Raises ConfigError that names those there are."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return name
    if name not in known:
        raise ConfigError(unknown_name("dtype", name, [*known, "auto"]))
    return known[name]


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes a model that writes text from a configuration.

    A causal language model wherever there is one, also of configurations that know images too (Gemma 3).
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _some(names: Iterable[str]) -> str:
    """The first names of a set, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


class EditableModel:
    """A language model, its tokenizer, and what errata knows about both.

    Args:
        model: a Hugging Face model that writes text: a causal language model, an encoder-decoder model (its layers
            are those of the encoder, see `encoder_decoder`) or a vision-language model (its layers are those of the
            text decoder; prompts with images go through `model.model`). It is used in place, in evaluation mode,
            frozen.
        tokenizer: its tokenizer.
        model_id: the name to record with results; defaults to the model's own.
        declaration: roles of modules given by hand, see `AnatomyDeclaration`.

    Attributes:
        anatomy: which modules play which role.
        sequences: follows forward passes for routed adapters.
        adapters: what is attached through this object, by name; `attach` and `detach` of an adapter keep it.
        verdicts: what `Tail` has found out about this model by trying, so that it is tried once.

    Raises:
        AnatomyError: the structure is not understood; the message lists the candidate modules.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model_id: str | None = None,
        revision: str | None = None,
        declaration: AnatomyDeclaration | None = None,
    ) -> None:
        self.model = model.eval()
        self.model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.model_id = model_id or str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.revision = revision
        self.anatomy: Anatomy = find_anatomy(model, declaration)
        self.sequences = SequenceTracker.of(model, model.get_submodule(self.anatomy.trunk))
        self.adapters: dict[str, Any] = {}
        self.verdicts: dict[str, bool] = {}
        if tokenizer.pad_token_id is None:
            # Padding is always masked, so any existing token can serve.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    @classmethod
    def load(
        cls,
        name: str | Path = "atlas",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        revision: str | None = None,
        declaration: AnatomyDeclaration | None = None,
    ) -> EditableModel:
        """Load a model from a folder or from the Hugging Face hub; "atlas" and "atlas-instruct" are built in.

        Args:
            device: where to put the model; not together with `device_map`.
            dtype: a torch dtype or its name; None means float32 on a CPU, as stored elsewhere.
            device_map: passed on to transformers (needs accelerate), e.g. "auto".
            revision: commit or tag on the hub.
            declaration: roles of modules given by hand, see `AnatomyDeclaration`.

        Raises:
            ArtifactError: nothing can be loaded under this name, or weights are damaged or missing.
            ConfigError: a device or dtype that there is not, or an option that does not fit the others.
        """
        from transformers import AutoConfig, AutoTokenizer

        name = str(name)
        if device is not None:
            device = _existing_device(device)
        if dtype is not None:
            dtype = _existing_dtype(dtype)
        from errata.atlas.shipped import ATLAS_NAMES, open_atlas

        if name in ATLAS_NAMES:
            given = {"device_map": device_map, "revision": revision, "declaration": declaration}
            if refused := [option for option, value in given.items() if value is not None]:
                raise ConfigError(
                    f"{name!r} is built in and takes no {' or '.join(refused)}; leave that out, or give the path of a "
                    "checkpoint"
                )
            return open_atlas(name, device=device, dtype=dtype)
        if device is not None and device_map is not None:
            raise ConfigError("give either device or device_map, not both: device_map places the modules itself")
        on_cpu = device_map is None and torch.device(device or "cpu").type == "cpu"
        if dtype is None:
            dtype = torch.float32 if on_cpu else "auto"
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            kind = auto_class(AutoConfig.from_pretrained(name, revision=revision))
            model, found = kind.from_pretrained(
                name, revision=revision, dtype=dtype, device_map=device_map, output_loading_info=True
            )
        except (torch.cuda.OutOfMemoryError, ImportError):
            raise
        except Exception as error:  # damaged files fail in as many ways as there are formats
            what = "the folder" if Path(name).exists() else "no folder of that name, and the hub"
            raise ArtifactError(
                f"cannot load {name!r}: {what} gave no language model with a tokenizer ({error}). Expected "
                "a path with config.json, model weights and tokenizer files, a hub id, or 'atlas'"
            ) from error
        # transformers fills such weights with random numbers and says so in passing. Tied ones are not among them.
        for problem in ("missing", "mismatched"):
            if keys := [key if isinstance(key, str) else key[0] for key in found[f"{problem}_keys"]]:
                raise ArtifactError(
                    f"the checkpoint {name!r} does not hold all of the model that its config.json describes: "
                    f"{len(keys)} {problem} weight{'s' * (len(keys) > 1)}, {_some(keys)}. Download it again, or give "
                    "the folder of a complete language model"
                )
        if device is not None:
            model = model.to(device)
        return cls(model, tokenizer, model_id=name, revision=revision, declaration=declaration)

    def copy(self) -> EditableModel:
        """This model again, for another thread: modules, hooks and a tokenizer of its own, on the same weights.

        Raises:
            ConfigError: something is attached, which would not know of the copy.
        """
        if self.sequences.owners:
            raise ConfigError(f"detach {', '.join(self.sequences.adapter_names)} from the model before it is copied")
        shared: dict[int, Any] = {id(one): one for one in (*self.model.parameters(), *self.model.buffers())}
        made = copy.copy(self)
        vars(made).pop("head", None)  # which is that of the modules it was made from
        made.model, made.tokenizer = copy.deepcopy(self.model, shared), copy.deepcopy(self.tokenizer)
        made.sequences = SequenceTracker.of(made.model, made.model.get_submodule(self.anatomy.trunk))
        made.adapters, made.verdicts = {}, dict(self.verdicts)
        return made

    # --- what it is -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embeddings."""
        embedding = self.model.get_input_embeddings()
        parameter: Tensor = next(embedding.parameters())
        return parameter.device

    @property
    def dtype(self) -> torch.dtype:
        parameter: Tensor = next(self.model.parameters())
        return parameter.dtype

    @property
    def is_encoder_decoder(self) -> bool:
        """True when prompts are read by an encoder, whose layers are edited, and answers written by a decoder."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def layer_count(self) -> int:
        return len(self.anatomy.blocks)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the base weights; attached adapters do not change it."""
        return weights_fingerprint(self.model)

    @cached_property
    def head(self) -> Callable[[Tensor], Tensor]:
        """From `answer_states` to logits; checked against the model. Raises TailError if it differs."""
        with self.sequences.selecting(BASE):
            return checked_head(self)

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids at which an answer ends."""
        return stop_tokens(self)

    @property
    def architecture(self) -> str:
        """The architecture's own name in its configuration, such as "llama"."""
        return str(getattr(self.model.config, "model_type", "unknown"))

    @property
    def treats_rows_alike(self) -> bool:
        """True when what is attached acts on all rows of a batch in the same way: by changes of weight alone."""
        edited = (module for module in self.model.modules() if isinstance(module, EditedLinear))
        is_routed = any(one.is_routed for layer in edited for one in layer.contributions)
        is_prefixed = any(isinstance(one, PrefixContribution) for one in self.sequences.owners)
        return not (is_routed or is_prefixed or self.sequences.is_selecting)

    def module(self, path: str) -> nn.Module:
        found: nn.Module = self.model.get_submodule(path)
        return found

    # --- texts and tokens -------------------------------------------------------------------------------------

    def passage(self, prompt: str, answer: str = "") -> Passage:
        """A prompt, with an answer behind it if given, as token ids."""
        encode = encode_pair if self.is_encoder_decoder else encode_passage
        return encode(self.tokenizer, prompt, answer)

    def batch(self, passages: Sequence[Passage], side: Literal["left", "right"] = "left") -> TokenBatch:
        """Pad passages to a batch on this model's device; an encoder's are always padded on the right."""
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int)
        if self.is_encoder_decoder:
            return pad_pairs(passages, pad_id, decoder_start(self.model), self.device)
        return pad(passages, pad_id, side, self.device)

    def subject_span(self, prompt: str, subject: str) -> SubjectSpan:
        """Where the subject stands in the prompt, in tokens. Raises SpanError when it does not."""
        return locate_subject(self.tokenizer, prompt, subject)

    def forward(self, batch: TokenBatch, **kwargs: Any) -> Any:
        """One forward pass of the whole model over a padded batch, its prompts announced to routed adapters."""
        with self.sequences.prompts(batch.prompt_lengths):
            return self.model(**batch.arguments(), **kwargs)

    def trunk_states(self, batch: TokenBatch) -> Tensor:
        """The residual stream of the blocks after their final norm, [rows, columns, hidden]."""
        with self.sequences.prompts(batch.prompt_lengths):
            output = self.module(self.anatomy.trunk)(**batch.trunk_arguments())
        states = output.last_hidden_state
        assert isinstance(states, Tensor)
        return states

    def answer_states(self, batch: TokenBatch, read: Tensor | None = None) -> Tensor:
        """What the vocabulary head reads, [rows, columns, hidden], at the columns of `TokenBatch.answer_places`.

        Args:
            read: the trunk's states, [rows, columns, hidden], if they are known already.
        """
        states = self.trunk_states(batch) if read is None else read
        if not self.is_encoder_decoder:
            return states
        return head_inputs(self.model, self.anatomy.head, encoder_outputs=(states,), **batch.arguments())

    # --- where adapters attach --------------------------------------------------------------------------------

    def contribute(self, path: str, contribution: Contribution, name: str | None = None) -> None:
        """Attach a contribution to the linear layer at `path`, behind those already there; one that is to be read by an
        attention (`PrefixContribution`) to the attention at `path`.

        Args:
            name: of the adapter that it belongs to. Without one it acts wherever no adapters are selected.
        """
        layer: Any = self.module(path)
        if isinstance(contribution, PrefixContribution):
            layer = PrefixedAttention.at(self, path) or PrefixedAttention.put(self, path)
        elif not isinstance(layer, EditedLinear):
            offload = getattr(layer, "_hf_hook", None)
            if getattr(offload, "offload", False):
                raise ModelError(
                    f"{path} is offloaded to disk or CPU between passes; load the model without offloading"
                )
            layer = EditedLinear(layer, self.sequences)
            self._put(path, layer)
        layer.contributions.append(contribution)
        if name is not None:
            self.sequences.owners[contribution] = name
        self.sequences.acquire()

    def withdraw(self, path: str, contribution: Contribution) -> None:
        """Take a contribution away; the base layer itself returns when the last one has gone."""
        layer: Any = self.module(path)
        if isinstance(contribution, PrefixContribution):
            layer = PrefixedAttention.at(self, path)
        if not any(c is contribution for c in getattr(layer, "contributions", ())):
            raise ModelError(f"nothing of this adapter is attached at {path}")
        layer.remove(contribution)
        self.sequences.owners.pop(contribution, None)
        if isinstance(layer, EditedLinear) and not layer.contributions:
            layer.base.train(layer.training)
            self._put(path, layer.base)
        self.sequences.release()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The base model for a while, bit for bit, whatever is attached to it; cheaper than detaching. May be nested.

        Passes are not followed meanwhile: a KV cache that is begun inside cannot be continued outside.
        """
        with self.sequences.suspended():
            yield

    @contextmanager
    def selecting(self, adapters: AdapterNames | None) -> Iterator[None]:
        """Choose which of the attached adapters act, for the sequences that begin inside.

            with model.selecting(["__base__", "geo", ("geo", "people")]):
                model.generate(three_prompts)

        The choice belongs to the sequences: what is read onto a KV cache inside goes on with its adapters outside too,
        and each of them is answered as if its own adapters alone were attached. Hugging Face's `generate` and the
        model's forward take the same as their argument `adapter_names` while an adapter is attached, as with PEFT.

        Args:
            adapters: for each sequence (prompt, passage or row of a forward pass) the name of its adapter, several
                names, or "__base__" for none; or one string for all of them. None leaves it as it is; where nothing
                was selected, all adapters act.

        Raises:
            ConfigError: no adapter of such a name is attached.
            SequenceError: inside, for another number of sequences, or on the cache of sequences that began otherwise.
        """
        with self.sequences.selecting(adapters):
            yield

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        holder = self.module(parent) if parent else self.model
        if name.isdigit() and isinstance(holder, (nn.ModuleList, nn.Sequential)):
            holder[int(name)] = module
        else:
            setattr(holder, name, module)

    # --- using it ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        *,
        adapters: AdapterNames | None = None,
        max_new_tokens: int = 20,
        batch_tokens: int = 8192,
    ) -> list[str]:
        """Greedy continuations, one per prompt, each ending at the end token or at a line break.

        Batched by length with left padding; the texts come back in the order of the prompts, without the prompt.

        Args:
            adapters: which adapters act on which prompt, see `selecting`.
        """
        with self.selecting(adapters):
            return greedy(self, prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)

    def perplexity(self, texts: Iterable[str], *, max_length: int = 512) -> float:
        """Perplexity per token over texts, each read on its own."""
        return perplexity(self, texts, max_length=max_length)
