"""Two hundred steps of every consistency method against published arithmetic.

Each method trains a small network from the same weights twice: by its `Stage`
and `core.make_step` in float32, as in any run, and here in NumPy in float64.
The NumPy side is derived from the paper's equations, and from what is known of
the authors' code where the paper is silent; gradients are written by hand.
Batches, views and the random draws of a method are the same on both sides.

The whole curve of the loss, the parameters after step 200 and their average
have to agree. The library computes in float32, as users do, which leaves a
relative difference of at most 3e-5 in these runs (VAT: 7e-5). A ramp shifted by
one step, another order of updates or another constant gives far more. Decisions
(thresholds, largest class) could differ by rounding alone: `Network.margin` is
the smallest distance of any decision from its boundary.

Where a release departs from its paper, the function says which one it follows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssljax.core import (
  DEFAULT_VIEW,
  BatchSpec,
  init_stage,
  init_state,
  make_step,
)
from ssljax.methods import (
  fixmatch,
  flexmatch,
  freematch,
  ict,
  laplacenet,
  mean_teacher,
  mixmatch,
  pi_model,
  pseudo_label,
  softmatch,
  temporal_ensembling,
  uda,
  vat,
)
from ssljax.networks import network

STEPS, RATE, MOMENTUM = 200, 0.02, 0.9
C, D, H = 3, 5, 7  # classes, pixels, hidden units
N, M = 30, 9  # images, of them with a label: the first
L, U = 4, 6  # labelled and unlabelled images of a step
B = L + U
EMA = 0.9
MIX = 0.3  # λ where a batch has one


# Fixed inputs.


class Inputs(NamedTuple):
  """The data of all steps."""

  images: np.ndarray  # [N, D]
  classes: np.ndarray  # [N] true classes; those of the first M are labels
  rows: np.ndarray  # [T, B], labelled rows first
  views: dict[str, np.ndarray]  # [T, rows, D] by name

  def of_step(self, t):
    return {name: view[t] for name, view in self.views.items()}


def make_inputs(seed=3):
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(C, D))
  classes = np.arange(N) % C
  images = 1.2 * centres[classes] + 0.8 * rng.normal(size=(N, D))
  draw = lambda low, high, count: np.stack(
    [low + rng.permutation(high - low)[:count] for _ in range(STEPS)]
  )
  rows = np.concatenate([draw(0, M, L), draw(M, N, U)], axis=1)
  view = lambda rows, noise: (
    images[rows] + noise * rng.normal(size=(*rows.shape, D))
  )
  views = {DEFAULT_VIEW: view(rows, 0.2), 'second': view(rows, 0.2)}
  for name in ('strong', 'strong0', 'strong1'):
    views[name] = view(rows[:, L:], 0.8)
  views['weak1'] = view(rows[:, :L], 0.2)
  views['teacher'] = views['second']
  # The library computes in float32: its inputs are these numbers exactly.
  single = lambda x: x.astype(np.float32).astype(np.float64)
  views = {name: single(view) for name, view in views.items()}
  return Inputs(single(images), classes, rows, views)


INPUTS = make_inputs()
LAMBDAS = np.linspace(0.05, 0.95, L + 2 * U)  # one for each mixed row
DIRECTION = np.random.default_rng(4).normal(size=(B, D)).astype(np.float32)
# The partner of row i is i + 11, modulo their number: no row is the partner of
# its partner, so that λ and 1 − λ differ.
PARTNER_STEP = 11


def initial_weights():
  rng = np.random.default_rng(5)
  shapes = {'w1': (D, H), 'b1': (H,), 'w2': (H, C), 'b2': (C,)}
  return {
    name: (0.4 * rng.normal(size=shape)).astype(np.float32)
    for name, shape in shapes.items()
  }


# The library's side.


def outputs(params, images):
  x = images.reshape(len(images), -1)
  h = jnp.tanh(x @ params['w1'] + params['b1'][None])
  return network.Outputs(h @ params['w2'] + params['b2'][None], h)


NET = network.Network(
  init=lambda key, image: (jax.tree.map(jnp.asarray, initial_weights()), {}),
  train=lambda params, stats, image, key: (outputs(params, image), stats),
  infer=lambda params, stats, image: outputs(params, image),
  sample=lambda params, stats, image, key: outputs(params, image),
)


def as_images(x):
  return jnp.asarray(x, jnp.float32)[..., None, None, :]


def train_by_the_library(method, spans):
  """Return (losses [T], state) of spans (stage, begin, end) of the steps."""
  labels = np.where(np.arange(N) < M, INPUTS.classes, -1)
  state = init_state(
    method,
    NET,
    jax.random.key(0),
    jnp.asarray(labels, jnp.int32),
    as_images(INPUTS.images[:1]),
    labelled=M,
  )
  losses, runs = [], {}
  for number, begin, end in spans:
    stage = method.stages[number]
    if number not in runs:
      state = init_stage(stage, state, method.averaging)
      runs[number] = span_of_steps(stage, begin, method.averaging)
    views = {
      view.name: INPUTS.views[view.name][begin:end, -rows_of(view) :]
      for view in stage.views
    }
    size = stage.batch_spec.size
    views[DEFAULT_VIEW] = INPUTS.views[DEFAULT_VIEW][begin:end, :size]
    views = {name: as_images(view) for name, view in views.items()}
    rows = jnp.asarray(INPUTS.rows[begin:end, :size], jnp.int32)
    state, some = runs[number](state, rows, views)
    losses.append(np.asarray(some))
  return np.concatenate(losses), state


def rows_of(view):
  return {'all': B, 'labelled': L, 'unlabelled': U}[view.rows]


def span_of_steps(stage, first, averaging):
  """Return the function of the steps of an epoch, with its update before."""
  step = make_step(stage, lambda views, rows, key: views, averaging)

  def body(state, inputs):
    rows, views = inputs
    state, metrics = step(state, views, rows, jnp.int32(first))
    return state, metrics['loss']

  @jax.jit
  def run(state, rows, views):
    if stage.per_example:
      images = as_images(INPUTS.images)
      mapped = stage.per_example(state, images, jax.random.key(0))
      state = stage.epoch_update(state, mapped)
    return jax.lax.scan(body, state, (rows, views))

  return run


@pytest.fixture(autouse=True)
def fixed_draws(monkeypatch):
  """Replace the random draws inside a step by constants."""

  def beta(key, a, b, shape):
    del key, a, b
    (count,) = shape
    return jnp.float32([MIX] if count == 1 else LAMBDAS[:count])

  def permutation(key, x):
    del key
    return jnp.roll(x, -PARTNER_STEP)

  def normal(key, shape, dtype=jnp.float32):
    del key, dtype
    return jnp.asarray(DIRECTION).reshape(shape)

  monkeypatch.setattr(jax.random, 'beta', beta)
  monkeypatch.setattr(jax.random, 'permutation', permutation)
  monkeypatch.setattr(jax.random, 'normal', normal)


# NumPy's side: the network, its gradient and the optimiser.


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


class Pass(NamedTuple):
  """A forward pass."""

  x: np.ndarray  # [n, D]
  h: np.ndarray  # [n, H]
  z: np.ndarray  # [n, C]
  p: np.ndarray  # [n, C]


class Network:
  """logits = tanh(x W1 + b1) W2 + b2, trained by SGD with momentum."""

  def __init__(self):
    self.w = {k: v.astype(np.float64) for k, v in initial_weights().items()}
    self.velocity = {k: np.zeros_like(v) for k, v in self.w.items()}
    self.margin = np.inf
    self.masks = []

  def __call__(self, x, w=None):
    w = w or self.w
    h = np.tanh(x @ w['w1'] + w['b1'])
    z = h @ w['w2'] + w['b2']
    return Pass(x, h, z, softmax(z))

  def descend(self, slopes):
    """Update the weights from (pass, dloss/dlogits [n, C]) of each pass."""
    total = {k: np.zeros_like(v) for k, v in self.w.items()}
    for one, dz in slopes:
      da = dz @ self.w['w2'].T * (1 - one.h**2)
      total['w2'] += one.h.T @ dz
      total['b2'] += dz.sum(0)
      total['w1'] += one.x.T @ da
      total['b1'] += da.sum(0)
    for k, slope in total.items():
      self.velocity[k] = MOMENTUM * self.velocity[k] + slope
      self.w[k] = self.w[k] - RATE * self.velocity[k]

  def slope_of_inputs(self, one, dz):
    """Return dloss/dx [n, D]."""
    return dz @ self.w['w2'].T * (1 - one.h**2) @ self.w['w1'].T

  def decided(self, x, boundary):
    """Return x >= boundary, and note the distance."""
    self.margin = min(self.margin, np.abs(x - boundary).min())
    self.masks.append(x >= boundary)
    return self.masks[-1]

  def largest(self, p):
    """Return the largest class [n], and note the distance to the second."""
    ordered = np.sort(p, axis=-1)
    self.margin = min(self.margin, (ordered[:, -1] - ordered[:, -2]).min())
    return p.argmax(-1)


class Step(NamedTuple):
  """What a method sees of a step."""

  t: int  # within the stage
  rows: np.ndarray  # [B]
  y: np.ndarray  # [L]
  x: np.ndarray  # [L, D] labelled images, weak view
  u: np.ndarray  # [U, D] unlabelled images, weak view
  views: dict[str, np.ndarray]


def onehot(y):
  return np.eye(C)[y]


def cross_entropy(p, y):
  return -np.log(p[np.arange(len(y)), y])


def supervised(net, b):
  """Return the mean cross-entropy of the labelled images, and its slope."""
  one = net(b.x)
  return cross_entropy(one.p, b.y).mean(), (one, (one.p - onehot(b.y)) / L)


def pseudo_cross_entropy(one, y, weight):
  """Return 1/U Σ weight CE, and its slope."""
  loss = (weight * cross_entropy(one.p, y)).sum() / U
  return loss, (one, weight[:, None] * (one.p - onehot(y)) / U)


def through_softmax(p, dp):
  """Return dloss/dlogits from dloss/dp."""
  return p * (dp - (p * dp).sum(-1, keepdims=True))


def squared_distance(one, q):
  """Return the mean over rows and classes of (p − q)², and its slope."""
  difference = one.p - q
  return (difference**2).mean(), (
    one,
    through_softmax(one.p, 2 * difference / difference.size),
  )


def sigmoid_ramp(t, length):
  """exp(−5 (1 − t/T)²) of Laine and Aila, 1 after T."""
  return np.exp(-5 * (1 - min(t / length, 1.0)) ** 2)


def moving_average(decay_at):
  """Return the update of an average; `decay_at` takes the updates before."""

  def update(memory, net):
    d = decay_at(memory.setdefault('updates', 0))
    memory['updates'] += 1
    old = memory['average']
    memory['average'] = {k: d * old[k] + (1 - d) * net.w[k] for k in old}

  return update


def scaled(factor, slope):
  one, dz = slope
  return one, factor * dz


# The methods: (net, step, memory) -> (loss, slopes). The memory is a dict.


def numpy_pseudo_label(net, b, memory):
  # Lee 2013, Eq. 15 and 16, with T1 = 20, T2 = 120 and α_f = 3.
  alpha = 3 * min(max((b.t - 20) / 100, 0.0), 1.0)
  labelled, slope = supervised(net, b)
  other = net(b.u)
  y = net.largest(other.p)
  unlabelled, more = pseudo_cross_entropy(other, y, np.ones(U))
  return labelled + alpha * unlabelled, [slope, scaled(alpha, more)]


def numpy_pi_model(net, b, memory):
  # Laine and Aila 2017, Algorithm 1: both passes have gradients. w_max = 4,
  # T = 60. The authors' sum over |B| is here a mean over labelled images.
  w = 4 * sigmoid_ramp(b.t, 60)
  labelled, slope = supervised(net, b)
  one, two = net(np.concatenate([b.x, b.u])), net(b.views['second'])
  distance, of_one = squared_distance(one, two.p)
  _, of_two = squared_distance(two, one.p)
  return labelled + w * distance, [slope, scaled(w, of_one), scaled(w, of_two)]


def numpy_temporal_ensembling(net, b, memory):
  # Algorithm 2 with the paper's bias correction Z / (1 − α^n), where n counts
  # the visits of an image (authors: of an epoch). Visited images only.
  w, alpha = 4 * sigmoid_ramp(b.t, 60), 0.6
  z_sums = memory.setdefault('Z', np.zeros([N, C]))
  visits = memory.setdefault('visits', np.zeros(N, int))
  labelled, slope = supervised(net, b)
  one = net(np.concatenate([b.x, b.u]))
  target = one.p.copy()
  for i, row in enumerate(b.rows):
    if visits[row]:
      target[i] = z_sums[row] / (1 - alpha ** visits[row])
  distance, more = squared_distance(one, target)
  for i, row in enumerate(b.rows):
    z_sums[row] = alpha * z_sums[row] + (1 - alpha) * one.p[i]
    visits[row] += 1
  return labelled + w * distance, [slope, scaled(w, more)]


def numpy_mean_teacher(net, b, memory):
  # Tarvainen and Valpola 2017. The teacher moves after the student, with
  # α = min(1 − 1/(step + 1), α_max) at step 1, 2, ..., as in their PyTorch
  # code: the first update takes half of the student.
  w = 4 * sigmoid_ramp(b.t, 60)
  labelled, slope = supervised(net, b)
  student = net(np.concatenate([b.x, b.u]))
  teacher = net(b.views['teacher'], memory['average'])
  distance, more = squared_distance(student, teacher.p)
  return labelled + w * distance, [slope, scaled(w, more)]


def numpy_vat(net, b, memory):
  # Miyato et al. 2018, VAT + EntMin with one power iteration, α = 1, ε = 1.5
  # and ξ = 0.5, at which float32 resolves the direction.
  xi, epsilon = 0.5, 1.5
  labelled, slope = supervised(net, b)
  one = net(np.concatenate([b.x, b.u]))
  unit = lambda d: d / np.linalg.norm(d, axis=1, keepdims=True)
  near = net(one.x + xi * unit(DIRECTION.astype(np.float64)))
  # The slope of KL(p‖q) with respect to the logits of q is q − p.
  d = unit(net.slope_of_inputs(near, near.p - one.p))
  moved = net(one.x + epsilon * d)
  smoothness = (one.p * np.log(one.p / moved.p)).sum(-1).mean()
  entropy = -(one.p * np.log(one.p)).sum(-1)
  of_entropy = -one.p * (np.log(one.p) + entropy[:, None]) / B
  slopes = [slope, (moved, (moved.p - one.p) / B), (one, of_entropy)]
  return labelled + smoothness + entropy.mean(), slopes


def partners(count):
  return (np.arange(count) + PARTNER_STEP) % count


def numpy_ict(net, b, memory):
  # Verma et al. 2019, Algorithm 1: probabilities of the teacher are mixed, one
  # λ for the batch, labelled images are not mixed (the authors' code mixes
  # logits, and labelled images too).
  w = 4 * sigmoid_ramp(b.t, 60)
  labelled, slope = supervised(net, b)
  other = partners(U)
  mix = lambda x: MIX * x + (1 - MIX) * x[other]
  target = mix(net(b.u, memory['average']).p)
  distance, more = squared_distance(net(mix(b.u)), target)
  return labelled + w * distance, [slope, scaled(w, more)]


def numpy_mixmatch(net, b, memory):
  # Berthelot et al. 2019, Algorithm 1 with K = 2, T = 0.5, and the authors'
  # linear ramp of λ_U, here to 4 over 40 steps.
  guess = (net(b.u).p + net(b.views['second'][L:]).p) / 2
  q = guess**2 / (guess**2).sum(-1, keepdims=True)  # 1/T = 2
  x = np.concatenate([b.x, b.u, b.views['second'][L:]])
  targets = np.concatenate([onehot(b.y), q, q])
  other = partners(len(x))
  lam = np.maximum(LAMBDAS, 1 - LAMBDAS)[:, None]
  mix = lambda x: lam * x + (1 - lam) * x[other]
  x, targets = mix(x), mix(targets)
  one, two = net(x[:L]), net(x[L:])
  labelled = -(targets[:L] * np.log(one.p)).sum(-1).mean()
  distance, more = squared_distance(two, targets[L:])
  w = 4 * min(b.t / 40, 1.0)
  slope = one, (one.p - targets[:L]) / L
  return labelled + w * distance, [slope, scaled(w, more)]


def numpy_uda(net, b, memory):
  # Xie et al. 2020 with linear training signal annealing, τ = 0.4, β = 0.8:
  # the mask is of the prediction before sharpening.
  eta = b.t / STEPS * (1 - 1 / C) + 1 / C
  one = net(b.x)
  kept = ~net.decided(one.p[np.arange(L), b.y], eta)
  count = max(kept.sum(), 1)
  labelled = (kept * cross_entropy(one.p, b.y)).sum() / count
  slope = one, kept[:, None] * (one.p - onehot(b.y)) / count
  weak, strong = net(b.u), net(b.views['strong'])
  mask = net.decided(weak.p.max(-1), 0.8)
  q = softmax(weak.z / 0.4)
  divergence = (q * np.log(q / strong.p)).sum(-1)
  more = strong, mask[:, None] * (strong.p - q) / U
  return labelled + (mask * divergence).mean(), [slope, more]


def numpy_fixmatch(net, b, memory):
  # Sohn et al. 2020, Eq. 3 and 4, τ = 0.8.
  labelled, slope = supervised(net, b)
  q = net(b.u).p
  mask = net.decided(q.max(-1), 0.8)
  unlabelled, more = pseudo_cross_entropy(
    net(b.views['strong']), net.largest(q), mask
  )
  return labelled + unlabelled, [slope, more]


def numpy_flexmatch(net, b, memory):
  # Zhang et al. 2021 as in TorchSSL: the counts of the step before; the unused
  # images are a class of their own in the maximum; ≥ where the paper has >.
  label = memory.setdefault('label', np.full(N, -1))
  labelled, slope = supervised(net, b)
  counts = np.array([(label[M:] == c).sum() for c in range(C)])
  beta = counts / max(counts.max(), (label[M:] == -1).sum())
  limits = 0.8 * beta / (2 - beta)
  q = net(b.u).p
  guess, confidence = net.largest(q), q.max(-1)
  mask = net.decided(confidence, limits[guess])
  unlabelled, more = pseudo_cross_entropy(net(b.views['strong']), guess, mask)
  sure = net.decided(confidence, 0.8)
  label[b.rows[L:][sure]] = guess[sure]
  return labelled + unlabelled, [slope, more]


def numpy_freematch(net, b, memory):
  # Wang et al. 2023: the averages are updated first; L_f = Σ a log b with the
  # authors' ratio 0 for classes without a prediction. w_f = 0.05, m = 0.9.
  m = 0.9
  labelled, slope = supervised(net, b)
  q, strong = net(b.u).p, net(b.views['strong'])
  guess = net.largest(q)
  average = lambda name, new: memory.update(
    {name: m * memory.get(name, 1 / C) + (1 - m) * new}
  )
  average('tau', q.max(-1).mean())
  average('p', q.mean(0))
  average('h', onehot(guess).mean(0))
  limits = memory['tau'] * memory['p'] / memory['p'].max()
  mask = net.decided(q.max(-1), limits[guess])
  unlabelled, more = pseudo_cross_entropy(strong, guess, mask)
  fair, dz = 0.0, np.zeros_like(strong.z)
  if mask.any():
    count = mask.sum()
    h = (mask[:, None] * onehot(net.largest(strong.p))).sum(0) / count
    inverse = np.where(h > 0, 1 / np.where(h > 0, h, 1), 0)
    ratio = inverse * (mask[:, None] * strong.p).sum(0) / count
    ours = ratio / ratio.sum()
    target = memory['p'] / memory['h']
    target = target / target.sum()
    fair = (target * np.log(ours + 1e-12)).sum()
    slope_ours = target / (ours + 1e-12)
    slope_ratio = (slope_ours - (slope_ours * ours).sum()) / ratio.sum()
    dp = mask[:, None] * (inverse * slope_ratio)[None] / count
    dz = through_softmax(strong.p, dp)
  total = labelled + unlabelled + 0.05 * fair
  return total, [slope, more, (strong, 0.05 * dz)]


def numpy_softmatch(net, b, memory):
  # Chen et al. 2023 as in USB: p̂ starts as the first batch's mean, aligned
  # confidences, unbiased variance, 2σ; the label is that of q. m = 0.9.
  m = 0.9
  labelled, slope = supervised(net, b)
  q = net(b.u).p
  mean = q.mean(0)
  memory['p'] = m * memory['p'] + (1 - m) * mean if 'p' in memory else mean
  aligned = q * (1 / C + 1e-6) / (memory['p'] + 1e-6)
  confidence = (aligned / aligned.sum(-1, keepdims=True)).max(-1)
  mu = m * memory.get('mu', 1 / C) + (1 - m) * confidence.mean()
  var = m * memory.get('var', 1.0) + (1 - m) * confidence.var(ddof=1)
  memory.update(mu=mu, var=var)
  below = np.minimum(confidence - mu, 0)
  weight = np.exp(-(below**2) / (2 * var / 2**2))
  unlabelled, more = pseudo_cross_entropy(
    net(b.views['strong']), net.largest(q), weight
  )
  return labelled + unlabelled, [slope, more]


NEIGHBOURS, ALPHA = 4, 0.99


def conjugate_gradients(a, y):
  """Solve a f = y from 0 until ‖y − a f‖ ≤ 1e-3 ‖y‖, in 30 steps at most."""
  f, r = np.zeros_like(y), y.copy()
  d = r.copy()
  for _ in range(30):
    if np.linalg.norm(r) <= 1e-3 * np.linalg.norm(y):
      break
    along = a @ d
    length = (r @ r) / (d @ along)
    f, new = f + length * d, r - length * along
    d = new + (new @ new) / (r @ r) * d
    r = new
  return f


def propagated(net):
  """Return LaplaceNet's pseudo-labels [N]; Sellars et al. 2022, steps 1–4."""
  h = net(INPUTS.images).h
  x = h / np.linalg.norm(h, axis=1, keepdims=True)
  w = x @ x.T
  np.fill_diagonal(w, -np.inf)
  ordered = np.sort(w, axis=1)
  gaps = ordered[:, -NEIGHBOURS] - ordered[:, -NEIGHBOURS - 1]
  net.margin = min(net.margin, gaps.min())
  w = np.where(w >= ordered[:, [-NEIGHBOURS]], np.maximum(w, 0), 0)
  w = np.maximum(w, w.T)
  scale = 1 / np.sqrt(w.sum(1))
  system = np.eye(N) - ALPHA * scale[:, None] * w * scale[None]
  y = np.zeros([N, C])
  y[np.arange(M), INPUTS.classes[:M]] = 1
  f = np.stack([conjugate_gradients(system, y[:, c]) for c in range(C)], 1)
  f = np.maximum(f, 0)
  f /= f.sum(1, keepdims=True)
  wanted = np.bincount(INPUTS.classes[:M], minlength=C) / M
  for _ in range(100):
    now = np.bincount(f[M:].argmax(1), minlength=C) / (N - M)
    f *= np.clip(wanted / (now + 1e-7), 0.99, 1.01)
    f /= f.sum(1, keepdims=True)
  net.largest(f[M:])
  return np.where(np.arange(N) < M, INPUTS.classes, f.argmax(1))


