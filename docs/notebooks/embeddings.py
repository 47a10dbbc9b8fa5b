# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, name: python3}
# ---

# %% [markdown]
# # Embeddings and a few labels
#
# A network that was trained on millions of photographs turns your images into
# features. A small network on top of them is trained in seconds, and most
# methods work on features `[N, D]` as they do on images.
#
# `ssljax embed --images=DIR --backbone=FILE.onnx` writes such features. Here
# the 32 principal components of digits take their place, so that the notebook
# needs no download.

# %%
import numpy as np
from sklearn.decomposition import PCA
from sklearn.semi_supervised import LabelSpreading

import ssljax

data = ssljax.load_data('digits')
pixels = data.train.read(np.arange(len(data.train.labels))) / 255
test_pixels = data.test.read(np.arange(len(data.test.labels))) / 255
pca = PCA(32, random_state=0).fit(pixels.reshape(len(pixels), -1))
features = pca.transform(pixels.reshape(len(pixels), -1))
test = (
  pca.transform(test_pixels.reshape(len(test_pixels), -1)),
  data.test.labels,
)
features.shape

# %% [markdown]
# Three labels per class. `Classifier` is a scikit-learn estimator; -1 marks
# an unlabelled row in both libraries.

# %%
split = ssljax.draw_split(data.train.labels, data.classes, per_class=3, seed=0)
labels = split.labels

accuracies = {}
for method in ('supervised', 'madnn'):
  classifier = ssljax.Classifier(method, network='mlp', steps=300)
  accuracies[method] = classifier.fit(features, labels).score(*test)
spreading = LabelSpreading(kernel='knn', n_neighbors=7).fit(features, labels)
accuracies['LabelSpreading'] = spreading.score(*test)
accuracies

# %% [markdown]
# Label spreading wins here: digits form clusters, and a graph of neighbours
# follows them. Compare with such a classical method before you train for long.
# What is better depends on the features and on the number of labels;
# [Results](../results.md) has measured comparisons on CIFAR-10.
