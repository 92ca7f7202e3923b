"""An experimental check that a network obeys attention patterns: change one token, see which logits change."""

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal
from diffusify.models.denoiser import Denoiser


@torch.no_grad()
def attention_influence(denoiser: Denoiser, attention: AttentionPattern, n: int = 6) -> Bool[Tensor, "n n"]:
    """The measured influence: [i, j] is whether a different token at position j changes the logits at position i."""
    vocab_size = denoiser.config.get_text_config().vocab_size
    text = torch.linspace(0.1 * vocab_size, 0.4 * vocab_size, n).long()  # far from special and unused tokens
    tokens = text.repeat(n + 1, 1)
    tokens[range(n), range(n)] += vocab_size // 2
    training = denoiser.training
    logits = denoiser.eval()(Canvas.clean(tokens.to(denoiser.device)), attention=attention).logits
    denoiser.train(training)
    logits = logits.float().nan_to_num(neginf=0.0)
    return ((logits[:n] - logits[n]).abs().amax(-1).T > 1e-6).cpu()


def allowed_influence(denoiser: Denoiser, attention: AttentionPattern, n: int = 6) -> Bool[Tensor, "n n"]:
    """The influence that the pattern allows through all of the network's layers, in the same layout."""
    inputs = attention(Canvas.clean(torch.arange(n)[None]), shift=denoiser.diffusion_config.shift)
    mask = inputs.visible()[0].long()
    reachable = torch.eye(n, dtype=torch.long)
    for _ in range(denoiser.config.get_text_config().num_hidden_layers):
        reachable = (mask @ reachable).clamp_max(1)
    return reachable[inputs.output_index[0]] > 0


def check_attention(denoiser: Denoiser) -> None:
    """Check that the network attends to exactly what an attention pattern allows. ValueError if it does not."""
    for attention in (Bidirectional(), BlockCausal(2, clean="block")):
        try:
            influence = attention_influence(denoiser, attention)
        except (TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{denoiser.diffusion_config.architecture} does not run under a custom attention mask "
                f"({type(error).__name__}: {error}), so it cannot become a diffusion model"
            ) from error
        wrong = influence != allowed_influence(denoiser, attention)
        if wrong.any():
            i, j = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{denoiser.diffusion_config.architecture} does not obey {attention}: token {j} "
                f"{'changes' if influence[i, j] else 'does not change'} the logits at position {i}, "
                "so it cannot become a diffusion model"
            )
