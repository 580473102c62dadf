"""The critic's clipped gradients of DP-WGAN-GP: both ways against one record at a time, what one record can change, and critics that are refused.

All in float64 unless a test is about float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen.models.dpwgan import per_record, two_pass
from medgen.models.dpwgan.cross_record import cross_record_problem
from medgen.models.dpwgan.networks import Critic
from medgen.models.dpwgan.records import ClippedSum, Records

PENALTY = 10.0
ROUTES = pytest.mark.parametrize("route", [two_pass, per_record], ids=["two_pass", "per_record"])
FORMS = pytest.mark.parametrize("formed_cost", [0, two_pass.FORMED_COST, 1e18], ids=["formed", "as_it_costs", "factored"])


class Uneven(nn.Module):
    """Biases, kernels and strides that differ by direction, and rows of the image that no kernel reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.image_shape, self.slope = (2, 10, 9), 0.3
        self.convolutions = nn.ModuleList([nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(0, 1)), nn.Conv2d(4, 3, 3, stride=2, padding=2), nn.Conv2d(3, 5, 1, bias=False)])
        self.score = nn.Linear(5 * 3 * 6, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        for convolution in self.convolutions:
            images = functional.leaky_relu(convolution(images), self.slope)
        return self.score(images.flatten(1)).flatten()


def random_critic(made: Callable[[], nn.Module]) -> nn.Module:
    critic = made().double()
    generator = torch.Generator().manual_seed(3)
    for parameter in critic.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return critic


CRITICS: dict[str, Callable[[], nn.Module]] = {"published": lambda: Critic(2, 32, 2), "uneven": Uneven}


def random_records(critic: nn.Module, n: int, k: int, seed: int = 1) -> Records:
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn((2, n, k, *critic.image_shape), generator=generator, dtype=torch.float64)
    return Records(real, fake, torch.rand((n, k), generator=generator, dtype=torch.float64))


def chosen(records: Records, kept: list[int]) -> Records:
    return Records(records.real[kept], records.fake[kept], records.mix[kept])


def loss_by_definition(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> tuple[Tensor, list[float]]:
    """Of slices [k, C, H, W], with a graph for a double backward; and its three terms."""
    share = mix.view(-1, 1, 1, 1)
    mixed = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    excess = ((slope.flatten(1).square().sum(dim=1) + 1e-12).sqrt() - 1).square().mean()
    terms = [critic(real).mean(), critic(fake).mean(), excess]
    return terms[1] - terms[0] + PENALTY * excess, [term.item() for term in terms]


def flat(gradients: dict[str, Tensor] | list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in (gradients.values() if isinstance(gradients, dict) else gradients)])


def gradient_of(critic: nn.Module, loss: Tensor) -> Tensor:
    return flat(list(torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True, materialize_grads=True)))


def one_by_one(critic: nn.Module, records: Records) -> tuple[Tensor, Tensor]:
    """The records' gradients [N, parameters] and terms with the loss [N, 4], by a loop."""
    rows, terms = [], []
    for real, fake, mix in zip(records.real, records.fake, records.mix, strict=True):
        loss, parts = loss_by_definition(critic, real, fake, mix)
        rows.append(gradient_of(critic, loss))
        terms.append([*parts, loss.item()])
    return torch.stack(rows), torch.tensor(terms, dtype=torch.float64)


def clipped(rows: Tensor, clip_norm: float | None) -> Tensor:
    return rows.sum(dim=0) if clip_norm is None else sum(row * min(1.0, clip_norm / row.norm().item()) for row in rows)


def assert_is(found: ClippedSum, critic: nn.Module, rows: Tensor, terms: Tensor, clip_norm: float | None) -> None:
    assert {name: gradient.shape for name, gradient in found.gradients.items()} == {name: weight.shape for name, weight in critic.named_parameters()}
    expected = clipped(rows, clip_norm)
    assert (flat(found.gradients) - expected).abs().max() <= 1e-9 * min(1, expected.abs().max())
    assert torch.allclose(found.norms, rows.norm(dim=1), rtol=1e-9, atol=1e-12)
    of_all = torch.stack([found.terms.real_score, found.terms.fake_score, found.terms.penalty, found.terms.loss], dim=1)
    assert torch.allclose(of_all, terms, rtol=1e-9, atol=1e-9)


