"""Does a network obey an attention pattern? Change each token in turn and see which answers move."""

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal
from diffusify.models.denoiser import Denoiser


@torch.no_grad()
def attention_influence(denoiser: Denoiser, attention: AttentionPattern, n: int = 6) -> Bool[Tensor, "n n"]:
    """influence[i, j]: does another token at position j move the logits about position i?"""
    vocabulary = denoiser.config.get_text_config().vocab_size
    text = torch.linspace(0.1 * vocabulary, 0.4 * vocabulary, n).long()  # far from special and unused tokens
    tokens = text.repeat(n + 1, 1)
    tokens[range(n), range(n)] += vocabulary // 2
    training = denoiser.training
    logits = denoiser.eval()(Canvas.clean(tokens.to(denoiser.device)), attention=attention).logits
    denoiser.train(training)
    logits = logits.float().nan_to_num(neginf=0.0)
    return ((logits[:n] - logits[n]).abs().amax(-1).T > 1e-6).cpu()


def allowed_influence(denoiser: Denoiser, attention: AttentionPattern, n: int = 6) -> Bool[Tensor, "n n"]:
    """The influence that the pattern allows through the network's layers."""
    inputs = attention(Canvas.clean(torch.arange(n)[None]), shift=denoiser.diffusion_config.shift)
    sight = inputs.visible()[0].long()
    reach = torch.eye(n, dtype=torch.long)
    for _ in range(denoiser.config.get_text_config().num_hidden_layers):
        reach = (sight @ reach).clamp_max(1)
    return reach[inputs.output_index[0]] > 0


def check_attention(denoiser: Denoiser) -> None:
    """ValueError unless the network sees exactly what attention patterns tell it to see."""
    for attention in (Bidirectional(), BlockCausal(2, clean="block")):
        try:
            seen = attention_influence(denoiser, attention)
        except (TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{denoiser.diffusion_config.architecture} does not run under an attention mask of our own "
                f"({type(error).__name__}: {error}), so it cannot become a diffusion model"
            ) from error
        wrong = seen != allowed_influence(denoiser, attention)
        if wrong.any():
            i, j = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{denoiser.diffusion_config.architecture} does not obey {attention}: token {j} "
                f"{'moves' if seen[i, j] else 'does not move'} the answer at position {i}, "
                "so it cannot become a diffusion model"
            )
