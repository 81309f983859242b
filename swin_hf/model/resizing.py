"""Loading and resizing: a checkpoint in other sizes than it was trained in, and never a random layer in silence.

:class:`ResizableMixin` extends transformers' ``from_pretrained`` and changes the sizes of a live model. The functions
below it resample the tensors whose shape depends on a size: bias tables, position embeddings, patch kernels, and the
decoder of a masked image model.

Shape legend:
    H and W height and width of a map in tokens, L = H * W, C channels,
    Mh and Mw sides of a window, h heads. Sizes are pairs (height, width), in tokens where nothing else is said.
"""

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from .configuration_swin_hf import FREE_PARAMETERS, LOCATION, SwinHFConfig
from .windows import Pair

logger = logging.get_logger(__name__)

# Keys of task heads: may be missing, or unused, when a model of another task saved the checkpoint.
_HEADS = re.compile(r"(^|\.)(classifier|decoder|decode_head|auxiliary_head|hidden_states_norms)\.|(^|\.)mask_token$")
# Sizes that weights can be adapted to on load.
_RESIZABLE = ("image_size", "patch_size", "num_channels", "window_size")

# Reads all that is not a folder or a repository of this family: the installed package sets
# :func:`swin_hf.loading.read_foreign`. Code that travels alone has no such reader.
foreign_reader: Callable[..., tuple[Path | None, Any, Any, Any]] | None = None


