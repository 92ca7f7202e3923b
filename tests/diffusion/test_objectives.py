"""Losses: both seeds' own numbers, sums and counts, and what is never asked."""

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
    return objective(LazyLogits.of(logits), LazyLogits.of(ar_logits), batch, Linear())


def test_diffullama_loss_of_the_authors_code() -> None:
    given = load_file(DATA / "losses.safetensors")
    x, masked = given["diffullama.x"], given["diffullama.masked"]
    logits = given["diffullama.network_logits"].roll(1, dims=1)  # about position i, from position i - 1
    canvas = Canvas(x, open=masked, editable=torch.ones_like(masked), document=torch.ones_like(x))
    canvas.open[:, 0] = False
    t = given["diffullama.t"][:, None].expand(x.shape)
    batch = Noised(canvas, x, t, torch.zeros_like(masked))
    loss = loss_of(Objective(Elbo(), per="open"), logits[canvas.open], logits[batch.ar_positions], batch)
    torch.testing.assert_close(loss.total / loss.count, given["diffullama.expected_loss"])


def test_rdm_loss_of_the_authors_code() -> None:
    given = load_file(DATA / "losses.safetensors")
    x, masked = given["rdm.x"], given["rdm.masked"]
    canvas = Canvas(x, open=masked, editable=given["rdm.maskable"], document=torch.ones_like(x))
    t = (given["rdm.t"] / 50)[:, None].expand(x.shape)
    batch = Noised(canvas, x, t, torch.zeros_like(masked))
    loss = loss_of(
        Objective(RdmWeight(50), per="text"),
        given["rdm.logits"][masked],
        given["rdm.logits"][batch.ar_positions],
        batch,
    )
    torch.testing.assert_close(loss.total / loss.count, given["rdm.expected_loss"])


