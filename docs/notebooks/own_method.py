# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, name: python3}
# ---

# %% [markdown]
# # Your own method in 30 lines
#
# A method is a function that returns a `Method`: stages of pure functions.
# This one adds the entropy of the predictions of unlabelled images to the
# cross-entropy of the labelled ones (Grandvalet and Bengio, 2004). The loop,
# the data, checkpoints, seeds and evaluation are the library's.

# %%
import jax
import numpy as np

import ssljax
from ssljax import core, losses


def entropy_minimisation(
  net, tx, batch_spec, steps, *, strength: float = 0.1
) -> core.Method:
  """Cross-entropy, and the entropy of predictions of unlabelled images.

  Args:
    net: the network.
    tx: `steps -> optimiser` of a stage.
    batch_spec: labelled and unlabelled images per step.
    steps: length of the only stage.
    strength: weight of the entropy.
  """

  def loss(params, state, batch, key):
    outputs, stats = net.train(params, state.stats, batch.image, key)
    labels = core.visible_labels(state, batch)
    known = labels != core.UNLABELLED
    metrics = {
      'cross_entropy': losses.mean_where(
        losses.cross_entropy(outputs.logits, labels), known
      ),
      'entropy': losses.mean_where(
        losses.entropy(jax.nn.softmax(outputs.logits)), ~known
      ),
    }
    total = metrics['cross_entropy'] + strength * metrics['entropy']
    return total, (state.replace(stats=stats), metrics)

  stage = core.Stage(
    name='train', steps=steps, tx=tx(steps), batch_spec=batch_spec, loss=loss
  )
  return core.Method(name='entropy_minimisation', stages=(stage,))


# %% [markdown]
# `fit` takes the function. Its keyword `strength` is a setting like any
# other; on the command line it is a flag.

# %%
data = ssljax.load_data('digits')
images = data.train.read(np.arange(len(data.train.labels)))
split = ssljax.draw_split(data.train.labels, data.classes, per_class=5, seed=0)
test = data.test.read(np.arange(len(data.test.labels))), data.test.labels

errors = {}
for strength in (0.0, 0.1, 1.0):
  model = ssljax.fit(
    images,
    split.labels,
    method=entropy_minimisation,
    strength=strength,
    network='mlp',
    steps=200,
    progress=False,
  )
  errors[strength] = model.evaluate(*test).error
errors  # in percent, by the weight of the entropy

# %% [markdown]
# A strength of 0 is the supervised baseline. One seed and 500 test images do
# not rank settings that are close together: `ssljax compare` trains methods
# under several label splits, and shows the intervals of the differences.
#
# Methods with a memory (a teacher, a bank of embeddings, pseudo-labels) also
# give `init` and `layout`; [Add a method](../extend.md) tells how.
