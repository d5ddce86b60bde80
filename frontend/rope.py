"""Rotary embeddings for contexts longer than a model was trained on.

The frequencies and the attention factor are transformers' (`ROPE_INIT_FUNCTIONS`); this file says which of
them a compilation takes. `RopeScaling` is `--rope-scaling`: it edits a configuration that was published
without scaling. `settle` fixes what depends on the length of the whole sequence (dynamic NTK, LongRoPE): a
cached key was rotated when its token came, so the frequencies must not change while a sequence grows. They
are those that transformers has for a sequence of the artifact's whole context, at every position of every
sequence.

Position interpolation: Chen et al. 2023, arXiv:2306.15595. YaRN: Peng et al. 2023, arXiv:2309.00071.
LongRoPE: Ding et al. 2024, arXiv:2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..ir.errors import InputError, UnsupportedError
from . import hf

if TYPE_CHECKING:
    import torch

OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": ("original", "when"),
    "dynamic": ("original", "when"),
    "yarn": ("original", "when", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    "llama3": ("original", "when", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original", "when", "factors", "attention_factor"),
}
"""What each kind of scaling can be told besides its factor. Numbers are transformers' own fields;
`original` is the context that the model was trained on, `when` which sequences are scaled, `factors` a JSON
file.
"""

_WINDOWED: Final = ("sliding_attention", "chunked_attention")  # layers that never look further than a window
_LONGEST: Final = 1 << 24  # positions are float32 in the tables, which counts no further
_ELSE: Final = "leave --rope-scaling away"


@dataclass(frozen=True)
class RopeScaling:
    """`KIND:FACTOR[,key=value…]`, read and checked; lists and files are in `parameters`.

    Attributes:
        text: as it was given.
        original: tokens that the model was trained on; None: what its configuration says.
        needed: whether sequences of at most `original` tokens are left as the model was published
            (rope_by_length.py), rather than all of them scaled.
        parameters: further fields of transformers' `rope_parameters`.
    """

    text: str
    kind: str
    factor: float
    original: int | None
    parameters: Mapping[str, Any]
    needed: bool = False

    @staticmethod
    def parse(text: str) -> RopeScaling:
        """Raises InputError that names the part which is wrong."""
        head, *rest = text.split(",")
        kind, colon, number = head.partition(":")
        if kind not in OPTIONS:
            raise InputError(
                f"--rope-scaling {text}: {kind!r} is no kind of scaling",
                remedy=f"one of {', '.join(OPTIONS)}, with a factor: yarn:4",
            )
        if not colon:
            raise InputError(
                f"--rope-scaling {text} says no factor", remedy=f"{kind}:4 makes the context 4 times as long"
            )
        factor = _number(text, "factor", number, least=1.0)
        given: dict[str, str] = {}
        for part in rest:
            key, equals, value = part.partition("=")
            if key not in OPTIONS[kind] or not equals or key in given:
                raise InputError(
                    f"--rope-scaling {text}: {part!r} is no option of {kind}, or is there twice",
                    remedy=f"options: {', '.join(f'{name}=…' for name in OPTIONS[kind])}",
                )
            given[key] = value
        original = None if "original" not in given else _whole(text, "original", given.pop("original"))
        when = given.pop("when", "always")
        if when not in ("always", "needed"):
            raise InputError(f"--rope-scaling {text}: when={when}", remedy="always or needed")
        return RopeScaling(text, kind, factor, original, _parameters(text, kind, given), when == "needed")

    def key(self) -> list[Any]:
        """What tells whether interrupted work was on the same scaling: a file's content, not its name."""
        return [self.kind, self.factor, self.original, dict(sorted(self.parameters.items())), self.needed]

    def command(self) -> str:
        """The option as given, a file without its folders, so that the same inputs give the same bytes."""
        parts = [
            f"factors={Path(part.partition('=')[2]).name}" if part.startswith("factors=") else part
            for part in self.text.split(",")
        ]
        return ",".join(parts)

    def apply(self, config: Any, name: str) -> int:
        """Write the scaling into the configuration of model `name`; the context that it has then, in tokens.

        Layers that see a window only keep their frequencies. Raises InputError where there is nothing to
        scale, or where this contradicts what the configuration says.
        """
        text = _text_config(config)
        entries = [entry for kind, entry in _entries(text) if kind not in _WINDOWED]
        if not entries:
            raise InputError(
                f"--rope-scaling {self.text}: {name} has no rotary embedding that reaches beyond a window",
                remedy=_ELSE,
            )
        field, published = _published(text, name)
        scaled = [entry for entry in entries if entry.get("rope_type", "default") != "default"]
        if scaled:
            self._check_same(scaled[0], published, name)
            return longest(config, published) or published
        original = self.original or published
        if original > published:
            raise InputError(
                f"--rope-scaling {self.text}: original={original} contradicts {name}, which was made for "
                f"{published} tokens",
                remedy="leave original away, or give what the model was trained on",
            )
        context = int(original * self.factor)
        if context > _LONGEST:
            raise InputError(
                f"--rope-scaling {self.text}: {context} tokens are more than positions in float32 can count",
                remedy=f"a factor of at most {_LONGEST // original}",
            )
        for entry in entries:
            entry.update(rope_type=self.kind, factor=self.factor, **self.parameters)
            if self.kind in ("yarn", "llama3", "longrope"):
                entry["original_max_position_embeddings"] = original
            if self.kind == "longrope":
                self._check_lists(text, entry, name)
        if hasattr(text, "original_max_position_embeddings"):  # transformers takes this one where it is there
            text.original_max_position_embeddings = original
        # transformers' dynamic scaling grows from this length on; the others want the length after scaling.
        setattr(text, field, original if self.kind == "dynamic" else context)
        return context

    def _check_same(self, entry: Mapping[str, Any], published: int, name: str) -> None:
        """A configuration that is scaled already must say the same."""
        if self.needed:
            raise InputError(
                f"--rope-scaling {self.text}: {name} was published with a scaling of all sequences "
                f"({entry['rope_type']})",
                remedy="leave when=needed away",
            )
        wanted = {"rope_type": self.kind, "factor": self.factor, **self.parameters}
        if self.original is not None:
            wanted["original_max_position_embeddings"] = self.original
        held = {**entry, "original_max_position_embeddings": _original(entry, published)}
        for key, value in wanted.items():
            if held.get(key) != value:
                factor = f":{entry['factor']:g}" if isinstance(entry.get("factor"), int | float) else ""
                raise InputError(
                    f"--rope-scaling {self.text} contradicts {name}, which is scaled already "
                    f"({entry['rope_type']}{factor}; {key} is {_short(held.get(key))}, not {_short(value)})",
                    remedy=_ELSE,
                )

    def _check_lists(self, config: Any, entry: Mapping[str, Any], name: str) -> None:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        wanted = int(width * entry.get("partial_rotary_factor", 1.0)) // 2
        for key in ("short_factor", "long_factor"):
            if len(entry[key]) != wanted:
                raise InputError(
                    f"--rope-scaling {self.text}: {key} has {len(entry[key])} numbers, {name} has {wanted} "
                    "frequencies",
                    remedy="give the factors that were found for this model",
                )

    def check_built(self, model: Any, name: str) -> None:
        """Raises UnsupportedError where the model's code does not look at what `apply` wrote."""
        kinds = {kind for _, _, kind in rotary_modules(model)}
        if self.kind not in kinds:
            raise UnsupportedError(
                f"--rope-scaling {self.text}: {name} ({type(model).__name__}) computes its rotary embedding "
                "in a way of its own",
                remedy=_ELSE,
            )


