"""The configuration of a Swin Transformer: what every size means and where it comes from.

Every field is derived and checked here, so that the modeling file only reads. The fields have the names of
transformers' own ``SwinConfig``, whose dictionary is accepted as it is; new are ``shift_per_axis``, ``mask_padding``,
``norm_targets`` and ``upernet``.
"""

import difflib
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

Pair = tuple[int, int]

# Accepted although it is similar to one of our fields: transformers' tests set it on every configuration.
_OTHER_FAMILIES = frozenset({"layer_norm_epsilon"})
# Limits for a configuration from the Hub, far beyond any real model; the largest Swin has 50 blocks and 3 billion
# parameters. All other limits of the package refer to these.
MOST_STAGES, MOST_BLOCKS, MOST_CHANNELS = 16, 500, 2**20
MOST_PARAMETERS = 10**10
FREE_PARAMETERS = 50 * 10**6  # accepted without weights of that size: every machine has room for them
MOST_LABELS = 10**6  # that have no names; transformers makes a name for each
LONGEST_SIDE, MOST_PIXELS = 2**20, 2**26  # of an image: 8192 x 8192
MOST_WINDOW_TOKENS = 2**13  # the index of a window has their square
CONFIG_BYTES = 32 * 2**20  # of a JSON file; 21,841 class names twice are 2 MB

# Types of the fields that are not sizes.
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
_POSITIVE = ("mlp_ratio", "layer_norm_eps", "initializer_range")
_SWITCHES = ("qkv_bias", "use_absolute_embeddings", "shift_per_axis", "mask_padding", "norm_features")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_PROBABILITIES, *_POSITIVE), (int, float)),
    **dict.fromkeys((*_SWITCHES, "return_dict", "output_hidden_states", "is_encoder_decoder"), (bool,)),
    **dict.fromkeys(("hidden_act", "model_type", "problem_type", "transformers_version"), (str,)),
    **{"output_attentions": (bool,), "id2label": (dict,), "label2id": (dict,), "architectures": (list, tuple)},
}
_MAY_BE_NONE = _TYPES.keys() - {*_PROBABILITIES, *_POSITIVE, *_SWITCHES, "hidden_act"}

# Keywords that say where a checkpoint is.
LOCATION = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Reads configurations of other packages: the installed package sets :func:`swin_hf.loading.read_foreign_config`. Code
# that travels alone has no such reader.
foreign_reader: Callable[..., Any] | None = None


