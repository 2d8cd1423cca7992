"""Loading a model by its folder or its name on the Hugging Face hub: safetensors only, and nothing fetched unasked."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sap_fast.cli.errors import CommandError
from sap_fast.data.encode import set_chat_template
from sap_fast.data.files import is_hub_name

_ADAPTER, _CONFIG = "adapter_config.json", "config.json"


def load_tokenizer(model: str, *, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer from a model's folder (for an adapter without one, its base's), or by a hub name.

    Raises:
        CommandError: no such folder, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    local = is_folder(model)
    with _explained(model, "a tokenizer", local):
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=local, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    return tokenizer


def load_model(
    model: str, *, dtype: str = "auto", device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> nn.Module:
    """Load a causal language model from its folder or by its hub name, in evaluation mode.

    Args:
        dtype: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 where the weights are stored in 16 bits.

    Raises:
        CommandError: no such folder; no model in it, or one without safetensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    local = is_folder(model)
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    with _explained(model, "a model's config.json", local):
        config = AutoConfig.from_pretrained(model, **options)
    # float16 overflows in second derivatives; what is stored in it is run in bfloat16.
    half = str(config.dtype).rpartition(".")[2] in ("float16", "bfloat16")
    chosen = ("bfloat16" if half else "float32") if dtype == "auto" else dtype
    with _explained(model, "a causal language model in safetensors", local):
        loaded, found = AutoModelForCausalLM.from_pretrained(
            model,
            config=config,
            dtype=getattr(torch, chosen),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    # transformers fills what is missing with random numbers.
    if missing := sorted(found["missing_keys"]):
        raise CommandError(f"{model} lacks {len(missing)} weights of a {type(loaded).__name__}: {missing[:3]} ...")
    return loaded.to(device).eval()


def load_with_adapter(spec: str, base: str | None, **options: Any) -> nn.Module:
    """Load a model, or an adapter's folder upon its base: ``base`` if given, else the one that the adapter names.

    Raises:
        CommandError: as :func:`load_model`; an adapter whose base is not in a folder here and was not given.
    """
    if not is_adapter(spec):
        return load_model(spec, **options)
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    folder = Path(spec)
    if not (folder / "adapter_model.safetensors").is_file():
        raise CommandError(f"{folder} holds {_ADAPTER} but no adapter_model.safetensors; only safetensors are read")
    named = base_of(spec, base)
    model = load_model(named, **options)
    with _explained(spec, f"an adapter for {named}", local=True):
        adapted = PeftModel.from_pretrained(model, spec, local_files_only=True).eval()
        stored = set(load_peft_weights(spec, device="cpu"))
    # PEFT leaves what is missing as it was made, and what is unknown aside.
    if differing := sorted(stored ^ set(get_peft_model_state_dict(adapted))):
        raise CommandError(
            f"{spec} is no adapter for {named}: they differ in {len(differing)} weights, {differing[:3]}"
        )
    return adapted


def base_of(spec: str, base: str | None) -> str:
    """Return the base of an adapter's folder."""
    if base is not None:
        return base
    try:
        named = json.loads((Path(spec) / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise CommandError(f"{spec}: its {_ADAPTER} cannot be read ({error})") from None
    if not named or not Path(named).is_dir():
        raise CommandError(f"the adapter {spec} is for {named!r}, which is no folder here; name its base with --base")
    return named


def is_adapter(spec: str) -> bool:
    """Tell whether ``spec`` is the folder of a PEFT adapter."""
    return (Path(spec) / _ADAPTER).is_file()


def is_folder(model: str) -> bool:
    """Tell whether ``model`` is a folder; False for what can only be a name on the hub.

    Raises:
        CommandError: it was meant as a path, and there is none; a file.
    """
    path = Path(model)
    if path.is_dir():
        return True
    if path.exists():
        raise CommandError(f"{model} is a file; name the model's folder")
    if not is_hub_name(model):
        raise CommandError(f"no model folder {model}; a name on the Hugging Face hub has the form owner/name")
    return False


@contextmanager
def _explained(model: str, wanted: str, local: bool) -> Iterator[None]:
    where = "the folder" if local else "neither a folder here nor a model that the Hugging Face hub would give:"
    with quiet():
        try:
            yield
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise CommandError(f"{where} {model}: expected {wanted} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars for loading, and what its and PEFT's releases say of each other."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # ... and warns of an adapter's missing weights, which are refused here.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