def numpy_laplacenet(net, b, memory):
  # Both stages: one λ and one shuffle for all K = 2 samples; labelled images
  # weakly, unlabelled ones strongly augmented.
  size = len(b.rows)
  y = INPUTS.classes[b.rows] if size == L else memory['label'][b.rows]
  other, loss, slopes = partners(size), 0.0, []
  for k in range(2):
    x = b.views['weak1'] if k else b.x
    if size > L:
      x = np.concatenate([x, b.views[f'strong{k}']])
    one = net(MIX * x + (1 - MIX) * x[other])
    target = MIX * onehot(y) + (1 - MIX) * onehot(y[other])
    loss += -(target * np.log(one.p)).sum() / (2 * size)
    slopes.append((one, (one.p - target) / (2 * size)))
  return loss, slopes


def train_in_numpy(function, spans, average=None, before_span=None):
  """Return (losses [T], network, memory)."""
  net = Network()
  memory, losses = {'average': dict(net.w)}, []
  firsts = {}
  for number, begin, end in spans:
    first = firsts.setdefault(number, begin)
    if before_span and number:
      memory['label'] = before_span(net)
    size = L if number == 0 and len({n for n, *_ in spans}) > 1 else B
    for t in range(begin, end):
      rows, views = INPUTS.rows[t, :size], INPUTS.of_step(t)
      image = views[DEFAULT_VIEW]
      y = INPUTS.classes[rows[:L]]
      b = Step(t - first, rows, y, image[:L], image[L:], views)
      loss, slopes = function(net, b, memory)
      losses.append(loss)
      net.descend(slopes)
      if average:
        average(memory, net)
  return np.array(losses), net, memory


