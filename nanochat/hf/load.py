"""A folder of transformers as a checkpoint of ours: an export of nanochat.hf.export, or another model of its type."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import rustbpe
from nanochat.checkpoint import STAGE_SCRIPTS, committed_steps
from nanochat.errors import UserError
from nanochat.files import fields, from_json, parse_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf.export import ABOUT, OWN_TYPE, exported
from nanochat.hf.names import classic_config
from nanochat.paths import checkpoint_dir
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer, byte_letters

# what nanochat.json says, where it is there
KINDS = {"stage": str, "tag": str, "step": int, "model_config": dict, "settings": dict, "recipe": dict}


def find_folder(name: str) -> Path:
    """The folder `name`, else what the hub has under it. Raises UserError where there is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name}: no such folder, and no OWNER/NAME of the hub")
    from huggingface_hub import snapshot_download  # takes half a second
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    from nanochat.data.hub import check_connection, endpoint

    check_connection()
    try:
        asked: Any = {"endpoint": endpoint(), "token": os.environ.get("HF_TOKEN")}
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **asked))
    except (HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        hint = "check the name, HF_TOKEN and HF_ENDPOINT"
        raise UserError(f"could not get {name} from the hub ({reason}): {hint}") from None


def load(folder: Path) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """(model in fp32 on the CPU, its tokenizer, what nanochat.json says of it). Raises UserError where the folder is
    damaged, or of a model that we do not compute."""
    settings = _read_json(folder, "config.json")
    about = _read_json(folder, ABOUT) if (folder / ABOUT).exists() else {}
    kind = settings.get("model_type")
    try:
        if "model_config" in about:  # knows more than config.json: with which width it was tuned, for example
            config = from_json(GPTConfig, about["model_config"])
        elif kind == OWN_TYPE:
            config = from_json(GPTConfig, settings["gpt"])
        elif kind == "nanochat":
            config = classic_config(settings)
        else:
            raise UserError(f"model_type is {kind!r:.50}, expected nanochat or {OWN_TYPE}")
        tokenizer = _tokenizer(_read_json(folder, "tokenizer.json"))
        if tokenizer.get_vocab_size() > config.vocab_size:
            raise UserError(f"{tokenizer.get_vocab_size()} tokens, the model has {config.vocab_size}")
    except (UserError, ValueError, KeyError, TypeError) as error:
        kept = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{folder} is no model for nanochat: {kept}") from None
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    _fill(exported(model), folder)
    model.init_buffers()
    return model, tokenizer, about


def write(model: GPT, tokenizer: RustBPETokenizer, about: dict[str, Any], stage: str, tag: str) -> Path:
    """Make it a checkpoint of this stage and tag; returns its folder. Raises UserError where there is one."""
    from nanochat.saver import Saver  # takes 3 s

    folder = checkpoint_dir(stage, tag)
    if committed_steps(folder):
        raise UserError(f"{folder} holds checkpoints already: choose another --model-tag, or remove it")
    step = about.get("step", 0)
    meta = {
        **{name: about.get(name, {}) for name in ("settings", "recipe")},
        "stage": stage,
        "tokenizer_hash": tokenizer.hash,
        "model_config": vars(model.config),
    }
    tokenizer.keep(folder / "tokenizer")
    saver = Saver(folder, model, None)
    try:
        saver.save(step, {name: value for name, value in meta.items() if value or name == "settings"}, last=True)
        saver.wait()
    finally:
        saver.close()
    return folder


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json((folder / name).read_bytes())
        fields({"x": found}, x=dict)
        if name == ABOUT:
            fields(found, **{key: kind for key, kind in KINDS.items() if key in found})
            if found.get("stage", "base") not in STAGE_SCRIPTS:
                raise UserError(f"stage is {found['stage']!r:.50}")
    except FileNotFoundError:
        raise UserError(f"{folder} has no {name}: give the folder of a model") from None
    except (ValueError, UserError) as error:
        raise UserError(f"{folder / name} is damaged ({error}): get it again") from None
    return found


def _tokenizer(content: dict[str, Any]) -> RustBPETokenizer:
    """From tokenizer.json, whose vocabulary is spelled with a letter for each byte. Raises UserError or ValueError for
    tokenizers of other kinds."""
    model, steps = content["model"], content["pre_tokenizer"].get("pretokenizers", [])
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    if model["type"] != "BPE" or len(patterns) != 1:
        raise UserError("its tokenizer is no byte-level BPE with one split pattern")
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    ranks = [(token, rank) for token, rank in model["vocab"].items() if token not in added]
    spelled = sorted(((bytes(bytes_of[letter] for letter in token), rank) for token, rank in ranks), key=lambda r: r[1])
    specials = sorted(added, key=added.__getitem__)
    in_order = [rank for _, rank in spelled] + [added[name] for name in specials]
    if in_order != list(range(len(in_order))) or not set(SPECIAL_TOKENS) <= set(specials):
        raise UserError(f"its special tokens are not {', '.join(SPECIAL_TOKENS)} behind all others")
    return RustBPETokenizer(rustbpe.Tokenizer.from_ranks(spelled, patterns[0]), specials)


@torch.no_grad()
def _fill(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill the tensors `weights` from all files of the folder. Raises UserError where they are not exactly these."""
    missing = set(weights)
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    shape = tuple(file.get_slice(name).get_shape())
                    wanted = tuple(weights[name].shape) if name in missing else None
                    if shape != wanted:
                        raise UserError(f"{path}: {name} is {shape}, the model has {wanted}")
                    weights[name].copy_(file.get_tensor(name))
                    missing.remove(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}): get it again") from None
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weights of model.safetensors, {min(missing)} for one")
