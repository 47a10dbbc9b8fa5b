# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, name: python3}
# ---

# %% [markdown]
# # Quick start on digits
#
# Ten labels per class and 1,197 images without a label: a semi-supervised
# method uses both. The data are part of scikit-learn, so nothing is
# downloaded.

# %%
import numpy as np

import ssljax

data = ssljax.load_data('digits')
rows = np.arange(len(data.train.labels))
images, truth = data.train.read(rows), data.train.labels
images.shape, truth.shape

# %% [markdown]
# `draw_split` chooses ten labelled images of every class. A label of -1 marks
# an unlabelled image.

# %%
split = ssljax.draw_split(truth, data.classes, per_class=10, seed=0)
labels = split.labels
(labels >= 0).sum(), (labels == -1).sum()

# %% [markdown]
# First the baseline: the same network, trained on the 100 labels alone. Then
# MA-DNN, which also uses the images without a label.

# %%
test = data.test.read(np.arange(len(data.test.labels))), data.test.labels
errors = {}
for method in ('supervised', 'madnn'):
  model = ssljax.fit(
    images, labels, method=method, steps=300, seed=0, progress=False
  )
  errors[method] = model.evaluate(*test).error
errors  # in percent

# %% [markdown]
# A model predicts classes and probabilities, and gives the embedding of the
# last hidden layer.

# %%
few = test[0][:3]
model.predict(few), model.predict_proba(few).max(axis=1), model.embed(few).shape

# %% [markdown]
# `evaluate` also counts per class; its intervals show how much 500 test
# images can say.

# %%
found = model.evaluate(*test)
found.report['recall'], found.report['recall_interval'][0]

# %% [markdown]
# A saved model is a folder. `ssljax.load` reads it, and the folder of any
# finished run of the command line.

# %%
model.save('digits-model')
again = ssljax.load('digits-model')
assert (again.predict(few) == model.predict(few)).all()