# The comparison.

SPEC = BatchSpec(L, U)
TX = lambda *_, **__: optax.sgd(RATE, MOMENTUM)
make = lambda factory, **settings: factory(NET, TX, SPEC, STEPS, **settings)
CONSISTENT = dict(weight=4.0, ramp=60 / STEPS)
STRONG = dict(strong_augment=(), ema=EMA)
# (1 + t)/(10 + t) below the decay: the departure of FixMatch and others.
EVALUATED = moving_average(lambda t: min(EMA, (1 + t) / (10 + t)))
TEACHER = moving_average(lambda t: min(EMA, 1 - 1 / ((t + 1) + 1)))
METHODS = {
  'pseudo_label': (
    lambda: make(pseudo_label.pseudo_label),
    numpy_pseudo_label,
    None,
  ),
  'pi_model': (
    lambda: make(pi_model.pi_model, **CONSISTENT),
    numpy_pi_model,
    None,
  ),
  'temporal_ensembling': (
    lambda: make(temporal_ensembling.temporal_ensembling, **CONSISTENT),
    numpy_temporal_ensembling,
    None,
  ),
  'mean_teacher': (
    lambda: make(mean_teacher.mean_teacher, teacher_ema=EMA, **CONSISTENT),
    numpy_mean_teacher,
    TEACHER,
  ),
  'vat': (lambda: make(vat.vat, epsilon=1.5, xi=0.5), numpy_vat, None),
  'ict': (
    lambda: make(ict.ict, teacher_ema=EMA, **CONSISTENT),
    numpy_ict,
    TEACHER,
  ),
  'mixmatch': (
    lambda: make(mixmatch.mixmatch, weight=4.0, ramp=40 / STEPS, ema=EMA),
    numpy_mixmatch,
    EVALUATED,
  ),
  'uda': (
    lambda: make(uda.uda, annealing='linear', **STRONG),
    numpy_uda,
    EVALUATED,
  ),
  'fixmatch': (
    lambda: make(fixmatch.fixmatch, threshold=0.8, **STRONG),
    numpy_fixmatch,
    EVALUATED,
  ),
  'flexmatch': (
    lambda: make(flexmatch.flexmatch, threshold=0.8, **STRONG),
    numpy_flexmatch,
    EVALUATED,
  ),
  'freematch': (
    lambda: make(
      freematch.freematch, fairness_weight=0.05, threshold_ema=0.9, **STRONG
    ),
    numpy_freematch,
    EVALUATED,
  ),
  'softmatch': (
    lambda: make(softmatch.softmatch, moments_ema=0.9, **STRONG),
    numpy_softmatch,
    EVALUATED,
  ),
  'laplacenet': (
    lambda: make(
      laplacenet.laplacenet,
      pretrain=50,
      neighbours=NEIGHBOURS,
      samples=2,
      strong_augment=(),
    ),
    numpy_laplacenet,
    None,
  ),
}
WHOLE = [(0, 0, STEPS)]
# LaplaceNet: 50 steps on the labels, then five epochs of 30 steps.
EPOCHS = [(0, 0, 50)] + [(1, t, t + 30) for t in range(50, STEPS, 30)]


@pytest.mark.parametrize('name', METHODS)
def test_two_hundred_steps_equal_the_published_arithmetic(name):
  method, function, average = METHODS[name]
  spans = EPOCHS if name == 'laplacenet' else WHOLE
  want, net, memory = train_in_numpy(function, spans, average, propagated)
  assert net.margin > 1e-5, 'a decision is too close to its boundary'
  if net.masks:
    assert 0.1 < np.concatenate(net.masks).mean() < 0.95  # both decisions occur
  losses, state = train_by_the_library(method(), spans)
  assert len(losses) == STEPS
  # VAT's direction is a quotient of two small numbers.
  rounding = 3e-4 if name == 'vat' else 1e-4
  np.testing.assert_allclose(losses, want, rtol=rounding, atol=1e-6)
  close = lambda tree, other: jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rounding, atol=rounding),
    dict(tree),
    other,
  )
  close(state.params, net.w)
  if average:
    close(state.average.params, memory['average'])
  # Training has moved the weights far beyond the tolerance.
  start = initial_weights()
  assert all(np.abs(net.w[k] - start[k]).max() > 0.05 for k in start)
