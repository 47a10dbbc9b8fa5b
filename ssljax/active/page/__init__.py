"""A local web page on which people label while a process learns.

store        answers as append-only lines, and the state that they give
images       the files of the folder: index, original bytes, thumbnails
suggestions  the predictions of a learning round, in one file
learner      the process that trains and publishes suggestions
service      the choice of the next images, and the progress
server       HTTP: access, limits, routes
exchange     import and export of labels
questions    the questions of a run with `oracle=people`

Files of a store's folder: `labels.jsonl` has the answers and is the only one
that matters; `run.lock` names the running server; `index.sqlite`, `thumbs/`,
`pixels.*`, `suggestions.sqlite`, `model/` and `compiled/` can be removed.
"""
