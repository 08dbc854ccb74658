"""`load`: a pack, a local folder or a hub id → the model in eval mode and its tokenizer or processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenthrift.core.errors import ThriftError, did_you_mean
from tokenthrift.models.packs import composed, download
from tokenthrift.models.packs.cache import damaged, verify
from tokenthrift.models.packs.pulling import pull
from tokenthrift.models.packs.quiet import quiet, spinner
from tokenthrift.models.packs.spec import PACKS

if TYPE_CHECKING:
    import torch

# By the end of the architecture's name in config.json; anything else loads as the bare AutoModel.
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)


def load(
    name_or_path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load a model in eval mode, with its tokenizer (text), image processor (vision) or processor (both).

    The name is a pack's (`smollm2-135m`, pulled on first use), a folder with safetensors and config.json, or a hub id
    with a `/` in it. Weights are only read from safetensors and no code from a repository is run. Raises ThriftError:
    unknown name, damaged pack, pickle-only folder, incomplete or NaN/infinite weights, bad device, dtype or attention.
    """
    import torch

    place, number = _device(device, torch), _dtype(dtype, torch)
    name = str(name_or_path_or_hub_id)
    where, pack = _locate(name)
    encoder = PACKS[pack].encoder if pack else ""
    if pack:
        verify(where, encoder or pack)
    with quiet():
        try:
            if encoder:
                model, companion = composed.compose(where, number, attn_implementation), composed.processor()
            else:
                model = _model(where, number, attn_implementation)
                companion = _companion(where, model.config)
        except ThriftError as error:
            raise ThriftError(f"cannot load '{name}': {error}") from error
        except Exception as error:  # transformers raises nearly every type for bad files
            if pack and type(error).__name__ == "SafetensorError":
                raise damaged(encoder or pack, download.first_line(error)) from error
            raise ThriftError(f"cannot load '{name}': {download.first_line(error)}") from error
    check_finite(model, name)
    return model.to(place).eval(), companion


def folder_of(name: str) -> Path:
    """The folder of a pack, a folder, or the local copy of a hub repository's safe files."""
    return _locate(name)[0]


def _locate(name: str) -> tuple[Path, str | None]:
    """The folder to load from, and the pack's name if it is one. A pack's name wins over a folder of that name."""
    if name in PACKS:
        with spinner() as tell:
            return pull(name, progress=tell), name
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    if path.is_file():
        raise ThriftError(f"'{name}' is a file: give the folder that holds it, its config.json and its tokenizer")
    if "/" in name and not name.startswith((".", "/", "~")) and name.count("/") == 1:
        return _hub_snapshot(name), None
    kind = "there is no such folder" if "/" in name else "not a model pack, a folder or a hub id (owner/name)"
    raise ThriftError(f"cannot load '{name}': {kind}; {did_you_mean(name, PACKS)}")


def _hub_snapshot(repo_id: str) -> Path:
    """The safe files of a hub repository in Hugging Face's own cache; only what is there if the hub is unreachable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = download.hub_revision(repo_id)
    try:
        with spinner() as tell:
            tell(f"{repo_id}: looking at the hub")
            found = snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=[*download.SAFE_PATTERNS],
                ignore_patterns=download.IGNORED_PATTERNS,
                local_files_only=revision is None,
            )
    except LocalEntryNotFoundError as error:
        raise ThriftError(
            f"cannot load '{repo_id}': there is no such folder, it is not in the local hub cache, and the hub does not "
            f"answer for it (offline, misspelt or private?); packs that need no hub: {', '.join(sorted(PACKS))}"
        ) from error
    except Exception as error:
        raise ThriftError(f"downloading {repo_id} from the hub failed: {download.first_line(error)}") from error
    return Path(found)


def _model(where: Path, dtype: torch.dtype, attention: str | None) -> Any:
    import transformers

    config = _config(where)
    if not any(where.glob("*.safetensors")):
        if any(file for pattern in _PICKLES for file in where.glob(pattern)):
            raise ThriftError("it holds only pickled weights, which run code when loaded; convert them to safetensors")
        raise ThriftError(f"{where} holds no .safetensors file")
    auto = getattr(transformers, _auto_class(config))
    options = {"attn_implementation": attention} if attention else {}
    model, info = auto.from_pretrained(
        str(where),
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    # A tensor that is not in the file is filled with random numbers, so a wrong folder would "work". A pooler is the
    # exception: many encoders are published without theirs and nobody reads it.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key) or sorted(
        str(key) for key in info["mismatched_keys"]
    )
    if missing:
        raise ThriftError(f"{len(missing)} tensors the model needs are missing or misshapen, first {missing[0]}")
    return model


def _config(where: Path) -> dict[str, Any]:
    path = where / "config.json"
    if not path.is_file():
        raise ThriftError(f"{where} holds no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ThriftError(f"{path} is not readable JSON ({download.first_line(error)})") from error
    if not isinstance(config, dict):
        raise ThriftError(f"{path} is not a JSON object")
    return config


def _auto_class(config: dict[str, Any]) -> str:
    architecture = next(iter(config.get("architectures") or []), "")
    if architecture.endswith("ForConditionalGeneration"):
        return "AutoModelForImageTextToText" if "vision_config" in config else "AutoModelForSeq2SeqLM"
    return next((auto for end, auto in _AUTO_CLASSES.items() if architecture.endswith(end)), "AutoModel")


def _companion(where: Path, config: Any) -> Any:
    """The tokenizer or processor that belongs to a model; our own for DINOv2, which needs no torchvision."""
    import transformers as untyped

    transformers: Any = untyped
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if hasattr(config, "vision_config"):
        return transformers.AutoProcessor.from_pretrained(str(where), **safe)
    if any((where / file).is_file() for file in _TOKENIZER_FILES):
        return transformers.AutoTokenizer.from_pretrained(str(where), **safe)
    if str(config.model_type).startswith("dinov2"):
        from tokenthrift.models.images import ImageProcessor

        return ImageProcessor(patch=int(config.patch_size))
    if (where / "preprocessor_config.json").is_file():
        return transformers.AutoImageProcessor.from_pretrained(str(where), **safe)
    raise ThriftError(f"{where} holds neither a tokenizer nor an image processor")


def check_finite(module: torch.nn.Module, name: str) -> None:
    """Raise ThriftError naming the first parameter or buffer that holds a NaN or an infinity."""
    import torch

    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        # A sum is ten times cheaper than isfinite, and a NaN or infinity cannot leave it finite. It can overflow by
        # itself, so a suspicion is looked at closely.
        # 8-bit floats cannot be summed and are skipped.
        if not tensor.is_floating_point() or tensor.element_size() == 1 or bool(torch.isfinite(tensor.sum())):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ThriftError(
                f"'{name}': {bad} of {tensor.numel()} values in {key} ({tensor.dtype}) are NaN or infinite; "
                "get the weights again or choose a wider dtype"
            )


def _device(device: str | torch.device, torch: Any) -> Any:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ThriftError(f"device '{device}' cannot be used here: {download.first_line(error)}") from error
    return place


def _dtype(dtype: str | torch.dtype, torch: Any) -> Any:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype in known.values():
        return dtype
    if dtype not in known:
        raise ThriftError(f"dtype '{dtype}' is not one a model loads in: {did_you_mean(str(dtype), known)}")
    return known[str(dtype)]
