"""A class name of diffusers to our class of that name, and back: the one place that knows how diffusers looks it up.

Published folders name diffusers as the home of their components, and so do ours. A pipeline of ours therefore reads
and writes the name "diffusers" and stands in its own class when it loads. `register` goes further: it puts our classes
in the place of diffusers' own, for every program that asks diffusers for them.
"""

import inspect
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from operator import or_
from types import ModuleType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin


class Homes(NamedTuple):
    """Where the two classes of one name are defined."""

    ours: str
    theirs: str


CLASSES = {
    "AutoencoderDC": Homes("sana_sprint.autoencoder.model", "diffusers.models.autoencoders.autoencoder_dc"),
    "SCMScheduler": Homes("sana_sprint.trigflow.scheduler", "diffusers.schedulers.scheduling_scm"),
    "SanaControlNetModel": Homes("sana_sprint.transformer.control", "diffusers.models.controlnets.controlnet_sana"),
    "SanaTransformer2DModel": Homes("sana_sprint.transformer.model", "diffusers.models.transformers.sana_transformer"),
    "SanaSprintPipeline": Homes("sana_sprint.pipelines.text_to_image", "diffusers.pipelines.sana.pipeline_sana_sprint"),
    "SanaSprintImg2ImgPipeline": Homes(
        "sana_sprint.pipelines.image_to_image", "diffusers.pipelines.sana.pipeline_sana_sprint_img2img"
    ),
}
# Classes of ours that diffusers has none for.
ADDITIONS = {
    "SanaMultiControlNetModel": "sana_sprint.transformer.multi_control",
    "SanaSprintControlNetImg2ImgPipeline": "sana_sprint.pipelines.control_image_to_image",
    "SanaSprintControlNetPipeline": "sana_sprint.pipelines.control_to_image",
    "SanaSprintInpaintPipeline": "sana_sprint.pipelines.inpaint",
}

# What diffusers' tables of automatic pipelines get from us, by the names of the tables. Entries of one key are made of
# one another; with a `controlnet` diffusers puts "ControlNet" into a class's name, and looks for what is called so.
AUTO_PIPELINES = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": {
        "sana-sprint": "SanaSprintPipeline",
        "sana-sprint-controlnet": "SanaSprintControlNetPipeline",
    },
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": {
        "sana-sprint": "SanaSprintImg2ImgPipeline",
        "sana-sprint-controlnet": "SanaSprintControlNetImg2ImgPipeline",
    },
    "AUTO_INPAINT_PIPELINES_MAPPING": {"sana-sprint": "SanaSprintInpaintPipeline"},
}

# diffusers' names of what we quantise our models with, and modules of `sana_sprint.quantisation` with our classes.
QUANTISERS = {
    "bitsandbytes_8bit": ("quantisers", "Quantiser8bit"),
    "bitsandbytes_4bit": ("quantisers", "Quantiser4bit"),
    "torchao": ("others", "QuantiserTorchAo"),
    "quanto": ("others", "QuantiserQuanto"),
}

# diffusers recognises what it may load by base classes that it looks up beside the component's own class.
_BASE_CLASSES = ("ModelMixin", "SchedulerMixin")

# What bitsandbytes and torchao log as warnings without anything being wrong, by its loggers: that a package is missing
# which is not needed, once; that products in int8 start from float16, at every product of an 8-bit model; and, where
# diffusers finds torchao and imports it, that it has kernels for another processor, an enumeration for an older torch,
# and no longer the tensors of older checkpoints in pickled files.
_NOTICES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "torchao": "Failed to load ",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
}

_lock = threading.RLock()


def _is_no_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(tuple(_NOTICES.values()))


def silence_notices() -> None:
    """Keep the messages of `_NOTICES` off the screen, and nothing else. To call it again does nothing."""
    for name in _NOTICES:
        logging.getLogger(name).addFilter(_is_no_notice)


class _Later(ModuleType):
    """Stands for a module that is imported when something of it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        self.withdraw()
        return getattr(import_module(self.__name__), name)

    def withdraw(self) -> None:
        """Leave the name to the module itself: from now on, to import it is to import it."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


