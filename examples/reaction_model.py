"""Turn a masked language model of chemical reactions into a diffusion model that generates products for reactants.

pip install --no-deps rxnfp==0.1.0 && python examples/reaction_model.py DATA.jsonl runs/out 'CCO.CC(=O)O>>[[9]]'
"""

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import diffusify


def save_base(folder: str) -> str:
    """Save the BERT of the package rxnfp and its vocabulary as a folder that transformers loads."""
    path = next(Path(str(f.locate())).parent for f in metadata.files("rxnfp") or [] if f.match("bert_pretrained/*.bin"))
    network = BertForMaskedLM(BertConfig.from_json_file(path / "config.json"))
    old = torch.load(path / "pytorch_model.bin", weights_only=True)
    network.load_state_dict({k: old.get(k, old.get(k.replace("decoder.bias", "bias"))) for k in network.state_dict()})
    network.save_pretrained(folder)
    words = {word: i for i, word in enumerate((path / "vocab.txt").read_text().split("\n")) if word}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    atoms = r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(atoms), "isolated"), decoders.Fuse()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def main(reactions: str, out: str, reactants: str, **settings: Any) -> str:
    diffusify.adapt(save_base(f"{out}-base"), reactions, out, recipe=diffusify.mlm(), **(settings or {"steps": 600}))
    return diffusify.load(out).infill(reactants, steps=10).text


if __name__ == "__main__":
    print(main(*sys.argv[1:4]))
