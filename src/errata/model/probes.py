"""Looking into a forward pass, and changing one layer's output for a moment.

All temporary hooks of errata go through `probing`: it resolves every module first, fails if one is missing, and
always removes its hooks. What stays attached to a linear layer is never a hook but a replaced module
(`edited_linear`); in front of an attention, `prefixed_attention` puts a hook of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from errata.errors import ModelError

__all__ = ["adding", "by_rows", "capturing_inputs", "probing"]

Probe = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@contextmanager
def probing(
    model: nn.Module, before: Mapping[str, Probe] | None = None, after: Mapping[str, Probe] | None = None
) -> Iterator[None]:
    """Call probes before and after the named modules run.

    Args:
        before: probes called with (module, args, kwargs, None); a result that is not None is the pair of args and
            kwargs that the module gets instead.
        after: probes called with (module, args, kwargs, output); a result that is not None replaces the output.

    Raises:
        ModelError: a module does not exist.
    """
    before, after = before or {}, after or {}
    modules: dict[str, nn.Module] = {}
    for path in [*before, *after]:
        try:
            modules[path] = model.get_submodule(path)
        except AttributeError as error:
            raise ModelError(f"cannot look into {path!r}: this model has no such module") from error

    def as_pre_hook(probe: Probe) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return probe(module, args, kwargs, None)

        return hook

    with ExitStack() as handles:
        for path, probe in before.items():
            handle = modules[path].register_forward_pre_hook(as_pre_hook(probe), with_kwargs=True)
            handles.callback(handle.remove)
        for path, probe in after.items():
            handles.callback(modules[path].register_forward_hook(probe, with_kwargs=True).remove)
        yield


def adding(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]], rows: int) -> Any:
    """A context in which each named linear layer gives `output + change(input)`.

    Inputs reach `change` as [rows, columns, width], also in families that flatten tokens on the way (OPT).
    """

    def probe(change: Callable[[Tensor], Tensor]) -> Probe:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return output + change(by_rows(args[0], rows)).to(output).reshape(output.shape)

        return add

    return probing(model, after={path: probe(change) for path, change in changes.items()})


@contextmanager
def capturing_inputs(model: nn.Module, paths: Iterable[str], rows: int) -> Iterator[dict[str, Tensor]]:
    """A context that fills a dictionary with each named module's input, [rows, columns, width], as passes are made."""
    captured: dict[str, Tensor] = {}

    def probe(path: str) -> Probe:
        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            captured[path] = by_rows(args[0], rows)

        return capture

    with probing(model, before={path: probe(path) for path in paths}):
        yield captured


def by_rows(tokens: Tensor, rows: int) -> Tensor:
    """[rows, columns, width] from that or from [rows x columns, width]."""
    return tokens if tokens.dim() == 3 else tokens.view(rows, -1, tokens.shape[-1])