# both ways against the definition


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("made", CRITICS.values(), ids=CRITICS)
@FORMS
def test_two_passes_are_a_double_backward_of_each_record(made: Callable[[], nn.Module], k: int, formed_cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_pass, "FORMED_COST", formed_cost)
    critic = random_critic(made)
    assert two_pass.supports(critic) is None
    records = random_records(critic, 4, k)
    rows, terms = one_by_one(critic, records)
    for clip_norm in (None, rows.norm(dim=1).median().item()):  # half of the records are clipped
        assert_is(two_pass.clipped_sum(critic, records, PENALTY, clip_norm, 3), critic, rows, terms, clip_norm)


@ROUTES
def test_frozen_layers_have_no_gradient_and_no_part_in_the_norm(route: ModuleType) -> None:
    critic = random_critic(lambda: Critic(2, 32, 2))
    critic.convolutions[:2].requires_grad_(False)
    records = random_records(critic, 4, 2)
    rows = []
    trained = {name: weight for name, weight in critic.named_parameters() if weight.requires_grad}
    for real, fake, mix in zip(records.real, records.fake, records.mix, strict=True):
        loss, _ = loss_by_definition(critic, real, fake, mix)
        rows.append(flat(list(torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True))))
    clip_norm = torch.stack(rows).norm(dim=1).median().item()
    found = route.clipped_sum(critic, records, PENALTY, clip_norm, 3)
    assert list(trained) == list(found.gradients) == list(route.clipped_sum(critic, chosen(records, []), PENALTY, clip_norm, 3).gradients) and len(trained) == 5
    assert (flat(found.gradients) - clipped(torch.stack(rows), clip_norm)).abs().max() <= 1e-9
    assert torch.allclose(found.norms, torch.stack(rows).norm(dim=1), rtol=1e-9)

@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("made", CRITICS.values(), ids=CRITICS)
def test_the_reference_is_a_double_backward_of_each_record(made: Callable[[], nn.Module], k: int) -> None:
    critic = random_critic(made)
    records = random_records(critic, 4, k)
    rows, terms = one_by_one(critic, records)
    for clip_norm in (None, rows.norm(dim=1).median().item()):
        assert_is(per_record.clipped_sum(critic, records, PENALTY, clip_norm, 3), critic, rows, terms, clip_norm)


def test_the_reference_takes_critics_that_two_passes_do_not() -> None:
    critic = Planted(nn.GroupNorm(2, 4), nn.Tanh()).double()
    assert cross_record_problem(critic) is None and two_pass.supports(critic) is not None
    records = random_records(critic, 3, 2)
    rows, terms = one_by_one(critic, records)
    assert_is(per_record.clipped_sum(critic, records, PENALTY, 0.5, 2), critic, rows, terms, 0.5)


@ROUTES
def test_without_clipping_the_sum_is_the_gradient_of_the_batch(route: ModuleType) -> None:
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 5, 3)
    loss, _ = loss_by_definition(critic, records.real.flatten(0, 1), records.fake.flatten(0, 1), records.mix.flatten())
    expected = len(records) * gradient_of(critic, loss)
    found = flat(route.clipped_sum(critic, records, PENALTY, None, 2).gradients)
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@FORMS
def test_slices_without_content_and_without_a_slope_count_as_the_definition_has_them(formed_cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_pass, "FORMED_COST", formed_cost)
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 2, 2)
    records.real[0, 0], records.fake[0, 0] = 0, 0  # every convolution gives exactly 0, where the kink is
    rows, terms = one_by_one(critic, records)
    assert_is(two_pass.clipped_sum(critic, records, PENALTY, 1.0, 2), critic, rows, terms, 1.0)
    assert_is(per_record.clipped_sum(critic, records, PENALTY, 1.0, 2), critic, rows, terms, 1.0)

    critic.score.weight.data.zero_()  # so that the score has no slope anywhere, and its length no derivative but for the small number in it
    rows, terms = one_by_one(critic, records)
    assert rows.isfinite().all() and rows.any()
    assert_is(two_pass.clipped_sum(critic, records, PENALTY, 1.0, 2), critic, rows, terms, 1.0)
    assert_is(per_record.clipped_sum(critic, records, PENALTY, 1.0, 2), critic, rows, terms, 1.0)