@contextmanager
def bitsandbytes_later() -> Iterator[None]:
    """Inside, a module that imports bitsandbytes gets it when it first uses it.

    diffusers imports bitsandbytes with every model and uses it for quantised ones; it brings torch's compiler along and
    takes a second. diffusers' module keeps the stand-in, which is as good as what it stands for. Where bitsandbytes has
    been imported before, or is not installed, nothing is done.
    """
    is_late = "bitsandbytes" in sys.modules or "diffusers.quantizers.bitsandbytes.utils" in sys.modules
    spec = None if is_late else find_spec("bitsandbytes")
    if spec is None:
        yield
        return
    stand_in = _Later("bitsandbytes")
    # What libraries look at to see whether it is installed, and where modules come from.
    stand_in.__spec__, stand_in.__file__ = spec, spec.origin
    sys.modules["bitsandbytes"] = stand_in
    try:
        yield
    finally:
        stand_in.withdraw()


def __getattr__(name: str) -> Any:
    # This module is the library that a pipeline of ours names for its components while it loads (`_from_here`).
    if name in CLASSES or name in ADDITIONS:
        return getattr(import_module(CLASSES[name].ours if name in CLASSES else ADDITIONS[name]), name)
    if name in _BASE_CLASSES:
        return getattr(import_module("diffusers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_entry(value: Any) -> bool:
    """Whether a value of model_index.json names a component that we have, as [library, class]."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], str)
    return is_pair and (value[1] in CLASSES or value[1] in ADDITIONS)


def _from_here(value: Any) -> Any:
    """The same value, with a component that we have too taken from this module."""
    return (__name__, value[1]) if _is_entry(value) and value[0] == "diffusers" else value


def _as_published(value: Any) -> Any:
    """The same value, with a component of ours called diffusers', where every reader finds one of that name.

    One that diffusers has no class for is called this module's, wherever it is defined.
    """
    is_ours = _is_entry(value) and str(value[0]).partition(".")[0] == __name__.partition(".")[0]
    return ("diffusers" if value[1] in CLASSES else __name__, value[1]) if is_ours else value


class _Unchanged:
    """Stands for a dtype where none was asked for."""


_UNCHANGED = _Unchanged()


class PublishedPipeline:
    """Mixin, ahead of DiffusionPipeline: loads our classes from published folders, and writes published folders.

    Nothing of diffusers is altered for it: only what this pipeline reads from and writes to model_index.json.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """A pipeline from a folder, or from a repository of the hub, in the layout of diffusers.

        Transformer, autoencoder and scheduler are ours where diffusers has a class of the same name; components
        passed by name, ours or diffusers', are kept as they are.

        Args:
            pretrained_model_name_or_path: The folder, or the repository as "owner/name".
            **kwargs: As for diffusers' `DiffusionPipeline.from_pretrained`: `dtype` (or `torch_dtype`), `variant`,
                `device_map`, `quantization_config`, components by name, and so on. Beside "balanced", "cuda" and
                "cpu", `device_map` takes devices by component, such as {"transformer": "cuda", "vae": "cuda"}: "" in
                it stands for the components that are not named, which are on the CPU without it.
        """
        if kwargs.get("dtype") is None and "torch_dtype" in kwargs:
            # The older name of the argument. It still works, and diffusers would warn of it.
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        # transformers quantises the text encoder with bitsandbytes as it is.
        with import_module("sana_sprint.quantisation.pieces").InPieces():
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """diffusers' own, which `from_pretrained` loads components by; ours are taken from here."""
        entries, unused, hidden = super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]
        return {name: _from_here(value) for name, value in entries.items()}, unused, hidden

    def register_to_config(self, **entries: Any) -> None:
        """diffusers' own, which model_index.json is written from; ours are written as diffusers'."""
        super().register_to_config(  # type: ignore[misc]
            **{name: _as_published(value) for name, value in entries.items()}
        )

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """A pipeline around the components of another one.

        The components are shared, so unlike in diffusers a dtype that is not given leaves them as they are.

        Args:
            pipeline: Any pipeline of diffusers, or of ours, with the components that this one needs.
            **kwargs: As for diffusers' `DiffusionPipeline.from_pipe`: `dtype`, and components to use instead.
        """
        if all(kwargs.get(name) is None for name in ("dtype", "torch_dtype", "custom_pipeline")):
            kwargs.pop("torch_dtype", None)
            kwargs["dtype"] = _UNCHANGED  # diffusers hands it on to `to`, below
        return super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast every model of the pipeline, as diffusers does; returns the pipeline."""
        if kwargs.get("dtype") is _UNCHANGED:
            return self
        return super().to(*args, **kwargs)  # type: ignore[misc]

    def device_of(self, name: str) -> Any:
        """The device that a network computes on, by the component's name; offloaded weights wait on another."""
        network = getattr(self, name)
        groups = import_module("diffusers.hooks.group_offloading")
        if groups._is_group_offload_enabled(network):
            return groups._get_group_onload_device(network)
        hooks = (getattr(module, "_hf_hook", None) for module in network.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        device = next((device for device in devices if device is not None), network.device)
        return import_module("torch").device(device)


class QuantisedModel:
    """Mixin, ahead of diffusers' ModelMixin, whose loader knows no quantisers but diffusers'."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, **kwargs: Any) -> Any:
        """A model from a folder, or from a repository of the hub.

        Args:
            pretrained_model_name_or_path: The folder, or the repository as "owner/name".
            **kwargs: As for diffusers' `ModelMixin.from_pretrained`. With a `quantization_config`, or that of a folder,
                for bitsandbytes, torchao or Quanto, `sana_sprint.quantisation` says what is quantised.
        """
        with _our_quantisers():
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the model, as diffusers does; returns the model."""
        if kwargs.get("dtype") is None:
            # No cast: diffusers saves adapters with it, and refuses to cast a quantised model.
            kwargs.pop("dtype", None)
        return super().to(*args, **kwargs)  # type: ignore[misc]

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """Keep the weights in another dtype than they compute in, as diffusers does.

        Raises:
            ValueError: for a quantised model, of which it would round just what quantisation leaves exact.
        """
        if getattr(self, "is_quantized", False):
            raise ValueError(
                f"{type(self).__name__} is quantised, and its weights are not stored in another dtype: load it without"
                " quantization_config for layerwise casting"
            )
        super().enable_layerwise_casting(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _our_quantisers() -> Iterator[None]:
    """Inside, diffusers quantises with ours what this thread loads; for other threads nothing changes."""
    table = import_module("diffusers.quantizers.auto").AUTO_QUANTIZER_MAPPING
    thread = threading.get_ident()

    def chooser(method: str, theirs: Any) -> Any:
        def choose(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return theirs(*args, **kwargs)
            # Looked up late, like all above this module; and bitsandbytes takes seconds to import.
            module, name = QUANTISERS[method]
            return getattr(import_module(f"sana_sprint.quantisation.{module}"), name)(*args, **kwargs)

        return choose

    with _lock:
        theirs = {method: table[method] for method in QUANTISERS}
        table.update({method: chooser(method, quantiser) for method, quantiser in theirs.items()})
        try:
            yield
        finally:
            table.update(theirs)


def fill_quantised(
    model: Any, tensors: Mapping[str, Any], quantization_config: Any, dtype: Any = None, device: Any = None
) -> Any:
    """A model on the meta device with tensors in it, quantised one by one; returns the model.

    Args:
        model: as its class makes it from a config.
        tensors: every one of its state dict, by name; looked up one after the other.
        quantization_config: of diffusers.
        dtype: of what is not quantised; the quantiser's choice if None.
        device: where all of it goes; the quantiser's choice if None.
    """
    fill = import_module("diffusers.models.model_loading_utils").load_model_dict_into_meta
    with _our_quantisers():
        choose = import_module("diffusers.quantizers.auto").DiffusersAutoQuantizer.from_config
        quantiser = choose(quantization_config, pre_quantized=False)
    device_map = None if device is None else {"": import_module("torch").device(device)}
    quantiser.validate_environment(device_map=device_map)
    dtype = quantiser.update_torch_dtype(dtype)
    device_map = quantiser.update_device_map(device_map)
    quantiser.preprocess_model(model=model, device_map=device_map, keep_in_fp32_modules=[])
    fill(model, tensors, dtype=dtype, device_map=device_map, hf_quantizer=quantiser)
    if device_map is not None:
        import_module("accelerate").dispatch_model(model, device_map)
    quantiser.postprocess_model(model)
    model.hf_quantizer = quantiser
    return model


class SingleFileModel:
    """Mixin, ahead of diffusers' FromOriginalModelMixin, whose own loader knows no class but diffusers'."""

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Any:
        """A model from one file of weights: in the original layout, Sprint's included, or in diffusers'.

        Args:
            pretrained_model_link_or_path_or_dict: The file, a link to one on the hub, or a state dict.
            **kwargs: As for diffusers' `from_single_file`: `config`, `dtype` (or `torch_dtype`), `device`,
                `quantization_config`, `revision` and so on, and entries of the config, such as `sample_size`. Those
                that `sana_sprint.checkpoints.single_file.load_single_file` does not list are refused.
        """
        # Looked up late: this module is the lowest of all, and checkpoints stand above the models.
        load = import_module("sana_sprint.checkpoints.single_file").load_single_file
        return load(cls, pretrained_model_link_or_path_or_dict, **kwargs)


def _ours_for_theirs() -> dict[Any, Any]:
    """diffusers' classes, each with ours of the same name. Imports them all."""
    return {
        getattr(import_module(homes.theirs), name): getattr(import_module(homes.ours), name)
        for name, homes in CLASSES.items()
    }


def _resolve_lazy_names() -> None:
    """Make diffusers' lazy packages hold the classes under their names, as they do once the names have been used."""
    for name, homes in CLASSES.items():
        packages = homes.theirs.split(".")[:-1]
        for depth in range(1, len(packages) + 1):
            getattr(import_module(".".join(packages[:depth])), name, None)


def _diffusers_modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "diffusers" and isinstance(module, ModuleType):
            yield module


def _is_at_home(module: ModuleType, name: str) -> bool:
    """Whether this is the module of diffusers that defines the class: that one stays as it is."""
    return name in CLASSES and CLASSES[name].theirs == module.__name__


def _exchange_names(new_for_old: Mapping[Any, Any]) -> None:
    """Give the names of diffusers' modules another class, wherever they are names of one of the old ones."""
    for module in _diffusers_modules():
        for name, value in list(vars(module).items()):
            if inspect.isclass(value) and value in new_for_old and not _is_at_home(module, name):
                setattr(module, name, new_for_old[value])


def _exchange_annotations(new_for_old: Mapping[Any, Any]) -> None:
    """Do the same in the annotations of diffusers' constructors, by which pipelines judge their components."""
    for module in _diffusers_modules():
        for value in list(vars(module).values()):
            if not inspect.isclass(value) or value.__module__ != module.__name__:
                continue
            annotations = getattr(vars(value).get("__init__"), "__annotations__", {})
            for name, annotation in annotations.items():
                annotations[name] = _exchanged(annotation, new_for_old)


def _exchanged(annotation: Any, new_for_old: Mapping[Any, Any]) -> Any:
    if inspect.isclass(annotation):
        return new_for_old.get(annotation, annotation)
    if get_origin(annotation) in (Union, UnionType):
        members = get_args(annotation)
        exchanged = [_exchanged(member, new_for_old) for member in members]
        return annotation if exchanged == list(members) else reduce(or_, exchanged)
    return annotation


@contextmanager
def _without_advice() -> Iterator[None]:
    """Inside, transformers does not recommend torchvision to whoever imports pipelines that would profit from it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _auto_pipelines() -> list[tuple[dict[str, Any], str, str]]:
    """Each entry of ours as diffusers' table, key and name of the class. Imports most of diffusers' pipelines."""
    with _without_advice():
        tables = import_module("diffusers.pipelines.auto_pipeline")
    return [(getattr(tables, table), key, name) for table, ours in AUTO_PIPELINES.items() for key, name in ours.items()]


def register() -> None:
    """Put our classes in the place of diffusers' classes of the same names, and beside them those it does not have.

    From then on `from diffusers import SanaTransformer2DModel`, `DiffusionPipeline.from_pretrained`,
    `AutoPipelineForText2Image.from_pretrained`, the same for image-to-image and inpainting, with
    `controlnet` except for inpainting, and `AutoModel.from_pretrained` give ours, whichever module of diffusers was
    imported before or is imported after. Names that a program has imported from diffusers earlier stay what they were.
    To call it again does nothing.
    """
    with _lock, bitsandbytes_later():
        ours_for_theirs = _ours_for_theirs()
        auto_pipelines = _auto_pipelines()
        _resolve_lazy_names()
        _exchange_names(ours_for_theirs)
        # diffusers' other pipelines then take either class without a warning.
        _exchange_annotations({theirs: theirs | ours for theirs, ours in ours_for_theirs.items()})
        for table, key, name in auto_pipelines:
            table[key] = __getattr__(name)
        for name in ADDITIONS:
            setattr(import_module("diffusers"), name, __getattr__(name))


def unregister() -> None:
    """Undo `register`: every name and table of diffusers is what it was. Without `register`, does nothing."""
    with _lock:
        if "diffusers.pipelines.auto_pipeline" not in sys.modules:
            return
        auto_pipelines = _auto_pipelines()
        if not all(key in table for table, key, _ in auto_pipelines):
            return
        theirs_for_ours = {ours: theirs for theirs, ours in _ours_for_theirs().items()}
        _exchange_names(theirs_for_ours)
        _exchange_annotations(theirs_for_ours)
        for table, key, _ in auto_pipelines:
            del table[key]
        for name in ADDITIONS:
            delattr(import_module("diffusers"), name)
