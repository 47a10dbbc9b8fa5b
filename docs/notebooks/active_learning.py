# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, name: python3}
# ---

# %% [markdown]
# # An active learning curve
#
# Which images should be labelled next? A loop trains, asks for the labels of
# the images that the model finds hardest, and trains again. Its curve is
# compared with that of random images. The true labels of digits play the
# person who answers.

# %%
import numpy as np

import ssljax
from ssljax import losses

data = ssljax.load_data('digits')
images = data.train.read(np.arange(len(data.train.labels)))
truth = data.train.labels
test = data.test.read(np.arange(len(data.test.labels))), data.test.labels
first = ssljax.draw_split(truth, data.classes, per_class=2, seed=0).labels


# %% [markdown]
# A round trains on the labels so far, and chooses 20 images: those with the
# largest entropy of the prediction, or random ones.


# %%
def hardest(model, free, rng):
  """Return the 20 rows with the most uncertain predictions."""
  uncertainty = np.asarray(losses.entropy(model.predict_proba(images[free])))
  return free[np.argsort(-uncertainty)[:20]]


def random(model, free, rng):
  """Return 20 random rows."""
  return rng.choice(free, 20, replace=False)


def curve(choose, rounds=3):
  """Return the numbers of labels and the errors in percent."""
  labels, rng, found = first.copy(), np.random.default_rng(0), []
  for number in range(rounds):
    model = ssljax.fit(
      images,
      labels,
      method='supervised',
      network='mlp',
      steps=150,
      seed=number,
      progress=False,
    )
    found.append((int((labels >= 0).sum()), model.evaluate(*test).error))
    rows = choose(model, np.flatnonzero(labels < 0), rng)
    labels[rows] = truth[rows]
  return found


# %%
curves = {choose.__name__: curve(choose) for choose in (hardest, random)}
curves

# %% [markdown]
# One curve is one draw: repeat it with other seeds before you conclude
# anything. The command line does that, with every method and ten acquisition
# functions: `ssljax deepbass --acquire=entropy --query_every=100
# --query_size=20 --budget=60 --seeds=5`. For your own photographs, `ssljax
# label` shows the images in a browser and trains meanwhile, and `ssljax rank`
# writes the list of images to label next.
