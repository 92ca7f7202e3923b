"""Losses against the authors' own numbers and torch's losses, and how sums and counts add up."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Noised, PerBlock, PerText, noised
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.objectives import Elbo, Flat, Loss, Objective, RdmWeight, cross_entropy, divergence
from diffusify.diffusion.schedules import Linear

DATA = Path(__file__).parents[1] / "data"


def loss_of(objective: Objective, logits: torch.Tensor, ar_logits: torch.Tensor, batch: Noised) -> Loss:
    return objective(LazyLogits.from_tensor(logits), LazyLogits.from_tensor(ar_logits), batch, Linear())


def test_diffullama_loss_agrees_with_the_authors_code() -> None:
    given = load_file(DATA / "losses.safetensors")
    x, masked = given["diffullama.x"], given["diffullama.masked"]
    logits = given["diffullama.network_logits"].roll(1, dims=1)  # the logits of position i, from position i - 1
    canvas = Canvas(x, open=masked, editable=torch.ones_like(masked), document=torch.ones_like(x))
    canvas.open[:, 0] = False
    t = given["diffullama.t"][:, None].expand(x.shape)
    batch = Noised(canvas, x, t, torch.zeros_like(masked), canvas.open.float())
    loss = loss_of(Objective(Elbo(), per="open"), logits[canvas.open], logits[batch.ar_positions], batch)
    torch.testing.assert_close(loss.total / loss.count, given["diffullama.expected_loss"])


def test_rdm_loss_agrees_with_the_authors_code() -> None:
    given = load_file(DATA / "losses.safetensors")
    x, masked = given["rdm.x"], given["rdm.masked"]
    canvas = Canvas(x, open=masked, editable=given["rdm.maskable"], document=torch.ones_like(x))
    t = (given["rdm.t"] / 50)[:, None].expand(x.shape)
    batch = Noised(canvas, x, t, torch.zeros_like(masked), canvas.open.float())
    loss = loss_of(
        Objective(RdmWeight(50), per="text"),
        given["rdm.logits"][masked],
        given["rdm.logits"][batch.ar_positions],
        batch,
    )
    torch.testing.assert_close(loss.total / loss.count, given["rdm.expected_loss"])


@given(st.integers(0, 500), st.sampled_from([0.0, 0.1, 0.5]))
def test_label_smoothing_agrees_with_torch_on_the_tokens_with_finite_logits(seed: int, smoothing: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    possible = torch.randn(300, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 6, (300,), generator=rng)
    theirs = F.cross_entropy(possible, targets, reduction="none", label_smoothing=smoothing)
    logits = torch.cat([possible, torch.full((300, 1), -torch.inf)], -1).float()
    ours = cross_entropy(logits, targets, smoothing)
    torch.testing.assert_close(ours, theirs.float())
    weight = torch.rand(300, generator=rng)
    grads = [torch.autograd.grad((loss * weight).sum(), possible)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_label_smoothing_changes_the_loss_but_not_the_reported_nll() -> None:
    rng = torch.Generator().manual_seed(0)
    batch = noised(Canvas.clean(torch.randint(0, 7, (2, 9), generator=rng)), PerText(), Linear(), 7, generator=rng)
    logits = torch.randn(int(batch.canvas.open.sum()), 7, generator=rng)
    plain, smooth = (loss_of(Objective(label_smoothing=s), logits, logits[:0], batch) for s in (0.0, 0.1))
    assert plain.total != smooth.total
    assert torch.equal(plain.nll, smooth.nll)


def test_packed_texts_have_the_same_loss_as_alone() -> None:
    """Per text means per document, whether documents share a row or not."""
    rng = torch.Generator().manual_seed(0)
    tokens, open = torch.randint(0, 7, (1, 9), generator=rng), torch.rand(1, 9, generator=rng) < 0.5
    logits, t = torch.randn(1, 9, 7, generator=rng), torch.full((1, 9), 0.5)
    none = torch.zeros(1, 9, dtype=torch.bool)
    objective = Objective(RdmWeight(10), per="text")

    def loss(columns: slice, document: list[int]):
        editable, document_ids = torch.ones_like(open[:, columns]), torch.tensor([document])
        canvas = Canvas(tokens[:, columns], open[:, columns], editable, document_ids)
        batch = Noised(canvas, tokens[:, columns], t[:, columns], none[:, columns], canvas.open.float())
        return loss_of(objective, logits[:, columns][canvas.open], logits[0, :0], batch)

    packed = loss(slice(0, 9), [1, 1, 2, 2, 2, 2, 2, 2, 2])
    torch.testing.assert_close(packed.total, loss(slice(0, 2), [1] * 2).total + loss(slice(2, 9), [1] * 7).total)
    assert packed.count == 2


@pytest.mark.parametrize("per", ["editable", "open", "text"])
@pytest.mark.parametrize("seed", range(3))
def test_sums_and_counts_add_up_for_every_split_of_the_batch(seed: int, per: str) -> None:
    rng = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 7, (6, 9), generator=rng)
    document = (torch.arange(9) < torch.randint(1, 10, (6, 1), generator=rng)).long()
    batch = noised(Canvas.clean(text, document), PerText(), Linear(), 7, ar_share=0.4, generator=rng)
    logits = torch.randn(6, 9, 7, generator=rng)
    objective = Objective(Elbo(), per=per, ar_weight=0.5, ar_share=0.4)  # type: ignore[arg-type]

    def loss(rows: slice):
        part = batch[rows]
        return loss_of(objective, logits[rows][part.canvas.open], logits[rows][part.ar_positions], part)

    full = loss(slice(0, 6))
    for cut in range(1, 6):
        first, second = loss(slice(0, cut)), loss(slice(cut, 6))
        torch.testing.assert_close(full.total, first.total + second.total)
        torch.testing.assert_close(full.count, first.count + second.count)


def test_batch_without_open_positions_has_loss_zero() -> None:
    canvas = Canvas.clean(torch.zeros(2, 4, dtype=torch.long))
    batch = Noised(canvas, canvas.tokens, torch.full((2, 4), 0.1), canvas.open, canvas.open.float())
    no_logits = torch.zeros(0, 5, requires_grad=True)
    loss = loss_of(Objective(), no_logits, no_logits, batch)
    loss.total.backward()
    assert loss.total == 0 and loss.count == 8


@pytest.mark.parametrize(("rows", "batches"), [(32, 50), (320, 20)])
def test_elbo_per_editable_token_does_not_depend_on_the_batch_size(rows: int, batches: int) -> None:
    """With a cross-entropy of 1 everywhere its mean is 1; per open token it is about 2 for large batches."""
    rng = torch.Generator().manual_seed(0)
    clean = Canvas.clean(torch.zeros(rows, 64, dtype=torch.long))
    logits = torch.full((rows, 64, 2), 0.0)
    logits[..., 1] = torch.tensor(torch.e - 1).log()  # cross-entropy of token 0 is exactly 1
    values = {"editable": [], "open": []}
    for _ in range(batches):
        batch = noised(clean, PerText(), Linear(), 0, generator=rng)
        for per, losses in values.items():
            loss = loss_of(Objective(per=per), logits[batch.canvas.open], logits[batch.ar_positions], batch)  # type: ignore[arg-type]
            losses.append(float(loss.total / loss.count))
    means = {per: sum(losses) / len(losses) for per, losses in values.items()}
    assert abs(means["editable"] - 1) < 0.03
    assert 1.9 < means["open"] < 2.2


def test_perfect_logits_have_loss_zero_and_off_by_one_do_not() -> None:
    """Law 2, on the loss: correct logits of position i give 0; shifted by one they give more than log V."""
    text = torch.randint(0, 11, (4, 20), generator=torch.Generator().manual_seed(0))
    batch = noised(Canvas.clean(text), PerText(), Linear(), 11, generator=torch.Generator().manual_seed(1))
    perfect = F.one_hot(text, 11).float() * 100
    for logits, correct in ((perfect, True), (perfect.roll(1, 1), False)):
        loss = loss_of(Objective(Flat(), per="open"), logits[batch.canvas.open], logits[batch.ar_positions], batch)
        mean = float(loss.total / loss.count)
        assert (mean < 1e-6) if correct else (mean > torch.tensor(11.0).log())


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 300), (torch.bfloat16, 300), (torch.float32, 0)])
def test_cross_entropy_in_chunks_agrees_with_torch(dtype: torch.dtype, rows: int) -> None:
    rng = torch.Generator().manual_seed(0)
    values = (torch.randn(rows, 40, generator=rng) * 4).to(dtype)
    values[:, 7] = -torch.inf  # a banned token
    targets = torch.randint(8, 40, (rows,), generator=rng)
    weight = torch.rand(rows, generator=rng)
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    a, b = cross_entropy(ours, targets), F.cross_entropy(theirs.float(), targets, reduction="none")
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_invalid_ar_share_raises() -> None:
    with pytest.raises(ValueError, match="ar_share"):
        Objective(ar_share=0.0)


@pytest.mark.parametrize(
    "settings", [{"total_variation": 0.5}, {"total_variation": 1.5, "distill": 1.0}, {"entropy": -1.0}]
)
def test_invalid_shares_of_the_loss_raise(settings) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Objective(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_is_kl_plus_the_entropy_of_the_teacher(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 300, 20, generator=rng).to(dtype).index_fill(2, torch.tensor([3]), -torch.inf)
    ours, theirs = (logits.clone().requires_grad_() for _ in "ab")
    weight = torch.rand(300, generator=rng)
    kl = kl_divergence(Categorical(logits=teacher.float()), Categorical(logits=theirs.float()))
    entropy = Categorical(logits=teacher.float()).entropy()
    loss = divergence(ours, teacher)
    torch.testing.assert_close(loss, (kl + entropy).detach(), atol=1e-4, rtol=1e-4)
    (loss * weight).sum().backward()
    (kl * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_total_variation_replaces_a_share_of_the_divergence(dtype: torch.dtype, share: float) -> None:
    rng = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 300, 20, generator=rng).to(dtype).index_fill(2, torch.tensor([3]), -torch.inf)
    ours, theirs = (logits.clone().requires_grad_() for _ in "ab")
    weight = torch.rand(300, generator=rng)
    probs, teacher_probs = theirs.float().softmax(-1), teacher.float().softmax(-1)
    finite = theirs.float().log_softmax(-1).masked_fill(theirs.isinf(), 0.0)
    expected = (1 - share) * -(teacher_probs * finite).sum(-1)
    expected = expected + share * (1 - torch.minimum(probs, teacher_probs).sum(-1))  # the rate of rejected drafts
    loss = divergence(ours, teacher, share)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-4, rtol=1e-4)
    (loss * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


def test_the_entropy_of_right_predictions_is_added() -> None:
    rng = torch.Generator().manual_seed(0)
    clean = Canvas.clean(torch.randint(0, 9, (3, 8), generator=rng))
    batch = noised(clean, PerBlock(4, min_t=1.0), Linear(), 9, generator=rng)
    assert batch.canvas.open.all()
    logits = torch.randn(24, 9, generator=rng)
    logits[:12] += 9 * torch.nn.functional.one_hot(clean.tokens.flatten()[:12], 9)
    none = torch.zeros(0, 9)
    plain, confident = (loss_of(Objective(Flat(), entropy=e), logits, none, batch).total for e in (0.0, 2.0))
    right = logits.argmax(-1) == clean.tokens.flatten()
    torch.testing.assert_close(confident - plain, 2 * Categorical(logits=logits[right]).entropy().sum())


def test_distillation_uses_the_next_token_distribution_of_the_clean_text() -> None:
    rng = torch.Generator().manual_seed(0)
    clean = Canvas.clean(torch.randint(0, 9, (3, 8), generator=rng))
    batch = noised(clean, PerBlock(4), Linear(), 9, ar_share=0.3, generator=rng)
    objective = Objective(ar_weight=0.5, ar_share=0.3, distill=0.4)
    ar_targets = objective.ar_targets(batch)
    assert torch.equal(ar_targets, batch.ar_positions | batch.canvas.open)
    logits, ar_logits = (torch.randn(3, 8, 9, generator=rng).requires_grad_() for _ in "ab")
    loss = loss_of(objective, logits[batch.canvas.open], ar_logits[ar_targets], batch)
    plain = loss_of(
        Objective(ar_weight=0.5, ar_share=0.3), logits[batch.canvas.open], ar_logits[batch.ar_positions], batch
    )
    open = batch.canvas.open
    kl = F.kl_div(logits[open].log_softmax(-1), ar_logits[open].softmax(-1), reduction="none").sum(-1)
    entropy = Categorical(logits=ar_logits[open]).entropy()
    nll = F.cross_entropy(logits[open], batch.clean[open], reduction="none")
    extra = (0.4 * (kl + entropy - nll) / batch.t[open]).sum()
    torch.testing.assert_close(loss.total, plain.total + extra)
    torch.testing.assert_close(loss.nll, plain.nll)
    torch.testing.assert_close(loss.ar_nll, plain.ar_nll)
    loss.total.backward()
    assert ar_logits.grad is not None
    assert (ar_logits.grad[~batch.ar_positions] == 0).all()  # the teacher gets no gradient