class ResizableMixin:
    """What ``SwinHFPreTrainedModel`` adds to transformers' ``PreTrainedModel``; comes before it in the bases."""

    config: SwinHFConfig
    config_class: Any
    _left_out = "$^"  # pattern of the keys of the family that a class leaves out on purpose

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        strict: bool | None = None,
        method: str = "bicubic",
        head_rows: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model as transformers does, adapt its weights to other sizes, and refuse random layers.

        Args:
            pretrained_model_name_or_path: See transformers, like all that is not listed here. Where ``swin_hf`` is
                installed, anyone's Swin too: what :func:`swin_hf.load_checkpoint` takes.
            model_args: See there.
            config: Weights are adapted where its sizes differ from those of the checkpoint.
            strict: None refuses a checkpoint that leaves layers random, unless the loading info is asked for; True one
                that has layers to spare as well; False takes both, and logs random layers as an error. Heads and mask
                tokens may be new, or left over, if another class saved the checkpoint.
            method: How bias tables are resampled, see :func:`resize_bias_table`.
            head_rows: Numbers of the classes to keep, see :meth:`select_labels`.
            kwargs: ``image_size``, ``window_size``, ``patch_size`` and ``num_channels`` adapt the weights, see
                :meth:`set_input_size`, :meth:`resize_patches` and :meth:`resize_channels`. ``use_safetensors`` is
                True unless it is given.

        Raises:
            ValueError: If the checkpoint does not fit under ``strict`` (the message lists the keys), a size is out of
                range, or the index of a folder names a file outside of it.
            OSError: If there is no such model.
        """
        source = pretrained_model_name_or_path
        changes = {name: size for name in _RESIZABLE if (size := kwargs.pop(name, None)) is not None}
        is_told = kwargs.pop("output_loading_info", False)
        if head_rows is not None:
            kwargs.pop("num_labels", None)  # it follows from the rows
        folder, stored, processor = cls._find(source, config, kwargs)
        if stored is not None and isinstance(config, SwinHFConfig):
            config, differences = _with_sizes_of(stored, config)
            changes = {**differences, **changes}
            if folder is None:
                config.shift_per_axis = stored.shift_per_axis  # the rule that the weights were trained with
            if head_rows is not None:
                config.id2label, config.label2id = stored.id2label, stored.label2id
        elif stored is not None and kwargs.keys() == {"state_dict"}:
            config = stored
        elif stored is not None:
            types = {name: kwargs.pop(name) for name in {"dtype", "torch_dtype"} & kwargs.keys()}  # may be "auto"
            config, kwargs = cls.config_class.from_dict(stored.to_dict(), return_unused_kwargs=True, **kwargs)
            kwargs |= types
        if "patch_size" in changes:
            kwargs.pop("encoder_stride", None)  # follows from the patch
        with _no_conversion():
            model, info = super().from_pretrained(  # type: ignore[misc]  # of PreTrainedModel
                folder, *model_args, config=config, output_loading_info=True, **{"use_safetensors": True, **kwargs}
            )
        model._check_loading(info, source, strict, is_told)
        if source is not None and folder is None:
            model.config.name_or_path = str(source)
            model._processor = model.config.image_hw, processor
        model._adapt(changes, method, head_rows)
        return (model, info) if is_told else model

    @classmethod
    def _find(cls, source: Any, config: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Where transformers finds the weights; None if the package read them, into ``kwargs["state_dict"]``.

        Also gives their configuration, if it was read or is to be compared with ``config``, and image processor.
        """
        if source is None:
            return None, None, None
        for index in Path(source, kwargs.get("subfolder") or "").glob("*.index*.json"):
            shard_names(index)
        where = {name: kwargs[name] for name in LOCATION if name in kwargs}
        values = _stored_values(source, where)
        is_ours = values.get("model_type") == cls.config_class.model_type
        if not is_ours and not values.get("is_adapter") and (values or foreign_reader is not None):
            if foreign_reader is None:
                raise ValueError(
                    f"{source} is not a model of type {cls.config_class.model_type}, and the code of the model alone "
                    "reads no other; the package does: pip install swin-hf, and import swin_hf first"
                )
            pickles = kwargs.pop("use_safetensors", None) is False
            source, stored, kwargs["state_dict"], processor = foreign_reader(cls, source, pickles=pickles, **where)
            for name in where:  # the weights have been read
                del kwargs[name]
            if source is None:
                return None, stored, processor
            is_ours, values = True, _stored_values(source, {})
        is_compared = is_ours and isinstance(config, SwinHFConfig)
        return source, cls.config_class.from_dict(values) if is_compared else None, None

    def _adapt(self: Any, changes: dict[str, Any], method: str, head_rows: Sequence[int] | None) -> None:
        """Give a model that was just loaded the sizes and the classes that were asked for."""
        if changes and any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError(
                f"{sorted(changes)} cannot change while weights are offloaded; load without device_map, save the "
                "resized model, and load that"
            )
        if "patch_size" in changes:
            self.resize_patches(changes["patch_size"])
        if "num_channels" in changes:
            self.resize_channels(changes["num_channels"])
        if changes:
            self.set_input_size(changes.get("image_size"), changes.get("window_size"), method)
        if head_rows is not None:
            self.select_labels(head_rows)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does; with a model that was read from anyone else's, also its image processor."""
        size, values = getattr(self, "_processor", None) or (None, None)
        path = Path(save_directory, "preprocessor_config.json")
        if values is not None and size == self.config.image_hw and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # of PreTrainedModel

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; before memory is allocated, headers and sizes of the files are checked."""
        files = [Path(path) for path in checkpoint_files or ()]
        for path in files:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
                    refuse_types(path.name, types)
        size, asked = sum(path.stat().st_size for path in files), sum(weight.numel() for weight in model.parameters())
        if files and asked > max(size, FREE_PARAMETERS):  # a parameter has one byte or more
            raise ValueError(
                f"config.json asks for {asked:,} parameters, but the weights have {size:,} bytes, less than one for "
                "each; save both again with save_pretrained"
            )
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _check_loading(self: Any, info: dict[str, Any], source: Any, strict: bool | None, is_told: bool) -> None:
        """Refuse, or log, what loading left random; see ``strict`` of :meth:`from_pretrained`."""
        no_random = (
            not (is_told or source is None) if strict is None else strict
        )  # without a source, the caller gave the weights
        same_class = type(self).__name__ in (self.config.architectures or ())
        missing = {key for key in info["missing_keys"] if same_class or not _HEADS.search(key)}
        missing |= {key for key, *_ in info["mismatched_keys"] if not _HEADS.search(key)}
        spare = set(info["unexpected_keys"]) if strict else set()
        spare = {key for key in spare if not _HEADS.search(key) and not re.search(self._left_out, key)}
        if spare or (missing and no_random):
            raise ValueError(
                f"{source} does not fit {type(self).__name__}: {len(missing)} keys are missing and would be random"
                f"{_listed(missing)}; {len(spare)} have no place in the model{_listed(spare)}; make config.json agree "
                "with the weights (depths, embed_dim), or ask for random layers on purpose with strict=False"
            )
        if missing and source is not None:
            logger.error(
                f"{len(missing)} of {len(self.state_dict())} weights of {type(self).__name__} are not in {source} and "
                f"are random{_listed(missing)}; without strict=False such a checkpoint is refused"
            )

    @torch.no_grad()
    def set_input_size(
        self: Any, image_size: int | Pair | None = None, window_size: Any = None, method: str = "bicubic"
    ) -> Any:
        """Change the training image size, in pixels, and the windows of a live model; returns the model.

        Bias tables are resampled for the new windows, see :func:`resize_bias_table`, and absolute position embeddings
        for the new image. Windows may have any form that the configuration takes.

        Raises:
            ValueError: If a size is out of range, or the image is smaller than one patch.
        """
        target = _changed(self.config, image_size=image_size, window_size=window_size)
        if any(side < patch for side, patch in zip(target.image_hw, target.patch_hw, strict=True)):
            raise ValueError(
                f"image_size {target.image_size} is smaller than one patch of {target.patch_size}; "
                "choose a larger image or resample the patches first"
            )
        for stage, window in zip(self.base_model.stages, target.stage_windows, strict=False):
            for block in stage.blocks:
                self._resize_attention(block.attention, window, method)
                block.attention.window = block.window = window
        self._move_to_grid(target.grid_hw)
        self.config.image_size, self.config.window_size = target.image_size, target.window_size
        return self

    def resize_windows(self, *args: Any, **kwargs: Any) -> Any:
        """The name of :meth:`set_input_size` in version 0.1; removed in 0.3."""
        return self.set_input_size(*args, **kwargs)

    @torch.no_grad()
    def resize_patches(self: Any, patch_size: int | Pair) -> Any:
        """Change the patch size of a live model, in pixels; :func:`resample_patches` says how. Returns the model.

        The decoder of a masked image model, whose stride follows from the patch, is interpolated; it needs a square.
        """
        target = _changed(self.config, patch_size=patch_size)
        target.encoder_stride = target.stride_hw[0]
        self._resize_head(target)
        convolution = self.base_model.embeddings.patch_embeddings
        convolution.weight = _like(convolution.weight, resample_patches(convolution.weight, target.patch_hw))
        convolution.kernel_size = convolution.stride = target.patch_hw
        self._move_to_grid(target.grid_hw)
        self.config.patch_size, self.config.encoder_stride = target.patch_size, target.encoder_stride
        return self

    @torch.no_grad()
    def resize_channels(self: Any, num_channels: int) -> Any:
        """Change the image channels of a live model; :func:`channel_matrix` says how. Returns the model.

        A masked image model also reconstructs that many: the old ones in turn, or, if there are fewer, the mean of
        those that fall on the same place.
        """
        target = _changed(self.config, num_channels=num_channels)
        self._resize_head(target)
        convolution = self.base_model.embeddings.patch_embeddings
        mix = channel_matrix(convolution.in_channels, num_channels).to(convolution.weight)
        convolution.weight = _like(convolution.weight, torch.einsum("oihw,ni->onhw", convolution.weight, mix))
        convolution.in_channels = num_channels
        self.config.num_channels = num_channels
        return self

    @torch.no_grad()
    def select_labels(self: Any, rows: Sequence[int]) -> Any:
        """Keep the classes with the numbers ``rows`` of a live classifier, in this order; returns the model.

        An example is the 1k of ImageNet out of 22k. The names in ``config.id2label`` are kept too.
        """
        classes, head = self.config.id2label, self.classifier
        wrong = [row for row in rows if not 0 <= row < len(classes)]
        if wrong or not len(rows):
            raise ValueError(
                f"rows {wrong[:5] if wrong else list(rows)} are not classes of the model; give numbers from 0 to "
                f"{len(classes) - 1}"
            )
        index = torch.as_tensor(list(rows), device=head.weight.device)
        head.weight, head.bias = _like(head.weight, head.weight[index]), _like(head.bias, head.bias[index])
        names = [classes[row] for row in rows]
        self.num_labels = head.out_features = self.config.num_labels = len(rows)
        if len(set(names)) == len(names):
            self.config.id2label = dict(enumerate(names))
            self.config.label2id = {name: number for number, name in enumerate(names)}
        return self

    def _resize_attention(self, attention: Any, window: Pair, method: str) -> None:
        """Adapt what a layer has learned to another window."""
        table = resize_bias_table(attention.relative_position_bias_table, attention.window, window, method)
        attention.relative_position_bias_table = _like(attention.relative_position_bias_table, table)

    def _resize_head(self, target: SwinHFConfig) -> None:
        """Adapt a head whose sizes depend on those of ``target``; refuse a target that it cannot take."""

    def _move_to_grid(self: Any, grid: Pair) -> None:
        """Interpolate absolute position embeddings, where there are any."""
        embeddings = self.base_model.embeddings
        if embeddings.position_embeddings is not None:
            positions = resize_position_embeddings(embeddings.position_embeddings, embeddings.grid, grid)
            embeddings.position_embeddings = _like(embeddings.position_embeddings, positions.flatten(1, 2))
        embeddings.grid = grid


def resize_bias_table(table: Tensor, old: Pair, new: Pair, method: str = "bicubic") -> Tensor:
    """Resample a bias table ``((2 Mh - 1)(2 Mw - 1), h)`` of an old window for a new one; dtype and device stay.

    ``"bicubic"`` is what Microsoft's loader does. SimMIM's is ``"geometric"``: the old offsets are spread over the new
    range in a geometric progression, so that near offsets keep their resolution. ValueError for another method, or for
    a table that does not have the rows of the old window.
    """
    old_sides, new_sides = (2 * old[0] - 1, 2 * old[1] - 1), (2 * new[0] - 1, 2 * new[1] - 1)
    if table.shape[0] != old_sides[0] * old_sides[1]:
        raise ValueError(
            f"the bias table has {table.shape[0]} rows; a window of {old[0]}x{old[1]} has {old_sides[0] * old_sides[1]}"
        )
    if method not in ("bicubic", "geometric"):
        raise ValueError(f"unknown method {method!r}; choose 'bicubic' or 'geometric'")
    if old == new:
        return table
    maps = table.T.float().reshape(1, -1, *old_sides)  # 1, h, 2Mh - 1, 2Mw - 1
    if method == "bicubic":
        maps = F.interpolate(maps, size=new_sides, mode="bicubic", align_corners=False)
    else:
        for axis in (2, 3):
            weights = _geometric_weights(old_sides[axis - 2], new_sides[axis - 2]).to(maps)
            maps = torch.movedim(torch.movedim(maps, axis, -1) @ weights.T, -1, axis)
    return maps.reshape(-1, new_sides[0] * new_sides[1]).T.to(table.dtype).contiguous()


def _geometric_weights(old_side: int, new_side: int) -> Tensor:
    """Matrix ``(new_side, old_side)`` of a cubic spline through a geometric progression of offsets.

    As SimMIM's ``remap_pretrained_keys_swin``: the ratio q for which ``1 + q + q^2 + ...`` over the old half axis
    reaches the end of the new one is found by bisection. Where the window shrinks, q is 1.
    """
    half_old, half_new = old_side // 2, new_side // 2
    low, high = 1.0, max(1.5, float(half_new))
    for _ in range(60):
        ratio = (low + high) / 2
        if sum(ratio**power for power in range(half_old)) > half_new:
            high = ratio
        else:
            low = ratio
    steps = [sum(ratio**power for power in range(k + 1)) for k in range(half_old)]
    knots = torch.tensor([*(-step for step in reversed(steps)), 0.0, *steps], dtype=torch.float64)
    targets = torch.arange(new_side, dtype=torch.float64) - half_new
    return _cubic_spline_weights(knots, targets.clamp(knots[0], knots[-1]))


def _cubic_spline_weights(knots: Tensor, targets: Tensor) -> Tensor:
    """Matrix that evaluates the cubic spline through ``knots`` at ``targets``, float64.

    The ends are "not a knot", as in SciPy's ``interp2d``, which SimMIM used: the spline is a cubic plus, for each knot
    but two at each end, a multiple of ``max(0, x - knot)^3``. Three knots define a parabola, one knot a constant.
    """
    reach = knots[-1].clamp(min=1)

    def basis(x: Tensor) -> Tensor:
        powers = [(x / reach) ** power for power in range(min(len(knots), 4))]
        return torch.stack([*powers, *(((x - knot) / reach).clamp(min=0) ** 3 for knot in knots[2:-2])], dim=1)

    return torch.linalg.solve(basis(knots), basis(targets), left=False)


def resize_position_embeddings(embeddings: Tensor, old: Pair, new: Pair) -> Tensor:
    """Interpolate position embeddings ``(1, L, C)`` of one grid for another, bicubic; ``(1, H, W, C)``."""
    maps: Tensor = embeddings.unflatten(1, old)  # 1, H, W, C
    if old == new:
        return maps
    resized = F.interpolate(maps.permute(0, 3, 1, 2).float(), size=new, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(embeddings.dtype)


def resample_patches(kernel: Tensor, new: Pair) -> Tensor:
    """Resample patch kernels ``(out, in, h, w)`` for patches of ``new`` pixels, so that tokens stay the same.

    The pseudo-inverse of FlexiViT (https://arxiv.org/abs/2212.08013, section 3.4): the new kernel gives for a patch
    that was enlarged with bicubic interpolation what the old kernel gives for the patch itself.
    """
    old = (kernel.shape[2], kernel.shape[3])
    if old == new:
        return kernel
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
    enlarge = F.interpolate(pixels, size=new, mode="bicubic", align_corners=False).flatten(1)  # hw, h'w'
    inverse = torch.linalg.pinv(enlarge).T.to(kernel.device)  # hw, h'w'
    resampled: Tensor = (kernel.flatten(2).double() @ inverse).unflatten(2, new)  # out, in, h', w'
    return resampled.to(kernel.dtype)


def channel_matrix(old: int, new: int) -> Tensor:
    """Matrix ``(new, old)`` float32 that mixes the input weights of a model for another number of image channels.

    A picture of equal channels keeps its output: additional channels repeat the old ones in turn, each divided by the
    number of its copies (1 to 3: a third each); surplus channels are added to the others in turn (3 to 1: the sum).
    """
    matrix = torch.zeros(new, old)
    for place in range(max(old, new)):
        matrix[place % new, place % old] = 1
    return matrix / matrix.sum(dim=0)


def resize_decoder(decoder: Any, channels: int, stride: int) -> None:
    """Adapt the decoder of a masked image model in place, for other image channels and another stride in pixels.

    Its rows are the pixels of ``stride x stride`` squares, channel by channel.
    """
    convolution, shuffle = decoder
    side = shuffle.upscale_factor
    rows = torch.cat([convolution.weight.flatten(1), convolution.bias[:, None]], dim=1).float()
    pixels = rows.T.unflatten(1, (-1, side, side))  # C + 1, channels, stride, stride
    mix = channel_matrix(pixels.shape[1], channels).to(pixels)
    pixels = torch.einsum("ckhw,nk->cnhw", pixels, mix / mix.sum(dim=1, keepdim=True))
    if stride != side:
        pixels = F.interpolate(pixels, size=(stride, stride), mode="bicubic", align_corners=False)
    rows = pixels.flatten(1).T.to(convolution.weight.dtype)
    convolution.weight = _like(convolution.weight, rows[:, :-1, None, None])
    convolution.bias = _like(convolution.bias, rows[:, -1])
    convolution.out_channels = channels * stride**2
    shuffle.upscale_factor = stride


def check_stride(config: SwinHFConfig) -> None:
    """Refuse a decoder that does not give back the size of the image, with a ValueError."""
    stride = config.stride_hw
    if stride != (config.encoder_stride, config.encoder_stride):
        raise ValueError(
            f"encoder_stride is {config.encoder_stride} but patches of {config.patch_hw} in {config.num_layers} "
            f"stages shrink an image by {stride}; the decoder needs a square patch and encoder_stride={stride[0]}"
        )


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=parameter.requires_grad)


def _changed(config: SwinHFConfig, **changes: Any) -> SwinHFConfig:
    """Copy of a configuration with other sizes, checked; None changes nothing."""
    target = copy.deepcopy(config)
    for name, value in changes.items():
        if value is not None:
            setattr(target, name, value)
    target.check_sizes()
    return target


def _with_sizes_of(stored: SwinHFConfig, config: SwinHFConfig) -> tuple[SwinHFConfig, dict[str, Any]]:
    """Copy ``config`` with the checkpoint's sizes; return also the requested sizes that differ, to resize to later."""
    config.check_sizes()
    derived = {"image_size": "image_hw", "patch_size": "patch_hw", "window_size": "stage_windows"}
    names = [n for n in _RESIZABLE if getattr(config, derived.get(n, n)) != getattr(stored, derived.get(n, n))]
    differences = {name: getattr(config, name) for name in names}
    config = _changed(config, **{name: getattr(stored, name) for name in names})
    if "patch_size" in names:
        config.encoder_stride = stored.encoder_stride
    return config, differences


def _stored_values(source: Any, where: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``config.json`` of a folder or a repository; an empty dictionary where it has no such file."""
    if Path(source).is_file():
        return {}
    try:
        values: Any = SwinHFConfig.get_config_dict(source, **where)[0]
        if values != {}:  # as transformers answers for a folder without the file
            return values if isinstance(values, dict) else SwinHFConfig.from_dict(values)  # which raises
    except (OSError, ValueError):
        if Path(source, where.get("subfolder") or "", "config.json").is_file():
            raise
    try:
        return {"is_adapter": True} if find_adapter_config_file(source, **where) else {}
    except (OSError, ValueError):
        return {}


def shard_names(index: Path, pattern: str = r"[\w-][\w.-]*") -> list[str]:
    """The files that an index of shards names, sorted; ValueError for one elsewhere, which transformers would load."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} cannot be read ({error}); save the model again") from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(pattern, name):
            raise ValueError(
                f"{index.name} points to {name!r}; a shard is in the folder of its index and has a plain name such as "
                "model-00001-of-00002.safetensors, anything else is refused: download the folder again, or save the "
                "model again"
            )
    return sorted(names)


def refuse_types(source: str, types: Mapping[str, str]) -> None:
    """Refuse weights whose type, in the words of safetensors, has no fractions or needs a scale."""
    for name, kind in types.items():
        is_count = kind == "I64" and name.endswith(".num_batches_tracked")  # of a batch normalisation
        if kind not in ("F64", "F32", "F16", "BF16") and not is_count:
            raise ValueError(
                f"{source} holds {name} as {kind}; weights are floating-point numbers (F64, F32, F16, BF16): save the "
                "model again, not quantised"
            )


@contextmanager
def _no_conversion() -> Iterator[None]:
    """Disable transformers' automatic safetensors conversion; it posts repository id and token to a Space."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _listed(keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:20]) + (", ..." if len(keys) > 20 else "")
    return f" ({shown})" if keys else ""
