"""A model's Hugging Face folder: what must be in it, and its weights. What is wrong is said by name.

What we would compute wrongly is refused, not guessed at. The files that hold a model are written here, too.
"""

import json
import struct
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from files import NotJson, parse_json


def read_json(path):
    """The JSON object in a file; ValueError names a file that is not there, not readable or not an object."""
    try:
        value = parse_json(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; a model folder has config.json, weights and tokenizer") from None
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}") from None
    except NotJson as e:
        raise ValueError(f"{path}:{e.line}: not valid JSON: {e.fault}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, need an object")
    return value


def n_tokens(path, vocab_size):
    """How many ids the tokenizer beside a model has: the head's other rows are padding, which nobody trained."""
    file = path / "tokenizer.json"
    if not file.exists():
        return vocab_size
    spec = read_json(file)
    try:
        n = 1 + max([*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{file}: not a BPE tokenizer of the tokenizers library") from None
    if n > vocab_size:
        raise ValueError(f"{path}: tokenizer.json has {n} tokens, but config.json's vocab_size is {vocab_size}: they "
                         "are not of the same model; take both from one")
    return n


def check_folder(path):
    """Before any work: ValueError says what a path is that is no model's folder, and what to do."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: is {'a file' if path.exists() else 'no folder here'}; --model is a Hugging Face one "
                         "(python data/fetch.py ORG/MODEL makes one of the Hub's: runs/data/ORG/MODEL)")
    advice = {"model/config.json": f"it is a run's: take {path / 'model'}",
              "adapter_config.json": "it is a LoRA adapter: merge it into its model (peft: merge_and_unload)",
              "*.gguf": "GGUF is not read: take the model's safetensors",
              "*.bin": "pickled weights are not read: save safetensors (transformers: save_pretrained)",
              "*": "take a Hugging Face folder that has all"}
    wanted = ["config.json", "tokenizer.json", *weight_files(path)]
    if missing := [name for name in wanted if not (path / name).is_file()]:
        fitting = [text for pattern, text in advice.items() if pattern == "*" or any(path.glob(pattern))]
        raise ValueError(f"{path}: has no {', '.join(missing)}; {fitting[0]}")
    for name in weight_files(path):
        opened(path / name)


def check_context(model, lengths, what, say):
    """Of sequences of these lengths: a note if some are longer than a model was made to read, ValueError if all are."""
    context = model.config.raw.get("max_position_embeddings")
    n_long = sum(length > context for length in lengths) if context else 0
    said = f"{n_long} of {len(lengths)} {what} are longer than the {context} tokens that {model.name} was made to read"
    if n_long and n_long == len(lengths):
        raise ValueError(f"{said} (max_position_embeddings): give shorter ones, or another model")
    if n_long and say:
        print(f"note: {said}")


def opened(file):
    """A safetensors file, whose header fits its size."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; weights are in model.safetensors or the index's shards") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: not a readable safetensors file ({e}); copy or download it again") from None


def weight_files(path):
    """The names of the safetensors files that hold a folder's weights.

    model.safetensors wins over an index, as in transformers: a folder saved over a sharded one still has the old index.
    """
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map must be an object of tensor name: file name")
    return sorted(set(weight_map.values()))


ONE_MODEL = "take config.json and weights of one model"


def whole(name, shape):
    """load_weights' part_of: all of a tensor."""
    return ()


@torch.no_grad()
def load_weights(model, path, device, dtype, part_of=whole, shapes=None):
    """Fills a model that has no memory, or the shards of one that has, tensor after tensor, cast as they come; missing,
    unexpected or mis-shaped ones by name.

    part_of(name, shape): the slices of a tensor's axes that this process keeps, and nothing else of it is read; shapes:
    the whole tensors', if the model does not know them. Files are mapped: their pages count as the process's, but the
    system may drop them at any time.
    """
    files = weight_files(path)
    wanted = dict(model.named_parameters())
    shapes = shapes or {name: x.shape for name, x in wanted.items()}
    seen = set()
    head = None  # some tied checkpoints carry the head as well, as a copy of the embedding
    for file in files:
        with opened(path / file) as shard:
            for name in shard.keys():
                tensor = shard.get_slice(name)
                if name == "lm_head.weight" and model.config.tie_word_embeddings:
                    head = tensor
                    continue
                check_tensor(f"{path / file}", name, tensor, shapes, seen)
                part = tensor[part_of(name, tensor.get_shape())]
                if wanted[name].is_meta:
                    owner, leaf = name.rsplit(".", 1)
                    setattr(model.get_submodule(owner), leaf, nn.Parameter(part.to(device, dtype)))
                else:
                    wanted[name].to_local().copy_(part)
                seen.add(name)
    if missing := sorted(set(wanted) - seen):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{path}: tensor {missing[0]}{more} is missing from {', '.join(files)}; {ONE_MODEL}")
    if head is not None and not is_embedding(head, model.model.embed_tokens.weight, part_of):
        raise ValueError(f"{path}: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")


def is_embedding(head, embedding, part_of):
    """Are the head's numbers those of the embedding, or of this process's part of it?"""
    part = head[part_of("model.embed_tokens.weight", head.get_shape())]
    own = embedding.to_local() if isinstance(embedding, DTensor) else embedding
    return part.shape == own.shape and torch.equal(part.to(own.device, own.dtype), own)


def check_tensor(where, name, tensor, shapes, seen):
    """ValueError unless the tensor is wanted, new, and of the shape that the config gives it."""
    if name in seen:
        raise ValueError(f"{where}: second copy of tensor {name}")
    if name not in shapes:
        raise ValueError(f"{where}: unexpected tensor {name}; {ONE_MODEL}")
    dtype, shape, config_shape = tensor.get_dtype(), tuple(tensor.get_shape()), tuple(shapes[name])
    if shape != config_shape or "F" not in dtype:
        raise ValueError(f"{where}: tensor {name} is {dtype} {shape}, the config needs floating point {config_shape}; "
                         f"{ONE_MODEL}")


# -------------------------------------------------------------------------------------------------------------- writing

MAX_FILE_BYTES = 5 * 10**9  # of a file of weights, but for a tensor that is larger
CHUNK_BYTES = 2**24  # what is written, or read, at once
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def split_files(sizes):
    """{file: [tensors]} for {tensor: bytes}, in their order, as transformers names them."""
    shares, room = [[]], MAX_FILE_BYTES
    for name, n_bytes in sizes.items():
        if shares[-1] and n_bytes > room:
            shares.append([])
            room = MAX_FILE_BYTES
        shares[-1].append(name)
        room -= n_bytes
    if len(shares) == 1:
        return {"model.safetensors": shares[0]}
    return {f"model-{i:05}-of-{len(shares):05}.safetensors": names for i, names in enumerate(shares, 1)}


def write_tensors(file, tensors, metadata=None):
    """Writes a safetensors file and returns its checksum. metadata: {text: text} for its header.

    Not by the library's save_file: that holds Python's lock for seconds, in which a loop that goes on meanwhile could
    launch nothing, and the checksum would be another pass.
    """
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    checksum = 0
    try:
        with open(file, "wb") as out:
            for data in (struct.pack("<Q", len(text)) + text, *map(bytes_of, tensors.values())):
                for start in range(0, len(data), CHUNK_BYTES):
                    chunk = data[start:start + CHUNK_BYTES]
                    checksum = zlib.crc32(chunk, checksum)
                    out.write(chunk)
    except OSError as e:  # Python does not say which file a full disk has cut
        raise OSError(e.errno, e.strerror, str(file)) from None
    return checksum


def bytes_of(tensor):
    """A tensor's bytes, not copied if it is contiguous and on the host."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def checksum_of(file):
    """A file's, as write_tensors has it: CRC-32, which every change of up to 32 bits in a row changes."""
    checksum = 0
    with open(file, "rb") as data:
        while chunk := data.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


# --------------------------------------------------------------------------------------------------------- the config


def check_config(raw, refuse):
    """refuse(why) for the first field that is missing, malformed, or asks for something we do not compute."""
    kind = raw.get("model_type")
    if kind not in ("qwen2", "qwen3"):
        refuse(f"model_type is {kind!r}; supported are qwen2 (Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen) and qwen3")
    wanted = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
    if raw.get("architectures", [wanted]) not in ([wanted], None):
        refuse(f"architectures {raw['architectures']!r} is not supported; model_type {kind} needs [{wanted!r}]")

    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    optional = [key for key in ("num_key_value_heads", "head_dim") if raw.get(key) is not None]
    for key in (*required, *optional):
        largest = 1000 if key == "num_hidden_layers" else 2**24  # beyond any model, and short of an overflow
        if type(raw.get(key)) is not int or not 1 <= raw[key] <= largest:
            refuse(f"{key} must be an integer from 1 to {largest}, got {show(raw.get(key))}")
    if not isinstance(raw.get("rms_norm_eps", 1e-6), float) or not 0 <= raw.get("rms_norm_eps", 1e-6) < 1:
        refuse(f"rms_norm_eps must be a number like 1e-6, got {show(raw['rms_norm_eps'])}")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {raw['hidden_act']!r} is not supported; only silu is")
    for key in ("tie_word_embeddings", "attention_bias", "use_sliding_window"):
        if raw.get(key) not in (True, False, None):
            refuse(f"{key} must be true or false, got {raw[key]!r}")
    if slides(raw):
        refuse("sliding-window attention is in use (use_sliding_window, max_window_layers, layer_types); "
               "only full attention is supported")
    for key in ("attention_dropout", "use_mrope", "quantization_config"):
        if raw.get(key):
            refuse(f"{key}={raw[key]!r} is not supported; remove it from the config if you can do without it")


def slides(raw):
    """Does any layer see a window only? layer_types says it of each; without it, the layers from max_window_layers on
    do if use_sliding_window is on (released Qwen configs carry the window's fields, and leave it off)."""
    if raw.get("layer_types"):
        return any(kind != "full_attention" for kind in raw["layer_types"])
    on = raw.get("use_sliding_window") and raw.get("sliding_window") is not None
    return bool(on) and raw["num_hidden_layers"] > (raw.get("max_window_layers", 28) or 0)


def show(value):
    """A value of somebody else's file, in a line."""
    return f"{value!r:.40}"