class SwinHFConfig(BackboneConfigMixin, PreTrainedConfig):
    """Sizes and switches of a Swin Transformer (https://arxiv.org/abs/2103.14030).

    Args:
        image_size: Height and width of the training images in pixels, one integer for a square. Positive. Other
            sizes can be run at any time; this one sizes the absolute position embeddings and the image processor.
        patch_size: Height and width of a patch in pixels (section 3.1: 4). Positive.
        num_channels: Channels of an image. Positive.
        embed_dim: Channels of the first stage, ``C`` of table 7; each stage doubles it. A multiple of its heads.
        depths: Blocks of each stage; blocks alternate between W-MSA and SW-MSA. Positive.
        num_heads: Attention heads of each stage, which divide its channels. Left out, those of four stages whose heads
            have about 32 channels, as all of the paper's.
        window_size: Side of an attention window in tokens, ``M`` of section 3.2: one integer; ``(height, width)``
            for a rectangle; or one entry for each stage, as a list of pairs, or of integers where that cannot be
            mistaken for a rectangle (any number of stages but two). Positive.
        mlp_ratio: Hidden channels of the MLP over its channels. Positive.
        qkv_bias: Whether the query, key and value projection has a bias.
        hidden_dropout_prob: Dropout of embeddings, projections and MLP. In ``[0, 1)``.
        attention_probs_dropout_prob: Dropout of the attention probabilities. In ``[0, 1)``.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first. In ``[0, 1)``.
        hidden_act: Activation of the MLP, a name of transformers' ``ACT2FN``.
        use_absolute_embeddings: Whether learned position embeddings are added to the patches (table 4 of the paper).
        initializer_range: Standard deviation of the truncated normal that fills Linear layers and bias tables.
        layer_norm_eps: Epsilon of every LayerNorm.
        encoder_stride: Pixels for each token of the last stage, the upsampling factor of the SimMIM decoder.
        shift_per_axis: When the window covers the map on one axis only: False, Microsoft's rule, drops the shift on
            both axes; True, the rule of timm and torchvision, only on the covered one.
        mask_padding: Whether the tokens that pad a map to whole windows are kept out of attention. False is the
            arithmetic of the reference, where they take part.
        norm_targets: Side in pixels, odd, of the neighbourhood that normalises SimMIM's targets; None for raw pixels.
        upernet: Sizes of the heads of semantic segmentation, see ``segmentation_swin_hf.UperNetSizes``.
        out_features: Stages whose maps the backbone returns, names out of ``stage_names``.
        out_indices: The same as positions in ``stage_names``.

    Raises:
        ValueError: If a value is out of its range or contradicts another; the message gives both.
        TypeError: If a keyword is not a field but nearly one, such as ``windw_size``. Other unknown keywords are
            kept as attributes, as transformers demands.
    """

    model_type = "swin_hf"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # noqa: RUF012
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # the installed package fills it, see swin_hf/presets.py
    cosine_attention: ClassVar[bool] = False  # whether scores are those of Swin V2
    _sequences: ClassVar[frozenset[str]] = frozenset({"image_size", "patch_size", "depths", "num_heads", "window_size"})
    # Model types of transformers with the same fields; those of the other version, with the prefix of its classes.
    _peers: ClassVar[tuple[str, ...]] = ("swin", "maskformer-swin")
    _strangers: ClassVar[dict[str, str]] = {"swinv2": "SwinV2HF", "swinv2_hf": "SwinV2HF"}

    image_size: int | Sequence[int] = 224
    patch_size: int | Sequence[int] = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: Sequence[int] = (2, 2, 6, 2)
    num_heads: Sequence[int] = ()
    window_size: int | Sequence[int | Sequence[int]] = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    encoder_stride: int = 32
    shift_per_axis: bool = False
    mask_padding: bool = False
    norm_targets: int | None = None
    upernet: dict[str, Any] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for derived in ("num_layers", "num_hidden_layers", "num_attention_heads", "hidden_size", "stage_names"):
            kwargs.pop(derived, None)
        if not type(self).__module__.startswith("transformers_modules."):
            kwargs.pop("auto_map", None)  # it names files of a repository, which are not saved with the model
        self._refuse_near_misses(kwargs)
        self._check_general(kwargs)
        name: Any = kwargs.get("transformers_weights")
        if name is not None and (not isinstance(name, str) or re.search(r"[/\\]", name)):
            raise ValueError(
                f"transformers_weights is {_short(name)}; give the name of a file in its folder, or leave it out"
            )
        if not self.num_heads:  # the largest divisor that leaves a head 32 channels or more, doubling in four stages
            _check_positive("embed_dim", self.embed_dim, MOST_CHANNELS)
            heads = max(n for n in range(1, max(self.embed_dim // 32, 1) + 1) if self.embed_dim % n == 0)
            self.num_heads = [heads * 2**stage for stage in range(4)]
        self.check_sizes()
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", self._out_features),
            out_indices=kwargs.pop("out_indices", self._out_indices),
        )
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # JSON knows lists only; a configuration is equal to itself after a round trip because it holds no tuples.
        super().__setattr__(name, _as_lists(value) if name in self._sequences else value)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Build the configuration of a released model, or of one of the small ones of this package.

        Args:
            name: One of ``swin_hf.list_presets()``.
            overrides: Fields to change, such as ``num_labels=10``; ``id2label`` brings its own number of classes.

        Raises:
            ValueError: If there is no such preset (the message names the nearest and lists all), or ``num_labels``
                contradicts ``id2label``.
        """
        if name not in cls.presets:
            relatives: list[type[SwinHFConfig]] = [SwinHFConfig, *SwinHFConfig.__subclasses__()]
            hints = [f"it is one of {other.__name__}; " for other in relatives if name in other.presets]
            hints += [f"did you mean {near!r}? " for near in difflib.get_close_matches(name, cls.presets, n=1)]
            known = f"there are {', '.join(cls.presets)}" if cls.presets else "pip install swin-hf, which has them"
            raise ValueError(f"unknown preset {name!r}; {''.join(hints[:1])}{known}")
        fields = {**cls.presets[name], **overrides}
        names = overrides.get("id2label")
        if names is not None:  # transformers would drop the names for the sake of the preset's number
            count = overrides.get("num_labels")
            if count not in (None, len(names)):
                raise ValueError(f"num_labels is {count} but id2label names {len(names)} classes; give one of them")
            fields["num_labels"] = len(names)
            fields.setdefault("label2id", {name: int(number) for number, name in names.items()})
        return cls(**fields)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> Any:
        """Read the configuration of a saved model as transformers does; ``kwargs`` change fields.

        Where ``swin_hf`` is installed, it reads every source that :func:`swin_hf.load_checkpoint` takes. A Swin of
        transformers needs only its ``config.json``; of others the weights are downloaded, because their shapes give
        the sizes.

        Raises:
            ValueError: If it cannot be used, or the weights that it has to be derived from cannot be read.
            OSError: If there is no such model.
        """
        source = pretrained_model_name_or_path
        path = Path(source, kwargs.get("subfolder") or "")
        if foreign_reader is None:
            return super().from_pretrained(source, **kwargs)
        try:
            values, others = cls.get_config_dict(source, **kwargs)
        except (OSError, ValueError):
            if path.suffix == ".json" or (path / "config.json").is_file():
                raise
            values, others = {}, {}
        if values.get("model_type") == cls.model_type:
            return cls.from_dict(values, **others)
        files = path.iterdir() if path.is_dir() else ()
        has_weights = any(file.suffix in (".safetensors", ".bin", ".pth") for file in files)
        if values.get("model_type") in (*cls._peers, *cls._strangers) and not has_weights:
            theirs = ("architectures", "model_type") if values["model_type"] in cls._peers else ()
            ours = {name: value for name, value in values.items() if name not in (*theirs, "encoder_stride")}
            config = cls.from_dict(ours, **others)  # its fields have our names; the other version is refused
            config.encoder_stride = config.stride_hw[0]  # theirs may be a default
            return config
        where = {name: kwargs.pop(name) for name in LOCATION if name in kwargs}
        return cls.from_dict(foreign_reader(source, **where).to_dict(), **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration of what a file holds; whatever is wrong with it is a ValueError."""
        if not isinstance(config_dict, dict):
            raise ValueError("config.json is not a JSON object; save the model again")
        model_type = config_dict.get("model_type")
        if isinstance(model_type, str) and model_type in cls._strangers:
            raise ValueError(
                f"the configuration is of model type {model_type!r} and {cls.__name__} of {cls.model_type!r}, another "
                f"version of Swin Transformer; use the classes that begin with {cls._strangers[model_type]}"
            )
        try:
            return super().from_dict(config_dict, **kwargs)
        except ValueError:
            raise
        except Exception as error:  # the file may hold anything, and transformers calls methods of its values
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the configuration cannot be used: {reason[:200]}") from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read ``config.json`` as transformers does; one that cannot be read is a ValueError."""
        path = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "config.json")
        if path.is_file() and path.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"{path} has more than {CONFIG_BYTES // 2**20} MiB; save the model again")
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (OSError, TypeError, AttributeError, KeyError, RecursionError) as error:
            if isinstance(error, OSError) and not isinstance(error.__context__, JSONDecodeError | UnicodeDecodeError):
                raise  # it is not there, or may not be read
            raise ValueError(
                f"config.json of {pretrained_model_name_or_path} is not a JSON object; save the model again"
            ) from error

    @property
    def num_layers(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def stage_dims(self) -> tuple[int, ...]:
        """Channels of each stage: ``C, 2C, 4C, ...``."""
        return tuple(self.embed_dim * 2**stage for stage in range(self.num_layers))

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.stage_dims[-1]

    @property
    def stage_names(self) -> list[str]:
        """``stem, stage1, stage2, ...``, the names that ``out_features`` chooses from."""
        return ["stem", *(f"stage{number}" for number in range(1, self.num_layers + 1))]

    @property
    def image_hw(self) -> Pair:
        """Image height and width in pixels."""
        return as_pair(self.image_size)

    @property
    def patch_hw(self) -> Pair:
        """Patch height and width in pixels."""
        return as_pair(self.patch_size)

    @property
    def stride_hw(self) -> Pair:
        """Height and width in pixels of a token of the last stage."""
        return as_pair(side * 2 ** (self.num_layers - 1) for side in self.patch_hw)

    @property
    def grid_hw(self) -> Pair:
        """Height and width of the first stage's map in tokens; an incomplete patch at the border counts."""
        (height, width), (patch_height, patch_width) = self.image_hw, self.patch_hw
        return -(-height // patch_height), -(-width // patch_width)

    @property
    def stage_windows(self) -> tuple[Pair, ...]:
        """Window height and width in tokens, one pair for each stage."""
        window: Any = self.window_size
        if isinstance(window, int) or (len(window) == 2 and all(isinstance(side, int) for side in window)):
            return (as_pair(window),) * self.num_layers
        return tuple(map(as_pair, window))

    @property
    def drop_path_rates(self) -> tuple[tuple[float, ...], ...]:
        """Stochastic depth of each block of each stage, linear in the block's global position."""
        last, numbers = max(sum(self.depths) - 1, 1), itertools.count()
        return tuple(tuple(self.drop_path_rate * next(numbers) / last for _ in range(depth)) for depth in self.depths)

    def _estimate_parameters(self) -> int:
        """Weights of a model with every part (positions, classifier, decoder), without norms and biases."""
        total = self.hidden_size * (len(self.id2label or {}) + self.num_channels * self.encoder_stride**2)
        total += self.embed_dim * self.num_channels * math.prod(self.patch_hw)
        total += self.embed_dim * math.prod(self.grid_hw) * self.use_absolute_embeddings
        windows = self.stage_windows
        for dim, depth, heads, window in zip(self.stage_dims, self.depths, self.num_heads, windows, strict=True):
            table = heads * math.prod(2 * side - 1 for side in window)
            total += depth * (4 * dim * dim + 2 * dim * int(dim * self.mlp_ratio) + table) + 8 * dim * dim
        return total

    def check_sizes(self) -> None:
        """Check every field against its range and the others, ValueError if one does not fit; models call it again."""
        self._check_general(vars(self))
        for name in ("image_size", "patch_size"):
            check_sides(name, getattr(self, name))
        if math.prod(self.image_hw) > MOST_PIXELS:
            raise ValueError(f"image_size is {self.image_size}; an image has at most {MOST_PIXELS:,} pixels")
        for name in ("num_channels", "embed_dim", "encoder_stride"):
            _check_positive(name, getattr(self, name), MOST_CHANNELS)
        for name, most in (("depths", MOST_BLOCKS), ("num_heads", None)):
            if not isinstance(values := getattr(self, name), list) or not values:
                raise ValueError(f"{name} is {_short(values)}; give a list with an integer for each stage")
            if len(values) > MOST_STAGES:
                raise ValueError(f"{name} has {len(values)} stages; a model has at most {MOST_STAGES}")
            for stage, value in enumerate(values, start=1):
                _check_positive(f"{name} of stage {stage}", value, most)
        if sum(self.depths) > MOST_BLOCKS:
            raise ValueError(f"depths asks for {sum(self.depths)} blocks; a model has at most {MOST_BLOCKS}")
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths {self.depths} has {len(self.depths)} stages but num_heads {self.num_heads} has "
                f"{len(self.num_heads)}; give one entry for each stage in both"
            )
        for stage, (dim, heads) in enumerate(zip(self.stage_dims, self.num_heads, strict=True), start=1):
            if dim % heads:
                raise ValueError(
                    f"num_heads {heads} of stage {stage} does not divide its {dim} channels (embed_dim "
                    f"{self.embed_dim} * 2^{stage - 1}); choose a divisor of {dim} or another embed_dim"
                )
        self._check_windows()
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is a probability in [0, 1)")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be positive")
        if self.norm_targets is not None:
            _check_positive("norm_targets", self.norm_targets, LONGEST_SIDE)
            if self.norm_targets % 2 == 0 or self.norm_targets == 1:
                raise ValueError(f"norm_targets is {self.norm_targets}; a neighbourhood has an odd side of 3 or more")
        if (parameters := self._estimate_parameters()) > MOST_PARAMETERS:
            raise ValueError(
                f"embed_dim {self.embed_dim}, depths {self.depths}, mlp_ratio {self.mlp_ratio} and the other sizes "
                f"make {_short(parameters)} parameters; a model has at most {MOST_PARAMETERS:,}"
            )

    def _check_windows(self) -> None:
        window: Any = self.window_size
        is_list = isinstance(window, list)
        per_stage = is_list and (len(window) != 2 or any(isinstance(stage, list) for stage in window))
        if per_stage and len(window) != self.num_layers:
            raise ValueError(
                f"window_size {window} has {len(window)} entries for {self.num_layers} stages (depths {self.depths}); "
                "give one integer, one (height, width), or one entry for each stage"
            )
        for stage, side in enumerate(window if per_stage else [window], start=1):
            check_sides(f"window_size of stage {stage}" if per_stage else "window_size", side)
        largest = max(self.stage_windows, key=math.prod)
        if math.prod(largest) > MOST_WINDOW_TOKENS:
            raise ValueError(
                f"window_size is {self.window_size}; a window has at most {MOST_WINDOW_TOKENS:,} tokens, "
                f"{math.isqrt(MOST_WINDOW_TOKENS)} x {math.isqrt(MOST_WINDOW_TOKENS)}"
            )

    @classmethod
    def _check_general(cls, values: dict[str, Any]) -> None:
        """Check the types of what is not a size, and that no name is that of a method or of a computed attribute."""
        for name, value in values.items():
            kinds = None if value is None and name in _MAY_BE_NONE else _TYPES.get(name)
            if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{name} is {_short(value)}; it must be of type {wanted}")
            member = inspect.getattr_static(cls, name, None)
            if callable(getattr(member, "__func__", member)) or (isinstance(member, property) and member.fset is None):
                raise ValueError(f"{name} is not a field of the configuration but computed by it; remove it")
        if values.get("attribute_map", cls.attribute_map) != cls.attribute_map:
            raise ValueError(f"attribute_map is {_short(values['attribute_map'])}; it cannot be changed, remove it")
        if (name := values.get("hidden_act", "gelu")) not in ACT2FN:
            raise ValueError(f"hidden_act is {_short(name)}; it must be an activation of transformers, such as 'gelu'")
        architectures = values.get("architectures") or []
        if wrong := [name for name in architectures if not isinstance(name, str)]:
            raise ValueError(f"architectures holds {_short(wrong[0])}; it is a list of names of classes")
        count, names = values.get("num_labels"), values.get("id2label") or {}
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
            raise ValueError(f"num_labels is {_short(count)}; it must be an integer, 0 or more")
        if count is not None and count > MOST_LABELS and len(names) != count:  # transformers would make each a name
            raise ValueError(f"num_labels is {count}; more than {MOST_LABELS:,} need a name each in id2label")
        if wrong := [name for name in names.values() if not isinstance(name, str | int | float)]:
            raise ValueError(f"id2label holds {_short(wrong[0])}; the name of a class is text")

    @classmethod
    def _refuse_near_misses(cls, kwargs: dict[str, Any]) -> None:
        fields = [name for name in cls.__dataclass_fields__ if not name.startswith("_")]
        fields += ["out_features", "out_indices", "num_labels"]
        if foreign := sorted({"extra_norm_every_n_blocks", "norm_features", "pretrained_window_sizes"} & kwargs.keys()):
            raise TypeError(f"{foreign[0]!r} is a field of Swin Transformer V2, not of V1; use SwinV2HFConfig")
        for name in (name for name in kwargs if name not in _OTHER_FAMILIES):
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
            if near and name not in fields and not hasattr(cls, name):
                raise TypeError(f"unknown config field {name!r}; did you mean {near[0]!r}?")


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def as_pair(value: int | Iterable[int]) -> Pair:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _check_positive(name: str, value: Any, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {_short(value)}; it must be a positive integer")
    if most is not None and value > most:
        raise ValueError(f"{name} is {_short(value)}; it must be at most {most}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_sides(name: str, value: Any) -> None:
    if isinstance(value, list) and len(value) != 2:
        raise ValueError(f"{name} is {_short(value)}; give one integer or (height, width)")
    for side in value if isinstance(value, list) else [value]:
        _check_positive(name, side, LONGEST_SIDE)


__all__ = ["SwinHFConfig"]
