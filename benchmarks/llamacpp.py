"""A GGUF file in llama.cpp, one forward pass at a time. Needs llama-cpp-python, which is compiled when installed."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

_SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


class GgufModel:
    """A model of up to `length` tokens, in float32 wherever the file is."""

    def __init__(self, path: Path, *, length: int = 512, threads: int = 1) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot open {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self.mask_token_id = llama_cpp.llama_vocab_mask(self._vocabulary)

    def logits(self, tokens: list[int], positions: list[int] | None = None, *, causal: bool = False) -> np.ndarray:
        """The logits at some or all positions of a text, as the network gives them: [positions, vocabulary]."""
        positions = list(range(len(tokens))) if positions is None else positions
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        llama_cpp.llama_set_causal_attn(self._context, causal)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, i in positions
            batch.seq_id[i][0] = 0
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = [llama_cpp.llama_get_logits_ith(self._context, i) for i in positions]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)).copy() for row in rows])

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, without the start token."""
        data, ids = text.encode(), (llama_cpp.llama_token * (len(text) + 8))()
        count = llama_cpp.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), False, False)
        return list(ids[:count])

    def close(self) -> None:
        """Free the memory of the model."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def greedy_infill(model: GgufModel, tokens: list[int], shift: int) -> list[int]:
    """Fill the masks of a text, in every forward pass the one that the network is surest of."""
    tokens = list(tokens)
    while model.mask_token_id in tokens:
        masks = [i for i, token in enumerate(tokens) if token == model.mask_token_id]
        logits = model.logits(tokens, [i - shift for i in masks]).astype(np.float64)
        logits[:, model.mask_token_id] = -np.inf
        best = logits.max(axis=1)
        surest = int(np.argmax(-np.log(np.exp(logits - best[:, None]).sum(axis=1))))
        tokens[masks[surest]] = int(logits[surest].argmax())
    return tokens