@FORMS
def test_norms_of_float32_hold_where_large_gradients_cancel(formed_cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real and fake images that are alike give each a large gradient that the other takes away: the square of what remains is far below rounding."""
    monkeypatch.setattr(two_pass, "FORMED_COST", formed_cost)
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 4, 1)
    near = Records(1000 * records.real, 1000 * records.real + 0.01 * records.fake, records.mix)
    exact = two_pass.clipped_sum(critic, near, 0.0, None, 4).norms
    single = Records(near.real.float(), near.fake.float(), near.mix.float())
    found = two_pass.clipped_sum(critic.float(), single, 0.0, None, 4).norms
    apart = per_record.clipped_sum(critic, single, 0.0, None, 4).norms
    assert (found / exact - 1).abs().max() < 10 * max((apart / exact - 1).abs().max().item(), 1e-4)


@FORMS
def test_a_gradient_that_cancels_wholly_has_norm_zero(formed_cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_pass, "FORMED_COST", formed_cost)
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 20, 1)
    found = two_pass.clipped_sum(critic, Records(records.real, records.real, records.mix), 0.0, 1.0, 20)
    assert (found.norms < 1e-5).all() and flat(found.gradients).norm() < 1e-9


# what one record can change


@ROUTES
@FORMS
def test_taking_a_record_away_changes_the_sum_by_the_clip_norm_at_most(route: ModuleType, formed_cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_pass, "FORMED_COST", formed_cost)
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 5, 2)
    records.real[3] *= 1e6  # a scan in other units
    whole = route.clipped_sum(critic, records, PENALTY, 0.7, 2)
    assert whole.norms[3] > 1e4 * whole.norms.median() and (whole.norms > 0.7).all()
    for gone in range(5):
        rest = route.clipped_sum(critic, chosen(records, [index for index in range(5) if index != gone]), PENALTY, 0.7, 2)
        change = (flat(whole.gradients) - flat(rest.gradients)).norm().item()
        assert change == pytest.approx(0.7, abs=1e-9)


@ROUTES
def test_a_gradient_below_the_clip_norm_is_left_as_it_is(route: ModuleType) -> None:
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 3, 1)
    norms = route.clipped_sum(critic, records, PENALTY, None, 3).norms
    unclipped, high = (flat(route.clipped_sum(critic, records, PENALTY, clip_norm, 3).gradients) for clip_norm in (None, 1.01 * norms.max().item()))
    assert torch.equal(unclipped, high)


@ROUTES
@FORMS
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_record_whose_gradient_is_not_finite_moves_nothing(route: ModuleType, value: float, formed_cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_pass, "FORMED_COST", formed_cost)
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 4, 2)
    records.real[1, 0, 0, 5, 5] = value
    for clip_norm in (None, 0.7):
        found = route.clipped_sum(critic, records, PENALTY, clip_norm, 3)
        expected = flat(route.clipped_sum(critic, chosen(records, [0, 2, 3]), PENALTY, clip_norm, 3).gradients)
        assert (flat(found.gradients) - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert found.norms.isfinite().tolist() == [True, False, True, True]


@ROUTES
@FORMS
def test_only_records_that_are_not_finite_sum_to_zero(route: ModuleType, formed_cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_pass, "FORMED_COST", formed_cost)
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 2, 1)
    broken = Records(records.real, records.fake * math.nan, records.mix)
    assert not flat(route.clipped_sum(critic, broken, PENALTY, 1.0, 2).gradients).any()
    for parameter in critic.parameters():
        parameter.data *= 1e200
    assert not flat(route.clipped_sum(critic, records, PENALTY, 1.0, 2).gradients).any()


@ROUTES
def test_no_records_sum_to_zero(route: ModuleType) -> None:
    critic = random_critic(CRITICS["published"])
    found = route.clipped_sum(critic, random_records(critic, 0, 3), PENALTY, 1.0, 4)
    assert {name: gradient.shape for name, gradient in found.gradients.items()} == {name: weight.shape for name, weight in critic.named_parameters()}
    assert not flat(found.gradients).any()
    assert [len(values) for values in (found.norms, found.terms.real_score, found.terms.fake_score, found.terms.penalty, found.terms.loss)] == [0] * 5


@ROUTES
def test_chunks_change_nothing_but_rounding_and_one_chunk_size_not_even_that(route: ModuleType) -> None:
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 7, 2)
    whole = route.clipped_sum(critic, records, PENALTY, 0.7, 7)
    for chunk in (1, 3, 100):
        found = route.clipped_sum(critic, records, PENALTY, 0.7, chunk)
        assert (flat(found.gradients) - flat(whole.gradients)).abs().max() <= 1e-12 * flat(whole.gradients).abs().max()
        assert torch.allclose(found.norms, whole.norms, rtol=1e-12)
    again = route.clipped_sum(critic, records, PENALTY, 0.7, 3)
    once_more = route.clipped_sum(critic, records, PENALTY, 0.7, 3)
    assert torch.equal(flat(again.gradients), flat(once_more.gradients)) and torch.equal(again.norms, once_more.norms)


@ROUTES
def test_critic_and_records_stay_as_they_were(route: ModuleType) -> None:
    critic = random_critic(CRITICS["published"])
    records = random_records(critic, 3, 2)
    records.real[0, 0, 0, 0, 0] = math.nan
    weights, given = {name: value.clone() for name, value in critic.state_dict().items()}, [records.real.clone(), records.fake.clone(), records.mix.clone()]
    route.clipped_sum(critic, records, PENALTY, 0.7, 2)
    assert all(torch.equal(value, weights[name]) for name, value in critic.state_dict().items())
    assert all(parameter.grad is None for parameter in critic.parameters())
    for value, before in zip((records.real, records.fake, records.mix), given, strict=True):
        assert torch.equal(value.nan_to_num(7), before.nan_to_num(7))


# critics that are refused


class Planted(nn.Module):
    """A critic with something in its middle."""

    def __init__(self, middle: nn.Module, activation: nn.Module | None = None):
        super().__init__()
        self.image_shape = (1, 8, 8)
        self.first, self.middle, self.activation = nn.Conv2d(1, 4, 4, 2), middle, activation or nn.LeakyReLU(0.2)
        self.score = nn.Linear(36, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.activation(self.middle(self.first(images))).flatten(1)).flatten()


class BatchStd(nn.Module):
    """Written by hand, as in PACGAN, but added: no layer of torch's that could be known by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.std(dim=0).mean()


class Centred(Planted):
    def forward(self, images: Tensor) -> Tensor:
        x = self.activation(self.first(images)).flatten(1)
        return self.score(x - x.mean(dim=0)).flatten()


class Remembers(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean()
        return x


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


class OnlyIn(nn.Module):
    """Couples the parameters' gradients and no values: what is added is exactly 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.weight - self.weight.detach()) * x.mean()


PLANTED = {
    "BatchNorm": (lambda: Planted(nn.BatchNorm2d(4)), "middle (BatchNorm2d) normalises"),
    "BatchNorm in a sequence": (lambda: Planted(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4, track_running_stats=False))), "middle.1 (BatchNorm2d) normalises"),
    "SyncBatchNorm": (lambda: Planted(nn.SyncBatchNorm(4)), "middle (SyncBatchNorm) normalises"),
    "InstanceNorm with statistics": (lambda: Planted(nn.InstanceNorm2d(4, track_running_stats=True)), "middle (InstanceNorm2d) keeps statistics"),
    "Dropout": (lambda: Planted(nn.Dropout2d(0.5)), "middle (Dropout2d) draws random numbers"),
    "standard deviation of the batch": (lambda: Planted(BatchStd()), "what comes out of middle depends on the other records"),
    "mean of the batch": (lambda: Centred(nn.Identity()), "what goes into score depends on the other records"),
    "coupled gradients": (lambda: Planted(OnlyIn()), "Planted couples the records"),
    "memory": (lambda: Planted(Remembers()), "changes the buffer middle.seen"),
    "random numbers": (lambda: Planted(Draws()), "draws random numbers"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_critic_that_couples_records_is_named(planted: str) -> None:
    made, words = PLANTED[planted]
    critic = made()
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    problem = cross_record_problem(critic)
    assert problem is not None and words in problem
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())


@pytest.mark.parametrize("made", [lambda: Critic(2, 32, 2), Uneven, lambda: Planted(nn.GroupNorm(2, 4)), lambda: Planted(nn.InstanceNorm2d(4, affine=True))])
def test_a_critic_that_judges_each_record_for_itself_is_not(made: Callable[[], nn.Module]) -> None:
    critic = made()
    for parameter in critic.parameters():
        parameter.data.zero_()  # what cannot be seen with these weights is looked for with others
    assert cross_record_problem(critic) is None


def test_coupling_is_seen_even_where_the_weights_hide_it() -> None:
    critic = Planted(BatchStd())
    critic.score.weight.data.zero_()
    assert cross_record_problem(critic) is not None


class Extra(Critic):
    """Its score is more than its layers say."""

    def __init__(self) -> None:
        super().__init__(2, 32, 1)
        self.scale = nn.Parameter(torch.ones(()))


class Squared(Critic):
    def __init__(self) -> None:
        super().__init__(2, 32, 1)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).square()


def uneven_with(**changed: object) -> nn.Module:
    critic = Uneven()
    for name, value in changed.items():
        setattr(critic, name, value)
    return critic


REFUSED = {
    "other layers": (lambda: Planted(nn.Identity()), "Planted does not have the attributes"),
    "not a convolution": (lambda: uneven_with(convolutions=nn.ModuleList([nn.ConvTranspose2d(2, 4, 3)])), "not a Conv2d"),
    "groups": (lambda: uneven_with(convolutions=nn.ModuleList([nn.Conv2d(2, 4, 3, groups=2)])), "only one group"),
    "dilation": (lambda: uneven_with(convolutions=nn.ModuleList([nn.Conv2d(2, 4, 3, dilation=2)])), "no dilation"),
    "reflection": (lambda: uneven_with(convolutions=nn.ModuleList([nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")])), "zeros as padding"),
    "same": (lambda: uneven_with(convolutions=nn.ModuleList([nn.Conv2d(2, 4, 3, padding="same")])), "numbers of zeros"),
    "two scores": (lambda: uneven_with(score=nn.Linear(90, 2)), "not a Linear with one output"),
    "slope": (lambda: uneven_with(slope=-0.1), "slope is -0.1"),
    "one layer twice": (lambda: uneven_with(convolutions=nn.ModuleList([nn.Conv2d(2, 2, 3)] * 2)), "stand in two places"),
    "a parameter more": (Extra, "its parameters scale are in neither"),
    "another score": (Squared, "scores images unlike its convolutions"),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED)
def test_two_passes_refuse_critics_that_they_would_be_wrong_for(refused: str) -> None:
    made, words = REFUSED[refused]
    critic = made()
    for parameter in critic.parameters():
        parameter.data.zero_()  # with these weights all critics give the same
    problem = two_pass.supports(critic)
    assert problem is not None and words in problem