@given(st.integers(0, 500), st.sampled_from([0.0, 0.1, 0.5]))
def test_label_smoothing_is_torch_s_own_on_the_tokens_that_can_be(seed: int, smoothing: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    possible = torch.randn(300, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 6, (300,), generator=rng)
    theirs = F.cross_entropy(possible, targets, reduction="none", label_smoothing=smoothing)
    logits = torch.cat([possible, torch.full((300, 1), -torch.inf)], -1).float()
    ours = cross_entropy(logits, targets, smoothing)
    torch.testing.assert_close(ours, theirs.float())
    worth = torch.rand(300, generator=rng)
    grads = [torch.autograd.grad((loss * worth).sum(), possible)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_smoothing_changes_the_loss_but_not_what_is_reported() -> None:
    rng = torch.Generator().manual_seed(0)
    batch = noised(Canvas.clean(torch.randint(0, 7, (2, 9), generator=rng)), PerText(), Linear(), 7, generator=rng)
    logits = torch.randn(int(batch.canvas.open.sum()), 7, generator=rng)
    plain, smooth = (loss_of(Objective(label_smoothing=s), logits, logits[:0], batch) for s in (0.0, 0.1))
    assert plain.total != smooth.total
    assert torch.equal(plain.nll, smooth.nll)


def test_packed_texts_weigh_what_they_would_alone() -> None:
    """Per text means per document, whether documents share a row or not."""
    rng = torch.Generator().manual_seed(0)
    tokens, open = torch.randint(0, 7, (1, 9), generator=rng), torch.rand(1, 9, generator=rng) < 0.5
    logits, t, no = torch.randn(1, 9, 7, generator=rng), torch.full((1, 9), 0.5), torch.zeros(1, 9, dtype=torch.bool)
    objective = Objective(RdmWeight(10), per="text")

    def loss(part: slice, document: list[int]):
        canvas = Canvas(tokens[:, part], open[:, part], torch.ones_like(open[:, part]), torch.tensor([document]))
        batch = Noised(canvas, tokens[:, part], t[:, part], no[:, part])
        return loss_of(objective, logits[:, part][canvas.open], logits[0, :0], batch)

    whole, parts = (
        loss(slice(0, 9), [1, 1, 2, 2, 2, 2, 2, 2, 2]),
        (loss(slice(0, 2), [1] * 2), loss(slice(2, 9), [1] * 7)),
    )
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    assert whole.count == 2


@given(st.integers(0, 500), st.sampled_from(["editable", "open", "text"]), st.integers(1, 5))
def test_sums_and_counts_add_up_however_the_batch_is_split(seed: int, per: str, cut: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 7, (6, 9), generator=rng)
    document = (torch.arange(9) < torch.randint(1, 10, (6, 1), generator=rng)).long()
    batch = noised(Canvas.clean(text, document), PerText(), Linear(), 7, ar_share=0.4, generator=rng)
    logits = torch.randn(6, 9, 7, generator=rng)
    objective = Objective(Elbo(), per=per, ar_weight=0.5, ar_share=0.4)  # type: ignore[arg-type]

    def loss(rows: slice):
        part = batch[rows]
        return loss_of(objective, logits[rows][part.canvas.open], logits[rows][part.ar_positions], part)

    whole, parts = loss(slice(0, 6)), (loss(slice(0, cut)), loss(slice(cut, 6)))
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    torch.testing.assert_close(whole.count, parts[0].count + parts[1].count)


def test_a_batch_without_open_positions_gives_zero() -> None:
    canvas = Canvas.clean(torch.zeros(2, 4, dtype=torch.long))
    batch = Noised(canvas, canvas.tokens, torch.full((2, 4), 0.1), canvas.open)
    nothing = torch.zeros(0, 5, requires_grad=True)
    loss = loss_of(Objective(), nothing, nothing, batch)
    loss.total.backward()
    assert loss.total == 0 and loss.count == 8


def test_the_elbo_normalised_per_token_does_not_depend_on_the_batch_size() -> None:
    """With a cross-entropy of 1 everywhere its mean is 1; the seed's per-open count gives about 2 for large batches."""
    rng = torch.Generator().manual_seed(0)
    clean = Canvas.clean(torch.zeros(32, 64, dtype=torch.long))
    logits = torch.full((32, 64, 2), 0.0)
    logits[..., 1] = torch.tensor(torch.e - 1).log()  # cross-entropy of token 0 is exactly 1
    means = {}
    for per in ("editable", "open"):
        values = []
        for _ in range(200):
            batch = noised(clean, PerText(), Linear(), 0, generator=rng)
            loss = loss_of(Objective(per=per), logits[batch.canvas.open], logits[batch.ar_positions], batch)
            values.append(float(loss.total / loss.count))
        means[per] = sum(values) / len(values)
    assert abs(means["editable"] - 1) < 0.03
    assert 1.9 < means["open"] < 2.2


def test_a_perfect_next_token_oracle_has_loss_zero_and_off_by_one_does_not() -> None:
    """Law 2, on the loss: logits about position i that are right give 0; shifted by one they give more than log V."""
    text = torch.randint(0, 11, (4, 20), generator=torch.Generator().manual_seed(0))
    batch = noised(Canvas.clean(text), PerText(), Linear(), 11, generator=torch.Generator().manual_seed(1))
    sure = F.one_hot(text, 11).float() * 100
    for logits, right in ((sure, True), (sure.roll(1, 1), False)):
        loss = loss_of(Objective(Flat(), per="open"), logits[batch.canvas.open], logits[batch.ar_positions], batch)
        mean = float(loss.total / loss.count)
        assert (mean < 1e-6) if right else (mean > torch.tensor(11.0).log())


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 300), (torch.bfloat16, 300), (torch.float32, 0)])
def test_cross_entropy_in_chunks_agrees_with_torch(dtype: torch.dtype, rows: int) -> None:
    rng = torch.Generator().manual_seed(0)
    values = (torch.randn(rows, 40, generator=rng) * 4).to(dtype)
    values[:, 7] = -torch.inf  # a banned token
    targets = torch.randint(8, 40, (rows,), generator=rng)
    worth = torch.rand(rows, generator=rng)
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    a, b = cross_entropy(ours, targets), F.cross_entropy(theirs.float(), targets, reduction="none")
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    (a * worth).sum().backward()
    (b * worth).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_impossible_ar_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="ar_share"):
        Objective(ar_share=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_is_kl_but_for_the_teacher_s_entropy(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 300, 20, generator=rng).to(dtype).index_fill(2, torch.tensor([3]), -torch.inf)
    ours, theirs = (logits.clone().requires_grad_() for _ in "ab")
    worth = torch.rand(300, generator=rng)
    kl = kl_divergence(Categorical(logits=teacher.float()), Categorical(logits=theirs.float()))
    entropy = Categorical(logits=teacher.float()).entropy()
    made = divergence(ours, teacher)
    torch.testing.assert_close(made, (kl + entropy).detach(), atol=1e-4, rtol=1e-4)
    (made * worth).sum().backward()
    (kl * worth).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


def test_distillation_takes_the_clean_text_s_answers_for_the_truth() -> None:
    rng = torch.Generator().manual_seed(0)
    clean = Canvas.clean(torch.randint(0, 9, (3, 8), generator=rng))
    batch = noised(clean, PerBlock(4), Linear(), 9, ar_share=0.3, generator=rng)
    objective = Objective(ar_weight=0.5, ar_share=0.3, distill=0.4)
    asked = objective.ar_targets(batch)
    assert torch.equal(asked, batch.ar_positions | batch.canvas.open)
    about, told = (torch.randn(3, 8, 9, generator=rng).requires_grad_() for _ in "ab")
    loss = loss_of(objective, about[batch.canvas.open], told[asked], batch)
    plain = loss_of(Objective(ar_weight=0.5, ar_share=0.3), about[batch.canvas.open], told[batch.ar_positions], batch)
    open = batch.canvas.open
    kl = F.kl_div(about[open].log_softmax(-1), told[open].softmax(-1), reduction="none").sum(-1)
    entropy = Categorical(logits=told[open]).entropy()
    nll = F.cross_entropy(about[open], batch.clean[open], reduction="none")
    extra = (0.4 * (kl + entropy - nll) / batch.t[open]).sum()
    torch.testing.assert_close(loss.total, plain.total + extra)
    torch.testing.assert_close(loss.nll, plain.nll)
    torch.testing.assert_close(loss.ar_nll, plain.ar_nll)
    loss.total.backward()
    assert told.grad is not None and (told.grad[~batch.ar_positions] == 0).all()  # the teacher is not taught