def longest(config: Any, limit: int | None) -> int | None:
    """Tokens that an artifact of the model may be compiled for: `limit`, what its configuration says; with
    dynamic NTK as many times more as its factor.
    """
    for _, entry in _entries(_text_config(config)):
        if limit is not None and "dynamic" in entry.get("rope_type", "default"):
            return min(int(limit * float(entry.get("factor") or 1.0)), _LONGEST)
    return limit


def settle(model: torch.nn.Module, length: int) -> None:
    """Give the rotary embeddings that change with the length of a sequence the frequencies that transformers
    has for a sequence of `length` tokens, and keep them from changing. What asks for the largest position all
    the same, to scale what it computes, is told the last of so many.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module, layer_type, kind in list(rotary_modules(model)):
        if not _depends_on_length(kind):
            continue
        prefix = f"{layer_type}_" if layer_type else ""
        # Where it grows beyond what it was built for, transformers counts in float32: so do we, to the bit.
        grows = "dynamic" in kind and length > module.config.max_position_embeddings
        compute: Any = ROPE_INIT_FUNCTIONS[kind]
        given = torch.tensor(length) if grows else length
        frequencies, factor = compute(module.config, "cpu", seq_len=given, layer_type=layer_type)
        getattr(module, f"{prefix}inv_freq").copy_(frequencies)
        setattr(module, f"{prefix}attention_scaling", factor)
        if layer_type:
            module.rope_type[layer_type] = "default"  # what its forward method asks before it updates
        else:
            module.rope_type = "default"
        module.forward = _told(module.forward, length)  # type: ignore[method-assign]


def _told(forward: Callable[..., Any], length: int) -> Callable[..., Any]:
    """A rotary embedding's forward method, in which the largest of its positions is that of the last of
    `length` tokens.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Told(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked = func in (torch.max, torch.Tensor.max, torch.amax) and len(args) == 1 and not kwargs
            if asked and not args[0].dtype.is_floating_point:
                return length - 1
            return func(*args, **(kwargs or {}))

    def told(*args: Any, **kwargs: Any) -> Any:
        with Told():
            return forward(*args, **kwargs)

    return told


def refuse_unsettled(model: torch.nn.Module, name: str) -> None:
    """Raises UnsupportedError for a module from Python whose frequencies change with the length: it is the
    caller's, and stays as it is.
    """
    for _, _, kind in rotary_modules(model):
        if _depends_on_length(kind):
            raise UnsupportedError(
                f"{name} has rotary frequencies that change with the length of a sequence ({kind})",
                remedy="save_pretrained it and compile the folder, which fixes them for the context",
            )


def rope_facts(config: Any, length: int | None, limit: int | None) -> dict[str, Any] | None:
    """The scaling of a compiled model for its manifest; None without one. `limit`: what its configuration
    says of its context.

    `type`, `factor`, `original` (tokens that the model was trained on); of dynamic NTK and LongRoPE `length`,
    the one that its frequencies are for, and of the latter which `factors` they are: "short" or "long".
    """
    for _, entry in _entries(_text_config(config)):
        kind = entry.get("rope_type", "default")
        if kind in ("default", "axial", "proportional"):
            continue
        original = limit if "dynamic" in kind else _original(entry, limit)
        facts: dict[str, Any] = {"type": kind, "factor": entry.get("factor"), "original": original}
        if facts["factor"] is None and original and limit:
            facts["factor"] = limit / original
        if _depends_on_length(kind):
            facts["length"] = length
        if kind == "longrope" and length is not None and original is not None:
            facts["factors"] = "long" if length > original else "short"
        return facts
    return None


def _depends_on_length(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _original(entry: Mapping[str, Any], limit: int | None) -> int | None:
    """Tokens trained on, of an entry that is scaled: what it says, or the context divided by the factor."""
    if isinstance(entry.get("original_max_position_embeddings"), int):
        return entry["original_max_position_embeddings"]
    factor = entry.get("factor")
    return round(limit / factor) if limit and isinstance(factor, int | float) and factor else limit


def _text_config(config: Any) -> Any:
    """The part of a configuration that is the language model's; None of what is no configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _entries(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """`rope_parameters` by the type of layers that they are for ("" for all)."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        return []
    nested = list(config.nested_rope_parameter_keys(parameters))
    found = [(key, parameters[key]) for key in nested] if nested else [("", parameters)]
    return [(key, entry) for key, entry in found if isinstance(entry, dict)]


def _published(config: Any, name: str) -> tuple[str, int]:
    """The field that holds a configuration's context, and the tokens in it."""
    for field in ("max_position_embeddings", "max_seq_len"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return field, value
    raise InputError(
        f"{name} does not say how many tokens it was made for, so nothing can be scaled", remedy=_ELSE
    )


def rotary_modules(model: torch.nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """Rotary modules of transformers: the module, the type of layers, the kind of its frequencies."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            yield module, None, kinds
        elif isinstance(kinds, dict):
            yield from ((module, layer_type, kind) for layer_type, kind in kinds.items())


def _parameters(text: str, kind: str, given: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `rope_parameters` besides kind, factor and original."""
    found: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    for key, value in given.items():
        if key == "factors":
            found |= _read_factors(Path(value))
        elif key == "truncate":
            if value not in ("true", "false"):
                raise InputError(f"--rope-scaling {text}: truncate={value}", remedy="true or false")
            found[key] = value == "true"
        else:
            found[key] = _number(text, key, value, least=0.0)
    if kind == "longrope" and "short_factor" not in found:
        raise InputError(
            f"--rope-scaling {text}: longrope needs the factors that were searched for this model",
            remedy='give factors=FILE.json: {"short_factor": […], "long_factor": […]}',
        )
    low, high = found.get("low_freq_factor", 0.0), found.get("high_freq_factor", 1.0)
    slow, fast = found.get("beta_slow", 1.0), found.get("beta_fast", 32.0)
    if low >= high or slow > fast or min(high, slow, fast) <= 0:
        raise InputError(
            f"--rope-scaling {text}: the bounds between short and long waves are the wrong way round",
            remedy="low_freq_factor < high_freq_factor, 0 < beta_slow <= beta_fast",
        )
    return found


def _read_factors(path: Path) -> dict[str, Any]:
    """LongRoPE's lists from a JSON file: of a number for each frequency, each above 0."""
    raw = hf.read_json(path)
    found: dict[str, Any] = {}
    for key in ("short_factor", "long_factor"):
        values = raw.get(key)
        if not isinstance(values, list) or not values or not all(_is_positive(v) for v in values):
            raise InputError(
                f"{path} has no {key}, or one that is not all numbers above 0",
                remedy='write {"short_factor": […], "long_factor": […]}, a number for each frequency',
            )
        found[key] = [float(v) for v in values]
    return found


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _number(text: str, key: str, value: str, *, least: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise InputError(f"--rope-scaling {text}: {key} {value!r}", remedy=f"a number from {least:g} on")
    return number


def _whole(text: str, key: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 9 or int(value) < 1:
        raise InputError(
            f"--rope-scaling {text}: {key} {value!r}", remedy="a number of tokens: original=2048"
        )
    return int(value)


def _short(value: Any) -> str:
    words = f"{value:g}" if isinstance(value, float) else str(value)
    return words if len(words) <= 40 else words[:40] + "…"
