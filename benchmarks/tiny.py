"""A tiny AR model trained in a minute or two, for scripts that are run without a model."""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffusify.text.packing import pack
from diffusify.text.sources import load_texts
from diffusify.text.tokenizer import TextTokenizer


def train_tiny_base(folder: Path, data: str, *, steps: int = 600, rows: int = 16, length: int = 256) -> Path:
    """A Llama of 260k parameters with a vocabulary of 512, trained on `data` and saved in `folder`."""
    texts = load_texts(data)
    assert isinstance(texts, Dataset)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts["text"],
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", mask_token="<mask>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    tokens = torch.tensor(pack(texts, TextTokenizer(tokenizer, 2), length)["tokens"][:])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(steps):
        batch = tokens[torch.randint(len(tokens), (rows,))]
        loss = network(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"base: step {step}, loss {loss.item():.2f}", flush=True)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
